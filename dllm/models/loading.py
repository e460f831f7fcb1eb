"""`load`: loads a backbone and its tokenizer by name, without running any code of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal
from weakref import finalize

import torch
import transformers
from huggingface_hub import snapshot_download
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import logging

from dllm.checks import choice, first_line, out_of_memory
from dllm.files import BUNDLED, expanded, is_folder, read_json
from dllm.identity import Stamp, stamps
from dllm.models import FAMILIES, NEWER, MaskedDiffusionModel, adapters, family_of, leading, packed, parallel
from dllm.models.base import token_ids
from dllm.models.checkpoint import (
    ATTENTION,
    DTYPES,
    QUANTISED,
    check_values,
    check_width,
    read_config,
)
from dllm.models.expressions import check_quantiser
from dllm.models.linear import join_products
from dllm.models.tokenizers import load_tokenizer
from dllm.resolve import names

# Files of a checkpoint; code is not downloaded.
_TEXTS = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
_FILES = (*_TEXTS, "*.safetensors")
# Pickled weights are downloaded only if there are no others.
_PICKLES = (("config.json", "model*.safetensors", "pytorch_model*.bin"),
            (adapters.CONFIG, "adapter_model.safetensors", "adapter_model.bin"))  # fmt: skip
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model.

    Attributes:
        backbone: the denoiser, in evaluation mode.
        tokenizer: None without one; prompts must then be token ids.
        name: as given to `load`, with the adapter if any.
        adapter: folder of the merged adapter; None without one.
        folder: of its files; None for a model created in memory.
        spare: memory not used by any engine (`dllm.decoding.memory.Memory`).
        stamps: of its files, and of the adapter's, before reading; see `dllm.identity.stamps`.
        sampler: the policy used where none is given: a name of conf/sampler or an object.
        quantization: settings by which the weights were quantised when they were loaded; None where they were not.
    """

    backbone: MaskedDiffusionModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    adapter: Path | None = None
    folder: Path | None = None
    stamps: tuple[Stamp, ...] = ()
    spare: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)
    sampler: Any = field(default="vanilla", kw_only=True)
    quantization: Mapping[str, Any] | None = field(default=None, kw_only=True)

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return self.backbone.device


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    pack: bool | Literal["auto"] = False,
    adapter: str | Path | None = None,
    tp: bool = False,
    quantization: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """Load a denoiser and its tokenizer.

    The architecture is selected by ``model_type`` in ``config.json`` and implemented in this package:
    remote code, named by ``auto_map``, is never executed. Tokens that end a chat turn or are
    listed in ``generation_config.json`` also count as end-of-text.

    Args:
        name: a model of conf/model such as "tiny-llada" or "llada-8b-instruct", a local folder, or a hub id.
        device: of the weights; None for the first GPU, or the CPU without one.
        dtype: "auto" for the checkpoint's, or "float16", "bfloat16", "float32", "float64" or a `torch.dtype`.
        device_map: distribution of the model over devices, as in transformers; instead of `device`.
        attn_implementation: "sdpa" (the default) or "eager".
        revision: branch, tag or commit of a hub id.
        pack: reorder the weights for small forwards on a CPU, in float32: faster with the same results up to rounding,
            but such a model cannot be saved, moved or trained. "auto", as in the commands, does so where it can.
        adapter: folder or hub id of a LoRA, or of another adapter that peft can merge into the weights. Its tokenizer,
            if any, replaces the model's. If `name` is an adapter, its base model is loaded.
        tp: divide the model over the processes that torchrun started (tensor parallelism). All of them then make the
            same calls, with the same seeds, and get the same results.
        quantization: quantise the weights, by settings of transformers such as {"quant_method": "bitsandbytes",
            "load_in_8bit": True}. A checkpoint of quantised weights names its own settings.

    Raises:
        ValueError: an unknown name or option, or a checkpoint that is incomplete, damaged, of another
            architecture, or holds NaN or infinite weights.
    """
    options = _options(device, dtype, device_map, attn_implementation)
    choice("pack", pack, (True, False, "auto"))
    choice("tp", tp, (True, False))
    if quantization is not None:
        _quantization(quantization)
        options |= {"quantization": quantization}
        if adapter is not None:
            raise ValueError(
                f"adapter={str(adapter)!r} cannot be merged into weights that quantization changes; "
                "leave one of them out"
            )
    if not tp:
        lm = _load(name, revision, adapter, pack, options, 1)
        return replace(lm, quantization=quantization)
    parallel.check_options(device, device_map, pack, adapter, quantization)
    told = leading.tell_load(
        name=name, dtype=dtype, attn_implementation=attn_implementation, revision=revision, pack=pack, tp=True
    )
    count = parallel.join()
    options = {key: value for key, value in options.items() if key != "device_map"} | parallel.arguments(count)
    lm = parallel.together(lambda: _load(name, revision, adapter, pack, options, count))
    if told is not None:
        lm.backbone.number = told
        finalize(lm.backbone, leading.tell, told, "forget").atexit = False
    return lm


