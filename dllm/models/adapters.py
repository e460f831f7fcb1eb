"""Adapters in PEFT's layout, such as LoRA: a folder with changes to the weights of a base model.

They are merged into the weights, W + scaling * B A for LoRA, so that the model behaves like any other. The result
differs from that of an unmerged adapter by rounding in the precision of the weights.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from dllm.checks import Notice, out_of_memory
from dllm.files import read_json
from dllm.models.checkpoint import read_header
from dllm.models.expressions import unmatchable
from dllm.models.published import is_whole

CONFIG = "adapter_config.json"
_CONFIG_BYTES = 10**6
# Options with several expressions, and how peft uses each.
_PATTERNS = {
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(\d+)\.",
}
_BY_NUMPY = ("UNILORA",)  # kinds that draw indices with NumPy, which allocates them
_FEW = 1 << 24  # numbers that any model may draw
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base model of an adapter, and its revision.

    Raises:
        ValueError: the adapter does not name it.
    """
    config = read_json(folder / CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{folder / CONFIG}: base_model_name_or_path={base!r} names no model; load the adapter's base model with "
            f"adapter={str(folder)!r}"
        )
    return base, revision if isinstance(revision, str) and revision else None


@contextmanager
def hidden(folder: Path) -> Iterator[Path]:
    """A checkpoint folder without an adapter in it, which transformers would apply automatically."""
    if not (folder / CONFIG).is_file():
        yield folder
        return
    with TemporaryDirectory() as links:
        for file in folder.iterdir():
            if file.name != CONFIG:
                (Path(links) / file.name).symlink_to(file.absolute())
        yield Path(links)


def merge(backbone: PreTrainedModel, folder: Path) -> None:
    """Merge an adapter into the weights of a model, in place.

    Args:
        backbone: the model.
        folder: of the adapter.

    Raises:
        ValueError: peft is not installed, or the adapter is incomplete, damaged, of another model, or of a kind that
            cannot be merged.
    """
    called = f"adapter={str(folder)!r}"
    if (folder / CONFIG).stat().st_size > _CONFIG_BYTES:
        raise ValueError(f"{called} has a {CONFIG} that is too long for a config; copy it again")
    read_json(folder / CONFIG)
    stored = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if stored is None:
        raise ValueError(f"{called} has no {' or '.join(WEIGHTS)}; give the folder of a complete adapter")
    if getattr(backbone, "hf_quantizer", None) is not None:
        raise ValueError(f"{called} cannot be merged into quantised weights; give the model it was quantised from")
    if any(weight.is_meta for weight in backbone.parameters()):
        raise ValueError(f"{called} cannot be merged into weights that are left on disk; use another device_map")
    try:
        import peft
    except ImportError:
        raise ValueError(f"{called} needs peft, which is not installed; pip install peft") from None
    try:
        list(read_header(stored))  # before its tensors take memory
        with warnings.catch_warnings(action="ignore"):
            problem = _merge(backbone, folder, peft)
    except Exception as error:  # peft raises what it likes for bad files
        if out_of_memory(error):
            raise
        problem = " ".join(str(error).split()) or type(error).__name__
    if problem:
        raise ValueError(
            f"{called} cannot be merged into this model: {problem}; give an adapter of this model, such as LoRA"
        )
    backbone.requires_grad_(True)


