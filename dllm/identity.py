"""Content hashes of files, checkpoints and models.

Files are hashed completely. Hashes of files of 64 MiB and more are cached in the user's cache folder (XDG_CACHE_HOME,
else ~/.cache) with the file's path, size, times of modification and change, inode and device, and are valid while
these are unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dllm.files import disturbed, read_json, write_json
from dllm.own_code import files_of

if TYPE_CHECKING:
    from dllm.models.loading import LanguageModel

_BIG = 1 << 26  # bytes; hashes of smaller files are not cached
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
# Other files that affect the computation and the tokenization of a checkpoint.
_SETTINGS = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "additional_chat_templates/*", "vocab*", "merges.txt", "*.model",
    "*.tiktoken",
)  # fmt: skip
_TENSORS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
_CONFIGS = ("config.json", "adapter_config.json")
_AGAIN = "; run the command again once nobody writes it"
_PIECE = 1 << 19  # values per checksum, of at most 8 bytes each


class Stamp(NamedTuple):
    """File metadata to detect changes without reading the content."""

    path: Path
    device: int
    inode: int
    size: int
    modified: int


@runtime_checkable
class Reader(Protocol):
    """A sampler, a cache or another object of conf/ whose results depend on files."""

    def files(self) -> Iterable[Path]:
        """The files, or folders of checkpoints."""
        ...


def digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex digits.

    Raises:
        OSError: it cannot be read.
    """
    path = Path(os.path.realpath(path))
    before = _state(path)
    if before["size"] < _BIG:
        return _hash(path)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dllm" / "digests"
    except RuntimeError:  # a user without a home folder
        return _hash(path)
    note = cache / f"{hashlib.sha256(str(path).encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"
    with suppress(ValueError, OSError):  # damaged or unreadable
        if note.is_file():
            kept = read_json(note)
            if isinstance(found := kept.pop("sha256", None), str) and kept == before:
                return found
    found = _hash(path)
    if _state(path) == before:
        with suppress(OSError):  # an unwritable cache only costs time
            write_json(note, before | {"sha256": found})
    return found


def checkpoint(folder: Path) -> dict[str, str]:
    """Two short hashes of a checkpoint: of its weights, and of its config, tokenizer and chat template."""
    weights = {folder / name for name in _WEIGHTS}
    for index in folder.glob("*.index.json"):
        weights.add(index)
        named = read_json(index).get("weight_map")
        weights |= {folder / str(name) for name in (named.values() if isinstance(named, dict) else ())}
    settings = {file for pattern in _SETTINGS for file in folder.glob(pattern)} - weights
    return {"weights": _joint(folder, weights), "tokenizer_and_config": _joint(folder, settings)}


def stamps(*folders: Path) -> tuple[Stamp, ...]:
    """Stamps of the files of checkpoints."""
    patterns = (*_SETTINGS, *_TENSORS, "*.index.json")
    files = sorted({file for folder in folders for pattern in patterns for file in folder.glob(pattern)})
    return tuple(filter(None, map(_stamp, files)))


def check_weights(lm: LanguageModel, read: Iterable[Stamp] = ()) -> None:
    """Reject a model whose weight files were overwritten: on a CPU they are memory-mapped, not copied.

    A file that was removed or replaced is still mapped with its old content.

    Args:
        lm: the model.
        read: files that samplers and caches read at each start, also during a run.

    Raises:
        OSError: a file was changed.
    """
    check_unchanged(read)
    for before in lm.stamps:
        now = _stamp(before.path)
        if now is None or now == before or now[:3] != before[:3] or not any(map(before.path.match, _TENSORS)):
            continue
        if {weight.device.type for weight in lm.backbone.parameters()} & {"cpu", "meta"}:
            raise disturbed(str(before.path), before.path, _AGAIN)


def check_unchanged(read: Iterable[Stamp]) -> None:
    """Reject files that were removed, replaced or changed since they were stamped.

    Raises:
        OSError: the first of them.
    """
    for before in read:
        if _stamp(before.path) != before:
            raise disturbed(str(before.path), before.path, _AGAIN)