def _load(
    name: str | Path,
    revision: str | None,
    adapter: str | Path | None,
    pack: bool | str,
    options: Mapping[str, Any],
    count: int,
) -> LanguageModel:
    """Load a model divided over `count` processes."""
    base, revision, adapter_folder = _base_and_adapter(name, revision, adapter)
    # The config comes first, to reject an unsupported model before downloading its weights.
    family = _family(checkpoint_folder(base, revision, files=("config.json",)))
    folder = checkpoint_folder(base, revision)
    if "quantization" in options and (method := _quantised(folder)) is not None:
        raise ValueError(
            f"quantization has no effect on {folder}, whose weights are quantised with {method}; leave it out"
        )
    if count > 1:
        _check_division(family, folder, adapter_folder, count)
    before = stamps(*filter(None, (folder, adapter_folder)))
    with quiet():
        backbone = _load_weights(family, folder, options)
        tokenizer = load_tokenizer(folder)
        if adapter_folder is not None:
            adapters.merge(backbone, adapter_folder)
            tokenizer = load_tokenizer(adapter_folder) or tokenizer
    if count > 1:
        pack = False
    if pack is True or (pack and packed.why_not(backbone) is None):
        packed.pack(backbone)
    elif backbone.device.type == "cuda":  # where launching and reading the weights is most of the time
        join_products(backbone.blocks)
    backbone.extra_eos_token_ids = _extra_eos(backbone, tokenizer, folder)
    _check_vocabulary(backbone, tokenizer, folder)
    if tokenizer is not None and tokenizer.mask_token_id != backbone.mask_token_id:
        # The config decides; LLaDA's published tokenizer does not declare its mask token.
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(backbone.mask_token_id)
    called = f"{name}{'' if adapter is None else f'+{adapter}'}"
    return LanguageModel(backbone, tokenizer, called, adapter_folder, folder, before)


def _base_and_adapter(
    name: str | Path, revision: str | None, adapter: str | Path | None
) -> tuple[str | Path, str | None, Path | None]:
    """The model to load with its revision, and the folder of the adapter to merge."""
    given = None if adapter is None else _adapter_folder(adapter)
    folder = checkpoint_folder(name, revision, files=("config.json", adapters.CONFIG))
    if not (folder / adapters.CONFIG).is_file():
        return name, revision, given
    if (folder / "config.json").is_file():
        if given is None:
            raise ValueError(
                f"{folder} holds a model and {adapters.CONFIG}; give adapter={str(name)!r} to apply the adapter, or "
                f"remove {adapters.CONFIG}"
            )
        return name, revision, given
    base, of_base = adapters.base_of(folder)
    if given is not None:
        raise ValueError(f"name={str(name)!r} is an adapter itself; give its base model ({base!r}) to apply another")
    try:
        found = checkpoint_folder(base, files=("config.json",))
    except ValueError as error:
        raise ValueError(f"{folder} is an adapter, and its base model is not found: {error}") from None
    downloaded = found.parent.name == "snapshots" and found != expanded(base)
    return base, of_base if downloaded else None, _adapter_folder(name, revision)


def _adapter_folder(adapter: str | Path, revision: str | None = None) -> Path:
    folder = checkpoint_folder(adapter, revision, (adapters.CONFIG,), "adapter", ())
    if (folder / adapters.CONFIG).is_file():
        return checkpoint_folder(adapter, revision, (*_TEXTS, adapters.WEIGHTS[0]), "adapter", ())
    raise ValueError(
        f"adapter={str(adapter)!r} has no {adapters.CONFIG}; give the folder of an adapter, as peft saves it"
    )


