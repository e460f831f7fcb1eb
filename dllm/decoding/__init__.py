"""The decode loop and what passes through it; README.md beside this file tells the way of a token."""
