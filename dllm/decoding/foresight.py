"""The next step, launched before the last one is read, so that the device does not wait for the host.

Reading, bookkeeping and planning take the host about as long as a step over few columns takes a GPU. Most steps do not
depend on what the host reads: a row stays in its block, and which of its positions are still masked, the device knows.
Such a step is launched at once, and the host reads the last one meanwhile. Where a row leaves its block after all, the
step is dropped and taken anew. Nothing has to be undone then: a foreseen step does not write to the canvas, it leaves
the states of policy and cache as they are, and the keys and values that it writes are those of the step that is taken
instead, or belong to no canvas (`Denoiser`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dllm.cache.base import Cache, Steady
from dllm.decoding.canvas import Canvas
from dllm.decoding.denoiser import Account, Denoiser
from dllm.decoding.gate import Gate
from dllm.decoding.window import Draws, Edit, Unforeseen, Window
from dllm.models.attention import BlockCausal
from dllm.models.base import MaskedDiffusionModel
from dllm.samplers.base import Sampler

DEVICES = {"cuda"}  # that work while the host does something else


@dataclass(frozen=True)
class Taken:
    """A step of the policy, before its edit is written.

    Attributes:
        window: what the policy saw.
        edit: what it wants to write.
        account: of the forwards.
    """

    window: Window
    edit: Edit
    account: Account


def foreseeable(
    sampler: Sampler, cache: Cache, cfg_scale: float, backbone: MaskedDiffusionModel, pattern: BlockCausal | None
) -> bool:
    """Whether an engine takes steps in advance: one with a policy whose step is a single forward, on a GPU."""
    plain = sampler.single_forward and cache.measure_every is None and not cfg_scale
    # Where a position is read in the block before its own, the columns to compute depend on whether it is masked.
    apart = backbone.uniform or backbone.is_divided or (pattern is not None and backbone.logits_shift)
    return plain and not apart and backbone.device.type in DEVICES


class Foresight:
    """Takes steps of an engine in advance.

    Args:
        canvas: of the engine.
        denoiser: of the engine.
        gate: of the engine.
        sampler: the policy; one whose step is a single forward about the window and leaves its state unchanged.
        state: of the policy.
    """

    def __init__(self, canvas: Canvas, denoiser: Denoiser, gate: Gate, sampler: Sampler, state: Any) -> None:
        self._canvas, self._denoiser, self._gate = canvas, denoiser, gate
        self._sampler, self._state = sampler, state
        self._off = False

    def __call__(self, taken: Taken) -> Taken | None:
        """The step after one whose edit is written and not read; None where it may depend on what is read."""
        canvas, cache = self._canvas, self._denoiser.cache
        if self._off or not (taken.edit.is_plain and isinstance(cache, Steady) and cache.steady(canvas.rows)):
            return None
        if self._gate.holds or not canvas.foreseeable:
            return None
        try:
            window = canvas.foreseen(taken.window)
            account = self._denoiser.bind(window, foreseen=True)
            return Taken(window, self._sampler.step(window, self._denoiser, self._state), account)
        except Exception as error:  # noqa: BLE001  # will be reported by the step itself
            # What is raised before a forward may be tried again at little cost; the rest would take one in vain.
            self._off = isinstance(error, Draws) or not isinstance(error, Unforeseen)
            return None