def _config(folder: Path, peft: Any) -> Any:
    """The config of an adapter; a notice names options that are set and that this peft does not know."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        config = peft.PeftConfig.from_pretrained(folder)
    written = read_json(folder / CONFIG)
    lists = (
        str(each.message).partition("[")[2].partition("]")[0] for each in told if "Unexpected" in str(each.message)
    )
    if unknown := [name for names in lists for name in re.findall(r"'(\w+)'", names) if written.get(name)]:
        with warnings.catch_warnings():
            warnings.simplefilter("always", Notice)
            warnings.warn(
                f"{folder / CONFIG}: this peft does not know {', '.join(unknown)} and ignores it; install a newer one",
                Notice,
                stacklevel=2,
            )
    return config


def _merge(backbone: PreTrainedModel, folder: Path, peft: Any) -> str | None:
    """Merge, or return the problem."""
    config = _config(folder, peft)
    if config.is_prompt_learning:
        return f"{config.peft_type} changes no weights"
    if getattr(config, "adapters", None):  # peft would download them
        return f"{config.peft_type} is made of other adapters"
    begun = str(getattr(config, "init_lora_weights", None))
    if begun.startswith("pissa_niter"):  # random at each load
        return f"init_lora_weights={begun!r} takes a random decomposition off the weights; convert it to LoRA with peft"
    config.inference_mode, config.base_model_name_or_path = True, None
    config.megatron_config = None  # for layers that no model here has; peft would import the module that it names
    if getattr(config, "layer_replication", None):
        return "layer_replication changes its layers"
    if problem := _unmatchable(config, backbone):
        return problem
    weights = peft.load_peft_weights(folder, device="cpu")
    wrong = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if wrong is not None:
        return f"tensor {wrong} holds NaN or infinity"
    if problem := _too_large(config, backbone, weights, peft):
        return problem
    model = peft.get_peft_model(backbone, config)
    if shared := _shared(model, backbone):
        return f"{shared} has its weight in common with another part of the model, which must not change"
    # peft ignores unknown tensors and initializes missing ones. Embeddings are optional.
    least, most = (peft.get_peft_model_state_dict(model, save_embedding_layers=all_) for all_ in (False, True))
    for names, what in (
        (weights.keys() - most.keys(), "has no place in it"),
        (least.keys() - weights.keys(), "is missing"),
    ):
        if names:
            return f"tensor {min(names)} {what}"
    for name, weight in weights.items():
        if weight.is_floating_point() != most[name].is_floating_point():  # some kinds have indices
            return f"tensor {name} is {weight.dtype}, and that of this kind is {most[name].dtype}"
    with torch.sparse.check_sparse_tensor_invariants():  # indices would write into memory of others
        peft.set_peft_model_state_dict(model, weights)
        model.merge_and_unload(safe_merge=True)
    return None


def _shared(model: Any, backbone: PreTrainedModel) -> str | None:
    """A module that the adapter changes, and whose weight is also that of others, such as a tied head."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer  # which peft applies to tied weights correctly
    from peft.tuners.tuners_utils import BaseTunerLayer

    uses = Counter(id(weight) for _, weight in backbone.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            base: Any = module.get_base_layer()
            if any(uses[id(weight)] > 1 for weight in base.parameters(recurse=False)):
                return str(name).removeprefix("base_model.model.")
    return None


def _too_large(config: Any, backbone: PreTrainedModel, weights: Mapping[str, torch.Tensor], peft: Any) -> str | None:
    """The problem with sizes of a config that its tensors do not have, before memory is allocated for them."""
    widest = max((size for weight in weights.values() for size in weight.shape), default=0)
    if config.peft_type in _BY_NUMPY and is_whole(config.r) and config.r > widest:
        return f"r={config.r} is more than its tensors hold"
    stored = sum(weight.numel() for weight in weights.values())
    with torch.device("meta"):
        model: Any = type(backbone)(deepcopy(backbone.config))
        own = sum(weight.numel() for weight in model.parameters())
        try:
            model = peft.get_peft_model(model, deepcopy(config))
        except RuntimeError:  # some kinds read values when they begin
            return None
    added = sum(weight.numel() for weight in model.parameters()) - own
    if added > stored + own:  # a few that are missing are named later
        return f"{CONFIG} asks for {added} weights, and its tensors hold {stored}"
    drawn = sum(buffer.numel() for buffer in model.buffers())  # from a seed
    return f"{CONFIG} asks for {drawn} random numbers, too many for this model" if drawn > max(own, _FEW) else None


def _unmatchable(config: Any, backbone: PreTrainedModel) -> str | None:
    """The problem with regular expressions that are invalid, too many, or take too long to match the modules' names.

    peft compiles them again for every module.
    """
    modules = [name for name, _ in backbone.named_modules()]
    named = (getattr(config, name, None) for name in ("target_modules", "exclude_modules", "feedforward_modules"))
    expressions = [rf"(?:{each})\Z" for each in named if isinstance(each, str)]
    for option, form in _PATTERNS.items():
        given = getattr(config, option, None) or ()
        patterns = [given] if isinstance(given, str) else list(given)
        if len(patterns) > len(modules):
            return f"{option} has {len(patterns)} patterns, and the model {len(modules)} modules"
        expressions += [form.format(each) for each in patterns]
    return unmatchable(expressions, modules)
