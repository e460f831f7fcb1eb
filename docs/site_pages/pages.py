"""The text of the generated pages, as Markdown: one for each policy and cache, and what is added to those of models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

from dllm.decoding.compatibility import NEEDS
from dllm.escape import markdown_table
from dllm.models import ARCHITECTURES, MaskedDiffusionModel
from dllm.reports.matrix import Cell
from dllm.resolve import names
from dllm.samplers.base import KINDS
from site_pages import canvas, facts
from site_pages.canvas import Decode, Run

WHAT_BECOMES = {
    "committing": "a committed token stays",
    "revising": "a committed token may be taken back or replaced",
    "lossless": "a committed token is the one that its base gives",
    "guided": "a committed token was judged by another model",
}
_BUNDLED = {"LLaDAModelLM": "tiny-llada", "DreamModel": "tiny-dream", "SDARForCausalLM": "tiny-block"}
# Folders of the pages of the methods in a table, by its first head.
_FOLDERS = {"| sampler": "policies", "| cache": "caches"}
_NAME = re.compile(r"`([a-z0-9_]+)`")
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s]+\))")


def policies() -> dict[str, list[str]]:
    """The policies by kind, in the order of docs/policies.md."""
    order = list(facts.sections("policies.md"))
    known = sorted(names("sampler"), key=lambda name: order.index(name) if name in order else len(order))
    return {kind: [name for name in known if facts.built("sampler", name).kind == kind] for kind in KINDS}


def policy(name: str) -> str:
    """The page of a policy."""
    run = canvas.run_of_policy(name)
    made = None if run is None else canvas.decode(run)
    cls = type(facts.built("sampler", name))
    return _page(
        f"# `{name}`",
        *_method(cls, f"conf/sampler/{name}.yaml"),
        *_when("policies.md", name),
        *_canvas(made),
        *_options("sampler", name),
        *_policy_cost(name, made),
        *_rows("sampler", name),
        *_differences(cls),
    )


def cache(name: str) -> str:
    """The page of a cache."""
    made = canvas.decode(canvas.run_of_cache(name))
    cls = type(facts.built("cache", name))
    return _page(
        f"# `{name}`",
        *_method(cls, f"conf/cache/{name}.yaml"),
        *_when("caches.md", name),
        *_canvas(made, computed=True),
        *_options("cache", name),
        *_cache_cost(name, made),
        *_rows("cache", name),
        *_differences(cls),
    )


def families(page: str) -> list[type[MaskedDiffusionModel]]:
    """The families of models that a page of docs/models/ is about."""
    return [cls for cls in ARCHITECTURES.values() if facts.family_page(cls) == page]


def model(text: str, page: str) -> str:
    """The page of a family: what is written in docs/models/, with what the code says of it."""
    title, _, rest = text.partition("\n")
    classes = families(page)
    facts_of = [part for cls in classes for part in (f"## `{cls.__name__}`", *_family(cls))]
    return _page(title, *_when("models.md", page)[1:], rest.strip("\n"), *facts_of)


def linked_headings(guide: str, text: str) -> str:
    """A guide whose sections are of methods, each with a link to its page."""
    folder = guide.removesuffix(".md")
    return re.sub(r"^### `([\w-]+)`$", rf"### [`\1`]({folder}/\1.md)", text, flags=re.MULTILINE)


def linked_tables(text: str) -> str:
    """A text at the top of the repository, whose tables of samplers and caches link to their pages."""
    folder, lines = "", []
    for line in text.splitlines():
        cell, bar, rest = line.partition(" |")
        if cell in _FOLDERS:
            folder = _FOLDERS[cell]
        elif not line.startswith("|"):
            folder = ""
        elif folder:
            cell = _NAME.sub(rf"[`\1`](docs/{folder}/\1.md)", cell)
        lines.append(cell + bar + rest)
    return "\n".join(lines) + "\n"


def _page(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _method(cls: type, *files: str) -> list[str]:
    method = facts.method_of(cls)
    papers = [f"[arXiv {number}](https://arxiv.org/abs/{number})" for number in method.papers]
    code = [f"[`{file}`](../../{file})" for file in (method.path, *files)]
    return [
        _plain(method.summary),
        _block(method.rule, "rule"),
        method.explanation,
        f"Source: {', '.join([*papers, *code])}.",
    ]


def _when(guide: str, name: str) -> list[str]:
    section = facts.sections(guide).get(name, "")
    return ["## When to take it", _LINK.sub(r"\1../\2", section)] if section else []


def _options(group: str, name: str) -> list[str]:
    settings = facts.settings(group, name)
    if not settings:
        return ["## Options", "None."]
    tuned = any(each.tuned for each in settings)
    head = ["option", "default", *([f"`tiny/{name}`"] if tuned else []), "meaning"]
    rows = [
        [f"`{each.name}`", _code(each.default), *([_code(each.tuned)] if tuned else []), _plain(each.meaning)]
        for each in settings
    ]
    note = [f"`{group}=tiny/{name}` has values for small, over-confident models such as the bundled ones."]
    example = next((f" {group}.{each.name}={each.default}" for each in settings if each.default != "null"), "")
    command = f"dllm generate {group}={name}{example}"
    return ["## Options", *(note if tuned else []), _table(head, rows), _block(command)]


def _policy_cost(name: str, made: Decode | None) -> list[str]:
    own = facts.built("sampler", name)
    rows = [["kind", f"{own.kind}: {WHAT_BECOMES[own.kind]}"], ["a step", _step(own.single_forward)]]
    if needs := facts.needs_of(own):
        rows.append(["asks of model and cache", "; ".join(needs)])
    rows.append(["models", _families(facts.families_of(name))])
    rows.append(["caches", _refusals(facts.refused("sampler", name))])
    if own.knob is not None:
        rows.append(["`dllm calibrate` sets", f"`{own.knob.name}`, trying {_span(own.knob.values)}"])
    return ["## What it costs", _table(["", f"`{name}`"], [*rows, *_decoded(made)])]


def _cache_cost(name: str, made: Decode) -> list[str]:
    rows = [["policies", _refusals(facts.refused("cache", name))]]
    if refuses := facts.built("cache", name).refuses:
        rows.append(["refuses", "; ".join(f"{NEEDS[need][0]}: {why}" for need, why in refuses.items())])
    return ["## What it costs", _table(["", f"`{name}`"], [*rows, *_decoded(made)])]


def _families(runs_on: list[str]) -> str:
    others = [family for family in ARCHITECTURES if family not in runs_on]
    if not others:
        return "all"
    return ", ".join(runs_on) if len(runs_on) <= len(others) else f"all but {', '.join(others)}"


def _step(single: bool) -> str:
    if single:
        return "one forward about the active block, and no state"
    return "of its own: other positions, several forwards or drafts, or a state that it keeps"


def _span(values: tuple[float, ...]) -> str:
    return f"{len(values)} values from {values[0]:g} to {values[-1]:g}"


def _refusals(reasons: dict[str, list[str]]) -> str:
    if not reasons:
        return "all"
    refused = [f"{', '.join(f'`{each}`' for each in names_)} ({why})" for why, names_ in reasons.items()]
    return f"all but {'; '.join(refused)}"


def _decoded(made: Decode | None) -> Iterable[list[str]]:
    if made is not None:
        yield [
            "in the picture above",
            f"{made.steps} steps, {made.forwards} forwards (NFE), {made.computed_share:.0%} of the positions computed",
        ]


def _rows(group: str, name: str) -> list[str]:
    drift = group == "cache"
    head = ["setting", "table", "accuracy", "95% interval", "NFE", "TPF", "positions", "computed", "tokens/s"]
    found = list(facts.measured(group, name))
    others = _with_others(group, name)
    if not found:
        return ["## Measured", *(others or ["Not measured in the tables of this site."])]
    rows = [
        [
            row["label"],
            f"[{table}](../{table}/report.md)",
            f"{float(row['accuracy']):.1%}",
            f"{float(row['accuracy_interval.low']):.1%} to {float(row['accuracy_interval.high']):.1%}",
            f"{float(row['nfe']):.1f}",
            f"{float(row['tpf']):.2f}",
            f"{float(row['positions']):,.0f}",
            f"{float(row['computed_share']):.0%}",
            f"{float(row['tokens_per_second']):,.0f}",
            *([f"{float(row['drift.kv_error']):.1%}" if row.get("drift.kv_error") else ""] if drift else []),
        ]
        for table, row in found
    ]
    meaning = (
        "Accuracy on held-out word problems with its 95% Wilson interval, forwards (NFE) and computed positions per "
        "problem, tokens per forward (TPF). Tokens/s compare within a table."
    )
    return ["## Measured", meaning, _table(head + (["KV error"] if drift else []), rows), *others]


def _with_others(group: str, name: str) -> list[str]:
    """The results of a policy with every cache, or of a cache with every policy: a column for each model."""
    other = "cache" if group == "sampler" else "policy"
    columns = {matrix.header.model: facts.runs(group, name, matrix) for matrix in facts.matrices()}
    lines = list(dict.fromkeys(each for cells in columns.values() for each in cells))
    if not lines:
        return []
    rows = [[f"`{each}`", *(_cell(cells.get(each)) for cells in columns.values())] for each in lines]
    meaning = (
        f"With every {other}: accuracy, its 95% Wilson interval, forwards (NFE) and tokens per forward (TPF), "
        "from [the results](../results.md), which say what was run."
    )
    return [meaning, _table([other, *(f"`{model}`" for model in columns)], rows)]


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    low, high = cell.interval or (float("nan"), float("nan"))
    return f"{cell.quality:.1%} [{low:.1%}, {high:.1%}], {cell.nfe:.1f}, {cell.tpf:.2f}"


def _canvas(made: Decode | None, computed: bool = False) -> list[str]:
    if made is None:
        return [
            "## A canvas that it filled",
            "None: it needs a model that denoises random tokens, and none of the bundled models does.",
        ]
    legend = "Colour and number of a token are the step that committed it; a later step may have replaced it."
    parts = [
        "## A canvas that it filled",
        _block(made.run.command),
        f"> {escape(canvas.PROMPT)}",
        canvas.tokens_html(made),
        legend,
        canvas.grid_svg(made, computed=False),
        "A row is a step, a column a position: coloured where the step committed a token, grey where one was decided, "
        "light where there is a mask, red where the step masked a token again.",
    ]
    if computed:
        parts += [
            "What each step computed (dark) and read from the cache (light):",
            canvas.grid_svg(made, computed=True),
        ]
    return parts


def _differences(cls: type) -> list[str]:
    differences = facts.method_of(cls).differences
    return ["## Differences", differences] if differences else []


def _family(cls: type[MaskedDiffusionModel]) -> list[str]:
    pattern = "causal over blocks" if "causal" not in cls.refuses and not cls.uniform else "every position"
    pattern = "all of the open block, and finished text before it" if cls.uniform else pattern
    shift = "at the position itself" if cls.logits_shift == 0 else f"{cls.logits_shift} position to the left"
    refused = [name for name in names("sampler") if cls.__name__ not in facts.families_of(name)]
    caches = [name for name in names("cache") if cls.needs & facts.built("cache", name).refuses.keys()]
    rows = [
        ["a position attends to", pattern],
        ["its prediction is read", shift],
        ["undecided positions hold", "random tokens" if cls.uniform else "[MASK]"],
        ["policies", f"all but {', '.join(f'`{each}`' for each in refused)}" if refused else "all"],
        ["caches", f"all but {', '.join(f'`{each}`' for each in caches)}" if caches else "all"],
    ]
    made = None
    if cls.__name__ in _BUNDLED:
        options = {"gen_length": 64, "block_length": 16 if pattern.startswith("causal") else 32}
        made = canvas.decode(Run("tiny/threshold", model=_BUNDLED[cls.__name__], options=options))
    return [
        *_method(cls),
        _table(["", f"`{cls.__name__}`"], rows),
        facts.method_of(cls).differences,
        *(_canvas(made)[1:] if made is not None else []),
    ]


def _block(text: str, kind: str = "") -> str:
    """A block of plain text, which no formatter touches."""
    opening = f"```{{ .text .{kind} }}" if kind else "```"
    return f"{opening}\n{text}\n```"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return markdown_table(head, [[cell.replace("|", r"\|") for cell in row] for row in rows])


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _plain(text: str) -> str:
    """Text in which Markdown has nothing to find."""
    return text.replace("[", r"\[").replace("*", r"\*").replace("<", "&lt;")
