"""The pickle of a table of tensors, read before anything runs it.

PyTorch's reader of pickles calls no foreign code, but what it does call can allocate any memory (`bytearray`), run for
hours (`_codecs.encode`), or end the process (the hash of tuples nested a million deep).
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from typing import IO, Any

import torch

_BYTES = 3 * 10**7
_DEEPEST = 32
# What `torch.save` writes for tensors and parameters, also those with attributes.
_CALLED = {
    "collections OrderedDict", "torch Size", "torch Tensor", "torch.nn.parameter Parameter",
    "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state", "torch._tensor _rebuild_from_type_v2",
}  # fmt: skip
_INTO = {"SETITEM", "SETITEMS", "APPEND", "APPENDS", "BUILD"}  # what is below on the stack


def check_pickle(file: IO[bytes]) -> None:
    """Reject a pickle that makes more than tensors in tables, or nests them deep; reads up to its end.

    Raises:
        ValueError: it does, or is no pickle.
    """
    begun, stack, memo = file.tell(), list[int | None](), dict[Any, int]()  # how deep each is; None for a mark

    def pop(kinds: list[Any]) -> Iterator[int]:
        for kind in reversed(kinds):
            if kind is pickletools.stackslice:
                while (top := stack.pop()) is not None:
                    yield top
            elif kind is not pickletools.markobject:  # which ended the slice
                yield stack.pop() or 0

    try:
        for code, value, place in pickletools.genops(file):
            if code.name == "GLOBAL" and not _is_known(str(value)):
                raise ValueError(f"it calls {value}")
            if (place or 0) - begun > _BYTES:
                raise ValueError("it is too long")
            if code.name == "MARK":
                stack.append(None)
            elif code.name in ("BINPUT", "LONG_BINPUT"):
                memo[value] = stack[-1] or 0
            elif code.name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[value])
            else:
                taken = [*pop(code.stack_before)]
                depth = 1 + max(taken) if taken else 0
                if code.name in _INTO:
                    *parts, whole = taken
                    depth = max(whole, 1 + max(parts, default=0))
                if depth > _DEEPEST:
                    raise ValueError("it is nested too deep")
                stack += [depth] * len(code.stack_after)
    except (IndexError, KeyError, UnicodeDecodeError):
        raise ValueError("it is damaged") from None


def _is_known(name: str) -> bool:
    module, _, kind = name.partition(" ")
    storage = module in ("torch", "torch.cuda", "torch.storage") and kind.endswith("Storage")
    return storage or name in _CALLED or (module == "torch" and isinstance(getattr(torch, kind, None), torch.dtype))
