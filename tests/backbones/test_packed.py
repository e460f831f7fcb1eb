"""Packed weights: the same results, and clear words where they are of no use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dllm
from commands import command
from dllm.models.base import MaskedDiffusionModel
from dllm.models.packed import PackedLinear, pack
from models import random_dream, random_llada

PROMPTS = ["Tom has 3 apples and buys 4.", "Ann has 20 pens. She gives 6 away. Then she"]


@pytest.mark.parametrize("make", [random_llada, random_dream])
def test_logits_are_the_same_up_to_rounding(make: type) -> None:
    lm = make(dtype=torch.float32)
    tokens = torch.arange(20).view(2, 10)
    with torch.inference_mode():
        before = lm.backbone(tokens).logits
        fingerprint = lm.backbone.fingerprint()
        pack(lm.backbone)
        assert torch.allclose(lm.backbone(tokens).logits, before, atol=1e-4)
    assert lm.backbone.fingerprint() == fingerprint
    assert not any(type(module) is torch.nn.Linear for module in lm.backbone.modules())
    assert sum(isinstance(module, PackedLinear) for module in lm.backbone.modules()) == 5 * 2 + 1


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
def test_bundled_models_answer_the_same(name: str) -> None:
    packed, plain = (dllm.load(name, device="cpu", pack=wanted) for wanted in (True, False))
    results = [dllm.generate(lm, PROMPTS, "learn2pd", "freecache", gen_length=64).texts for lm in (packed, plain)]
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
def test_caches_that_see_queries_answer_the_same(name: str) -> None:
    packed, plain = (dllm.load(name, device="cpu", pack=wanted) for wanted in (True, False))
    for cache in ("sparse", "elastic"):
        results = [dllm.generate(lm, PROMPTS[:1], "threshold", cache, gen_length=64).texts for lm in (packed, plain)]
        assert results[0] == results[1]


def test_the_command_line_packs_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[MaskedDiffusionModel] = []
    monkeypatch.setattr("dllm.models.packed.pack", lambda backbone: (seen.append(backbone), pack(backbone)))
    options = ["prompt=Tom has 3 apples and buys 4.", "gen_length=32", "show=none", "model.device=cpu"]
    packed, plain = (command("generate", *options, *wanted) for wanted in ([], ["model.pack=false"]))
    assert len(seen) == 1
    assert (packed.code, packed.err) == (0, "")
    assert packed.out.splitlines()[:2] == plain.out.splitlines()[:2]


def test_a_packed_model_is_not_saved_without_its_weights(tmp_path: Path) -> None:
    lm = dllm.load("tiny-llada", device="cpu", pack=True)
    with pytest.raises(ValueError, match="packed weights cannot be saved; load the model with pack=false"):
        lm.backbone.save_pretrained(tmp_path)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="pack=true is for a CPU and float32, and the model is on cpu in bfloat16"):
        dllm.load("tiny-llada", device="cpu", dtype="bfloat16", pack=True)
    with pytest.raises(ValueError, match="pack='yes'"):
        dllm.load("tiny-llada", pack="yes")  # type: ignore[arg-type]


def test_auto_packs_what_can_be_packed() -> None:
    for dtype, wanted in (("float32", True), ("bfloat16", False)):
        backbone = dllm.load("tiny-llada", device="cpu", dtype=dtype, pack="auto").backbone
        assert any(isinstance(module, PackedLinear) for module in backbone.modules()) is wanted
