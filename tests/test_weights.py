"""Pickled, quantised and offloaded weights: fetched where there are no others, read, and told apart from others'."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dllm
from dllm.filters import FilterCard
from dllm.models import loading
from dllm.models.packed import pack
from models import random_diffusion_gemma, random_dream, random_filter, random_llada, save_folder

Maker = Callable[..., dllm.LanguageModel]
FAMILIES = pytest.mark.parametrize("make", [random_llada, random_dream])
SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"


@torch.no_grad()
def logits(lm: dllm.LanguageModel) -> Tensor:
    return lm.backbone(torch.arange(12)[None]).logits


def refusal(name: str | Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # every caller looks at the message
        dllm.load(name, device="cpu", **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def pickled(folder: Path, *, legacy: bool = False, shards: int = 1, keep: bool = False) -> Path:
    """Write a folder's weights as torch does, in one or several files."""
    weights = load_file(folder / SAFE)
    names = [PICKLED] if shards == 1 else [f"pytorch_model-{i:05}-of-{shards:05}.bin" for i in range(1, shards + 1)]
    parts = [dict(list(weights.items())[i::shards]) for i in range(shards)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name, _use_new_zipfile_serialization=not legacy)
    if shards > 1:
        places = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        (folder / f"{PICKLED}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    if not keep:
        (folder / SAFE).unlink()
    return folder


class TestPickled:
    @FAMILIES
    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("shards", [1, 3])
    def test_every_layout_gives_the_same_logits(self, make: Maker, legacy: bool, shards: int, tmp_path: Path) -> None:
        folder = pickled(save_folder(make(), tmp_path), legacy=legacy, shards=shards)
        assert torch.equal(logits(dllm.load(folder, device="cpu")), logits(make()))

    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("shards", [1, 2])
    @pytest.mark.parametrize("size", [0, 10, *range(300, 330, 3), 20000])
    def test_one_that_is_cut_off_is_named(self, legacy: bool, shards: int, size: int, tmp_path: Path) -> None:
        folder = pickled(save_folder(random_llada(), tmp_path), legacy=legacy, shards=shards)
        file = max(folder.glob("pytorch_model*.bin"))
        file.write_bytes(file.read_bytes()[:size])
        message = refusal(folder)
        assert "pytorch_model" in message
        assert "again" in message

    def test_tensors_may_have_several_names(self, tmp_path: Path) -> None:
        lm = random_diffusion_gemma(vocab=2048, dtype=torch.float32)
        folder = save_folder(lm, tmp_path)
        (folder / SAFE).unlink()
        torch.save(lm.backbone.state_dict(), folder / PICKLED)
        assert (folder / PICKLED).stat().st_size * 2 < sum(t.nbytes for t in lm.backbone.state_dict().values())
        assert torch.equal(dllm.load(folder, device="cpu").backbone.model.decoder.embed_tokens.weight,
                           lm.backbone.model.decoder.embed_tokens.weight)  # fmt: skip

    def test_one_that_holds_code_is_refused_and_does_not_run_it(self, tmp_path: Path) -> None:
        folder = pickled(save_folder(random_llada(), tmp_path))
        torch.save({"weights": _Trap()}, folder / PICKLED)
        assert PICKLED in refusal(folder)
        assert not _Trap.sprung


class _Trap:
    sprung = False

    def __reduce__(self) -> Any:
        return _spring, ()


def _spring() -> None:
    _Trap.sprung = True


class TestFetching:
    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, set[str]]:
        """A folder that stands for a repository on the hub, and the names of what was fetched from it."""
        remote, cache, fetched = tmp_path / "remote", tmp_path / "models--some--model" / "snapshots" / "0", set()
        save_folder(random_llada(), remote)
        cache.mkdir(parents=True)

        def download(name: str, *, revision: Any, allow_patterns: Sequence[str], ignore_patterns: str) -> str:
            assert name == "some/model"
            files = [str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()]
            for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
                shutil.copy(remote / file, cache / file)
                fetched.add(file)
            return str(cache)

        monkeypatch.setattr(loading, "snapshot_download", download)
        return remote, fetched

    @pytest.mark.parametrize("shards", [1, 2])
    def test_pickled_weights_are_fetched_where_there_are_no_others(
        self, hub: tuple[Path, set[str]], shards: int
    ) -> None:
        pickled(hub[0], shards=shards)
        for other in ("optimizer.bin", "training_args.bin", "modeling_llada.py"):
            (hub[0] / other).write_bytes(b"")
        assert torch.equal(logits(dllm.load("some/model", device="cpu")), logits(random_llada()))
        weights = {file for file in hub[1] if file.endswith((".bin", ".py"))}
        assert weights == {path.name for path in hub[0].glob("pytorch_model*.bin")}

    def test_both_are_never_fetched(self, hub: tuple[Path, set[str]]) -> None:
        pickled(hub[0], keep=True)
        dllm.load("some/model", device="cpu")
        assert SAFE in hub[1]
        assert not [file for file in hub[1] if file.endswith(".bin")]

    def test_a_wrong_config_is_seen_before_the_weights_are_fetched(self, hub: tuple[Path, set[str]]) -> None:
        config = json.loads((hub[0] / "config.json").read_text())
        (hub[0] / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "linear", "factor": 2.0}}))
        assert "rope_scaling" in refusal("some/model")
        assert hub[1] == {"config.json"}

    def test_a_repository_without_weights_is_no_task_for_the_cache(self, hub: tuple[Path, set[str]]) -> None:
        (hub[0] / SAFE).unlink()
        message = refusal("some/model")
        assert "no weights" in message
        assert "put" not in message

    def test_what_is_no_adapter_is_seen_before_its_weights_are_fetched(
        self, hub: tuple[Path, set[str]], tmp_path: Path
    ) -> None:
        base = save_folder(random_llada(), tmp_path / "base")
        assert "adapter_config.json" in refusal(base, adapter="some/model")
        assert not hub[1]


