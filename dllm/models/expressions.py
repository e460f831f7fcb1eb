"""Regular expressions of files that are not trusted, matched in a process of its own, which can be ended."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

_SECONDS = 5  # of matching
_MATCH = "import json, re, sys; all_, names = json.load(sys.stdin); [re.match(e, name) for e in all_ for name in names]"


def unmatchable(expressions: Sequence[str], names: Sequence[str]) -> str | None:
    """The problem with expressions that are invalid, or take too long to match names; None if there is none.

    Args:
        expressions: in Python's syntax.
        names: of modules.
    """
    if not expressions:
        return None
    try:
        matched = subprocess.run(
            [sys.executable, "-X", "utf8", "-I", "-S", "-c", _MATCH], input=json.dumps([expressions, names]),
            encoding="utf-8", capture_output=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"its regular expressions take more than {_SECONDS} seconds to match the names of the modules"
    return None if matched.returncode == 0 else f"a regular expression is invalid: {matched.stderr.splitlines()[-1]}"
