"""The tables of docs/coming-from-elsewhere.md give the tokens of published code, and name options that exist.

Decodes recorded with the published code (tests/golden, and ../shared/golden where it exists) carry its own parameter
names; `elsewhere_page.py` translates them by the page, and what is decoded with the result is compared. Cases without
a counterpart (`golden_plan.plan`) are left out. Of ../shared/golden every case is translated as `golden_plan.py` maps
it, which `test_golden.py` holds to the recorded tokens; one for each set of rows is decoded here, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import dllm
from dllm.resolve import merged, names, option_names, options_of
from elsewhere_page import Call, NoCounterpartError, Row, literal, python_call, resolved, sections, shell_settings
from golden_batches import model
from golden_plan import plan

HERE = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[3] / "shared" / "golden"
FILES = (
    "cases.jsonl", "revising_and_length.jsonl", "llada_cases.jsonl", "dream_cases.jsonl",
    "block/llada_policies/cases.jsonl", "block/fastdllm_v2/cases.jsonl", "block/llada2/cases.jsonl",
    "block/sdar/cases.jsonl",
)  # fmt: skip
SECTIONS = sections()
RECORDING = {"mask_id", "cache", "cache_params", "dtype", "derived", "inplace_block_mask"}  # not parameters of theirs
BY_CACHE = {"none": "generate", "prefix": "generate_with_prefix_cache", "dual": "generate_with_dual_cache"}
D2CACHE = {"klass": "klass", "wino": "wino", "d2_vanilla": "vanilla", "d2cache_repo_vanilla": "vanilla"}
DINFER = {
    "dinfer_threshold": "ThresholdParallelDecoder",
    "dinfer_credit": "CreditThresholdParallelDecoder",
    "dinfer_hierarchy": "HierarchyDecoder",
}
RENAMED = {
    "dream_diffusion_generate": {"gen_length": "max_new_tokens"},
    "fast_dllm_dream_nocache": {"gen_length": "max_new_tokens"},
    "sdar_greedy": {"threshold": "confidence_threshold", "stop_ids": "stopping_criteria_idx"},
    "sdar_generate": {"threshold": "confidence_threshold", "stop_ids": "stopping_criteria_idx"},
}
FUNCTIONS = {
    "llada_vanilla": ("LLaDA: generate.py", "generate"),
    "dream_diffusion_generate": ("Dream: diffusion_generate", "diffusion_generate"),
    "fast_dllm_dream_nocache": ("Fast-dLLM for Dream", "diffusion_generate"),
    "fastdllm_v2_generate": ("Fast-dLLM v2", "generate"),
    "llada2_generate": ("LLaDA2: its own generate", "generate"),
    "llada21_generate": ("LLaDA2: its own generate", "generate"),
    "sdar_greedy": ("SDAR: block_diffusion_generate", "block_diffusion_generate"),
    "sdar_generate": ("SDAR: block_diffusion_generate", "block_diffusion_generate"),
}


def call_of(case: dict[str, Any]) -> tuple[str, Call] | None:
    """The section of the page that a recorded case belongs to, and the call that was recorded; None: of none."""
    p, name = case["params"], case["algorithm"]
    kept = {RENAMED.get(name, {}).get(key, key): value for key, value in p.items() if key not in RECORDING}
    if name in FUNCTIONS:
        section, function = FUNCTIONS[name]
        if name == "llada_vanilla":  # constants there
            kept = {key: value for key, value in kept.items() if key not in ("eos_id", "eot_id")}
        if name == "llada2_generate":  # the page says so in words
            kept["steps"] = min(p["steps"], p["gen_length"] // p["minimal_topk"])
        return section, Call(frozenset({function}), kept)
    kept = {key: value for key, value in kept.items() if key != "eos_id"}
    if name == "fastdllm":
        return "Fast-dLLM for LLaDA", Call(frozenset({BY_CACHE[p["cache"]]}), kept)
    if name in DINFER and p["cache"] == "none":
        return "dInfer", Call(frozenset({DINFER[name]}), kept)
    if name in D2CACHE:
        kept = {f"generation.{key}": value for key, value in kept.items()} | {"generation": D2CACHE[name]}
        if (reused := p.get("cache", "none")) != "none":
            own = (p.get("cache_params") or {}) | ({"use_dual": True} if reused == "dual" else {})
            kept |= {f"cache.{key}": value for key, value in own.items()}
            kept["cache"] = "prefix" if reused == "dual" else reused
        return "d2Cache", Call(frozenset(), kept)
    return None


def settings_of(case: dict[str, Any]) -> tuple[dict[str, Any], tuple[Row, ...]] | None:
    """What the page says for a case, and by which rows; None where it says that nothing here does it."""
    found = call_of(case)
    assert found is not None
    section, call = found
    unknown = {key for key, value in call.given.items() if value is not None} - SECTIONS[section].names
    assert not unknown, f"{section} has no row for {unknown}"
    try:
        settings, rows = SECTIONS[section].translate(call)
    except NoCounterpartError:
        return None
    if "eot_id" in case["params"]:  # constants of the published code, those of its checkpoint
        settings["eos_token_id"] = [case["params"]["eos_id"], case["params"]["eot_id"]]
    return settings, tuple(rows)


@cache
def cases(folder: Path) -> dict[str, dict[str, Any]]:
    """The cases of a folder that a section of the page is about and that have a counterpart, each with its home."""
    found = {}
    for name in FILES:
        path = folder / name
        for line in path.read_text().splitlines() if path.exists() else ():
            case = json.loads(line)
            home = path.parent if (path.parent / case["checkpoint"]).exists() else folder
            case["home"] = home
            after_filter = case["algorithm"] == "sdar_generate" and case["params"]["remasking_strategy"] != "sequential"
            planned = not case["fragile"] and not after_filter and call_of(case) and plan(case, home)
            if planned and settings_of(case) is not None:
                found[case["id"]] = case
    return found


def of_each_set_of_rows() -> Iterator[Any]:
    """Cases to decode: those of tests/golden, and of ../shared/golden one of each set of rows that they lack."""
    seen = set()
    for folder in (HERE, SHARED):
        for name, case in cases(folder).items():
            said = settings_of(case)
            assert said is not None
            if folder == HERE or said[1] not in seen:
                yield pytest.param(case, id=name)
            seen.add(said[1])


@pytest.mark.parametrize("case", list(of_each_set_of_rows()))
def test_what_the_page_says_gives_the_tokens_of_the_published_code(case: dict[str, Any]) -> None:
    said = settings_of(case)
    assert said is not None
    sampler, kept, options = resolved(said[0])
    lm = model(case["home"] / case["checkpoint"])
    result = dllm.generate(lm, [case["prompt"]], sampler, kept, **vars(options))
    written, given = result.sequences[0].tolist(), len(case["prompt"])
    count = min(len(written), len(case["sequence"]))
    if lm.backbone.pattern is not None:  # the published code decodes the last block whole, and here it may be shorter
        assert isinstance(options.block_length, int)
        count -= count % options.block_length
    if options.stop_at_eos:
        count = min(count, given + result.stats.tokens)
    assert count > given or len(case["sequence"]) - given < options.block_length
    assert written[:count] == case["sequence"][:count]
    assert lm.backbone.pattern is not None or int(result.nfe[0]) <= case["nfe"]  # there may be one block more


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/golden is not here")
def test_the_page_and_the_map_of_recorded_cases_say_the_same() -> None:
    for case in cases(SHARED).values():
        said, planned = settings_of(case), plan(case, case["home"])
        assert said is not None and planned is not None
        sampler, kept, options = resolved(said[0])
        assert _alike(sampler, planned.sampler), case["id"]
        reused = resolved({"cache": planned.cache})[1] if isinstance(planned.cache, str) else planned.cache
        assert kept == (dllm.cache.Block() if kept == dllm.cache.Block() else reused), case["id"]  # exact, like none
        for name in ("block_length", "cfg_scale", "top_k", "eos_suppression", "temperature"):
            assert getattr(options, name) == planned.options.get(name, getattr(dllm.Options(), name)), case["id"]


def _alike(one: Any, other: Any) -> bool:
    """Whether policies or caches are equal, thresholds but for the step from > to >= and of those no token passes."""
    if is_dataclass(one) and type(one) is type(other):
        return all(_alike(getattr(one, each.name), getattr(other, each.name)) for each in fields(one))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12) or min(one, other) > 1 or (one == 1.01 and other > 1)
    return bool(one == other)


@pytest.mark.parametrize("title", list(SECTIONS))
def test_a_section_tells_truly_whether_recorded_decodes_stand_behind_it(title: str) -> None:
    recorded = {call[0] for case in cases(HERE).values() if (call := call_of(case))}
    if SHARED.exists():
        recorded |= {call[0] for case in cases(SHARED).values() if (call := call_of(case))}
        assert (title in recorded) == ("Checked by: recorded decodes" in " ".join(SECTIONS[title].text.split()))
    assert "Checked by:" in " ".join(SECTIONS[title].text.split())
    assert title not in recorded or "Checked by: recorded decodes" in " ".join(SECTIONS[title].text.split())


def test_rows_are_tested_without_the_shared_cases_too() -> None:
    assert {call[0] for case in cases(HERE).values() if (call := call_of(case))} >= {
        "LLaDA: generate.py", "Dream: diffusion_generate", "Fast-dLLM for LLaDA", "Fast-dLLM for Dream", "d2Cache",
        "dInfer", "LLaDA2: its own generate", "SDAR: block_diffusion_generate",
    }  # fmt: skip


@pytest.mark.parametrize("title", list(SECTIONS))
def test_every_option_exists_with_the_default_that_the_page_gives(title: str) -> None:
    chosen: dict[str, list[str]] = {"sampler": [], "cache": []}
    for row in SECTIONS[title].rows:
        for each in row.ours:
            name, assigned, value = each.partition("=")
            if name in chosen:
                assert value in names(name), row
                chosen[name].append(value)
        for each in row.ours:
            name, assigned, value = each.partition("=")
            group, _, inner = name.partition(".")
            if name not in chosen:
                defaults = _defaults(group, inner, chosen) if group in chosen else [_plain(name)]
                assert defaults, f"{name} is no option of {chosen}"
                if row.our_default and not assigned:
                    assert literal(row.our_default) in defaults, row


def _defaults(group: str, option: str, chosen: dict[str, list[str]]) -> list[Any]:
    own = [options_of(group, each) for each in chosen[group]]
    return [options.get(option) for options in own if option in (*options, *option_names(group, options))]


def _plain(name: str) -> Any:
    """The default of an option that is not of a sampler or cache."""
    group, _, inner = name.partition(".")
    everything = merged("generate") | merged("serve") | merged("evaluate") | {"model": None} | merged("shared/decoding")
    own = {"model": merged("shared/model"), "task": merged("task/gsm8k"), "estimate": merged("evaluate")["estimate"]}
    return own[group][inner] if inner else everything[name]


@pytest.mark.parametrize("title", list(SECTIONS))
def test_both_snippets_of_a_section_say_the_same(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    section = SECTIONS[title]
    (_, theirs), (_, ours) = section.blocks
    given = shell_settings(theirs) if section.blocks[0][0] == "bash" else python_call(theirs)
    call = given if isinstance(given, Call) else Call(frozenset(), given)
    expected = resolved(section.translate(call)[0])
    found = resolved(shell_settings(ours)) if section.blocks[1][0] == "bash" else _run(ours, monkeypatch)
    assert found == expected


def _run(source: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a Python snippet calls `dllm.generate` with."""
    calls = []

    def generate(lm: Any, prompts: Any, sampler: Any = None, cache: Any = "none", **options: Any) -> dllm.Generation:
        own = dllm.cache.NoCache() if cache == "none" else cache
        own = resolved({"cache": cache})[1] if isinstance(cache, str) else own
        calls.append((sampler, own, dllm.Options(**options)))
        return Answer()  # type: ignore[return-value]

    class Answer:
        texts, nfe = ("",), (0,)

    monkeypatch.setattr(dllm, "generate", generate)
    monkeypatch.setattr(dllm, "load", lambda name, **options: None)
    exec(compile(source, "snippet", "exec"), {})
    return calls[0]
