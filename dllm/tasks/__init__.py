"""Tasks to measure on, and the tokenizer of the bundled one."""
