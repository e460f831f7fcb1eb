"""What tests of revising policies share: one step on probabilities given by hand, and what a whole run did."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import nan
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dllm
from dllm.api import prepare
from dllm.decoding.options import parse_options
from dllm.evaluation.records import Query, follow
from dllm.reports.player import moment


@dataclass
class Watched:
    """The steps of a run of one prompt, as a callback: committed, edited and revoked positions, and forwards."""

    steps: list[Any] = field(default_factory=list)

    def __call__(self, step: Any) -> None:
        self.steps.append(step)

    @property
    def revoked(self) -> int:
        return sum(int(step.change.revoked.sum()) for step in self.steps)


def last_commits(steps: list[Any], generated: int) -> list[int]:
    """The forward after which each position of the only row got the token it has."""
    found = np.full(generated, -1)
    for step in steps:
        change = step.change
        found[change.committed[0, -generated:]] = step.nfe[0] - 1
        found[(change.revoked | change.filled)[0, -generated:]] = -1
    return found.tolist()


def recorded_alike(lm: dllm.LanguageModel, prompt: list[int], sampler: Any, **options: Any) -> int:
    """Hold every record of a run to the steps it took; return the number of revoked positions.

    Commit steps, streamed frames, recorded confidences and the display of each step.
    """
    watched = Watched()
    result = dllm.generate(lm, [prompt], sampler, callback=watched, seed=0, **options)
    generated = result.completions.shape[1]
    assert result.commit_step[0].tolist() == last_commits(watched.steps, generated)

    frames = list(dllm.stream(lm, [prompt], sampler, seed=0, **options))
    for frame, step in zip(frames, watched.steps, strict=True):
        assert frame.tokens[0].tolist() == step.tokens[0].tolist()
        assert frame.revoked[0].tolist() == step.change.revoked[0].tolist()
        assert frame.committed[0].tolist() == step.change.committed[0].tolist()
        assert int(frame.nfe[0]) == int(step.nfe[0])

    query = Query("0", prompt, seed=0)
    made = prepare(lm, [prompt], sampler, "none", parse_options({**options, "seed": [0]}))
    ((record, trace),) = follow(*made, [query], frozenset({"0"}))
    assert record.commit_step == result.commit_step[0].tolist()
    assert trace is not None
    mask = lm.backbone.mask_token_id
    sure = np.full(generated, nan)
    for number, step in enumerate(watched.steps):
        own = step.tokens[0, -generated:]
        new = step.change.committed[0, -generated:] & (step.predicted[0, -generated:] == own)
        sure = np.where(step.change.committed[0, -generated:], nan, sure)
        sure = np.where(new, step.confidence[0, -generated:], sure)
        sure = np.where((step.change.revoked | step.change.filled)[0, -generated:], nan, sure)
        now = moment(trace, number, mask)
        assert now.tokens.tolist() == own.tolist()
        assert now.open.tolist() == (own == mask).tolist()
        shown = np.where(now.open, nan, now.confidence)
        np.testing.assert_allclose(shown, np.where(now.open, nan, sure), rtol=1e-5)
    np.testing.assert_allclose(np.array(record.confidence, dtype=float), sure, atol=1e-6)
    return watched.revoked


def two_way(probability: Tensor, tokens: Tensor, vocab: int) -> Tensor:
    """(N, vocab) logits that give each token its probability, the rest spread evenly over all but the last."""
    rest = ((1 - probability) / (vocab - 2)).clamp(min=1e-300).log()
    logits = rest[:, None].expand(-1, vocab).clone()
    logits[:, -1] = -1e9
    return logits.scatter(1, tokens[:, None], probability.log()[:, None])


def rows_by_hand(
    lm: dllm.LanguageModel, prompt: list[int], span: int, length: int, step: Any, stays: Any = None
) -> tuple[list[int], int]:
    """Decode one row greedily block by block, with one whole forward a step; return its tokens and the forwards.

    Args:
        lm: a model.
        prompt: of the row.
        span: positions to generate.
        length: of a block.
        step: maps the block's tokens, its logits and the number of the step to the block's next tokens.
        stays: called after a step, whether the row stays at a block without masks.
    """
    backbone, pattern = lm.backbone, lm.backbone.pattern_of(length)
    mask, start = backbone.mask_token_id, len(prompt)
    row = torch.tensor([*prompt, *[mask] * span])
    origin = 0 if pattern is not None else start
    positions = torch.arange(len(row))[None]
    sees = None if pattern is None else pattern(positions, positions)
    forwards = 0
    while (row == mask).any():
        low = origin + (int((row == mask).int().argmax()) - origin) // length * length
        block = torch.arange(max(low, start), min(low + length, len(row)))
        number = 0
        while (row[block] == mask).any() or (number and stays is not None and stays()):
            with torch.no_grad():
                logits = backbone(row[None], sees, positions).logits[0][(block - backbone.logits_shift).clamp(min=0)]
            row[block] = step(row[block], logits, number)
            forwards, number = forwards + 1, number + 1
    return row.tolist(), forwards
