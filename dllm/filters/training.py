"""Training of a Learn2PD filter (arXiv 2509.25188, section 3.3): replay, records, training, evaluation.

The labels come from the result of the base policy. The replay decodes the same canvas "extremely
greedily": at each step it records the block's confidences and which predictions equal that result, and
commits exactly those. If none does, the whole block is set to the result, and the replay continues with
the next one. The published replay calls the model once more in this case, on an unchanged canvas, which
duplicates the last record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

import dllm
from dllm.checks import number
from dllm.decoding.request import Request
from dllm.decoding.setup import Rehearsal, Setup
from dllm.decoding.window import Edit, Window
from dllm.filters.filter import ConfidenceFilter, FilterNetwork, NeighbourFilter
from dllm.resolve import resolve
from dllm.samplers.base import Denoise, Policy, Sampler

THRESHOLDS = (0.5, 0.7, 0.9, 0.96, 0.99, 0.999)


@dataclass
class Records:
    """R steps of replayed blocks.

    Attributes:
        confidence: of every position of the block; 1 at missing positions of a short block.
        inside: False at missing positions.
        final: True where the predicted token is the final one.
        masked: True where a token could be committed.
        prompt: index of the prompt of each record.
    """

    confidence: Float[Tensor, "R K"]
    inside: Bool[Tensor, "R K"]
    final: Bool[Tensor, "R K"]
    masked: Bool[Tensor, "R K"]
    prompt: Int[Tensor, " R"]

    @classmethod
    def join(cls, parts: Sequence[Records]) -> Records:
        """All records of several collections."""
        return cls(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})

    def where(self, keep: Bool[Tensor, " R"] | Int[Tensor, " N"]) -> Records:
        """Some of the records."""
        return Records(**{name: values[keep] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Truth:
    """State of a replay: the result of the base for every row, (rows, L), and its rehearsal."""

    result: Int[Tensor, "rows L"]
    rehearsal: Rehearsal


@dataclass(frozen=True)
class Replay(Policy):
    """A sampler that reproduces the result of another extremely greedily, and collects records.

    Attributes:
        base: the policy whose result gives the labels.
        records: one entry per step, for the rows of one batch.
    """

    base: Any
    records: list[Records] = field(default_factory=list)

    def start(self, setup: Setup) -> Truth:
        """Allocate the results."""
        result = torch.zeros((setup.slots, setup.length), dtype=torch.long, device=setup.device)
        return Truth(result, setup.rehearsal(self.base))

    def enter(self, state: Truth, row: int, request: Request) -> None:
        """Decode the result of the base."""
        state.result[row, -len(request.tokens) :] = state.rehearsal(request)

    def step(self, window: Window, denoise: Denoise, state: Truth) -> Edit:
        """Record, and commit correct predictions."""
        prediction = denoise(window.inside)
        final = state.result[window.rows].gather(1, window.columns)
        equal = (prediction.tokens == final) | ~window.inside
        seen = prediction.confidence.float().masked_fill(~window.inside, 1.0)
        self.records.append(Records(*(each.cpu() for each in (seen, window.inside, equal, window.masked, window.rows))))
        right = equal & window.masked
        return Edit(window.columns, final, torch.where(right.any(-1, keepdim=True), right, window.masked))


def collect(lm: dllm.LanguageModel, prompts: Sequence[Sequence[int]], base: Any, cache: Any, **options: Any) -> Records:
    """Replay one batch of prompts.

    Args:
        lm: the denoiser.
        prompts: token ids of each.
        base: the policy whose results give the labels.
        cache: as for `dllm.generate`.
        **options: fields of `dllm.Options`.

    Raises:
        ValueError: as `dllm.generate`, or a failed prompt.
    """
    replay = Replay(resolve("sampler", base, Sampler))
    result = dllm.generate(lm, [list(ids) for ids in prompts], replay, cache, **options, batch_size=len(prompts))
    if error := next(filter(None, result.errors), None):
        raise ValueError(f"a prompt has no answer: {error}")
    return Records.join(replay.records)


@dataclass(frozen=True)
class Training:
    """Training settings of a filter.

    Attributes:
        architecture: "neighbours", or "published".
        hidden: width of its hidden layers; None for 24, or for the block length in the published form.
        rate: learning rate of AdamW, 0.003 as published.
        batch_size: records per step.
        epochs: maximum number of epochs.
        patience: early stopping: epochs without a better held-out loss.
        held_out: share of the prompts held out.
        seed: of weights, split and order.

    Raises:
        ValueError: a rate or a share out of range.
    """

    architecture: str = "neighbours"
    hidden: int | None = None
    rate: float = 3e-3
    batch_size: int = 256
    epochs: int = 300
    patience: int = 15
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        number("rate", self.rate, "a number above 0 and at most 1 (0.003 is published)", above=0, high=1)
        number("held_out", self.held_out, "a share above 0 and below 1", above=0, high=0.99)


def split(records: Records, how: Training) -> tuple[Records, Records]:
    """Split records into training and held-out ones, by prompt."""
    prompts = records.prompt.unique()
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(how.seed), device="cpu")
    count = min(max(1, round(len(prompts) * how.held_out)), len(prompts) - 1)
    apart = torch.isin(records.prompt, prompts[order[:count]])
    return records.where(~apart), records.where(apart)


def fit(
    learn: Records, held_out: Records, how: Training, progress: Callable[[int, float], object] = lambda *_: None
) -> tuple[FilterNetwork, int]:
    """Train a filter by binary cross-entropy, returning the weights with the best held-out loss.

    The published form is trained on all positions, as published; the other on masked positions, where it is used.

    Args:
        learn: training records.
        held_out: records for early stopping.
        how: the settings.
        progress: called with the number of each finished epoch and its held-out loss.

    Returns:
        The filter, and the number of its epoch.

    Raises:
        ValueError: the training diverges.
    """
    network: FilterNetwork
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)  # layers draw their weights from the global generator
        if how.architecture == "published":
            network = ConfidenceFilter(learn.confidence.shape[1], how.hidden)
        else:
            network = NeighbourFilter(how.hidden or 24)
    optimizer = torch.optim.AdamW(network.parameters(), lr=how.rate)
    order = torch.Generator().manual_seed(how.seed)
    best, best_epoch, weights = float("inf"), 0, network.state_dict()
    for epoch in range(1, how.epochs + 1):
        for batch in torch.randperm(len(learn.prompt), generator=order, device="cpu").split(how.batch_size):
            loss = _loss(network, learn.where(batch))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            now = _loss(network, held_out).item()
        progress(epoch, now)
        if not isfinite(now):
            break  # diverged
        if now < best:
            best, best_epoch = now, epoch
            weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        elif epoch - best_epoch >= how.patience:
            break
    if best_epoch == 0:
        raise ValueError(f"rate={how.rate} makes the loss of the filter infinite or NaN; use a lower one")
    network.load_state_dict(weights)
    return network.eval(), best_epoch


@torch.no_grad()
def measure(network: FilterNetwork, records: Records) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Metrics of a filter on masked positions, where it is used.

    Returns:
        Loss, precision and recall of final tokens per threshold, and recall at fixed precisions; and the
        calibration table.
    """
    logits = network(records.confidence, records.masked, records.inside)
    probability, final = logits.sigmoid()[records.masked], records.final[records.masked]
    at = []
    for threshold in THRESHOLDS:
        accepted = probability > threshold
        right, count = int((accepted & final).sum()), int(accepted.sum())
        at.append(
            {
                "threshold": threshold,
                "precision": round(right / count, 4) if count else None,
                "recall": round(right / max(1, int(final.sum())), 4),
            }
        )
    return {
        "loss": round(_loss(network, records).item(), 5),
        "thresholds": at,
        **_recall(probability, final),
    }, _calibration(probability, final)


