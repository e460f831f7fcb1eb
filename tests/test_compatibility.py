"""What does not go together is refused before the first forward, and docs/ says the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

import dllm
from commands import command, unread
from dllm.cache.base import Cache
from dllm.decoding.compatibility import NEEDS, check, unmet
from dllm.models import FAMILIES, NEWER
from dllm.resolve import names, resolve
from dllm.samplers import FreeDave, Oracle, Threshold
from dllm.samplers.base import Sampler
from dllm.scripts import compatibility as application
from models import random_dream, random_llada

ROOT = Path(__file__).parents[1]
CACHES = [name for name in names("cache") if name != "none"]
Maker = Callable[..., dllm.LanguageModel]
backbones = pytest.mark.parametrize("make", [random_llada, random_dream])


def refused(lm: dllm.LanguageModel, sampler: Any, cache: Any, **options: Any) -> str:
    """Why a run is refused, without a forward."""
    hook = lm.backbone.register_forward_pre_hook(lambda *_: pytest.fail("a forward was run"))
    with pytest.raises(ValueError, match="is not compatible with") as caught:
        dllm.generate(lm, [[1, 2]], sampler, cache, gen_length=8, **options)
    hook.remove()
    return str(caught.value)


@backbones
@pytest.mark.parametrize("name", CACHES)
def test_guidance_is_refused(make: Maker, name: str) -> None:
    reason = refused(make(), "vanilla", name, cfg_scale=1.0)
    assert reason.endswith("guidance computes every row twice; use cache=none, or cfg_scale=0")


@backbones
@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("sampler", [FreeDave(eager=True), Oracle(FreeDave(eager=True))], ids=["freedave", "oracle"])
def test_drafts_of_the_next_block_are_refused(make: Maker, name: str, sampler: Any) -> None:
    assert "eager=true" in refused(make(), sampler, name)


@backbones
@pytest.mark.parametrize("name", CACHES)
def test_several_devices_are_refused(make: Maker, name: str) -> None:
    lm = make()
    lm.backbone.hf_device_map = {"model.a": "cpu", "model.b": "meta"}
    assert "several devices" in refused(lm, "vanilla", name)
    lm.backbone.hf_device_map = {"model.a": "cpu", "model.b": "cpu"}
    assert dllm.generate(lm, [[1, 2]], "vanilla", name, gen_length=4).nfe[0] > 0


@backbones
def test_nothing_is_refused_without_a_cache(make: Maker) -> None:
    lm = make()
    lm.backbone.hf_device_map = {"model.a": "cpu", "model.b": "meta"}
    assert dllm.generate(lm, [[1, 2]], FreeDave(eager=True), cfg_scale=1.0, gen_length=4).nfe[0] > 0


def test_one_draft_is_its_base_and_goes_with_everything() -> None:
    assert not unmet(FreeDave(1, Threshold(0.9), eager=True), dllm.cache.DKVCache())


def test_what_a_base_needs_its_user_needs() -> None:
    assert unmet(FreeDave(1, Oracle(FreeDave(4, eager=True))), dllm.cache.Dual()) == ["next_block"]
    assert unmet(Oracle(FreeDave(4)), dllm.cache.D2Cache()) == ["repeatable"]


def test_every_reason_is_told_at_once_with_its_way_out() -> None:
    with pytest.raises(ValueError, match="nor with") as caught:
        check(FreeDave(eager=True), dllm.cache.DKVCache(), cfg_scale=1.0)
    assert str(caught.value).startswith("cache=dkv is not compatible with classifier-free guidance")
    assert "cfg_scale=0 and eager=false and prefix, dual or freecache with freeze=clean" in str(caught.value)


def test_every_need_is_in_the_vocabulary() -> None:
    for name in names("cache"):
        assert set(resolve("cache", name, Cache).refuses) <= set(NEEDS)
    for name in names("sampler"):
        assert set(getattr(resolve("sampler", name, Sampler), "needs", ())) <= set(NEEDS)


DOCUMENT = (ROOT / "docs" / "compatibility.md").read_text()
TABLE = [[cell.strip() for cell in line.strip("|").split("|")] for line in DOCUMENT.splitlines() if line[:1] == "|"]
VARIANTS = OmegaConf.load(ROOT / "conf" / "compatibility.yaml").variants
LABELLED = {name: resolve("sampler", name, Sampler) for name in names("sampler")}
LABELLED |= {str(label): instantiate(entry) for label, entry in VARIANTS.items()}


@pytest.mark.skipif(FAMILIES.keys() < {*FAMILIES, *NEWER}, reason="older transformers do not have every family")
def test_the_matrix_in_docs_is_what_the_code_says() -> None:
    listed = [row[0].strip("`") for row in TABLE[2:]]
    samplers = {label: LABELLED[label] for label in listed if label in LABELLED}
    caches = {name: resolve("cache", name, Cache) for name in TABLE[0][1:]}
    assert application.matrix(samplers, caches) == DOCUMENT


@pytest.mark.parametrize("group", [dllm.samplers, dllm.cache])
def test_everything_that_comes_with_the_package_is_in_the_matrix(group: Any) -> None:
    # One's own policy or cache need not be.
    listed = [LABELLED[label] for label in (row[0].strip("`") for row in TABLE[2:]) if label in LABELLED]
    listed += [resolve("cache", name, Cache) for name in TABLE[0][1:]]
    offered = {getattr(group, name) for name in group.__all__} - {dllm.samplers.Calibrated}  # an option of the others
    assert offered <= {type(each) for each in listed}


def test_the_command_writes_the_matrix(tmp_path: Path) -> None:
    result = command("compatibility", f"out={tmp_path}/new/matrix.md")
    assert (result.code, result.err) == (0, "")
    written = (tmp_path / "new" / "matrix.md").read_text()
    assert result.out.startswith(written)
    assert {f"| `{name}` |" for name in names("sampler")} <= {
        line[: line.find("|", 2) + 1] for line in written.splitlines()
    }


def test_it_is_written_even_if_nobody_reads_what_is_printed(tmp_path: Path) -> None:
    assert unread("compatibility", f"out={tmp_path}/matrix.md") == 1
    assert (tmp_path / "matrix.md").read_text() == DOCUMENT


@backbones
def test_the_matrix_says_what_a_run_says(make: Maker) -> None:
    lm, checked = make(), 0
    for label, *cells in TABLE[2:]:
        for name, cell in zip(TABLE[0][1:], cells, strict=True):
            scale = 1.0 if "cfg_scale" in label else 0.0
            lm.backbone.needs = frozenset({"whole_blocks"} if "as a whole" in label else ())
            lm.backbone.hf_device_map = {"a": 0, "b": 1} if "devices" in label else {}
            sampler = LABELLED.get(label.strip("`"), LABELLED["vanilla"])
            graphs = True if "cuda_graphs" in label else None
            needs = unmet(sampler, resolve("cache", name, Cache), scale, lm.backbone, graphs)
            assert bool(needs) == cell.startswith("no (")
            checked += 1
    assert checked >= 7 * 15


def test_the_command_line_tells_it_in_one_line_before_the_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dllm, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    for arguments in (["sampler=freedave", "sampler.eager=true"], ["cfg_scale=1.5"]):
        result = command("generate", "cache=freecache", *arguments)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("dllm generate: error: cache=freecache is not compatible with ")
        assert result.err.count("\n") == 1
        assert "use cache=none, or " in result.err
