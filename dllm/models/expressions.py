"""Regular expressions of files that are not trusted, matched in a process of its own, which can be ended."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dllm.files import read_json
from dllm.models.checkpoint import read_headers
from dllm.stored import misfit

# Of a quantiser: the modules that it leaves out, as expressions; and how many there may be whatever the model has.
_SKIPPED, _FEW = ("modules_to_not_convert", "llm_int8_skip_modules"), 1000
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


def check_quantiser(folder: Path) -> None:
    """Reject a checkpoint whose quantiser has expressions that are invalid or take too long.

    Args:
        folder: with its config.json and weights.

    Raises:
        ValueError: the option, and what is wrong.
    """
    settings = read_json(folder / "config.json").get("quantization_config") or {}
    modules = sorted({name.rpartition(".")[0] for name in read_headers(folder)})
    for option in _SKIPPED:
        given = settings.get(option) or []
        if misfit(given, list[str]) or len(given) > max(_FEW, len(modules)):
            raise ValueError(f"{folder}/config.json: quantization_config.{option}={given!r} is no list of modules")
        # As transformers uses them (`should_convert_module`).
        if problem := unmatchable([rf"(?:{each})(?:(?<=\.)|(?=\.|$))" for each in given], modules):
            raise ValueError(f"{folder}/config.json: quantization_config.{option}: {problem}; correct or remove it")
    marked = [each.removeprefix("re:") for each in _words(settings) if each.startswith("re:")]
    if problem := unmatchable(marked, modules):
        raise ValueError(f"{folder}/config.json: quantization_config: {problem}; correct it")


def _words(value: Any) -> Iterator[str]:
    """All texts in settings, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in value:
            yield from _words(each)
        if isinstance(value, dict):
            yield from _words(list(value.values()))
