"""Compiling formats in a process of its own, whose time and memory are limited.

A grammar or a schema can be translated to an expression that is exponentially larger, the automaton of an expression
can be exponentially larger again, and the libraries that do so have no bound and do not hear signals.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dllm.structure.language import Automaton, extra
from dllm.structure.schema import Part

SECONDS, BYTES = 10, 2 << 30
_KEPT, _SHOWN = 16, 60  # formats; characters of one in errors
# The packages are made without their own imports: torch takes seconds, and more memory than is allowed.
_SCRIPT = """
import contextlib, json, pickle, sys, time, types
given = json.load(sys.stdin)
sys.path[:] = given["path"]
for name, folder in (("dllm", given["folder"]), ("dllm.structure", given["folder"] + "/structure")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from dllm.structure.worker import attempt
seconds = given["seconds"] + int(time.process_time()) + 1
with contextlib.suppress(ImportError, ValueError):  # not every system has them; the time is bounded by the caller, too
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (given["bytes"], given["bytes"]))
pickle.dump(attempt(given["form"]), sys.stdout.buffer)
"""


@dataclass(frozen=True, eq=False)
class Compiled:
    """What a format is decoded with.

    Attributes:
        automaton: of its texts.
        parts: of its scaffold; empty without one.
    """

    automaton: Automaton
    parts: list[Part]


def compiled(form: str, name: str) -> Compiled:
    """Translate and compile a format.

    Args:
        form: the arguments of `ResponseFormat`, in JSON.
        name: of the format in errors.

    Raises:
        ValueError: it is not valid or not supported, or takes too much time or memory.
    """
    extra("outlines_core", name)
    try:
        written = _written(form)
    except subprocess.SubprocessError:
        body = json.loads(form)[1]
        text = "" if body is None else f" ({body!r})"
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...)"
        raise ValueError(f"{name} takes too long or too much memory to compile{shown}; use a simpler one") from None
    found: Compiled | ValueError | TypeError = pickle.loads(written)
    if not isinstance(found, Compiled):
        raise found
    return found


@lru_cache(maxsize=_KEPT)
def _written(form: str) -> bytes:
    """What the process writes; where it comes to a limit, nothing is kept, since that may be for another reason.

    Raises:
        SubprocessError: it came to a limit, or was ended.
    """
    folder = str(Path(__file__).parents[1])
    given = {"form": form, "path": [*map(str, sys.path)], "folder": folder, "seconds": SECONDS, "bytes": BYTES}
    command = [sys.executable, "-I", "-c", _SCRIPT]
    one = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each thread reserves memory
    return subprocess.run(
        command, input=json.dumps(given).encode(), capture_output=True, timeout=3 * SECONDS, check=True, env=one
    ).stdout
