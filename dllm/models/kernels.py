"""What a block computes beside matrix products and attention: one kernel each on a GPU, by `torch.compile`.

A step over few columns is bound by the number of its kernels, and one over many by how often it reads its hidden
states; both fall by half. Elsewhere, and where torch cannot compile, the functions run as they are written.
``TORCH_COMPILE_DISABLE=1`` turns compilation off.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dllm.checks import Notice, first_line

_VARIANTS = 32
_SMALLEST = 1e-12  # largest number of a row, as which rows of zeros are scaled
P = ParamSpec("P")
R = TypeVar("R")


class Kernel(Generic[P, R]):
    """A function of tensors, compiled for GPUs at its first call there without gradients.

    Args:
        function: its first argument is a tensor.

    Attributes:
        devices: types of the devices that it is compiled for.
    """

    devices = frozenset({"cuda"})

    def __init__(self, function: Callable[P, R]) -> None:
        self.function = function
        self._compiled: Callable[P, R] | None = None
        self._failed = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        of = args[0]
        if self._failed or not (type(of) is Tensor and of.device.type in self.devices) or torch.is_grad_enabled():
            return self.function(*args, **kwargs)
        if self._compiled is None:
            # Compiled again for one column or row, and for inputs of other ranks.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
            self._compiled = torch.compile(self.function, fullgraph=True)
        try:
            return self._compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers fail with errors of any type
            if of.is_cuda and torch.cuda.is_current_stream_capturing():  # what fails is the capture
                raise
            self._failed = True
            warnings.warn(
                f"{self.function.__name__} runs uncompiled, which is slower: torch.compile failed "
                f"({first_line(error)}); TORCH_COMPILE_DISABLE=1 skips it",
                Notice,
                stacklevel=2,
            )
            return self.function(*args, **kwargs)


@Kernel
def rms_norm(x: Float[Tensor, "*B d"], weight: Float[Tensor, " d"], eps: float) -> Float[Tensor, "*B d"]:
    """Root-mean-square norm (arXiv 1910.07467) with statistics in float32 or wider."""
    return _rms_norm(x, weight, eps)


@Kernel
def add_rms_norm(
    x: Float[Tensor, "*B d"], added: Float[Tensor, "*B d"], weight: Float[Tensor, " d"], eps: float
) -> tuple[Float[Tensor, "*B d"], Float[Tensor, "*B d"]]:
    """The sum, and its `rms_norm`."""
    x = x + added
    return x, _rms_norm(x, weight, eps)


@Kernel
def rotate(
    x: Float[Tensor, "B H C D"], cos: Float[Tensor, "B 1 C R"], sin: Float[Tensor, "B 1 C R"]
) -> Float[Tensor, "B H C D"]:
    """Rotary embedding (arXiv 2104.09864) of the first R dimensions, in the precision of the cosines."""
    turned, size = x[..., : cos.shape[-1]], cos.shape[-1]
    wide = turned.to(cos.dtype)
    left, right = wide.chunk(2, dim=-1)
    turned = (wide * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), dim=-1)


@Kernel
def gated(gate: Float[Tensor, "*B m"], up: Float[Tensor, "*B m"]) -> Float[Tensor, "*B m"]:
    """Hidden activations of SwiGLU (arXiv 2002.05202): silu(gate) * up, in place without gradients."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.silu(gate) * up
    # The largest activations: in place they take half the memory. Of joined layers they are strided, and the next layer
    # would copy them.
    hidden = F.silu(gate, inplace=True)
    return hidden.mul_(up) if hidden.is_contiguous() else hidden * up


@Kernel
def quantise_rows(x: Float[Tensor, "N d"]) -> tuple[Float[Tensor, "N d"], Float[Tensor, "N 1"]]:
    """Each row divided by a scale, with which it fills the range of float8 (e4m3); and the scales, in float32."""
    wide, largest = x.float(), torch.finfo(torch.float8_e4m3fn).max
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(_SMALLEST) / largest
    return (wide / scale).clamp(-largest, largest).to(torch.float8_e4m3fn), scale


@Kernel
def write(
    keys: Float[Tensor, "B H C D"],
    values: Float[Tensor, "B H C D"],
    kept_keys: Float[Tensor, "B H L D"],
    kept_values: Float[Tensor, "B H L D"],
    index: Int[Tensor, "B C"],
) -> None:
    """Write the keys and values of some columns among those that are kept."""
    pairs = (kept_keys, keys), (kept_values, values)
    if torch.compiler.is_compiling():  # a compiled scatter would copy what is kept
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None, None]
        heads = torch.arange(keys.shape[1], device=keys.device)[:, None]
        for kept, fresh in pairs:
            kept[rows, heads, index[:, None]] = fresh
        return
    at = index[:, None, :, None].expand_as(keys)
    for kept, fresh in pairs:
        kept.scatter_(2, at, fresh)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
