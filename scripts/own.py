"""Overwrite protection: a command only overwrites files of its own kind, recognized by content."""

from __future__ import annotations

import csv
import io
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from dllm.escape import terminal
from dllm.files import parse_json, read_json, write_whole
from dllm.filters import FILTER_FORMAT, filter_layouts
from dllm.scripts import app

_MOST = 1 << 26  # bytes; larger than any output of a command


@dataclass(frozen=True)
class Kind:
    """A kind of output file of a command.

    Attributes:
        name: in errors.
        marks: whether a non-empty file is of this kind.
    """

    name: str
    marks: Callable[[Path], bool]


def check(option: str, value: str, files: Mapping[Path, Kind]) -> None:
    """Reject output files of another kind, before any work is done.

    Args:
        option: the option with their paths.
        value: its value.
        files: all output files.

    Raises:
        ValueError: one is not writable, or exists and is of another kind.
    """
    for path, kind in files.items():
        app.check_writable(option, value, str(path))
        check_sweep(option, value, path)
        if not _is_own(path, kind):
            raise ValueError(
                f"{option}={value!r}: {path} exists and is not a {kind.name}; give another path, or remove that file"
            )


def check_sweep(option: str, value: str, path: Path) -> None:
    """Reject a file written by another job of the same sweep, in any process.

    Raises:
        ValueError: the file was written since the sweep began.
    """
    sweeping = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    # A later time than now is that of another clock.
    if sweeping and path.is_file() and float(os.environ[app.STARTED]) <= path.stat().st_mtime <= time.time():
        raise ValueError(
            f"{option}={value!r}: {path} was written by another job of this sweep; include ${{NAME}} of a swept option "
            f"in {option}"
        )


def write(option: str, value: str, contents: Mapping[Path, tuple[Kind, str | bytes]]) -> None:
    """Write files atomically, after checking again, since hours may have passed.

    Raises:
        ValueError: one of them is of another kind; none is written then.
    """
    check(option, value, {path: kind for path, (kind, _) in contents.items()})
    for path, (_, content) in contents.items():
        write_whole(path, content)


def write_and_print(out: str | None, contents: Mapping[Path, tuple[Kind, str | bytes]], text: str) -> None:
    """Write the files of `out`, if it is given, then print a text, which may be read by nobody, and their names.

    Args:
        out: value of the option.
        contents: of the files; none without `out`.
        text: is printed also if a file cannot be written.

    Raises:
        ValueError: as `write`.
    """
    try:
        if out:
            write("out", out, contents)
    finally:
        print(text)
    if out:
        print(f"written to {' and '.join(terminal(path, one_line=True) for path in contents)}")


def svg(figure: Any) -> bytes:
    """A matplotlib figure as SVG, without the date; text is literal, without formulas or control characters."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(terminal(text.get_text()))
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _is_own(path: Path, kind: Kind) -> bool:
    path = Path(os.path.realpath(path))
    # Special files, such as /dev/stdout, have no content to protect.
    return not path.is_file() or path.stat().st_size == 0 or kind.marks(path)


def _text(name: str, pattern: str, *later: str) -> Kind:
    """Text that matches a pattern at its start; for tables up to the end, to protect manual additions.

    Args:
        name: in errors.
        pattern: matched at the start.
        *later: patterns that are found after it, each after the one before; one pattern of all is not linear.
    """
    first, others = re.compile(pattern.encode(), re.DOTALL), [re.compile(each.encode()) for each in later]

    def marks(path: Path) -> bool:
        with path.open("rb") as file:
            text = file.read(_MOST)
        found = first.match(text)
        for each in others:
            found = found and each.search(text, found.end())
        return found is not None

    return Kind(name, marks)


def _has_filter_layout(path: Path) -> bool:
    """A file with our metadata, or tensors of a filter with a card, as written by earlier versions."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length < _MOST else b""
    try:
        found = parse_json(header)
    except ValueError:
        return False
    if not isinstance(found, dict):
        return False
    metadata = found.pop("__metadata__", None)
    if isinstance(metadata, dict) and metadata.get("format") == FILTER_FORMAT:
        return True
    card = path.with_suffix(".json")
    return set(found) in filter_layouts() and card.is_file() and CARD.marks(card)


