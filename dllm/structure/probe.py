"""Compiling the expressions of strangers in a process of its own, whose time and memory are limited.

The automaton of an expression can be exponentially larger than the expression, and the library that makes it has no
bound.
"""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache

from dllm.structure.formats import ResponseFormat

SECONDS, BYTES = 10, 2 << 30
_SCRIPT = """
import resource, sys
seconds, size = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_AS, (size, size))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
import outlines_core
vocabulary = outlines_core.Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
try:
    outlines_core.Index(sys.stdin.read(), vocabulary)
except (ValueError, TypeError):
    pass
"""


def check_compiles(form: ResponseFormat) -> None:
    """Reject a format whose automaton takes too long, or too much memory.

    Raises:
        ValueError: it does.
    """
    _check(form.regex, form.name)


@lru_cache(maxsize=256)
def _check(regex: str, name: str) -> None:
    command = [sys.executable, "-I", "-c", _SCRIPT, str(SECONDS), str(BYTES)]
    try:
        done = subprocess.run(command, input=regex.encode(), capture_output=True, timeout=3 * SECONDS, check=False)
        failed = done.returncode != 0
    except subprocess.TimeoutExpired:
        failed = True
    if failed:
        raise ValueError(f"{name} takes too long or too much memory to compile; use a simpler one")
