"""Float8 weights as torchao makes them: computed with one kernel for their input, and otherwise left as they are."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dllm
from dllm.decoding.graphs import weights_of
from dllm.models import float8
from dllm.models.float8 import Float8Linear
from dllm.models.kernels import quantise_rows
from dllm.models.linear import join, join_products, joinable, outputs
from models import random_dream, random_llada

E4M3 = torch.float8_e4m3fn


class PerRow:
    """A granularity of torchao."""


class PerTensor:
    """Another."""


@dataclass
class Inputs:
    """How torchao quantises the input of a layer."""

    granularity: Any = field(default_factory=PerRow)
    float8_dtype: torch.dtype = E4M3
    hp_value_lb: float | None = None
    hp_value_ub: float | None = None


class Float8Tensor(Tensor):
    """What torchao's class of this name is to a layer."""

    qdata: Tensor
    scale: Tensor
    act_quant_kwargs: Inputs | None

    @staticmethod
    def __new__(cls, qdata: Tensor, scale: Tensor, inputs: Inputs | None, dtype: torch.dtype) -> Float8Tensor:
        made: Any = Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=dtype)
        return made

    def __init__(self, qdata: Tensor, scale: Tensor, inputs: Inputs | None, dtype: torch.dtype) -> None:
        self.qdata, self.scale, self.act_quant_kwargs = qdata, scale, inputs

    def __tensor_flatten__(self) -> Any:
        return ["qdata", "scale"], None

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return (self.qdata.float() * self.scale).to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].qdata, args[0].scale, args[0].act_quant_kwargs, args[0].dtype)
        if func is torch.ops.aten.clone.default:
            return cls(args[0].qdata.clone(), args[0].scale.clone(), args[0].act_quant_kwargs, args[0].dtype)
        raise NotImplementedError(f"{func} is not implemented")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return func(args[0], args[1].dequantize(), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def quantise(layer: nn.Linear, **inputs: Any) -> nn.Linear:
    weight = layer.weight.detach()
    numbers, scale = quantise_rows(weight)
    exact = inputs.pop("exact", False)
    given = None if inputs.get("weights_only") else Inputs(**inputs)
    layer.weight = nn.Parameter(Float8Tensor(numbers, scale, given, weight.dtype), requires_grad=False)
    layer.weight.mm_config = SimpleNamespace(use_fast_accum=not exact)  # type: ignore[attr-defined]
    return layer


def layers(bias: bool = False) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [quantise(nn.Linear(64, size, bias=bias, dtype=torch.bfloat16)) for size in (32, 16, 48)]


def computed(*own: nn.Linear) -> list[Any]:
    float8.adopt(nn.ModuleList(own))
    return list(own)


def inputs_of(*shape: int) -> Tensor:
    return torch.randn(*shape, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


class Quantisations:
    """Counts the inputs that are quantised."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def counted(x: Tensor) -> tuple[Tensor, Tensor]:
            self.count += 1
            return quantise_rows(x)

        patch.setattr(float8, "quantise_rows", counted)


@pytest.fixture
def quantisations(monkeypatch: pytest.MonkeyPatch) -> Quantisations:
    return Quantisations(monkeypatch)


def test_rows_fill_the_range_of_float8() -> None:
    x = torch.tensor([[1.0, -3.5, 0.25], [0.0, 0.0, 0.0], [1e-30, 0.0, 0.0]], dtype=torch.bfloat16)
    numbers, scale = quantise_rows(x)
    assert numbers.dtype == E4M3 and scale.dtype == torch.float32
    assert numbers[0, 1].float() == -448 and not numbers[1].float().any()
    torch.testing.assert_close(numbers.float() * scale, x.float(), rtol=2**-4, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_in_its_row(bad: float) -> None:
    (layer,), x = computed(layers()[0]), inputs_of(3)
    with torch.inference_mode():
        expected = layer(x)
        x[1, 5] = bad
        found = layer(x)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (2, 5), (2, 3, 4), (0,)])
def test_products_are_those_of_the_weights(bias: bool, shape: tuple[int, ...]) -> None:
    own, x = layers(bias), inputs_of(*shape)
    with torch.inference_mode():
        expected = [layer(x) for layer in own]
        for found, exact in zip(outputs(x, *computed(*own)), expected, strict=True):
            assert found.shape == exact.shape and found.dtype == torch.bfloat16
            assert not x.numel() or 0 < error(found, exact) < 0.04


def test_a_row_does_not_depend_on_others() -> None:
    (layer,), x = computed(layers()[0]), inputs_of(6)
    x[3] *= 1000
    with torch.inference_mode():
        together = layer(x)
        assert all(torch.equal(layer(x[[k]])[0], together[k]) for k in range(6))


@pytest.mark.parametrize("bias", [False, True])
def test_joined_layers_are_one_product_of_an_input_quantised_once(bias: bool, quantisations: Quantisations) -> None:
    own, x = computed(*layers(bias)), inputs_of(2, 5)
    with torch.inference_mode():
        expected = [layer(x) for layer in own]
        assert quantisations.count == 3
        assert joinable(*own)
        join(*own)
        quantisations.count = 0
        found = outputs(x, *own)
        assert quantisations.count == 1
        assert all(map(torch.equal, found, expected))
        assert torch.equal(own[1](x), expected[1])
        own[1].register_forward_hook(lambda module, inputs, output: output * 2)
        assert torch.equal(outputs(x, *own)[1], 2 * expected[1])


def test_layers_of_different_kinds_are_not_joined() -> None:
    one, other = layers()[:2]
    plain = nn.Linear(64, 16, bias=False, dtype=torch.bfloat16)
    (one,) = computed(one)
    assert not joinable(one, other) and not joinable(one, plain) and not joinable(other, one)
    assert not joinable(one, *computed(layers(bias=True)[1]))


@pytest.mark.parametrize(
    "inputs",
    [
        {"weights_only": True},
        {"granularity": PerTensor()},
        {"float8_dtype": torch.float8_e5m2},
        {"hp_value_ub": 1.0},
        {"hp_value_lb": 1.0},
        {"exact": True},
    ],
    ids=lambda inputs: next(iter(inputs)),
)
def test_what_is_quantised_otherwise_is_left_to_torchao(inputs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    (layer,) = computed(quantise(nn.Linear(64, 32, bias=False, dtype=torch.bfloat16), **inputs))
    assert type(layer) is nn.Linear


def test_other_types_and_layers_are_left() -> None:
    class Other(nn.Linear):
        """Somebody else's."""

    wide = quantise(nn.Linear(64, 32, dtype=torch.float32))
    other = quantise(Other(64, 32, dtype=torch.bfloat16))
    assert [type(each) for each in computed(wide, other, nn.Linear(4, 4))] == [nn.Linear, Other, nn.Linear]


def test_with_gradients_torchao_computes() -> None:
    own, x = layers(), inputs_of(2)
    expected = own[0](x)
    computed(*own)
    assert torch.equal(own[0](x), expected)
    with torch.inference_mode():
        assert not torch.equal(own[0](x), expected)


def test_weights_that_are_replaced_are_computed_as_any_others() -> None:
    own, x = computed(*layers()), inputs_of(2)
    join(*own)
    own[1].weight = nn.Parameter(torch.randn(16, 64, dtype=torch.bfloat16))
    with torch.inference_mode():
        found = outputs(x, *own)
        assert torch.equal(found[1], F.linear(x, own[1].weight))
        assert torch.equal(found[2], own[2](x))
    assert not joinable(*own)


def quantised(make: Callable[..., dllm.LanguageModel]) -> dllm.LanguageModel:
    lm = make(dtype=torch.bfloat16, hidden=64)
    for module in lm.backbone.blocks.modules():
        if isinstance(module, nn.Linear):
            quantise(module)
    return lm


@pytest.mark.parametrize("make", [random_llada, random_dream])
class TestModel:
    def test_each_block_quantises_four_inputs(
        self, make: Callable[..., dllm.LanguageModel], quantisations: Quantisations
    ) -> None:
        lm, ids = quantised(make), torch.arange(12)[None]
        before = lm.backbone.fingerprint()
        with torch.inference_mode():
            expected = lm.backbone(ids).logits
            assert not quantisations.count
            join_products(lm.backbone.blocks)
            found = lm.backbone(ids).logits
        assert quantisations.count == 4 * len(lm.backbone.blocks)
        assert 0 < error(found, expected) < 0.3
        assert lm.backbone.fingerprint() == before
        with torch.inference_mode():
            assert torch.equal(deepcopy(lm.backbone)(ids).logits, found)

    def test_it_decodes_with_every_kind_of_cache(self, make: Callable[..., dllm.LanguageModel]) -> None:
        lm = quantised(make)
        join_products(lm.backbone.blocks)
        for cache in ("none", "freecache", "dllm_cache", "d2cache"):
            result = dllm.generate(lm, [[1, 2, 3], [4, 5]], "threshold", cache, gen_length=16, block_length=8)
            assert lm.backbone.mask_token_id not in result.completions

    def test_graphs_replay_it_if_nothing_else_is_quantised(self, make: Callable[..., dllm.LanguageModel]) -> None:
        lm: Any = quantised(make)
        assert not float8.computes(lm.backbone)  # nobody says so
        lm.backbone.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="torchao"))
        assert not float8.computes(lm.backbone)
        join_products(lm.backbone.blocks)
        assert float8.computes(lm.backbone)
        lm.backbone.hf_quantizer.quantization_config.quant_method = "bitsandbytes"
        assert not float8.computes(lm.backbone)

    def test_graphs_notice_other_weights(self, make: Callable[..., dllm.LanguageModel]) -> None:
        lm: Any = quantised(make)
        before = weights_of(lm.backbone)
        assert weights_of(lm.backbone) == before
        weight = next(each for each in lm.backbone.parameters() if isinstance(each, Float8Tensor))
        weight.qdata.data = weight.qdata.clone()
        assert weights_of(lm.backbone) != before


def test_torchao_has_what_is_read_of_it() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    module = pytest.importorskip("torchao.quantization.quantize_.workflows.float8.float8_tensor")
    config: Any = module.Float8MMConfig(use_fast_accum=True)
    inputs = module.QuantizeTensorToFloat8Kwargs(E4M3, quantization.PerRow(), mm_config=config)
    own = [nn.Linear(64, size, bias=False, dtype=torch.bfloat16) for size in (32, 16)]
    for layer in own:
        weight = quantization.Float8Tensor.from_hp(
            layer.weight.detach(), granularity=quantization.PerRow(), mm_config=config, act_quant_kwargs=inputs
        )
        layer.weight = nn.Parameter(weight, requires_grad=False)
    x = inputs_of(2, 5)
    with torch.inference_mode():
        expected = [layer(x) for layer in own]
        join(*computed(*own))
        assert all(isinstance(layer, Float8Linear) for layer in own)
        assert all(error(left, right) < 0.01 for left, right in zip(outputs(x, *own), expected, strict=True))
