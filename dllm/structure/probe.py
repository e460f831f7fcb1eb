"""Compiling the formats of strangers in a process of its own, whose time and memory are limited.

A grammar or a schema can be translated to an expression that is exponentially larger, the automaton of an expression
can be exponentially larger again, and the libraries that do so have no bound.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

SECONDS, BYTES = 10, 2 << 30
# The packages are made without their own imports: torch takes seconds, and more memory than is allowed.
_SCRIPT = """
import json, resource, sys, time, types
seconds, size = map(int, sys.argv[1:3])
for name, folder in (("dllm", sys.argv[3]), ("dllm.structure", sys.argv[3] + "/structure")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from dllm.structure.formats import read_format
from dllm.structure.language import compile_regex
seconds += int(time.process_time()) + 1
resource.setrlimit(resource.RLIMIT_AS, (size, size))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
try:
    form = read_format(json.load(sys.stdin))
    form and compile_regex(form.regex, form.name)
except (ValueError, TypeError):
    pass
"""


def check_compiles(given: Mapping[str, Any]) -> None:
    """Reject a format that takes too long to be read and compiled, or too much memory.

    Args:
        given: the value of `response_format`.

    Raises:
        ValueError: it does.
    """
    kind = given.get("type")
    try:
        failed = _fails(json.dumps(given))
    except subprocess.TimeoutExpired:
        failed = True
    if failed:
        name = f"response_format of type {kind}" if isinstance(kind, str) else "response_format"
        raise ValueError(f"{name} takes too long or too much memory to compile; use a simpler one")


@lru_cache(maxsize=256)
def _fails(text: str) -> bool:
    command = [sys.executable, "-I", "-c", _SCRIPT, str(SECONDS), str(BYTES), str(Path(__file__).parents[1])]
    one = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each thread reserves memory
    done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=3 * SECONDS, check=False, env=one)
    return done.returncode != 0
