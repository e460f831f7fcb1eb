"""The page of `dllm results`: for each model a table of every policy with every cache, and what is behind it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dllm.calibration import Calibration
from dllm.escape import markdown, markdown_table, terminal
from dllm.evaluation.risk import at_most
from dllm.reports.matrix import Cell, Header, Matrix, Place, Setting
from dllm.resolve import TARGET, names, options_of

CARDS = "calibration"  # folder of the cards, beside the runs
_CELL = (
    "A cell: right answers in percent [95% Wilson interval], and below them forwards per problem (NFE) · generated "
    "tokens per forward (TPF). *(1)*: refused, for the reason of that number. *absent*: not run."
)
_AUP = (
    "AUP is Accuracy Under Parallelism as published (d3LLM): the area under accuracy in percent over TPF, with an "
    "over-proportional penalty for accuracy below the best of the table, and without points more than 5 percentage "
    "points below the most accurate. Its points are the settings of one method: here those of a policy are its caches, "
    "and those of a cache are the policies with it. Dominated points are left out of the curve. The oracle is a "
    "reference that knows the result, not a method, and has none. NFE and TPF do not count a guide's forwards "
    "(`ar_guided`)."
)
_SETTING = (
    "*certified*: the value that `dllm calibrate` certified. *tuned*: that for small models, which no certificate "
    "covers. *default*: that of the policy's YAML, likewise. *given*: another one, likewise."
)


def page(folder: Path, command: str, speed: bool, performance: bool) -> str:
    """The page as Markdown.

    Args:
        folder: of the data: one folder per model.
        command: that makes the page.
        speed: show tokens per second.
        performance: link to the page of speeds beside it.

    Raises:
        ValueError: there is no data, or some is damaged.
    """
    files = sorted(folder.glob("*/runs.jsonl"))
    if not files:
        raise ValueError(
            f"out={str(folder)!r} holds no results (MODEL/runs.jsonl); give model=, with run=true or runs="
        )
    parts = [
        "# Results",
        f"Made by {_code(command)} from the data in `{folder.name}/`: of each model one file `runs.jsonl`, "
        "and the cards of `dllm calibrate`.",
        _CELL + (" Then tokens per second, which are true only of a machine that does nothing else." if speed else ""),
        _SETTING,
        _AUP,
    ]
    if performance:
        parts.append("Speeds, of CPUs and of GPUs with card, versions and command: [performance.md](performance.md).")
    for file in files:
        parts += _model(Matrix.read(file), file.parent, f"{folder.name}/{file.parent.name}", speed)
    return "\n\n".join(parts) + "\n"


def card_name(sampler: str) -> str:
    """The folder of a sampler's card."""
    return sampler.replace("/", "-")


def _model(matrix: Matrix, folder: Path, place: str, speed: bool) -> Iterator[str]:
    header = matrix.header
    yield f"## {markdown(header.model)}, {markdown(header.task)}"
    counts = sorted({each.n for each in matrix.cells})
    asked = ", ".join(f"{name}={value}" for name, value in header.asked.items() if value is not None)
    yield (
        f"{' to '.join(map(str, counts[:1] + counts[1:][-1:]))} problems ({markdown(asked)}), judged by "
        f"{markdown(header.score)}; weights {markdown(header.weights)}. Runs: "
        f"[{markdown(place)}/runs.jsonl]({quote(place)}/runs.jsonl)."
    )
    reasons: dict[str, list[tuple[str, str]]] = {}
    for each in matrix.refusals:
        reasons.setdefault(_reason(each.refused), []).append((each.sampler, each.cache))
    yield _table(matrix, list(reasons), speed)
    if reasons:
        lines = [
            f"- ({number}) {'; '.join(_combinations(header, pairs))}: {markdown(reason)}"
            for number, (reason, pairs) in enumerate(reasons.items(), 1)
        ]
        yield "Refused:\n\n" + "\n".join(lines)
    if missing := matrix.missing():
        yield "Not run: " + "; ".join(_combinations(header, missing)) + "."
    yield from _cards(header.settings, folder / CARDS, f"{place}/{CARDS}")
    yield "### Where and how"
    yield f"Runs: {_code(header.command)}. The same command resumes, and reads what is finished."
    yield "\n".join(_places(matrix))


def _reason(message: str) -> str:
    """Why a combination is refused, without its name, which the page has, and without a way out."""
    return re.sub(r"^\S+ is (?=not compatible with )", "", message.partition("; use ")[0])