def model(lm: LanguageModel) -> dict[str, str]:
    """The same for a loaded model: of its folder, or of its weights if created in memory.

    Raises:
        OSError: its files changed since it was loaded.
    """
    if lm.folder is not None:
        found = checkpoint(lm.folder) | ({} if lm.adapter is None else {"adapter": of_path(lm.adapter)})
        now = stamps(*filter(None, (lm.folder, lm.adapter)))
        if lm.stamps and (other := set(lm.stamps) ^ set(now)):
            raise disturbed(str(min(other).path), min(other).path, _AGAIN)
        return found
    config = {name: value for name, value in lm.backbone.config.to_dict().items() if name != "_name_or_path"}
    tokenizer: Any = lm.tokenizer
    text = None if tokenizer is None else [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    return {
        "weights": checksum(lm.backbone.state_dict().items(), exact=True),
        "tokenizer_and_config": _short([config, text]),
    }


def contents(options: Any, paths: bool = False) -> dict[str, str]:
    """A hash of every file and folder named in options, at any depth.

    Args:
        options: values, or lists and dictionaries of them.
        paths: all of them are paths; otherwise values without a separator, such as `clean` or `auto`, are not.
    """
    match options:
        case Mapping():
            given = [value for name, value in options.items() if name != "_target_"]
            return contents(given, paths)
        case list() | tuple():
            return {name: found for value in options for name, found in contents(value, paths).items()}
        case str() if "::" in options:  # fsspec's syntax for a file within another one
            return contents(options.split("::"), paths)
        case str() if (url := re.match(r"(file|local):(//)?", options)) is not None:
            return contents(options[url.end() :], paths=True)
        case str() if not paths and not set("/." + os.sep) & set(options):
            return {}
        case str() if options and (Path(options).is_file() or Path(options).is_dir()):
            return {options: of_path(Path(options))}
        case str() if any(sign in options for sign in "*?["):
            named = map(Path, sorted(glob(options, recursive=True)))  # noqa: PTH207  # a pattern may be absolute
            return {str(file): digest(file) for file in named if file.is_file()}
    return {}


def of_path(path: Path) -> str:
    """A hash of a file, of a checkpoint folder, or of all files of any other folder."""
    if path.is_file():
        return digest(path)
    if any((path / name).is_file() for name in _CONFIGS):
        return _short(checkpoint(path))
    return tree(path)


def tree(folder: Path) -> str:
    """A hash of all files in a folder, following links."""
    return _joint(folder, within(folder))


def read_by(value: Any) -> dict[str, str]:
    """A hash of every file that an object reads, including objects in its fields, and of the code of one's own."""
    return {str(path): _content(path) for path in _read_by(value)} | dict(_code_of(value))


def _content(path: Path) -> str:
    return digest(path) if path.is_file() else _short(checkpoint(path))


def check_read(before: Mapping[str, str], *values: Any) -> None:
    """Reject objects that read other files than before; those that are not here, they have read already.

    Args:
        before: from `read_by`, of all of them, also of another machine.
        values: the objects.

    Raises:
        OSError: the first file that differs.
    """
    for path in (path for value in values for path in _read_by(value)):
        if path.exists() and before.get(str(path)) != _content(path):
            raise disturbed(str(path), path, _AGAIN)


def _read_by(value: Any) -> Iterator[Path]:
    if isinstance(value, Reader) and not isinstance(value, type):
        yield from value.files()
    if is_dataclass(value):
        for field in fields(value):
            yield from _read_by(getattr(value, field.name))


def _code_of(value: Any) -> Iterator[tuple[str, str]]:
    """The modules of classes that are no part of the package and those that these import, and hashes of their files."""
    for name, file in files_of(type(value)).items():
        with suppress(OSError):
            yield f"module {name}", digest(file)
    if is_dataclass(value):
        for field in fields(value):
            if is_dataclass(inner := getattr(value, field.name)):
                yield from _code_of(inner)


def stamps_read_by(*values: Any) -> tuple[Stamp, ...]:
    """Stamps of every file that objects read, as in `read_by`."""
    paths = [path for value in values for path in _read_by(value)]
    files = tuple(filter(None, (_stamp(path) for path in paths if path.is_file())))
    return files + stamps(*(path for path in paths if path.is_dir()))


def checksum(tensors: Iterable[tuple[str, Any]], exact: bool = False) -> str:
    """A checksum (16 hex digits) over every value of named tensors, the same on any device.

    Per piece x of a tensor, as 64-bit words, with a mixing function m with full avalanche:

        sum over i of m(x_i + (i + 1) c)   modulo 2^64

    Args:
        tensors: by name.
        exact: hash the exact values; otherwise floats are rounded to bfloat16.
    """
    state = hashlib.sha256()
    mixers: dict[torch.device, Tensor] = {}
    for name, tensor in tensors:
        for part in plain_tensors(tensor):
            state.update(f"{name}{tuple(part.shape)}".encode())
            if part.is_meta:
                continue  # offloaded to disk
            if part.device not in mixers:
                mixers[part.device] = torch.arange(1, _PIECE + 1, device=part.device) * _signed(_GAMMA)
            rounded = part.is_floating_point() and not exact
            sums = []
            for piece in part.reshape(-1).split(_PIECE):
                data = (piece.to(torch.bfloat16) if rounded else piece).contiguous().view(torch.uint8)
                words = torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64)
                sums.append(_mixed(words + mixers[part.device][: len(words)]).sum())
            if sums:
                state.update(torch.stack(sums).cpu().numpy().tobytes())
    return state.hexdigest()[:16]


_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mixed(words: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    words = (words ^ _shifted(words, 30)) * _signed(_FIRST)
    words = (words ^ _shifted(words, 27)) * _signed(_SECOND)
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, by: int) -> Tensor:
    return (words >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors of a tensor, none if it is something else: quantised ones have several."""
    if not isinstance(tensor, Tensor):
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    elif tensor.is_quantized or type(tensor).dequantize is not Tensor.dequantize:
        yield tensor.dequantize().detach()
    else:
        yield tensor.detach()


def is_system(name: str) -> bool:
    """Whether a folder is Python's or the file system's own."""
    return name in ("__pycache__", "lost+found")


def within(folder: Path, left_out: Callable[[str], bool] = is_system) -> Iterator[Path]:
    """All files below a folder, following links; each folder once, also with cyclic links.

    Args:
        folder: where to begin.
        left_out: whether folders of this name are not entered.

    Raises:
        OSError: a folder that is there cannot be read.
    """
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_raised):
        folders[:] = sorted(name for name in folders if not left_out(name))
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place) / name for name in names)


def _raised(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _joint(folder: Path, files: Iterable[Path]) -> str:
    """Joint hash of files with their names; missing ones are ignored."""
    return _short({str(file.relative_to(folder)): digest(file) for file in sorted(files) if file.is_file()})


def _short(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _state(path: Path) -> dict[str, Any]:
    found = path.stat()
    return {
        "path": str(path), "size": found.st_size, "modified": found.st_mtime_ns, "changed": found.st_ctime_ns,
        "inode": found.st_ino, "device": found.st_dev,
    }  # fmt: skip


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return Stamp(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