def checkpoint_folder(
    name: str | Path,
    revision: str | None = None,
    files: Sequence[str] = _FILES,
    option: str = "name",
    known: Sequence[str] | None = None,
) -> Path:
    """Resolve a name to a folder; a hub id is downloaded into the Hugging Face cache.

    Args:
        name: as for `load`; also bundled models that are not denoisers, such as "tiny-guide".
        revision: branch, tag or commit of a hub id.
        files: patterns of the files to download.
        option: parameter name in errors.
        known: names that errors suggest; None for those of conf/model.

    Raises:
        ValueError: an unknown model, or a `revision` for a local folder.
    """
    if isinstance(name, Path) and is_folder(name):  # and not a model of that name
        name = name.absolute()
    path = str(name)
    models = [model for model in names("model") if model != "custom"]
    if path in models:
        path = _path_of(path)
    folder = BUNDLED / path if path in _bundled() else expanded(path)
    if path and is_folder(folder):
        if revision is not None:
            raise ValueError(f"revision={revision!r} has no effect on a local folder ({folder}); leave it out")
        return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        suggested = ", ".join(models if known is None else known)
        kind = f", hub id or known model; known are {suggested}" if suggested else " or hub id; check the spelling"
        raise ValueError(f"{option}={str(name)!r} is not a folder{kind}")
    try:
        return _download(path, revision, files)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{option}={str(name)!r} is not a folder, and {path!r} cannot be fetched from the hub "
            f"({first_line(error)}); check the spelling and the connection, or give the folder of a downloaded copy"
        ) from None


def _download(path: str, revision: str | None, files: Sequence[str]) -> Path:
    """Download files of a hub repository; pickled weights only if there are no others."""
    folder = Path(snapshot_download(path, revision=revision, allow_patterns=list(files), ignore_patterns="*/*"))
    for config, usual, pickles in _PICKLES:
        wanted = {usual, "*.safetensors"}.intersection(files) and (folder / config).is_file()
        if wanted and not any(folder.glob(usual)):
            snapshot_download(path, revision=revision, allow_patterns=[pickles], ignore_patterns="*/*")
    return folder


def _bundled() -> list[str]:
    return [folder.name for folder in BUNDLED.iterdir()] if BUNDLED.is_dir() else []


def _path_of(model: str) -> str:
    text = (resources.files("dllm.conf") / "model" / f"{model}.yaml").read_text()
    return str(OmegaConf.select(OmegaConf.create(text), "path"))


def _options(
    device: str | torch.device | None,
    dtype: str | torch.dtype,
    device_map: str | dict[str, Any] | None,
    attn_implementation: str | None,
) -> dict[str, Any]:
    """Validate the options and convert them to arguments of `from_pretrained`."""
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype={dtype!r}; expected one of auto, {', '.join(DTYPES)} or a torch.dtype")
        dtype = getattr(torch, dtype)
    if isinstance(dtype, torch.dtype) and str(dtype).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"dtype={dtype} is not supported for weights; use {', '.join(DTYPES)}")
    if attn_implementation not in (None, *ATTENTION):
        raise ValueError(f"unknown attn_implementation={attn_implementation!r}; expected one of {', '.join(ATTENTION)}")
    if device_map is not None and device is not None:
        raise ValueError(f"device={device!r} has no effect beside device_map={device_map!r}; give one of them")
    placement: Any = device_map
    if device_map is None or (isinstance(device_map, str) and device_map not in _SPREADS):
        placement = {"": find_device(device) if device_map is None else find_device(device_map, "device_map")}
    elif not isinstance(device_map, str):
        placement = _placement(device_map)
    options = {"dtype": dtype, "device_map": placement}
    return options if attn_implementation is None else options | {"attn_implementation": attn_implementation}


def _placement(device_map: Any) -> dict[str, Any]:
    """A device for each part, at least one of which is not "disk" (offloaded parts are loaded when needed)."""
    placement: dict[str, Any] = dict(device_map) if isinstance(device_map, Mapping) else {}
    devices = [each for each in placement.values() if each != "disk"]
    if not all(isinstance(part, str) for part in placement) or not devices:
        raise ValueError(f"device_map={device_map!r} assigns no part to a device; give {{part: device}}")
    for each in devices:
        if not isinstance(each, (str, int, torch.device)):
            raise ValueError(f"device_map={placement!r} has values that are not devices; give {{part: device}}")
        find_device(each, "device_map")  # type: ignore[arg-type]  # torch takes numbers of devices as well
    return placement