def _combinations(header: Header, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Combinations in words, as few as possible."""
    left = list(pairs)
    for cache in header.caches:
        if len(header.samplers) > 1 and all((sampler, cache) in left for sampler in header.samplers):
            yield f"every policy with `{cache}`"
            left = [pair for pair in left if pair[1] != cache]
    by_caches: dict[tuple[str, ...], list[str]] = {}
    for sampler in dict.fromkeys(sampler for sampler, _ in left):
        by_caches.setdefault(tuple(cache for each, cache in left if each == sampler), []).append(f"`{sampler}`")
    for caches, samplers in by_caches.items():
        # Those of the line above are not said again.
        every = len(caches) > 1 and all((samplers[0].strip("`"), cache) in pairs for cache in header.caches)
        yield f"{', '.join(samplers)} with {'every cache' if every else ', '.join(f'`{each}`' for each in caches)}"


def _table(matrix: Matrix, reasons: Sequence[str], speed: bool) -> str:
    header, rows = matrix.header, []
    # Policies and caches without any run are listed below the table.
    samplers = [name for name in header.samplers if any(each.sampler == name for each in matrix.cells)]
    caches = [name for name in header.caches if any(each.cache == name for each in matrix.cells)]
    for sampler in samplers:
        cells = []
        for cache in caches:
            what = matrix.find(sampler, cache)
            if isinstance(what, Cell):
                cells.append(_cell(what, speed))
            else:
                cells.append("*absent*" if what is None else f"*({reasons.index(_reason(what.refused)) + 1})*")
        name = f"`{sampler}`" + (" (reference)" if sampler == "oracle" else "")
        name += _setting(sampler, header.settings.get(sampler))
        rows.append([name, *cells, _number(matrix.aup(sampler=sampler))])
    rows.append(["AUP", *(_number(matrix.aup(cache=cache)) for cache in caches), _number(matrix.aup())])
    return markdown_table(["policy", *(f"`{cache}`" for cache in caches), "AUP"], rows)


def _cell(cell: Cell, speed: bool) -> str:
    interval = "" if cell.interval is None else f" [{100 * cell.interval[0]:.1f}, {100 * cell.interval[1]:.1f}]"
    lines = [f"{100 * cell.quality:.1f}{interval}", f"{cell.nfe:.1f} · {cell.tpf:.2f}"]
    return "<br>".join([*lines, *([f"{cell.tokens_per_second:,.0f} tokens/s"] if speed else [])])


def _setting(sampler: str, setting: Setting | None) -> str:
    if setting is None or setting.knob is None:
        return ""
    usual = "given" if setting.given else "tuned" if "/" in sampler else "default"
    how = "certified" if setting.certified else usual
    return f"<br>{setting.knob}={setting.value!r}, {how}"


def _cards(settings: Mapping[str, Setting], folder: Path, place: str) -> Iterator[str]:
    rows, caches = [], set()
    for sampler, setting in settings.items():
        file = folder / card_name(sampler) / "calibration.json"
        if setting.knob is None:
            continue
        if not file.is_file():
            if setting.certified:
                raise ValueError(f"{file} is missing, and the runs were certified by it; put it back")
            rows.append([f"`{sampler}`", setting.knob, "not calibrated", *[""] * 6])
            continue
        card = Calibration.read(file)
        if setting.certified and (card.knob, card.value) != (setting.knob, setting.value):
            raise ValueError(
                f"{file} certifies {card.knob}={card.value!r}, and the runs were certified at "
                f"{setting.knob}={setting.value!r}; put back the card that they were made with"
            )
        chosen = next((test for test in card.tests if test["value"] == card.value), None)
        caches.add(_named(card.cache))
        value, found = "none", ["", "", ""]
        if chosen is not None:
            value, lost = repr(card.value), f"{chosen['mean_loss']:.2%}, {at_most(chosen['bound'])}"
            found = [f"{chosen['nfe']:.1f}", f"{chosen['accuracy']:.1%}", lost]
        link = f"[{value}]({quote(place)}/{card_name(sampler)}/calibration.json)"
        rows.append([f"`{sampler}`", markdown(card.knob), link, *found, f"{card.n}", f"{card.loss}", f"{card.delta}"])
    if not rows:
        return
    yield "### What is certified"
    if caches:
        yield (
            "With probability 1 - delta over the draw of the problems, at most a share `loss` of all problems is right "
            "with one token per step and wrong with the value. The guarantee is for the cache of the card alone "
            f"({', '.join(map(_code, sorted(caches)))}), and for its kind of problems; with other caches "
            "the table has the same value, without a guarantee."
        )
    else:
        yield "Nothing: there is no card of `dllm calibrate`."
    head = ["policy", "knob", "value", "NFE", "right", "lost, at most", "n", "loss", "delta"]
    yield markdown_table(head, rows)


def _named(cache: Mapping[str, Any]) -> str:
    """The choice of a cache with these options."""
    found = {options_of("cache", name)[TARGET]: name for name in names("cache")}
    return found.get(cache.get(TARGET, ""), str(cache.get(TARGET)))


def _places(matrix: Matrix) -> Iterator[str]:
    for number, place in enumerate(matrix.header.places):
        runs = [each for each in matrix.cells if each.place == number]
        days = sorted({each.started[:10] for each in runs})
        count = f"{len(runs)} run{'s' * (len(runs) != 1)}"
        packages = ", ".join(f"{name} {version}" for name, version in (place.packages or {}).items())
        yield (
            f"- {count}, {' to '.join(days[:1] + days[1:][-1:])}: {_said(place, 'device')}, "
            f"{_said(place, 'threads')} threads, {_said(place, 'dtype')}; {_said(place, 'platform')}; Python "
            f"{_said(place, 'python')}, {markdown(packages)}; commit {_said(place, 'git')}"
        )


def _said(place: Place, name: str) -> str:
    value = getattr(place, name)
    return "unknown" if value is None else markdown(value)


def _code(text: str) -> str:
    """A command as code of Markdown, in one line."""
    shown = terminal(text, one_line=True)
    if "`" not in shown:
        return f"`{shown}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", shown))))
    return f"{fence} {shown} {fence}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
