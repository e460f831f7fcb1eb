"""The decode loop and its data types; README.md in this folder follows a request to its answer."""
