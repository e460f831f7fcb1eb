"""Validation of a checkpoint folder before transformers reads it: `config.json`, and the headers of the weights.

Folders are not trusted. Some config keys make transformers download and import compiled attention kernels, read other
files, or allocate tensors of any declared size. So only published keys reach a config (`published`), and a folder
whose config, index and headers are inconsistent is rejected (`check_folder`, `check_causal_folder`) before anything
is computed or allocated.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from io import BytesIO
from math import isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from dllm.checks import first_line, number, out_of_memory
from dllm.files import read_json
from dllm.models.pickles import check_pickle
from dllm.models.published import is_whole

ATTENTION = ("sdpa", "eager")
DTYPES = ("float16", "bfloat16", "float32", "float64")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Quantisation methods of installed packages; others in transformers download kernels when used.
QUANTISED = {
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "gptq": "optimum and gptqmodel",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
}

_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
FLOATS = set(_NAMES.values())
_AGAIN = "copy config.json and weights of one model again"
# Keys of transformers' own that published configs have.
_COMMON = {
    "architectures", "attention_dropout", "attn_implementation", "auto_map", "bos_token_id", "dtype", "eos_token_id",
    "name_or_path", "pad_token_id", "quantization_config", "tie_word_embeddings", "torch_dtype", "use_cache",
}  # fmt: skip
# Keys that make transformers read other files, change the modules or import kernels.
_ACTED_ON = ("configuration_files", "transformers_weights", "fusion_config", "kernel_config", "use_kernels",
             "experts_implementation", "_experts_implementation", "distributed_config", "per_layer_config")  # fmt: skip
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # magic number of torch files before 1.6
_PICKLES = 5  # of such a file: that number, a protocol, the machine, the tensors, the keys of their storages
_CONFIG_BYTES, _HEADER_BYTES, _DEPTH = 10**7, 3 * 10**7, 32
_LARGEST = 2**24  # maximum plausible size
_LABELS = 10**5
_MODULES = 1024  # layers, or experts of a layer
_BUFFERS = 2**28  # entries of tensors that are no weights
_SHARED = 4  # tensors of a pickled file may be this many times as large as it: some models share all layers
_OPTIONAL = ("num_key_value_heads", "embedding_size", "head_dim")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "max_position_embeddings", *_OPTIONAL)  # fmt: skip


class Stored(NamedTuple):
    """The header of a stored tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def published(kwargs: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The keys of a config that are passed on to transformers: those of published configs.

    Args:
        kwargs: keys that the config class does not handle.
        names: keys of the family's published configs beside transformers' own.

    Raises:
        ValueError: an invalid value, or one that would make transformers download or import something.
    """
    _check_choices(kwargs)
    for name in ("pad_token_id", "bos_token_id"):
        if kwargs.get(name) is not None and not is_whole(kwargs[name]):
            raise ValueError(f"{name}={kwargs[name]!r} is not a token id; use a whole number or null")
    dropout = kwargs.get("attention_dropout")
    if dropout is not None and (isinstance(dropout, bool) or not isinstance(dropout, (int, float))):
        raise ValueError(f"attention_dropout={dropout!r} is not a number; use 0.0")
    return {name: value for name, value in kwargs.items() if name in _COMMON or name in names}


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder, validated.

    Raises:
        ValueError: it is missing or invalid.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a whole checkpoint")
    return _read(path)


def check_folder(family: Any, folder: Path) -> None:
    """Reject a folder without a complete checkpoint of a family.

    Args:
        family: the class of the model.
        folder: with `config.json` and the weights.

    Raises:
        ValueError: the problem and its fix, in one line.
    """
    path = folder / "config.json"
    content = read_config(folder)
    try:
        check_values(family.config_class, content)
        config = family.config_class(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, AttributeError) as error:
        raise _unusable(path, error) from None
    stored = read_headers(folder)
    tied = (family._tied_weights_keys or {}) if config.tie_word_embeddings else {}
    try:
        compare(family.__name__, config, expected_tensors(family, config), stored, folder, tied)
    except (TypeError, RuntimeError, OverflowError) as error:  # products of sizes that no tensor has
        raise _unusable(path, error) from None
    check_ids(config.vocab_size, config.mask_token_id, config.eos_token_id, folder)


def _unusable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be used ({first_line(error)}); copy it again from the published model")


def check_values(config_class: Any, content: Mapping[str, Any]) -> None:
    """Reject implausible sizes and constants, before building a config.

    Raises:
        ValueError: one is implausible.
    """
    for size in _SIZES:
        name = config_class.attribute_map.get(size, size)
        if name in content and not (content[name] is None and size in _OPTIONAL):
            check_size(name, content[name])
    for name in ("rms_norm_eps", "rope_theta"):
        if content.get(name) is not None:
            number(name, content[name], "a positive number", above=0, high=1e15)


def check_causal_folder(folder: Path) -> None:
    """Reject a folder whose files would make transformers' causal models download, import or allocate anything.

    Raises:
        ValueError: the problem and its fix, in one line.
    """
    config = read_config(folder)
    if (folder / "generation_config.json").is_file():
        _read(folder / "generation_config.json")
    path, stored = folder / "config.json", read_headers(folder)
    _check_counts(path, config)
    values = 8 * sum(file.stat().st_size for file in _weight_files(folder)[0])  # a bit each at least
    if not config.get("quantization_config"):
        for name, tensor in stored.items():
            if tensor.dtype not in FLOATS:
                raise ValueError(f"{tensor.file}: tensor {name} is {tensor.dtype}; weights are floating-point numbers")
        values = sum(prod(tensor.shape) for tensor in stored.values())
    for names in (("num_hidden_layers",), ("vocab_size", "hidden_size"), ("intermediate_size", "hidden_size")):
        sizes = [config.get(name, 1) for name in names]
        for name, size in zip(names, sizes, strict=True):
            check_size(f"{path}: {name}", size)
        if prod(sizes) > values:
            said = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
            raise ValueError(f"{path}: {said} needs more weights than there are; {_AGAIN}")
    # Other names, parts and defaults of a model count as well.
    with torch.device("meta"):
        described = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model = AutoModelForCausalLM.from_config(described, trust_remote_code=False)
    if isinstance(tied := getattr(model, "all_tied_weights_keys", None), Mapping):
        check_tied(folder, stored, tied)
    # Twice as many may be asked for: what is missing is named later.
    for kind, tensors, most in (("weights", model.parameters(), 2 * values), ("constants", model.buffers(), _BUFFERS)):
        count = sum(tensor.numel() for tensor in tensors)
        if count > most:
            raise ValueError(f"{path} asks for {count} {kind}, and at most {most} are plausible; {_AGAIN}")


def _check_counts(path: Path, content: Mapping[str, Any]) -> None:
    """Reject implausible numbers of layers and experts, each of which is a module, under any name; and in lists."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            _check_counts(path, value)
        elif isinstance(value, list):
            _check_listed(path, name, value)
        elif re.search("layer|expert|blocks", name) and is_whole(value) and value > _MODULES:
            raise ValueError(f"{path}: {name}={value} is not plausible; {_AGAIN}")


def _check_listed(path: Path, name: str, values: Sequence[Any]) -> None:
    """Reject implausible numbers, which may say how often something is repeated."""
    for value in values:
        if isinstance(value, Mapping):
            _check_counts(path, value)
        elif isinstance(value, list):
            _check_listed(path, name, value)
        elif is_whole(value) and value > _LARGEST:
            raise ValueError(f"{path}: {value} in {name} is not plausible; {_AGAIN}")


def read_headers(folder: Path) -> dict[str, Stored]:
    """Headers of the weights of a folder by name, without reading values.

    Raises:
        ValueError: a file that is missing, damaged, outside the folder, or inconsistent with the index.
    """
    files, index = _weight_files(folder)
    stored: dict[str, Stored] = {}
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is missing; copy or download this shard again")
        for name, tensor in read_header(path):
            if name in stored:
                raise ValueError(f"{path}: tensor {name} is in {stored[name].file.name} as well; {_AGAIN}")
            stored[name] = tensor
    if index is None:
        return stored
    for name in sorted(index.keys() | stored.keys()):
        said = index.get(name, "no shard")
        found = stored[name].file.name if name in stored else "no shard"
        if said != found:
            raise ValueError(
                f"{folder}: the index says that tensor {name} is in {said}, and it is in {found}; copy the index and "
                "the shards of one model again"
            )
    return stored


def read_tensors(folder: Path, names: Iterable[str], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the weights of a folder, one after the other, floats as this dtype.

    Args:
        folder: of the checkpoint.
        names: in this order; one that is stored under another name (tied weights) is that of the embeddings.
        dtype: of floats.

    Raises:
        ValueError: the folder was changed, or its weights are not safetensors.
    """
    stored = read_headers(folder)
    tied = next((name for name in stored if name.endswith(("embed_tokens.weight", "wte.weight"))), None)
    for name in names:
        at = stored.get(name) or stored.get(str(tied))
        if at is None or at.file.suffix != ".safetensors":
            raise ValueError(f"{folder}: tensor {name} cannot be read from safetensors; convert the weights to them")
        with safe_open(at.file, framework="pt") as weights:
            tensor = weights.get_tensor(name if name in stored else tied)
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that transformers will read, and the index if there is one."""
    apart = next(folder.glob("shard-?????-model-*.safetensors"), None)
    if apart is not None:
        raise ValueError(f"{apart} is of a distributed checkpoint; save the model with save_pretrained, and give that")
    for weights in WEIGHTS:
        index = folder / f"{weights}.index.json"
        if (folder / weights).is_file():
            return [folder / weights], None
        if index.is_file():
            listed = _weight_map(index, Path(weights).suffix)
            return [folder / file for file in sorted(set(listed.values()))], listed
    wanted = f"{' or '.join(WEIGHTS)} or shards with their index"
    if folder.parent.name == "snapshots":  # the hub's cache must not be edited
        raise ValueError(f"the hub has no weights for {folder} ({wanted}); use another repository or revision")
    raise ValueError(f"{folder} has no weights; put {wanted} there")


def _weight_map(index: Path, suffix: str) -> dict[str, str]:
    content = read_json(index)
    listed = content.get("weight_map")
    for key, value in (("weight_map", listed), ("metadata", content.get("metadata"))):
        if not isinstance(value, dict) or (key == "weight_map" and not value):
            raise ValueError(f"{index}: {key}={value!r} is not a table; copy or download it again")
    for name, file in listed.items():  # type: ignore[union-attr]  # a table, as checked
        if not isinstance(file, str) or not re.fullmatch(rf"[^/\\\0]+{re.escape(suffix)}", file):
            raise ValueError(f"{index}: tensor {name} is in {file!r}; expected {suffix} files in the same folder")
    return listed  # type: ignore[return-value]  # texts, as checked


def read_header(path: Path) -> Iterator[tuple[str, Stored]]:
    """Names, types and shapes of the tensors of a safetensors file, or of a pickled one; no value is read.

    Raises:
        ValueError: it is damaged, or a pickled one that holds anything else, or more than its size.
    """
    if path.suffix != ".safetensors":
        yield from _pickled(path)
        return
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > _HEADER_BYTES:
            raise ValueError("its header is too long")
        with safe_open(path, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118  # no mapping
            found = [(name, Stored(path, part.get_dtype(), tuple(part.get_shape()))) for name, part in slices.items()]
    except (SafetensorError, OSError, ValueError, OverflowError):
        raise ValueError(f"{path} is damaged or incomplete; copy or download it again") from None
    yield from found


def _is_old(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_OLD)) == _OLD


def _pickled(path: Path) -> Iterator[tuple[str, Stored]]:
    """The headers of a pickled file, read with weights_only."""
    old = _is_old(path)
    try:
        if not old and not zipfile.is_zipfile(path):
            raise ValueError("no archive")
        if not old:
            with zipfile.ZipFile(path) as archive:
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise ValueError("torch compresses nothing")
            check_pickle(BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")))
        else:
            with path.open("rb") as file:
                for _ in range(_PICKLES):
                    check_pickle(file)
        with torch.serialization.skip_data() if old else nullcontext():
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=not old)
    except Exception as error:  # torch raises what it likes for bad files
        if out_of_memory(error):
            raise
        raise ValueError(
            f"{path} is damaged, incomplete, or holds more than tensors; copy or download it again, or convert it to "
            "safetensors where it was made"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(part, torch.Tensor) for part in found.values()):
        raise ValueError(f"{path} is not a table of tensors; give the state_dict of a model")
    # A tensor may be stored under several names, but a small storage must not stand for large or many tensors.
    if sum(part.nbytes for part in found.values()) > _SHARED * path.stat().st_size:
        raise ValueError(f"{path} is smaller than the tensors that it says it holds; copy or download it again")
    yield from ((str(name), Stored(path, _NAMES.get(part.dtype, str(part.dtype)), tuple(part.shape)))
                for name, part in found.items())  # fmt: skip


def compare(
    family: str,
    config: PretrainedConfig,
    expected: Iterable[tuple[str, tuple[int, ...]]],
    stored: Mapping[str, Stored],
    folder: Path,
    tied: Mapping[str, str],
) -> None:
    """Reject weights whose names, shapes or dtypes do not match the config.

    Args:
        family: name of the model's class.
        config: of the model.
        expected: names and shapes of its tensors.
        stored: headers of the weights.
        folder: of the checkpoint.
        tied: names of tensors that are others, with those.

    Raises:
        ValueError: the first tensor that does not match.
    """
    quantised = getattr(config, "quantization_config", None) is not None
    seen, owners = set(), {name.rpartition(".")[0] for name in stored}
    for name, shape in expected:
        tensor = stored.get(name)
        if tensor is None and name in tied:
            continue
        if tensor is None:
            owner = name.rpartition(".")[0]
            if not (quantised and (owner in owners or name in owners)):
                raise ValueError(f"{folder}: tensor {name} is missing; {_AGAIN}")
            continue
        seen.add(name)
        if quantised and tensor.dtype not in FLOATS:
            continue
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{tensor.file}: tensor {name} is {tensor.dtype}, and weights are floating-point numbers; {_AGAIN}"
            )
        if tensor.shape != shape and not quantised:
            raise ValueError(
                f"{folder}: tensor {name} has another shape than config.json asks for, {list(tensor.shape)} "
                f"and not {list(shape)}; {_AGAIN}"
            )
    more = min(stored.keys() - seen, default=None)
    if more is not None and not quantised:
        raise ValueError(f"{folder}: tensor {more} is not part of {family}; {_AGAIN}")
    check_tied(folder, stored, tied)


def check_tied(folder: Path, stored: Mapping[str, Stored], tied: Mapping[str, str]) -> None:
    """Reject a tensor that the config says is another one, and that is stored with other values.

    Versions of transformers take one or the other for both.

    Args:
        folder: of the checkpoint.
        stored: headers of the weights.
        tied: names of tensors that are others, with those.

    Raises:
        ValueError: the first that differs.
    """
    for name, other in tied.items():
        if name not in stored or other not in stored or not {stored[name].dtype, stored[other].dtype} <= FLOATS:
            continue
        one, two = _value(stored[name], name), _value(stored[other], other)
        narrow = max(one.dtype, two.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        if not torch.equal(one.to(narrow), two.to(narrow)):
            raise ValueError(
                f"{folder}: tensor {name} differs from {other}, which it is by config.json; set "
                "tie_word_embeddings=false there, or remove the tensor"
            )


def _value(stored: Stored, name: str) -> torch.Tensor:
    """A tensor, memory-mapped if its file can be."""
    if stored.file.suffix == ".safetensors":
        with safe_open(stored.file, framework="pt") as weights:
            found: torch.Tensor = weights.get_tensor(name)
            return found
    weights = torch.load(stored.file, map_location="cpu", weights_only=True, mmap=not _is_old(stored.file))
    return weights[name]


def expected_tensors(family: Any, config: PretrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model, layer by layer, derived from models with one layer each of every kind."""
    kinds: dict[str, dict[str, tuple[int, ...]]] = {}
    for layer in range(config.num_hidden_layers):
        alone = family.layer_alone(config, layer)
        shapes = kinds.get(str(alone))
        if shapes is None:
            place, shapes = _single_layer(family, config, alone)
            if not kinds:
                yield from ((name, shape) for name, shape in shapes.items() if not name.startswith(f"{place}.0."))
            first = f"{place}.0"
            own = {name: shape for name, shape in shapes.items() if name.startswith(f"{first}.")}
            kinds[str(alone)] = shapes = {name.removeprefix(first): shape for name, shape in own.items()}
        yield from ((f"{place}.{layer}{name}", shape) for name, shape in shapes.items())


def _single_layer(
    family: Any, config: PretrainedConfig, alone: Mapping[str, Any]
) -> tuple[str, dict[str, tuple[int, ...]]]:
    """Name of the blocks of a model with one layer, and the shapes of its tensors."""
    single = deepcopy(config)
    for name, value in {"num_hidden_layers": 1, "quantization_config": None, **alone}.items():
        setattr(single, name, value)
    with torch.device("meta"):
        model: nn.Module = family(single)
    place = next(name for name, module in model.named_modules() if module is model.blocks)
    return place, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _read(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _CONFIG_BYTES:
        raise ValueError(f"{path} is of {path.stat().st_size} bytes, too long for a config; copy it again")
    content = read_json(path)
    waiting: list[tuple[str, Any, int]] = [("", content, 0)]
    while waiting:  # without recursion, since depth is checked too
        key, value, depth = waiting.pop()
        if depth > _DEPTH:
            raise ValueError(f"{path} is nested too deep; copy it again from the published model")
        if isinstance(value, float) and not isfinite(value):
            raise ValueError(f"{path}: {key}={value} is not finite; give a finite number")
        if isinstance(value, dict):
            try:
                _check_keys(value)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            # Settings of the quantiser are not checked.
            waiting += [(name, part, depth + 1) for name, part in value.items() if name != "quantization_config"]
        elif isinstance(value, list):
            waiting += [(key, part, depth + 1) for part in value]
    return content


def _check_keys(content: Mapping[str, Any]) -> None:
    for name in _ACTED_ON:
        harmless = name == "per_layer_config" and _sizes(content.get(name))
        if content.get(name) not in (None, False, {}, []) and not harmless:
            raise ValueError(f"{name}={content[name]!r} is not supported; remove it")
    labels = content.get("num_labels")
    if labels is not None and not (is_whole(labels) and 0 <= labels <= _LABELS):
        raise ValueError(f"num_labels={labels!r} is out of range; remove it")
    for name, kind in (("auto_map", dict), ("architectures", list), ("id2label", dict)):
        if content.get(name) is not None and not isinstance(content[name], kind):
            raise ValueError(f"{name}={content[name]!r} is not a {kind.__name__}; remove it")
    if not all(isinstance(name, str) for name in content.get("architectures") or ()):
        raise ValueError(f"architectures={content['architectures']!r} holds no names; remove it")
    _check_choices(content)


def _sizes(layers: Any) -> bool:
    """Whether these are heads of layers and their sizes, and nothing else."""
    return isinstance(layers, dict) and all(
        isinstance(own, dict) and own.keys() <= {"head_dim", "num_key_value_heads"} and all(map(_is_size, own.values()))
        for own in layers.values()
    )


def _check_choices(content: Mapping[str, Any]) -> None:
    for name in _ATTENTION_KEYS:
        if content.get(name) not in (None, *ATTENTION):
            raise ValueError(f"{name}={content[name]!r} is not supported; use {' or '.join(ATTENTION)}, or remove it")
    for name in ("dtype", "torch_dtype"):
        value = content.get(name)
        known = value.is_floating_point if isinstance(value, torch.dtype) else value in (None, *DTYPES)
        if not known:
            raise ValueError(f"unknown {name}={value!r}; expected one of {', '.join(DTYPES)}")
    quantised = content.get("quantization_config")
    if isinstance(quantised, (dict, str, list, int, float)):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        if not isinstance(quantised, dict) or method not in tuple(QUANTISED):  # it may be of any type
            said = f"quantization_config={quantised!r}" if method is None else f"quant_method={method!r}"
            raise ValueError(f"{said} is not supported; use weights quantised with one of {', '.join(QUANTISED)}")
        check_width(quantised)


def check_width(settings: Mapping[str, Any]) -> None:
    """Reject (ValueError) weights that quanto packs, whose products torch refuses in inference mode."""
    if settings["quant_method"] == "quanto" and (width := settings.get("weights", "int8")) not in ("int8", "float8"):
        raise ValueError(f"quanto's weights={width!r} are not supported; use int8 or float8")


def _is_size(value: Any) -> bool:
    return is_whole(value) and 1 <= value <= _LARGEST


def check_size(name: str, value: Any) -> None:
    """Reject (ValueError) what is not a plausible size."""
    if not _is_size(value):
        raise ValueError(f"{name}={value!r} is not a valid size; give an integer of at least 1 and at most {_LARGEST}")


def check_ids(rows: int, mask: int | None, eos: int | list[int] | None, folder: Path) -> None:
    """Reject special ids outside a vocabulary of this many rows, or equal to the mask; None for a model without one.

    Raises:
        ValueError: the first such id, or no id that ends a text.
    """
    named: list[tuple[str, str, Any]] = [("config.json", "eos_token_id", eos)]
    if mask is not None:
        named.insert(0, ("config.json", "mask_token_id", mask))
    if eos in (None, []):
        raise ValueError(f"{folder}/config.json has no eos_token_id; add the id that ends a text")
    if (folder / "generation_config.json").is_file():
        more = _read(folder / "generation_config.json").get("eos_token_id")
        named.append(("generation_config.json", "eos_token_id", [] if more is None else more))
    for file, name, ids in named:
        for token in ids if isinstance(ids, list) else [ids]:
            if not is_whole(token) or not 0 <= token < rows:
                raise ValueError(
                    f"{folder}/{file}: {name}={token!r} is not an id of this model; use one from 0 to {rows - 1}"
                )
            if name == "eos_token_id" and token == mask:
                raise ValueError(
                    f"{folder}/{file}: eos_token_id={token} is the mask_token_id as well; give the id that ends a text"
                )
