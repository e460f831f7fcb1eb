"""Logits against those of the published implementations, recorded in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dllm.models import ARCHITECTURES, MaskedDiffusionModel
from dllm.models.loading import load

ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])
NAMES = ["llada-rand-a", "dream-rand-a", "sdar-rand-a", "llada2-rand-a"]
CHECKPOINTS = pytest.mark.parametrize("checkpoint", NAMES)


def recorded(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The recorded forwards of a checkpoint: inputs and logits by entry."""
    entries: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "logits.safetensors").items():
        entry, name = key.split(".")
        entries.setdefault(entry, {})[name] = tensor
    return {name: entry for name, entry in entries.items() if "logits" in entry and "prefix" not in entry}


def worst_error(backbone: MaskedDiffusionModel, entry: dict[str, Tensor]) -> float:
    inputs = dict(entry)
    expected = inputs.pop("logits")
    if "block_length" in inputs:
        backbone.block_length = int(inputs.pop("block_length"))
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    with torch.no_grad():
        logits = backbone(**inputs).logits
    return (logits - expected)[real].abs().max().item()


@ATTENTION
@CHECKPOINTS
def test_logits_equal_the_published_ones(golden: Path, checkpoint: str, attention: str) -> None:
    backbone = load(golden / checkpoint, device="cpu", attn_implementation=attention).backbone
    errors = {name: worst_error(backbone, entry) for name, entry in recorded(golden / checkpoint).items()}
    assert len(errors) >= 5
    assert max(errors.values()) < 1e-4, errors


@ATTENTION
def test_logits_equal_the_published_ones_with_another_rope_base(shared: Path, attention: str) -> None:
    folder = shared / "golden" / "llada-rand-c"
    backbone = load(folder, device="cpu", attn_implementation=attention).backbone
    errors = {name: worst_error(backbone, entry) for name, entry in recorded(folder).items()}
    assert len(errors) == 5
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("checkpoint", ["llada-rand-a", "dream-rand-a"])
def test_default_positions_of_a_left_padded_batch_are_those_of_the_real_columns(golden: Path, checkpoint: str) -> None:
    entry = recorded(golden / checkpoint)["padded" if checkpoint.startswith("llada") else "pad_0"]
    assert (entry["attention_mask"] == 0).any()
    entry.pop("position_ids", None)
    assert worst_error(load(golden / checkpoint, device="cpu").backbone, entry) < 1e-4


@CHECKPOINTS
def test_a_float64_forward_differs_by_rounding_only(golden: Path, checkpoint: str) -> None:
    backbone = load(golden / checkpoint, device="cpu", dtype="float64").backbone
    for entry in recorded(golden / checkpoint).values():
        assert 0 < worst_error(backbone, entry) < 1e-4


@CHECKPOINTS
def test_weights_are_written_back_byte_for_byte(golden: Path, checkpoint: str, tmp_path: Path) -> None:
    load(golden / checkpoint, device="cpu").backbone.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (golden / checkpoint / "model.safetensors").read_bytes()


@CHECKPOINTS
def test_tensor_parallel_plan_names_every_projection_of_a_block_and_nothing_else(golden: Path, checkpoint: str) -> None:
    backbone = load(golden / checkpoint, device="cpu").backbone
    planned = {name.replace("*", "0"): style for name, style in type(backbone.config).base_model_tp_plan.items()}
    projections = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, torch.nn.Linear) and ".0." in name
    }
    if checkpoint.startswith("llada2"):  # rows of its joined projection are not those of one head after another
        projections = {name: module for name, module in projections.items() if ".layers.0.mlp." in name}
        planned = {name: style for name, style in planned.items() if "expert" not in name}
    assert planned.keys() == projections.keys()
    # A row-wise projection is the one whose result goes back into the residual stream.
    down = {name for name in projections if name.endswith(("attn_out", "ff_out", "o_proj", "down_proj"))}
    assert {name for name, style in planned.items() if style == "rowwise"} == down


def test_every_family_is_covered(golden: Path) -> None:
    covered = {type(load(golden / name, device="cpu").backbone).__name__ for name in NAMES}
    relatives = {"Fast_dLLM_QwenForCausalLM", "SDARMoeForCausalLM", "LLaDAMoEModelLM"}  # see test_relatives.py
    own = {"DiffusionGemmaForBlockDiffusion"}  # of transformers' modules, see test_diffusion_gemma.py
    assert covered | relatives == set(ARCHITECTURES) - own