class Opaque(Tensor):
    """A weight of whole numbers and a scale that, as torchao's, refuses most of what can be done with a tensor."""

    numbers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Opaque:
        made: Any = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)
        return made

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    @classmethod
    def of(cls, weight: Tensor) -> Opaque:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.numbers * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"{func} is not implemented")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, bias = args
            return func(x, weight.numbers * weight.scale, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Int8(Opaque):
    """The same, whose parts can be seen, and only seen."""

    def __tensor_flatten__(self) -> Any:
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> Int8:
        return Int8(inner["numbers"], inner["scale"])

    def dequantize(self) -> Tensor:  # type: ignore[override]
        raise NotImplementedError("no kernel for this device")


def quantised(make: Maker, kind: type[Opaque], seed: int = 0) -> dllm.LanguageModel:
    lm = make(seed=seed)
    for module in lm.backbone.blocks.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(kind.of(module.weight.detach()), requires_grad=False)
    return lm


class TestQuantised:
    @FAMILIES
    @pytest.mark.parametrize("kind", [Int8, Opaque])
    def test_the_fingerprint_tells_the_weights_apart(self, make: Maker, kind: type[Opaque]) -> None:
        lm = quantised(make, kind)
        prints = [one.backbone.fingerprint() for one in (lm, quantised(make, kind), quantised(make, kind, seed=1))]
        assert prints[0] == prints[1] != prints[2]
        changed = next(module for module in lm.backbone.blocks.modules() if isinstance(module, nn.Linear)).weight
        changed.numbers[0, 0] += 1
        assert lm.backbone.fingerprint() != prints[0]

    def test_a_filter_decodes_with_it(self) -> None:
        lm = quantised(random_llada, Int8)
        card = FilterCard("neighbours", 8, lm.name, lm.backbone.fingerprint(), {}, {}, "", 1, 0, {}, {}, [])
        sampler = dllm.samplers.Learn2PD(replace(random_filter(), card=card))
        assert dllm.generate(lm, [[5, 6, 7]], sampler, gen_length=16, block_length=8).nfe > 0

    def test_numbers_in_buffers_count(self) -> None:
        lm = random_llada()
        before = lm.backbone.fingerprint()
        lm.backbone.blocks[0].q_proj.register_buffer("qweight", torch.arange(12, dtype=torch.int32))
        assert lm.backbone.fingerprint() != before

    @FAMILIES
    def test_weights_on_disk_have_the_fingerprint_of_those_in_memory(self, make: Maker, tmp_path: Path) -> None:
        folder = save_folder(make(), tmp_path)
        lm = dllm.load(folder, device="cpu")
        block = next(name for name, module in lm.backbone.named_modules() if module is lm.backbone.blocks[1])
        leaves = (name for name, module in lm.backbone.named_modules() if not list(module.children()))
        others = {name: "cpu" for name in leaves if not name.startswith(f"{block}.")}
        split = dllm.load(folder, device_map=others | {block: "disk"})
        assert any(weight.is_meta for weight in split.backbone.parameters())
        assert split.backbone.fingerprint() == lm.backbone.fingerprint()

    def test_the_fingerprint_of_a_packed_model_is_kept(self) -> None:
        lm = random_llada(dtype=torch.float32)
        before = lm.backbone.fingerprint()
        pack(lm.backbone)
        assert lm.backbone.fingerprint() == before

    @pytest.mark.parametrize(
        ("method", "library"),
        [
            ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
            ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
            ({"quant_method": "gptq", "bits": 4}, "optimum"),
        ],
        ids=["torchao", "bitsandbytes", "gptq"],
    )
    def test_a_missing_library_is_named(
        self, method: dict[str, Any], library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = save_folder(random_llada(), tmp_path)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
        monkeypatch.setitem(sys.modules, library, None)
        message = refusal(folder)
        assert str(method["quant_method"]) in message
        assert library in message
        assert "install" in message

    def test_an_adapter_is_not_merged_into_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        base = save_folder(random_llada(), tmp_path / "base")
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
        save_file({"weight": torch.zeros(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
        monkeypatch.setattr(type(random_llada().backbone), "hf_quantizer", object(), raising=False)
        assert "quantised" in refusal(base, adapter=tmp_path / "adapter")
