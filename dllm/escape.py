"""Escaping of untrusted text for terminals, Markdown and spreadsheets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Control and invisible characters: control characters, bidirectional marks, line separators, the byte order mark, tags,
# and lone surrogates. Newline and tab are text.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff\U000e0000-\U000e007f\ud800-\udfff]"
)
_LONGEST_WORD, _LONGEST_MESSAGE, _SHORT = 600, 2000, 150  # characters; paths are words, too
_MEANT = re.compile(
    r"([\\`*\[\]{}<>|~$&@])|((?<!\w)_|_(?!\w))|((?<=http)|(?<=https)|(?<=ftp)):|(?<=\bwww)\.", re.IGNORECASE
)


def terminal(text: object, one_line: bool = False) -> str:
    """Text for a terminal, an SVG or a page: control characters are escaped.

    Args:
        text: what to show.
        one_line: escape newlines and tabs too, for names and messages.
    """
    shown = _OBEYED.sub(lambda match: _visible(match[0]), str(text))
    return re.sub(r"[\n\t]", lambda match: _visible(match[0]), shown) if one_line else shown


def brief(text: str) -> str:
    """A message with very long words (numbers, lists, paths) abbreviated in the middle."""
    words = re.sub(rf"\S{{{_LONGEST_WORD},}}", lambda match: _ends(match[0], _SHORT), text)
    return _ends(words, _LONGEST_MESSAGE) if len(words) > _LONGEST_MESSAGE else words


def _ends(text: str, length: int) -> str:
    return f"{text[: length // 2]}...{text[-length // 2 :]}"


def markdown(text: object) -> str:
    """Text escaped for a line of Markdown: no table cells, links, HTML or emphasis."""
    plain = terminal(re.sub(r"\s+", " ", str(text)).strip(), one_line=True)
    escaped = _MEANT.sub(lambda match: f"\\{match[0]}", plain)
    # Characters that would begin a heading, a list or a rule; numbers are unchanged.
    return re.sub(r"^(\d+)(?=[.)]\s)|^(?=[#=+-](?![\d.]))", r"\1\\", escaped)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def cell(value: Any) -> Any:
    """A value for CSV: text that a spreadsheet would evaluate gets a leading quote, numbers are unchanged."""
    if not isinstance(value, str):
        return value
    formula = re.match(r"[\t\r\n]|\s*[=+\-@\uff1d\uff0b\uff0d\uff20]", value) and not _is_number(value)
    return "'" * bool(formula) + terminal(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _visible(character: str) -> str:
    return character.encode("unicode_escape").decode()