def _recall(probability: Tensor, final: Tensor) -> dict[str, float]:
    """Recall of final tokens at a precision of 99% and 99.9%."""
    ranked, order = probability.sort(descending=True, stable=True)
    right = final[order].cumsum(0)
    precision = right / torch.arange(1, len(right) + 1, device=right.device)
    last = ranked != torch.cat((ranked[1:], ranked.new_tensor([-1.0])))  # a threshold accepts all of equal probability
    found = {share: last & (precision >= share) for share in (0.99, 0.999)}
    return {
        f"recall_at_{share}": round((right / right[-1])[at].amax().item(), 4) if at.any() else 0.0
        for share, at in found.items()
    }


def _calibration(probability: Tensor, final: Tensor, bins: int = 10) -> list[dict[str, float]]:
    """Mean predicted probability and share of final tokens, per bin of the predicted probability."""
    place = (probability * bins).long().clamp(max=bins - 1)
    table = []
    for bin_number in place.unique().tolist():
        here = place == bin_number
        predicted, share = probability[here].mean().item(), final[here].float().mean().item()
        table.append({"predicted": round(predicted, 4), "final": round(share, 4), "count": int(here.sum())})
    return table


def _loss(network: FilterNetwork, records: Records) -> Tensor:
    logits, final = network(records.confidence, records.masked, records.inside), records.final.float()
    if network.architecture == "neighbours":
        logits, final = logits[records.masked], final[records.masked]
    return F.binary_cross_entropy_with_logits(logits, final)
