"""Evaluation tasks, and the tokenizer of the bundled one."""