_ROWS = r"\|[-|]+\n(?:\|[^\n]*\n)*"
BENCH = _text(
    "table of dllm bench",
    r"(?!#)[^\n]+\n\n\| setting \| steps \|[^\n]*\n" + _ROWS
    + r"(?:\n|\|[^\n]*\n|\\\* not the same[^\n]*\n|\? not decoded[^\n]*\n|Reading the weights once[^\n]*\n"
    r"|Multiplying them with[^\n]*\n|After it the GPU ran at[^\n]*\n|A causal model of the same shape[^\n]*\n)*\Z",
)  # fmt: skip
BENCH_FORMAT = "dllm-bench"
BENCH_RECORD = _text("record of dllm bench", rf'\{{\s*"(?:format": "{BENCH_FORMAT}"|setting": "[^\n]*",\s*"torch": )')
MATRIX = _text(
    "table of dllm compatibility",
    r"# (?:What goes together|Compatibility)\n\nMade by `dllm compatibility [^|]{,2400}\n\| [^\n]*\n" + _ROWS
    + r"\n?(?:\(\d+\) [^\n]*\.\n)*\Z",
)  # fmt: skip
PICTURE = _text("picture of dllm generate", r'<svg class="rich-terminal"', "Generated with Rich", ">step&#160;")
FILTER = Kind("filter of dllm train-filter", _has_filter_layout)
CARD = _text(
    "card of a filter of dllm train-filter", r'\{\s*"architecture": "(?:published|neighbours)",\s*"block_length": '
)
RELIABILITY = _text("plot of dllm train-filter", r"<\?xml", "Matplotlib v", "[> ]share that was final[< ]")


CALIBRATION = _text("card of dllm calibrate", r'\{\s*"format": "dllm-calibration"')
CERTIFICATE = _text(
    "plot of dllm calibrate",
    r"<\?xml",
    "Matplotlib v",
    r"[> ](?:answers|share of problems) lost against one token per step[< ]",
)


