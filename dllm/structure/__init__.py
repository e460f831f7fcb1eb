"""Structured output: answers that match a JSON schema, a regular expression, a choice or a grammar.

`formats.py` reads `response_format`; `schema.py` and `grammar.py` translate schemas and grammars to regular
expressions; `language.py` compiles these to automata over bytes; `compiled.py` bounds the time and memory of both;
`tokens.py` lifts an automaton to the tokens of a tokenizer; `constraint.py` judges the partly masked tokens of one row.
Nothing here knows of engines or samplers.
"""

from dllm.structure.constraint import MASK, Constraint, Tracker
from dllm.structure.formats import ResponseFormat, read_format, read_format_file

__all__ = ["MASK", "Constraint", "ResponseFormat", "Tracker", "read_format", "read_format_file"]
