"""Mixtures of experts: one grouped product, or one expert after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import dllm
from dllm.models.experts import Experts, GroupLimitedRouter, SoftmaxRouter
from models import random_llada2, random_llada_moe, random_sdar_moe, save_folder

Maker = Callable[..., dllm.LanguageModel]
makers = pytest.mark.parametrize("make", [random_llada2, random_sdar_moe, random_llada_moe])
INPUT = torch.arange(40).view(2, 20)


def small(count: int = 6, dtype: torch.dtype = torch.float32) -> Experts:
    torch.manual_seed(1)
    return Experts(count, 16, 24).to(dtype)


def chosen(rows: int, experts: Experts, each: int = 3) -> tuple[Any, ...]:
    torch.manual_seed(2)
    index = torch.rand(rows, len(experts)).argsort(-1)[:, :each]
    return torch.randn(rows, 16), index, torch.rand(rows, each)


@pytest.mark.parametrize("rows", [1, 2, 50])
def test_a_grouped_product_is_the_sum_over_the_experts(rows: int) -> None:
    experts = small()
    x, index, weights = chosen(rows, experts)
    spelt = torch.stack(
        [sum(w * experts[int(e)](x[n]) for e, w in zip(index[n], weights[n], strict=True)) for n in range(rows)]
    )
    with torch.inference_mode():
        grouped = experts(x, index, weights)
    assert experts._joined is not None
    torch.testing.assert_close(grouped, spelt.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(experts(x, index, weights), spelt, rtol=0, atol=1e-5)  # with gradients


def test_experts_computed_at_every_position_give_the_same() -> None:
    experts = small(dtype=torch.float64)
    x, index, _ = chosen(9, experts)
    torch.testing.assert_close(experts._everywhere(x.double(), index), experts._one_by_one(x.double(), index))


def test_weights_that_change_after_a_product_are_those_of_the_next() -> None:
    experts = small()
    x, index, weights = chosen(9, experts)
    with torch.no_grad():
        experts(x, index, weights)
        experts[2].up_proj.weight.add_(1.0)  # in place
        experts[4].down_proj.weight.data = torch.randn(16, 24)  # replaced
        changed = experts(x, index, weights)
        experts._joined = None
        torch.testing.assert_close(changed, experts._one_by_one(x, index).mul(weights[..., None]).sum(1))
        experts.double()
        wide = experts(x.double(), index, weights.double())
        torch.testing.assert_close(wide.float(), changed, rtol=0, atol=1e-5)
        experts.float()
        torch.testing.assert_close(experts(x, index, weights), changed, rtol=0, atol=1e-5)
        experts[0].gate_proj = torch.nn.Sequential(experts[0].gate_proj)  # as an adapter does
        torch.testing.assert_close(experts(x, index, weights), changed, rtol=0, atol=1e-5)
    experts(x, index, weights).sum().backward()
    assert all(parameter.grad is not None for parameter in experts.parameters())


@makers
def test_a_float32_forward_in_groups_differs_by_rounding_only(make: Maker) -> None:
    with torch.inference_mode():
        wide, narrow = (make(dtype=dtype).backbone(INPUT).logits for dtype in (torch.float64, torch.float32))
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=1e-3)


@makers
def test_a_forward_leaves_the_weights_that_are_saved(make: Maker, tmp_path: Path) -> None:
    lm = make(dtype=torch.float32)
    before = save_folder(lm, tmp_path / "before")
    fingerprint = lm.backbone.fingerprint()
    with torch.inference_mode():
        lm.backbone(INPUT)
    after = save_folder(lm, tmp_path / "after")
    assert (after / "model.safetensors").read_bytes() == (before / "model.safetensors").read_bytes()
    loaded = dllm.load(after, device="cpu").backbone
    assert loaded.fingerprint() == lm.backbone.fingerprint() == fingerprint
    with torch.inference_mode():
        assert torch.equal(loaded(INPUT).logits, lm.backbone(INPUT).logits)


def test_the_router_of_llada2_is_the_published_one(golden: Path) -> None:
    folder = golden / "llada2-rand-a"
    recorded = {
        name.removeprefix("router."): tensor
        for name, tensor in load_file(folder / "logits.safetensors").items()
        if name.startswith("router.")
    }
    moe: Any = dllm.load(folder, device="cpu").backbone.blocks[1].mlp
    with torch.inference_mode():
        index, weights = moe.gate(recorded["hidden"])
        order = index.argsort(-1)
        expected = recorded["topk_idx"].argsort(-1)
        assert torch.equal(index.gather(1, order), recorded["topk_idx"].gather(1, expected))
        torch.testing.assert_close(weights.gather(1, order), recorded["topk_weight"].gather(1, expected))
        torch.testing.assert_close(moe(recorded["hidden"][None])[0], recorded["moe_output"], rtol=0, atol=1e-5)


def test_bias_chooses_groups_and_experts_and_weighs_none() -> None:
    router = GroupLimitedRouter(4, 6, 2, groups=3, best=1, scale=2.0)
    with torch.no_grad():
        router.weight.zero_()
        router.expert_bias.copy_(torch.tensor([0.9, 0.0, 0.5, 0.5, 0.8, 0.1]))
        index, weights = router(torch.randn(5, 4))
    assert index.sort(-1).values.tolist() == [[2, 3]] * 5  # the best pair, without the best expert
    assert weights.tolist() == [[1.0, 1.0]] * 5  # halves of the scale


def test_weights_of_one_expert_are_not_divided_by_their_sum() -> None:
    router = GroupLimitedRouter(4, 4, 1, groups=1, best=1, scale=2.0)
    with torch.no_grad():
        router.weight.zero_()
        assert router(torch.randn(3, 4))[1].tolist() == [[1.0]] * 3  # sigmoid(0) * 2
        scores = SoftmaxRouter(4, 4, 1, normalised=False)
        scores.weight.zero_()
        assert scores(torch.randn(3, 4))[1].tolist() == [[0.25]] * 3


@makers
def test_damaged_or_missing_experts_are_found_before_loading(make: Maker, tmp_path: Path) -> None:
    folder = save_folder(make(dtype=torch.float32), tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if ".experts.5.up_proj" in name)
    kept = weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor {name} is missing"):
        dllm.load(folder, device="cpu")
    save_file(weights | {name: kept[:3]}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor {name} has another shape"):
        dllm.load(folder, device="cpu")
    kept[0, 0] = torch.inf
    save_file(weights | {name: kept}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor {name} holds NaN or infinity"):
        dllm.load(folder, device="cpu")


def test_a_bias_of_nan_is_found(tmp_path: Path) -> None:
    lm = random_llada2(dtype=torch.float32)
    moe: Any = lm.backbone.blocks[1].mlp
    moe.gate.expert_bias[1] = torch.nan
    with pytest.raises(ValueError, match=r"expert_bias holds NaN"):
        dllm.load(save_folder(lm, tmp_path), device="cpu")


def test_the_bias_stays_in_float32_where_weights_are_in_bfloat16(tmp_path: Path) -> None:
    folder = save_folder(random_llada2(dtype=torch.float32), tmp_path)
    gate: Any = dllm.load(folder, device="cpu", dtype="bfloat16").backbone.blocks[1].mlp.gate
    assert (gate.expert_bias.dtype, gate.weight.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(gate.expert_bias, load_file(folder / "model.safetensors")["model.layers.1.mlp.gate.expert_bias"])


def test_llada2_is_constructed_where_what_stays_in_float32_has_to_be_a_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    post_init = PreTrainedModel.post_init

    def of_transformers_4(model: PreTrainedModel) -> None:
        names = {part for name, _ in model.named_parameters() for part in name.split(".")}
        assert set(model._keep_in_fp32_modules_strict or ()) <= names
        post_init(model)

    monkeypatch.setattr(PreTrainedModel, "post_init", of_transformers_4)
    random_llada2()


@makers
def test_tensor_parallel_plan_divides_every_expert(make: Maker) -> None:
    backbone = make().backbone
    planned = {name.replace("*", "0") for name in type(backbone.config).base_model_tp_plan}
    parts = {name.replace("layers.1.", "layers.0.") for name, each in backbone.named_modules()
             if isinstance(each, torch.nn.Linear) and ("experts.0." in name or "shared_experts" in name)}  # fmt: skip
    assert parts and parts <= planned
    assert not any(name.endswith(".gate") for name in planned)


@makers
def test_packed_experts_give_the_same(make: Maker, tmp_path: Path) -> None:
    folder = save_folder(make(dtype=torch.float32), tmp_path)
    plain, packed = (dllm.load(folder, device="cpu", pack=pack).backbone for pack in (False, True))
    with torch.inference_mode():
        torch.testing.assert_close(packed(INPUT).logits, plain(INPUT).logits, rtol=0, atol=1e-3)


def test_a_layer_may_compute_no_position() -> None:
    lm = random_llada2()
    result = dllm.generate(lm, [[37, 49, 9, 9, 11]], "threshold", "dllm_cache", gen_length=12, stop_at_eos=False)
    assert lm.backbone.mask_token_id not in result.completions
