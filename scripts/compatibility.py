"""`dllm compatibility`: the compatibility table of samplers and caches, generated from their declarations."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dllm.cache.base import Cache
from dllm.decoding.compatibility import AT_ONCE, NEEDS, unmet
from dllm.escape import markdown_table
from dllm.models import ARCHITECTURES, MaskedDiffusionModel
from dllm.models.base import CAUSAL_REFUSES
from dllm.resolve import build, names, resolve
from dllm.samplers.base import Sampler
from dllm.scripts import app, own

KINDS = {"variants": dict, "out": str | None}


def main() -> None:
    """Entry point."""
    app.run(compatibility, "compatibility", KINDS)


def compatibility(cfg: DictConfig) -> None:
    """Print the table, and write it to `out` if given."""
    if cfg.out:
        own.check("out", cfg.out, {Path(cfg.out): own.MATRIX})
    variants = {str(label): build(f"variants.{label}", entry, Sampler) for label, entry in cfg.variants.items()}
    samplers = {name: resolve("sampler", name, Sampler) for name in names("sampler")} | variants
    caches = {name: resolve("cache", name, Cache) for name in names("cache")}
    text = matrix(samplers, {"none": caches.pop("none"), **caches})
    own.write_and_print(cfg.out, {Path(cfg.out): (own.MATRIX, text)} if cfg.out else {}, text)


def _exceptions() -> Iterator[str]:
    """Which needs families do not meet that others do, and the reverse."""
    usual = MaskedDiffusionModel.refuses
    causal = [name for name, family in ARCHITECTURES.items() if family.refuses == CAUSAL_REFUSES]
    more = " and ".join(NEEDS[need][0] for need in sorted(usual.keys() - CAUSAL_REFUSES.keys()))
    yield from ("", f"{', '.join(causal)} are causal over blocks. They are compatible with {more}, as no others are.")
    for name, family in ARCHITECTURES.items():
        if family.refuses in (usual, CAUSAL_REFUSES):
            continue
        kind = " and ".join(NEEDS[need][0] for need in sorted(family.needs))
        alone = " and ".join(NEEDS[need][0] for need in sorted(usual.keys() - family.refuses.keys()))
        yield from ("", f"{name} is {kind}. It is compatible with {alone}, as no other is, and not with", "")
        yield from (f"- {NEEDS[need][0]}: {why};" for need, why in family.refuses.items() if need not in usual)
        yield "- samplers and caches that say so themselves: `daedal`, and those of the last row."


def matrix(samplers: dict[str, Any], caches: dict[str, Any]) -> str:
    """The compatibility table as Markdown; samplers and caches by label."""
    reasons: dict[str, int] = {}

    def cell(cache: Any, needs: Iterable[str]) -> str:
        marks = [reasons.setdefault(cache.refuses[need], len(reasons) + 1) for need in needs]
        return "no " + " ".join(f"({mark})" for mark in marks) if marks else "yes"

    head = ["", *caches]
    rows = [
        [f"`{label}`", *(cell(cache, unmet(sampler, cache)) for cache in caches.values())]
        for label, sampler in samplers.items()
    ]
    rows += [
        [NEEDS[need][0], *(cell(cache, {need} & set(cache.refuses)) for cache in caches.values())]
        for need in ("guidance", "several_devices", "graphs", "whole_blocks")
    ]
    families = ", ".join(ARCHITECTURES)
    at_once = ", ".join(f"`{label}`" for label, sampler in samplers.items() if AT_ONCE & sampler.needs)
    lines = [
        "# Compatibility",
        "",
        "Made by `dllm compatibility out=docs/compatibility.md` from the declarations of samplers and caches; the same",
        f"for every backbone ({families}). Incompatible combinations raise an error before the first forward.",
        "",
        "*yes*: in batches of any size, with rows at different blocks; `freedave`, `ssd` and `s2d2` are lossless with",
        "respect to their base with the same cache. `freecache` is listed with its defaults: with freeze=last_forward,",
        "another granularity than block, or refresh_above, its keys and values depend on the order a block is decoded",
        "in.",
        "",
        "`response_format` ([structure.md](structure.md)) is compatible with every sampler and cache"
        + (f" except {at_once}, which decide several tokens at once." if at_once else "."),
        *_exceptions(),
        "",
        markdown_table(head, rows),
        "",
        *(f"({number}) {reason}." for reason, number in reasons.items()),
    ]
    return "\n".join([*lines, ""])