def find_device(device: str | torch.device | None, parameter: str = "device") -> torch.device:
    """A device by name; None for the GPU if available, else the CPU.

    Raises:
        ValueError: the device is not available.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.empty(0, device=device).device
        if place.type == "meta":
            raise RuntimeError("holds no weights")
        return place
    except (RuntimeError, AssertionError, TypeError, ImportError):  # some types need another package
        raise ValueError(f"{parameter}={str(device)!r} is not available here; use cpu or a device torch sees") from None


def _family(folder: Path) -> type[MaskedDiffusionModel]:
    """The model class for a `config.json`."""
    path, config = folder / "config.json", read_config(folder)
    family = family_of(config)
    if family is None:
        model_type = str(config.get("model_type"))
        if model_type in NEWER:
            raise ValueError(
                f"{path}: model_type={model_type!r} needs transformers {NEWER[model_type]} or newer, and "
                f"{transformers.__version__} is installed; install a newer one"
            )
        raise ValueError(f"{path}: model_type={model_type!r} is not supported; use one of {', '.join(FAMILIES)}")
    config_class: Any = family.config_class
    for key, what in (("mask_token_id", "the id of [MASK]"), ("eos_token_id", "the id that ends a text")):
        if key not in config and key not in getattr(config_class, "default_ids", ()):
            raise ValueError(f"{path} has no {key}; add {what}")
    try:
        with quiet():
            check_values(config_class, config)
            config_class.from_dict(config)
            if config.get("quantization_config") is not None:
                AutoQuantizationConfig.from_dict(dict(config["quantization_config"]))
    except ImportError as error:
        raise _missing_library(folder, error) from None
    except Exception as error:  # noqa: BLE001  # transformers validates the rest, with errors of any type
        raise ValueError(f"{path} cannot be used: {' '.join(str(error).split())}") from None
    return family


def _check_division(family: type[MaskedDiffusionModel], folder: Path, adapter: Path | None, count: int) -> None:
    """Reject a model that tensor parallelism does not support over this many processes."""
    if adapter is not None:
        raise ValueError(f"{adapter} is an adapter, which cannot be merged with tp=true; use tp=false")
    if (method := _quantised(folder)) is not None:
        raise ValueError(f"{folder} has weights quantised with {method}, which tp=true does not support; use tp=false")
    config_class: Any = family.config_class
    parallel.check_family(family, config_class.from_dict(read_config(folder)), count)


def _quantization(given: Any) -> Any:
    """Settings of transformers.

    Raises:
        ValueError: they are not supported or invalid, or their library is not installed.
    """
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if method not in tuple(QUANTISED):  # it may be of any type
        raise ValueError(
            f"quantization={given!r} is not supported; give {{quant_method: ..., ...}} with one of "
            f"{', '.join(QUANTISED)}, and its settings in transformers"
        )
    try:
        check_width(given)
        with quiet():
            return AutoQuantizationConfig.from_dict(dict(given))
    except ImportError as error:
        raise _needs_library(given, error) from None
    except Exception as error:  # noqa: BLE001  # transformers validates the rest, with errors of any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"quantization={given!r} cannot be used ({reason}); see transformers for {method}") from None


def _unusable(given: Mapping[str, Any], error: Exception) -> ValueError:
    if isinstance(error, ImportError):
        return _needs_library(given, error)
    return ValueError(f"quantization={given!r} cannot be used here ({first_line(error)}); leave it out, or use another")


def _needs_library(given: Mapping[str, Any], error: ImportError) -> ValueError:
    return ValueError(
        f"quantization={given!r} needs a library that is not installed ({first_line(error)}); install "
        f"{QUANTISED[given['quant_method']]}, or leave it out"
    )


def _missing_library(folder: Path, error: ImportError) -> ValueError:
    method = _quantised(folder)
    return ValueError(
        f"{folder} has weights quantised with {method}, and a library for them is not installed ({first_line(error)}); "
        f"install {QUANTISED.get(str(method), error.name or 'it')}, or use the model it was quantised from"
    )


def _quantised(folder: Path) -> str | None:
    """The quantisation method of the weights; None if not quantised."""
    return (read_json(folder / "config.json").get("quantization_config") or {}).get("quant_method")


def quantised(backbone: MaskedDiffusionModel, quantization: Mapping[str, Any]) -> MaskedDiffusionModel:
    """A model with the same weights, quantised as `load` quantises those of a checkpoint.

    Raises:
        ValueError: the settings cannot be used, or their library is not installed.
    """
    settings = _quantization(quantization)
    given = {"config": backbone.config, "dtype": backbone.dtype, "device_map": {"": backbone.device}}
    try:
        with quiet():
            made: Any = type(backbone).from_pretrained(
                None, state_dict=backbone.state_dict(), quantization_config=settings, **given
            )
    except Exception as error:  # of any type
        if out_of_memory(error):
            raise
        raise _unusable(quantization, error) from None
    return made


def _load_weights(family: type[MaskedDiffusionModel], folder: Path, options: Mapping[str, Any]) -> MaskedDiffusionModel:
    """Load exactly the tensors of the architecture."""
    options = dict(options) | {"output_loading_info": True, "ignore_mismatched_sizes": True, "local_files_only": True}
    if (given := options.pop("quantization", None)) is not None:
        options["quantization_config"] = _quantization(given)
    check_quantiser(folder)
    try:
        with adapters.hidden(folder) as bare:
            loaded: Any = family.from_pretrained(bare, **options)
    except ImportError as error:
        raise (_missing_library(folder, error) if given is None else _needs_library(given, error)) from None
    except Exception as error:  # unpickling a truncated file may raise anything
        if out_of_memory(error):
            raise
        if given is not None:
            raise _unusable(given, error) from None
        if isinstance(error, RuntimeError) and (method := _quantised(folder)) is not None:  # as without a GPU
            raise ValueError(
                f"{folder} has weights quantised with {method}, which cannot be used here ({first_line(error)}); "
                "use the model it was quantised from"
            ) from None
        if any(folder.glob("*.safetensors")):
            raise
        # torch's message explains how to run the code in such a file.
        reason = "it holds more than tensors" if "Weights only load failed" in str(error) else first_line(error)
        raise ValueError(
            f"{folder}: pytorch_model*.bin cannot be read ({reason}); copy or download the weights again"
        ) from None
    backbone, info = loaded
    if backbone.is_divided:
        parallel.localise(backbone)
    backbone.name_or_path = backbone.config.name_or_path = str(folder)
    problems = {
        # Usually compared by headers before. Newer transformers report both shapes with the name.
        "has another shape than config.json asks for": [
            entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]
        ],
        "is missing": info["missing_keys"],
        f"is not part of {family.__name__}": info["unexpected_keys"],
        "holds NaN or infinity": [
            name for name, weight in backbone.state_dict(keep_vars=True).items() if not _is_finite(weight)
        ],
    }
    for problem, tensors in problems.items():
        if tensors:
            raise ValueError(
                f"{folder}: tensor {min(tensors)} {problem}; copy config.json and weights of one model again"
            )
    return backbone


def _is_finite(weight: torch.Tensor) -> bool:
    # Quantised formats are always finite, and offloaded weights are not in memory.
    ordinary = weight.is_floating_point() and type(weight.data) is torch.Tensor and not weight.is_meta
    if not ordinary:
        return True
    wide = weight.float() if weight.element_size() == 1 else weight  # torch knows of few functions of float8
    return bool(wide.isfinite().all())


def _extra_eos(
    backbone: MaskedDiffusionModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    listed = read_json(path).get("eos_token_id") if path.is_file() else None
    added = {} if tokenizer is None else tokenizer.get_added_vocab()
    named = [added[token] for token in backbone.end_of_turn if token in added]
    return (*token_ids(listed), *(each for each in named if each != backbone.mask_token_id))


def _check_vocabulary(backbone: MaskedDiffusionModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Reject a tokenizer with ids beyond the model's vocabulary."""
    ids, rows = {} if tokenizer is None else tokenizer.get_vocab(), backbone.config.get_text_config().vocab_size
    token = max(ids, key=ids.__getitem__, default=None)
    if token is not None and ids[token] >= rows:
        raise ValueError(
            f"{folder}: the tokenizer gives {token!r} the id {ids[token]}, and this model's ids are 0 to {rows - 1}; "
            "copy the tokenizer files of this model"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars and load reports of transformers; problems are raised as errors."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
