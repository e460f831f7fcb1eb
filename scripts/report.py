"""`dllm report`: table, plots and HTML page of a sweep."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dllm.checks import number
from dllm.escape import markdown, markdown_table, terminal
from dllm.reports import page, plots, table
from dllm.reports.reading import load
from dllm.reports.runs import Group, Sweep
from dllm.scripts import app, own

KINDS = {"out": str | None, "quality": str | int | None}
_FILES = {"nfe": "quality-nfe", "tokens_per_second": "quality-speed"}
_AUP = (
    "Accuracy Under Parallelism: the area under accuracy in percent over TPF along the Pareto front of these runs, "
    "with an over-proportional penalty for lost accuracy; runs that lose more than 5 points are excluded. With few "
    "samples a single answer may decide this; compare the intervals."
)
_ORACLE = (
    "The oracle is a reference that knows the result, not a method: it is excluded from the front and from AUP. "
    "Both do not count a "
    "guide's forwards."
)


def main() -> None:
    """Entry point."""
    app.run(report, "report", KINDS)


def report(cfg: DictConfig) -> None:
    """Read a sweep, print its table, and write table, plots and page."""
    number("traces", cfg.traces, "0 or more", low=0, whole=True)
    plots.check()
    out = Path(cfg.out or cfg.folder)
    sweep = load(Path(cfg.folder), None if cfg.quality is None else str(cfg.quality))
    look = plots.Look(sweep)
    drawn = [{cost: svg for cost in _FILES if (svg := plots.draw(group, cost, look))} for group in sweep.groups]
    files = {
        _picture(sweep, group, cost): svg
        for group, pictures in zip(sweep.groups, drawn, strict=True)
        for cost, svg in pictures.items()
    }
    files["report.md"] = _markdown(sweep, drawn)
    files["report.csv"] = table.raw(sweep)
    files["report.html"] = page.render(sweep, drawn, cfg.traces)
    kinds = {out / name: own.REPORT[Path(name).suffix] for name in files}
    earlier = _pictures_of(out / "report.md") - files.keys()
    own.write("out", str(out), {out / name: (kinds[out / name], text) for name, text in files.items()})
    for path in (out / name for name in earlier):
        if path.is_file() and own.REPORT[".svg"].marks(path):
            path.unlink()
    _show(sweep, files["report.md"])
    print(f"written to {terminal(out, one_line=True)}: {', '.join(sorted(files))}")


def _pictures_of(file: Path) -> set[str]:
    """The plots of an earlier report, if the file is one."""
    if not (file.is_file() and own.REPORT[".md"].marks(file)):
        return set()
    return set(re.findall(r"^!\[.*\]\((quality-[\w.-]+\.svg)\)$", file.read_text(encoding="utf-8"), re.MULTILINE))


def _picture(sweep: Sweep, group: Group, cost: str) -> str:
    """The file name of a plot, with a hash: other characters of a name, and long ones, are left out of it."""
    if len(sweep.groups) == 1:
        return f"{_FILES[cost]}.svg"
    words = re.sub(r"[^\w.-]+", "_", f"{group.model}-{group.task}", flags=re.ASCII)[:80]
    short = sha256(json.dumps([group.model, group.task]).encode()).hexdigest()[:8]
    return f"{_FILES[cost]}-{words}-{short}.svg"


def _markdown(sweep: Sweep, drawn: Sequence[Mapping[str, str]]) -> str:
    parts = [f"# {markdown(sweep.name)}"]
    for group, pictures in zip(sweep.groups, drawn, strict=True):
        shown = table.columns(group)
        rows = [[markdown(text) for text in row] for row in table.cells(group, shown)]
        parts += [f"## {markdown(group.title)}", markdown_table([markdown(column.head) for column in shown], rows)]
        if any(run.reference for run in group.runs):
            parts.append(_ORACLE)
        if areas := table.areas(group):
            areas_shown = [[markdown(each.of), str(each.runs), f"{each.aup:.1f}"] for each in areas]
            parts.append(markdown_table(["runs of", "runs", "AUP"], areas_shown))
            parts.append(_AUP)
        parts += [
            f"![{markdown(group.title)}: quality against {plots.COSTS[cost]}]({_picture(sweep, group, cost)})"
            for cost in pictures
        ]
    if sweep.failures:
        failed = [f"- {markdown(each.label)}: {markdown(each.message)}" for each in sweep.failures]
        parts.append("\n".join(["Not measured:", "", *failed]))
    return "\n\n".join(parts) + "\n"


def _show(sweep: Sweep, text: str) -> None:
    """Print the tables: on a terminal with as many columns as fit, elsewhere in Markdown."""
    console = Console()
    if not console.is_terminal:
        print(text)
        return
    for group in sweep.groups:
        shown = table.columns(group)
        drawn = _drawn(group, shown)
        unbound = console.options.update(max_width=100_000)
        while len(shown) > 2 and console.measure(drawn, options=unbound).maximum > console.width:
            shown = shown[:-1]
            drawn = _drawn(group, shown)
        console.print(drawn)
        left_out = [column.head for column in table.columns(group)[len(shown) :]]
        if left_out:
            console.print(_text(f"no room for {', '.join(left_out)}; see report.md"), style="dim")
    for failure in sweep.failures:
        message = f"not measured: {failure.label}: {failure.message}"
        console.print(Text(terminal(message, one_line=True), "red"))


def _drawn(group: Group, shown: list[table.Column]) -> Table:
    drawn = Table(title=_text(group.title), title_justify="left")
    for column in shown:
        drawn.add_column(_text(column.head), justify="left" if column is shown[0] else "right")
    for run, row in zip(group.runs, table.cells(group, shown), strict=True):
        style = "italic dim" if run.reference else "bold" if table.fronts(group, run) else ""
        drawn.add_row(*map(_text, row), style=style)
    return drawn


def _text(text: str) -> Text:
    """Text without rich markup."""
    return Text(terminal(text, one_line=True))
