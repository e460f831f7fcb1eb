"""The pages of the documentation that are made from the code."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest
from omegaconf import OmegaConf

import dllm
from dllm.models import ARCHITECTURES
from dllm.resolve import TARGET, names, options_of, variants
from site_pages import facts, pages, reference, sources

CHOICES = [(group, name) for group in ("sampler", "cache") for name in names(group)]


def shown(group: str, name: str) -> str:
    return pages.policy(name) if group == "sampler" else pages.cache(name)


def value(text: str) -> Any:
    return OmegaConf.create(f"it: {text}")["it"]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_policy_and_cache_states_its_rule_its_symbols_and_its_source(group: str, name: str) -> None:
    method = facts.method_of(type(facts.built(group, name)))
    assert method.summary
    assert method.rule
    assert "Rule:" not in method.explanation
    symbols = set(re.findall(r"(?<![\w'])(?:[B-Zb-hk-z]|KL)(?![A-Za-z0-9])", method.rule))
    unexplained = {each for each in symbols if not re.search(rf"(?<!\w){each}(?![A-Za-z0-9])", method.explanation)}
    assert not unexplained
    assert method.path.startswith({"sampler": "samplers/", "cache": "cache/"}[group])
    assert (sources.ROOT / method.path).is_file()


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_family_states_its_rule_and_has_a_page(family: str) -> None:
    cls = ARCHITECTURES[family]
    assert facts.method_of(cls).rule
    page = facts.family_page(cls)
    assert page in facts.sections("models.md")
    assert cls in pages.families(page)


@pytest.mark.parametrize("guide", ["policies.md", "caches.md"])
def test_every_method_has_a_section_in_its_guide(guide: str) -> None:
    group = {"policies.md": "sampler", "caches.md": "cache"}[guide]
    assert sorted(facts.sections(guide)) == names(group)


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_option_is_shown_with_its_default_and_meaning(group: str, name: str) -> None:
    options = {option: each for option, each in options_of(group, name).items() if option != TARGET}
    found = {each.name: value(each.default) for each in facts.settings(group, name)}
    assert found == options
    assert all(each.meaning for each in facts.settings(group, name))


@pytest.mark.parametrize("variant", variants("sampler"))
def test_the_values_for_the_bundled_models_are_shown(variant: str) -> None:
    name = variant.removeprefix("tiny/")
    plain, tuned = options_of("sampler", name), options_of("sampler", variant)
    other = {option: each for option, each in tuned.items() if each != plain[option]}
    assert {each.name: value(each.tuned) for each in facts.settings("sampler", name) if each.tuned} == other


@pytest.mark.parametrize(
    ("group", "name"), [("sampler", "wino"), ("sampler", "s2d2"), ("sampler", "daedal"), ("cache", "dual")]
)
def test_a_page_shows_rule_source_options_cost_and_a_canvas(group: str, name: str) -> None:
    page = shown(group, name)
    method = facts.method_of(type(facts.built(group, name)))
    assert all(f"https://arxiv.org/abs/{number}" in page for number in method.papers)
    for heading in (
        "When to take it",
        "A canvas that it filled",
        "Options",
        "What it costs",
        "Measured",
        "Differences",
    ):
        assert f"\n## {heading}\n" in page
    # What the symbols mean stands directly below them.
    assert f"\n{method.rule}\n```\n\n{method.explanation}\n\nSource: " in page
    assert all(f"| `{each.name}` |" in page for each in facts.settings(group, name))
    assert '<span class="token"' in page
    assert page.count("<svg") == (2 if group == "cache" else 1)


def test_a_policy_that_no_bundled_model_can_show_says_so() -> None:
    page = pages.policy("renoise")
    assert "<svg" not in page
    assert "None: it needs a model that denoises random tokens" in page


@pytest.mark.parametrize(("name", "block_length"), [("threshold", 4), ("s2d2", 1), ("daedal", 4), ("renoise", 4)])
@pytest.mark.parametrize(("model", "family"), [("tiny-block", "SDARForCausalLM"), ("tiny-llada", "LLaDAModelLM")])
def test_the_models_shown_are_those_that_a_policy_runs_on(
    name: str, block_length: int, model: str, family: str
) -> None:
    lm = dllm.load(model)
    decodes = family in facts.families_of(name)
    with nullcontext() if decodes else pytest.raises(ValueError, match=r"is not compatible|attends"):
        dllm.generate(lm, "Mia has", name, gen_length=4, block_length=block_length)


def test_the_reference_has_every_public_object() -> None:
    shown = {name for _, _, objects in reference.PAGES.values() for name in objects}
    assert {f"dllm.{name}" for name in dllm.__all__} - {"dllm.cache", "dllm.samplers"} <= shown
    assert all(f"({name}.md)" in reference.index() for name in reference.PAGES)


def test_tables_of_methods_link_to_their_pages() -> None:
    text = (sources.ROOT / "README.md").read_text()
    linked = pages.linked_tables(text)
    found = re.findall(r"\[`(\w+)`\]\(docs/(\w+)/\1\.md\)", linked)
    assert {name for name, folder in found if folder == "policies"} >= {"vanilla", "wino", "daedal"}
    assert {name for name, folder in found if folder == "caches"} == set(names("cache"))
    assert re.sub(r"\[(`\w+`)\]\(docs/\w+/\w+\.md\)", r"\1", linked) == text


def test_a_page_has_the_measured_rows_of_its_policy() -> None:
    rows = [row for _, row in facts.measured("sampler", "wino")]
    page = pages.policy("wino")
    assert {row["sampler.name"] for row in rows} == {"wino"}
    for matrix in facts.matrices():
        for cache, cell in facts.runs("sampler", "wino", matrix).items():
            assert re.search(rf"\| `{cache}` \|.*{cell.quality:.1%} .*{cell.nfe:.1f}, {cell.tpf:.2f}", page)
    for row in rows:
        assert f"| {row['label']} |" in page
        assert f"{float(row['accuracy_interval.low']):.1%} to {float(row['accuracy_interval.high']):.1%}" in page


def test_a_page_of_a_cache_shows_its_approximation_error() -> None:
    page = pages.cache("dual")
    for _, row in facts.measured("cache", "dual"):
        assert f"| {float(row['drift.kv_error']):.1%} |" in page


def test_a_written_page_of_a_family_keeps_its_text_and_gains_what_the_code_says() -> None:
    text = (facts.DOCS / "models" / "sdar.md").read_text()
    page = pages.model(text, "sdar")
    assert text.partition("\n")[2].strip() in page
    for family in ("SDARForCausalLM", "SDARMoeForCausalLM"):
        assert f"## `{family}`" in page
        assert facts.method_of(ARCHITECTURES[family]).rule in page
