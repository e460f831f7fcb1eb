"""Log-likelihood of a given continuation under a masked diffusion language model.

LLaDA (arXiv 2502.09992, Eq. 6 and algorithm 3; the published get_log_likelihood). With p(x_i | visible) the
prediction for masked position i of a continuation x of L tokens, given its prefix:

    monte_carlo  mean over samples of  L / l  sum over masked i of log p(x_i | visible)
                 l in 1..L uniform, l of the L positions masked at random, without replacement
    chain        mean over orders of  sum over j of log p(x_order[j] | x_order[0..j-1])

Over random orders the two have the same expectation, which is a lower bound: by Jensen's inequality it is
at most the logarithm of the continuation's probability averaged over orders. A single order (left_to_right,
or confidence: the order of one-token-per-step decoding) is an exact chain rule, not a bound.

As in the published code, probabilities are a plain softmax over the whole vocabulary, including [MASK],
which is never predicted. Differences: l is stratified over all samples at once, not batch by batch, and
halves are rounded up, since rounding to even, as in the published code, favours even l; identical states
are computed once; log-probabilities are float32 or wider.

Both mask positions of all blocks at once. Models whose attention is causal over blocks were trained with clean
earlier blocks: for them order=left_to_right is the estimate to use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm.api import stream
from dllm.checks import choice, number
from dllm.decoding.nonfinite import not_finite, reason
from dllm.decoding.prediction import Prediction, Sampling
from dllm.decoding.prompts import entries, token_list
from dllm.models.loading import LanguageModel
from dllm.samplers import Vanilla

METHODS = ("monte_carlo", "chain")
ORDERS = ("random", "left_to_right", "confidence")
# Rows of logits that are converted to float32 at a time: those of a long continuation take gigabytes.
_CHUNK = 512


@dataclass(frozen=True)
class Estimate:
    """How a log-likelihood is estimated.

    Attributes:
        method: monte_carlo (LLaDA's bound) or chain (chain rule along orders).
        samples: masked states of monte_carlo, or random orders of chain; an order costs up to L forwards.
        order: of chain: random; left_to_right; or confidence, which next reveals the most confident
            position. The last two are a single deterministic order.
        seed: every pair of prefix and target has its own stream, whatever else is scored.
        batch_size: maximum rows of a forward; order=confidence uses one row.
        cfg_scale: classifier-free guidance against the masked prefix (LLaDA's convention: 0 is off).

    Raises:
        ValueError: a value out of range, or one that would have no effect.
    """

    method: Literal["monte_carlo", "chain"] = "monte_carlo"
    samples: int = 128
    order: Literal["random", "left_to_right", "confidence"] = "random"
    seed: int = 0
    batch_size: int = 32
    cfg_scale: float = 0.0

    def __post_init__(self) -> None:
        choice("method", self.method, METHODS)
        number("samples", self.samples, "a whole number from 1 to 100000", low=1, high=100_000, whole=True)
        choice("order", self.order, ORDERS)
        number("seed", self.seed, "a whole number of at least 0", low=0, high=2**63 - 1, whole=True)
        number("batch_size", self.batch_size, "a whole number of at least 1", low=1, whole=True)
        number("cfg_scale", self.cfg_scale, "0 (off) or a positive number", low=0, high=1e6)
        if self.order == "random":
            return
        if self.method == "monte_carlo":
            raise ValueError(
                f"order={self.order} has no effect on method=monte_carlo; use method=chain or order=random"
            )
        for name in ("samples", "seed"):
            if getattr(self, name) != getattr(Estimate, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect on order={self.order}, which is deterministic; leave "
                    "it out or use order=random"
                )


def loglikelihood(lm: LanguageModel, prefix: Sequence[int], target: Sequence[int], estimate: Estimate) -> float:
    """Estimate the log-likelihood of the tokens `target` after the tokens `prefix`.

    Args:
        lm: a loaded model.
        prefix: given token ids; may be empty.
        target: scored token ids; empty ones have log-likelihood 0.
        estimate: the estimator.

    Returns:
        Nats. Deterministic for a pair and an estimate, whatever else is scored.

    Raises:
        ValueError: a token that is not an id of the model or is [MASK], more tokens than the model's context, or
            non-finite logits.
    """
    prefix, target = _check(lm, prefix, target)
    if len(target) == 0:
        return 0.0
    length = len(target)
    with torch.inference_mode(), torch.device("cpu"):  # whatever the user's default device is
        text = _Text(lm, prefix, target, estimate.cfg_scale)
        if estimate.order == "confidence":
            return float(_most_confident_first(text))
        if estimate.order == "left_to_right":
            asked = along_orders(torch.arange(length)[None])
        else:
            generator = torch.Generator().manual_seed(_own_seed(estimate.seed, prefix, target))
            shuffled = torch.rand((estimate.samples, length), generator=generator, dtype=torch.float64).argsort(-1)
            first = int(torch.randint(1, length + 1, (), generator=generator))
            asked = along_orders(shuffled) if estimate.method == "chain" else stratified_masks(shuffled, first)
        return float(_weighted(text, asked.merged(), estimate.batch_size))


def is_greedy(lm: LanguageModel, prefix: Sequence[int], target: Sequence[int], cfg_scale: float = 0.0) -> bool:
    """Whether greedy decoding, one token per step by confidence, gives exactly `target` after `prefix`.

    LLaDA's suffix_greedy_prediction: one block of as many masks as `target` has tokens, without stopping at
    end-of-text; in models whose attention is causal over blocks, block after block. Decoding ends at the first token
    that differs. Difference: [MASK] is never predicted.

    Raises:
        ValueError: as `loglikelihood`.
    """
    prefix, target = _check(lm, prefix, target)
    if len(target) == 0:
        return True
    wanted = torch.tensor(list(target), device="cpu")
    steps = stream(
        lm, [list(prefix)], Vanilla(), gen_length=len(target), block_length=None, stop_at_eos=False,
        cfg_scale=cfg_scale, seed=0,
    )  # fmt: skip
    for frame in steps:
        tokens, committed = frame.tokens[0, len(prefix) :], frame.committed[0, len(prefix) :]
        if (committed & (tokens != wanted)).any():
            return False
    return True


@dataclass(frozen=True)
class Asked:
    """The requested quantities: M log-probabilities in N masked states; the estimate is their weighted sum.

    Attributes:
        masked: which of the target's tokens each state masks.
        state: of each log-probability.
        place: masked position of each log-probability.
        weight: of each log-probability.
    """

    masked: Bool[Tensor, "N L"]
    state: Int[Tensor, " M"]
    place: Int[Tensor, " M"]
    weight: Float[Tensor, " M"]

    def merged(self) -> Asked:
        """The same sum without duplicate states and positions, ordered by state."""
        length = self.masked.shape[1]
        masked, state = self.masked.unique(dim=0, return_inverse=True)
        key, question = (state[self.state] * length + self.place).unique(return_inverse=True)
        weight = torch.zeros(len(key), dtype=self.weight.dtype).index_add_(0, question, self.weight)
        return Asked(masked, key.div(length, rounding_mode="floor"), key % length, weight)


def stratified_masks(rank: Int[Tensor, "S L"], first: int) -> Asked:
    """LLaDA's states, each with all of its masked positions and weight L / l / S.

    Args:
        rank: a permutation of the positions for each of the S samples; positions of rank below l are masked.
        first: l of the first sample, from 1 to L; the others are evenly spaced, modulo L.
    """
    samples, length = rank.shape
    # In integers, so that every l is exactly uniform over `first`, for any L and S.
    further = (2 * length * torch.arange(samples) + samples).div(2 * samples, rounding_mode="floor")
    count = (first - 1 + further) % length + 1
    masked = rank < count[:, None]
    state, place = masked.nonzero(as_tuple=True)
    return Asked(masked, state, place, length / (samples * count[state].double()))


def along_orders(orders: Int[Tensor, "S L"]) -> Asked:
    """The states along S orders of the positions, each with its next position and weight 1 / S."""
    samples, length = orders.shape
    masked = orders.argsort(-1)[:, None] >= torch.arange(length)[:, None]
    weight = torch.full((samples * length,), 1 / samples, dtype=torch.float64)
    return Asked(masked.flatten(0, 1), torch.arange(samples * length), orders.flatten(), weight)


class _Text:
    """A prefix and its target on the model's device; any part of the target can be masked."""

    def __init__(self, lm: LanguageModel, prefix: Sequence[int], target: Sequence[int], cfg_scale: float) -> None:
        self.backbone, self.cfg_scale = lm.backbone, cfg_scale
        self.prefix = torch.tensor(list(prefix), dtype=torch.long, device=lm.device)
        self.target = torch.tensor(list(target), dtype=torch.long, device=lm.device)

    def logits(
        self, masked: Bool[Tensor, "A L"], state: Int[Tensor, " M"], place: Int[Tensor, " M"]
    ) -> Float[Tensor, "M V"]:
        """Logits of the requested positions of the target in the given states.

        Raises:
            ValueError: they are not finite.
        """
        logits = self._logits(masked, state, place)
        # Synchronizes, which is cheap beside a forward over many states.
        if bool(not_finite(logits).any()):
            raise ValueError(reason("the model", self.backbone.dtype, "dtype="))
        return logits

    def _logits(
        self, masked: Bool[Tensor, "A L"], state: Int[Tensor, " M"], place: Int[Tensor, " M"]
    ) -> Float[Tensor, "M V"]:
        mask, given = self.backbone.mask_token_id, self.prefix.expand(len(masked), -1)
        target = self.target.masked_fill(masked, mask)
        tokens = torch.cat((given, target), dim=1)
        # The prediction for column i is read at column i - logits_shift, that for column 0 at column 0.
        select = (len(self.prefix) + place - self.backbone.logits_shift).clamp(min=0) + state * tokens.shape[1]
        if self.cfg_scale == 0:
            return self.backbone(tokens, select=select).logits
        blind = torch.cat((torch.full_like(given, mask), target), dim=1)
        both = torch.cat((select, select + tokens.numel()))
        conditional, unconditional = self.backbone(torch.cat((tokens, blind)), select=both).logits.chunk(2)
        return unconditional + (self.cfg_scale + 1) * (conditional - unconditional)


def _weighted(text: _Text, asked: Asked, batch_size: int) -> Float[Tensor, ""]:
    """The weighted sum, with `batch_size` states per forward."""
    total = torch.zeros((), dtype=torch.float64, device=text.target.device)
    starts = torch.arange(0, len(asked.masked) + batch_size, batch_size)
    ends = torch.searchsorted(asked.state, starts).tolist()
    for start, low, high in zip(starts.tolist(), ends, ends[1:], strict=False):
        masked, state, place, weight = (
            part.to(total.device)
            for part in (
                asked.masked[start : start + batch_size],
                asked.state[low:high] - start,
                asked.place[low:high],
                asked.weight[low:high],
            )
        )
        answers = _log_probability(text.logits(masked, state, place), text.target[place])
        total += (weight * answers).sum()
    return total


def _most_confident_first(text: _Text) -> Float[Tensor, ""]:
    """The chain rule along the order of confidence: the most confident position is revealed next."""
    total = torch.zeros((), dtype=torch.float64, device=text.target.device)
    left = torch.arange(len(text.target), device=total.device)
    masked = torch.ones_like(left, dtype=torch.bool)[None]
    for _ in range(len(left)):
        logits = text.logits(masked, torch.zeros_like(left), left)
        asked, index = torch.ones_like(left, dtype=torch.bool)[None], torch.arange(len(left), device=total.device)
        best = Prediction(logits, asked, index, text.backbone.mask_token_id, Sampling()).confidence.argmax(-1)
        place = left[best]
        total += _log_probability(logits[best], text.target[place])[0]
        masked = masked.index_fill(1, place, False)
        left = left[index[:-1] + (index[:-1] >= best)]
    return total


def _log_probability(logits: Float[Tensor, "M V"], tokens: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    parts = []
    for some, own in zip(logits.split(_CHUNK), tokens.split(_CHUNK), strict=True):
        wide = some.to(torch.promote_types(some.dtype, torch.float32))
        parts.append(wide.gather(-1, own[:, None])[:, 0] - wide.logsumexp(-1))
    return torch.cat(parts).double()


def _own_seed(seed: int, prefix: Sequence[int], target: Sequence[int]) -> int:
    text = json.dumps([int(seed), [int(token) for token in prefix], [int(token) for token in target]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 2**63


def _check(lm: LanguageModel, prefix: Sequence[int], target: Sequence[int]) -> tuple[list[int], list[int]]:
    """Both as lists, after validation."""
    backbone = lm.backbone
    if backbone.uniform:
        raise ValueError(
            f"{type(backbone).__name__} has no [MASK], which estimates of the log-likelihood need; use a task that "
            "generates, or another model"
        )
    vocabulary = backbone.logits_size
    lists = []
    for name, given in (("prefix", prefix), ("target", target)):
        empty = isinstance(given, (Tensor, np.ndarray)) and entries(name, given) == []  # of floats by default
        if (tokens := [] if empty else token_list(given, name)) is None:
            raise ValueError(f"{name} is a {type(given).__name__}, not token ids; give a list of them")
        lists.append(tokens)
        wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise ValueError(f"{name} has token id {wrong}; this model's ids are 0 to {vocabulary - 1}")
        if backbone.mask_token_id in tokens:
            raise ValueError(f"{name} contains [MASK] (id {backbone.mask_token_id}); give a text without masks")
    if sum(map(len, lists)) > backbone.max_length:
        raise ValueError(
            f"target has {len(target)} tokens; the model's context of {backbone.max_length} leaves room for "
            f"{max(0, backbone.max_length - len(prefix))} beside a prefix of {len(prefix)}: shorten one of them"
        )
    return lists[0], lists[1]
