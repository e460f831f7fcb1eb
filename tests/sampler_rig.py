"""Runs one step of a sampler on confidences given by hand."""

from __future__ import annotations

from math import nan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dllm.decoding.prediction import Prediction, Sampling
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window

# What a block may look like: nan stands for a position that is decoded already.
confidences = st.lists(st.one_of(st.just(nan), st.floats(0.02, 0.999)), min_size=1, max_size=12).filter(
    lambda values: any(value == value for value in values)
)
MASK = 99
GUESSES = 100


def facts() -> Setup:
    """Those of an engine for one row of 20 columns."""
    return Setup(
        slots=1, length=20, mask_token_id=MASK, logits_shift=0, kv_shape=(2, 1, 4), pattern=None, hidden_size=8,
        dtype=torch.float64, device=torch.device("cpu"), tokenizer=None, vocab_size=GUESSES + 2, fingerprint=str,
        rehearsal=lambda other: pytest.fail("there is nothing to decode with"),
        tensor=lambda name, shape: torch.zeros(tuple(shape), dtype=torch.float64),
    )  # fmt: skip


def request(block_length: int = 8, generated: int = 16) -> Request:
    """That many positions behind a prompt of 4 tokens."""
    return Request(np.array([1, 2, 3, 4, *[MASK] * generated]), MASK, (98,), block_length, Sampling(), seed=0)


def window(
    masked: Tensor, step: int = 0, block: int = 0, entry_masks: int | None = None, block_length: int | None = None,
    span: int = 16,
) -> Window:  # fmt: skip
    """A window over the columns 4, 5, ... of one row."""
    masked = masked[None]
    width = masked.shape[1]
    return Window(
        rows=torch.tensor([0]),
        tokens=torch.full((1, 20), MASK),
        first=torch.tensor([0]),
        region=torch.arange(20)[None] >= 4,
        start=torch.tensor([4 - block * (block_length or width)]),
        span=torch.tensor([span]),
        columns=4 + torch.arange(width)[None],
        inside=torch.ones_like(masked),
        masked=masked,
        block=torch.tensor([block]),
        entry_masks=torch.tensor([width if entry_masks is None else entry_masks]),
        step=torch.tensor([step]),
        block_length=torch.tensor([block_length or width]),
        ends=torch.tensor([[98]]),
        stop_at_eos=torch.tensor([True]),
        uniform=lambda: torch.rand(1, width, generator=torch.Generator().manual_seed(step)),
    )


def chosen(sampler: Any, confidence: list[float], **where: Any) -> list[int]:
    """Offsets that one step commits, given the confidence of each position; nan stands for a decoded one."""
    values = torch.tensor(confidence, dtype=torch.float64)
    view = window(~values.isnan(), span=2 * len(confidence), **where)
    logits = two_way(values[~values.isnan()])

    def denoise(*args: Any, **kwargs: Any) -> Prediction:
        return Prediction(logits, view.masked, view.masked.flatten().nonzero()[:, 0], GUESSES, Sampling())

    state = sampler.start(facts())
    asked = request(len(confidence), 2 * len(confidence))
    sampler.check(state, asked)
    sampler.enter(state, 0, asked)
    edit: Edit = sampler.step(view, denoise, state)
    assert torch.equal(edit.columns, view.columns)
    assert (edit.tokens[edit.write] == 0).all()
    return edit.write[0].nonzero()[:, 0].tolist()


def two_way(confidence: Tensor) -> Tensor:
    """Logits whose token 0 has the given probability, the rest spread over so many that none is larger."""
    rest = ((1 - confidence) / GUESSES).clamp(min=1e-300).log()
    return torch.cat((confidence.log()[:, None], rest[:, None].expand(-1, GUESSES), rest[:, None] - 1e9), dim=1)


def logits_at(lm: Any, canvas: list[int]) -> Tensor:
    """Logits of a whole forward, each row about its own position."""
    with torch.no_grad():
        logits = lm.backbone(torch.tensor([canvas])).logits[0]
    return torch.cat((logits[:1], logits[:-1])) if lm.backbone.logits_shift else logits


def best_at(lm: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable token other than [MASK] of each row of logits, and its probability."""
    tokens = logits.index_fill(-1, torch.tensor([lm.backbone.mask_token_id]), -torch.inf).argmax(-1)
    return tokens, logits.softmax(-1).gather(-1, tokens[:, None])[:, 0]
