"""Linear layers with one input: one product where their weights allow it, the same outputs and the same files."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dllm
from dllm.models.linear import Rows, join, join_products, joinable, outputs
from models import random_dream, random_llada

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]


class Products:
    """Counts the matrix products of linear layers."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, product = 0, torch.nn.functional.linear

        def counted(*inputs: Any) -> Tensor:
            self.count += 1
            return product(*inputs)

        patch.setattr(torch.nn.functional, "linear", counted)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    return Products(monkeypatch)


def layers(bias: bool = False) -> tuple[nn.Linear, ...]:
    torch.manual_seed(0)
    return tuple(nn.Linear(6, size, bias=bias, dtype=torch.float64) for size in (4, 2, 3))


@pytest.mark.parametrize("bias", [False, True])
def test_joined_layers_are_one_product(products: Products, bias: bool) -> None:
    own, x = layers(bias), torch.randn(2, 5, 6, dtype=torch.float64)
    with torch.inference_mode():
        expected = [layer(x) for layer in own]
        join(*own)
        products.count = 0
        found = outputs(x, *own)
        assert products.count == 1
        assert all(torch.allclose(left, right, rtol=0, atol=1e-14) for left, right in zip(found, expected, strict=True))
        assert torch.allclose(own[1](x), expected[1], rtol=0, atol=1e-14)
        outputs(x, *own[:2])
        assert products.count == 3


def _moved(own: tuple[nn.Linear, ...]) -> tuple[nn.Module, ...]:
    return tuple(layer.to(torch.float32).to(torch.float64) for layer in own)


def _hooked(own: tuple[nn.Linear, ...]) -> tuple[nn.Module, ...]:
    own[1].register_forward_hook(lambda module, inputs, output: output * 2)
    return own


def _subclassed(own: tuple[nn.Linear, ...]) -> tuple[nn.Module, ...]:
    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    other = Other(6, 2, bias=False, dtype=torch.float64)
    other.weight = own[1].weight
    return own[0], other, own[2]


def _forward_replaced(own: tuple[nn.Linear, ...]) -> tuple[nn.Module, ...]:
    own[2].forward = lambda x: x[..., :3]  # type: ignore[method-assign]
    return own


CHANGES: dict[str, Callable[[tuple[nn.Linear, ...]], tuple[nn.Module, ...]]] = {
    "moved": _moved, "hooked": _hooked, "subclassed": _subclassed, "forward replaced": _forward_replaced,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_was_changed_is_computed_by_itself(change: str) -> None:
    own, x = layers(), torch.randn(2, 6, dtype=torch.float64)
    join(*own)
    changed = CHANGES[change](own)
    with torch.inference_mode():
        for found, layer in zip(outputs(x, *changed), changed, strict=True):
            assert torch.allclose(found, layer(x), rtol=0, atol=1e-14)


def test_training_sees_every_layer() -> None:
    own, x = layers(), torch.randn(2, 6, dtype=torch.float64)
    join(*own)
    torch.cat(outputs(x, *own), -1).sum().backward()
    assert all(torch.allclose(layer.weight.grad, x.sum(0).expand_as(layer.weight)) for layer in own)
    with torch.inference_mode():
        before = outputs(x, *own)[1]
    torch.optim.SGD(own[1].parameters(), lr=1.0).step()
    with torch.inference_mode():
        assert torch.allclose(outputs(x, *own)[1], before - (x @ x.sum(0))[:, None])


@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_one_layer_are_one_product(products: Products, bias: bool) -> None:
    whole, x = nn.Linear(6, 9, bias=bias, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    query, key, value = Rows(whole, 0, 4), Rows(whole, 4, 6), Rows(whole, 6, 9)
    with torch.inference_mode():
        expected = whole(x)
        products.count = 0
        assert torch.equal(torch.cat(outputs(x, query, key, value), -1), expected)
        assert products.count == 1
        assert torch.allclose(torch.cat((*outputs(x, query, key), value(x)), -1), expected)
        assert products.count == 3
        assert torch.allclose(torch.cat(outputs(x, value, query), -1), expected[:, [6, 7, 8, 0, 1, 2, 3]])


def test_what_cannot_be_joined_is_left_as_it_is() -> None:
    one, other = nn.Linear(6, 2), nn.Linear(6, 2, bias=False)
    assert not joinable(one, other)
    assert not joinable(other, nn.Linear(6, 2, bias=False, dtype=torch.bfloat16))
    assert not joinable(other, nn.Linear(6, 2, bias=False, device="meta"))
    assert not joinable(other, nn.Identity())


@pytest.mark.parametrize("make", [random_llada, random_dream])
@pytest.mark.parametrize("cache", ["none", "freecache", "dllm_cache"])
def test_decodes_are_the_same(make: Callable[..., Any], cache: str, products: Products) -> None:
    plain, joined = make(dtype=torch.float64), make(dtype=torch.float64)
    join_products(joined.backbone.blocks)
    counts, tokens = [], []
    for lm in (plain, joined):
        products.count = 0
        result = dllm.generate(lm, PROMPTS, "threshold", cache, gen_length=16, block_length=8)
        counts.append(products.count)
        tokens.append(result.sequences)
    assert torch.equal(*tokens)
    assert counts[1] < counts[0]


@pytest.mark.parametrize("make", [random_llada, random_dream])
def test_files_hold_each_layer_by_itself(make: Callable[..., Any], tmp_path: Path) -> None:
    lm = make(dtype=torch.float32)
    lm.backbone.save_pretrained(tmp_path / "plain")
    fingerprint = lm.backbone.fingerprint()
    join_products(lm.backbone.blocks)
    lm.backbone.save_pretrained(tmp_path / "joined")
    plain, joined = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "joined"))
    assert plain.keys() == joined.keys()
    assert all(torch.equal(plain[name], joined[name]) for name in plain)
    assert lm.backbone.fingerprint() == fingerprint
    again = deepcopy(lm.backbone)
    again.load_state_dict(plain)
    with torch.inference_mode():
        assert torch.equal(again(torch.tensor(PROMPTS[:1])).logits, lm.backbone(torch.tensor(PROMPTS[:1])).logits)