def _has_turns(path: Path) -> bool:
    """Whether every line is a message of a conversation, and every answer has its costs."""
    try:
        rows = [parse_json(row) for row in path.read_bytes()[:_MOST].splitlines()]
    except ValueError:
        return False
    roles = [row.get("role") if isinstance(row, dict) else None for row in rows]
    costs = [row.get("dllm") if isinstance(row, dict) else None for row in rows[1::2]]
    return roles == ["user", "assistant"] * (len(rows) // 2) and all(isinstance(cost, dict) for cost in costs)


CONVERSATION = Kind("conversation of dllm chat", _has_turns)


def _has_rows(*first: str) -> Callable[[Path], bool]:
    """Whether a file is a complete CSV table with these first columns."""

    def marks(path: Path) -> bool:
        try:
            rows = list(csv.reader(io.StringIO(path.read_bytes()[:_MOST].decode(), newline=""), strict=True))
        except (UnicodeDecodeError, csv.Error):
            return False
        return len(rows) > 1 and rows[0][: len(first)] == list(first) and {len(row) for row in rows} == {len(rows[0])}

    return marks


_GROUP = (
    r"\n## [^\n]+\n\n\| setting \|[^\n]*\n" + _ROWS + r"(?:\nThe oracle is an? [^\n]*\n)?"
    r"(?:\n\| runs of \|[^\n]*\n" + _ROWS + r"\nAccuracy Under Parallelism: [^\n]*\n)?"
    r"(?:\n!\[[^\n]*\]\([^\n]*\)\n)*"
)  # fmt: skip
REPORT = {
    ".md": _text("table of dllm report", rf"# [^\n]*\n(?:{_GROUP})+(?:\nNot measured:\n\n(?:- [^\n]*\n)+)?\Z"),
    ".csv": Kind(
        "table of dllm report", _has_rows("label", "model", "task", "folder", "quality_name", "quality", "front")
    ),
    ".html": _text("page of dllm report", "<!DOCTYPE html>", "<title>[^<]* dllm report</title>"),
    ".svg": _text(
        "plot of dllm report",
        r"<\?xml(?!.*<metadata>)",
        '<g id="figure_1">',
        ">(?:NFE per sample|tokens per second)<",
    ),
}


RESULTS = _text(
    "page of dllm results",
    r"# Results\n\nMade by `+ ?dllm results [^\n]*\n(?:\n|(?:A cell: |\*certified\*: |AUP is |Speeds, of |## |### W|\|"
    r"|\d[^\n]* problems \(|Refused:|- \(\d|Not run: |Nothing: there is no card of |With probability |Runs: `+"
    r"|- \d+ runs?, )[^\n]*\n)*\Z",
)
MATRIX_DATA = _text("file of dllm results", r'\{"format": "dllm-matrix"')


LOAD_FORMAT = "dllm-load"


def _has_loads(path: Path) -> bool:
    """Whether every line is a record of a load."""
    try:
        rows = [parse_json(row) for row in path.read_bytes()[:_MOST].splitlines()]
    except ValueError:
        return False
    return all(isinstance(row, dict) and row.get("format") == LOAD_FORMAT for row in rows)


LOAD = {
    ".jsonl": Kind("record of dllm bench-serve", _has_loads),
    ".csv": Kind("table of dllm bench-serve", _has_rows("server", "model", "capacity", "rate", "load")),
}


def check_records(out: str, folder: Path, needed: tuple[str, ...]) -> None:
    """Reject a folder without records of `dllm train-filter`.

    Raises:
        ValueError: it has other content, or no recipe.
    """
    recipe, fix = folder / "recipe.json", "give another out, or remove that folder"
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise ValueError(f"out={out!r}: {folder} is not a folder; give another out, or remove it")
    if recipe.is_file():
        if not set(needed) <= set(_object(recipe)):
            raise ValueError(f"out={out!r}: {recipe} is damaged, or no recipe of dllm train-filter; {fix}")
    elif any(not each.name.startswith(".") for each in folder.iterdir()):
        raise ValueError(f"out={out!r}: {folder} holds no records of dllm train-filter; {fix}")


# By the name of the recipe of a command that trains: what its recipe and its card contain.
_TRAININGS = {
    "train_tiny.yaml": (b"matrix_lr:", b"It does one thing: solve the word problems"),
    "adapt.yaml": (b"block_length:", b"`dllm adapt"),
    "distill.yaml": (b"entropy_weight:", b"`dllm distill"),
}


def command_of(recipe: str) -> str:
    """The command of a recipe."""
    return f"dllm {Path(recipe).stem.replace('_', '-')}"


def check_training(option: str, folder: Path, names: Iterable[str], recipe: str) -> None:
    """Reject a folder with a model that is not from the same command.

    Args:
        option: the option with its path.
        folder: the folder.
        names: of the output files.
        recipe: file name of the command's configuration.

    Raises:
        ValueError: it has one of these files, but neither a recipe nor a model card of this command.
    """
    for name in names:
        check_sweep(option, str(folder), folder / name)
    there = [folder / name for name in names if (folder / name).exists() or (folder / name).is_symlink()]
    marks = dict(zip((folder / recipe, folder / "README.md"), _TRAININGS[recipe], strict=True))
    if there and not any(file.is_file() and mark in file.read_bytes() for file, mark in marks.items()):
        raise ValueError(
            f"{option}={str(folder)!r}: {there[0]} exists and is of no model of {command_of(recipe)}; give another "
            "folder"
        )


def _object(path: Path) -> dict[str, Any]:
    with suppress(ValueError):
        return read_json(path)
    return {}
