"""Sub-blocks: each block is decoded in parts, from left to right (Fast-dLLM v2, arXiv 2509.26328, section 4.2).

Rule:

    commit i  if  i is in the part of `length` positions with the block's first mask,  and the base policy, which sees
                  the predictions of that part alone, commits it

A part is finished before the next one begins.

Where the model attends causally over blocks and predicts the next token (Fast-dLLM v2), the prediction for the first
position of a block depends on finished blocks only and is final. It is committed in a step of its own, so that the
others of its block are predicted with it in place; the published code does the same with the forward that stores the
keys and values of the finished block.

Differences: any base with one forward a step (the published one is a threshold). The published code also uses stale
keys and values within the block: `cache=sub_blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dllm.checks import number
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, OverPolicy, Sampler, constant_denoiser


@dataclass(frozen=True)
class SubBlockState:
    """State of an engine.

    Attributes:
        base: the policy that commits.
        state: its state.
        leads: whether the first position of a block is predicted by the blocks before it alone.
    """

    base: Sampler
    state: Any
    leads: bool


@dataclass(frozen=True)
class SubBlocks(OverPolicy):
    """Decode each block in parts.

    Args:
        length: positions of a part; the last part of a block is shorter where it does not divide the block.
        base: the policy that commits: a name of conf/sampler or an object; any stateless policy with one forward per
            step.

    Raises:
        ValueError: a length below 1, an unknown name, or a base of another kind.
    """

    length: int = 8
    base: str | Sampler = "threshold"

    def __post_init__(self) -> None:
        number("length", self.length, "a whole number of at least 1 (8 is published)", low=1, whole=True)
        self._check_base()

    def start(self, setup: Setup) -> SubBlockState:
        """Start the base."""
        base = self._base
        return SubBlockState(base, base.start(setup), setup.pattern is not None and setup.logits_shift > 0)

    def step(self, window: Window, denoise: Denoise, state: SubBlockState) -> Edit:
        """Commit in the part with the first mask."""
        part = torch.arange(window.masked.shape[1], device=window.masked.device).expand_as(window.masked) // self.length
        current = part == part.gather(1, window.masked.int().argmax(-1, keepdim=True))
        lead = torch.zeros_like(window.masked)
        if state.leads:
            lead[:, 0] = window.masked[:, 0] & (window.columns[:, 0] > window.first)
            current = torch.where(lead[:, :1], lead, current)
        # Only these are requested, so that a cache need not compute the others; they are worked out on the device.
        masked = window.masked & current
        prediction = denoise(masked, window.columns)
        view = replace(window, masked=masked, inside=window.inside & current)
        edit = state.base.step(view, constant_denoiser(prediction), state.state)
        return replace(edit, tokens=prediction.tokens.where(lead, edit.tokens), write=edit.write | lead)
