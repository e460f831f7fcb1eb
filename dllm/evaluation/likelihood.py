"""Log-likelihood of a given continuation under a masked diffusion language model.

LLaDA (arXiv 2502.09992, Eq. 6 and algorithm 3; the published get_log_likelihood). With p(x_i | seen) what
the model predicts for masked position i of a continuation x of L tokens, behind its prefix:

    monte_carlo  mean over samples of  L / l  sum over masked i of log p(x_i | seen)
                 l in 1..L uniform, l of the L positions masked at random, without replacement
    chain        mean over orders of  sum over j of log p(x_order[j] | x_order[0..j-1])

Over random orders the two have the same expectation, and it is a lower bound: by Jensen's inequality it is
at most the logarithm of the continuation's probability averaged over orders. One order (left_to_right, or
confidence: the order in which one-token-per-step decoding goes) is an exact chain rule, and no bound.

As in the published code probabilities are a plain softmax over the whole vocabulary: [MASK] keeps its
share of it, though it is never predicted. Differences: l is stratified over all samples at once, not
batch by batch, and halves are rounded up, since rounding to even as the published code does favours even
l; states that samples share are computed once; log-probabilities are float32 or wider.
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
# Logits that are widened at a time: a long continuation over a large vocabulary has gigabytes of them.
_CHUNK = 512


@dataclass(frozen=True)
class Estimate:
    """How a log-likelihood is estimated.

    Attributes:
        method: monte_carlo (LLaDA's bound) or chain (chain rule along orders).
        samples: masked states of monte_carlo, or random orders of chain; an order costs up to L forwards.
        order: of chain: random; left_to_right; or confidence, which next reveals the position whose most
            probable token is surest. Those two are one order, without randomness.
        seed: of the randomness; every pair of prefix and target has its own, whatever else is scored.
        batch_size: rows of a forward at most; order=confidence goes one row at a time.
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
                    f"{name}={getattr(self, name)} has no effect on order={self.order}, which is one order without "
                    "randomness; leave it out or use order=random"
                )


def loglikelihood(lm: LanguageModel, prefix: Sequence[int], target: Sequence[int], estimate: Estimate) -> float:
    """Estimate the log-likelihood of the tokens `target` behind the tokens `prefix`.

    Args:
        lm: a loaded model.
        prefix: token ids that are given; may be empty.
        target: token ids that are scored; none have log-likelihood 0.
        estimate: how.

    Returns:
        Nats. The same for the same pair and estimate, whatever else is scored.

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
            return float(_surest_first(text))
        if estimate.order == "left_to_right":
            asked = along_orders(torch.arange(length)[None])
        else:
            generator = torch.Generator().manual_seed(_own_seed(estimate.seed, prefix, target))
            shuffled = torch.rand((estimate.samples, length), generator=generator, dtype=torch.float64).argsort(-1)
            first = int(torch.randint(1, length + 1, (), generator=generator))
            asked = along_orders(shuffled) if estimate.method == "chain" else stratified_masks(shuffled, first)
        return float(_weighted(text, asked.merged(), estimate.batch_size))


def is_greedy(lm: LanguageModel, prefix: Sequence[int], target: Sequence[int], cfg_scale: float = 0.0) -> bool:
    """Whether greedy decoding, one token per step and the surest first, gives exactly `target` behind `prefix`.

    LLaDA's suffix_greedy_prediction: one block of as many masks as `target` has tokens, where end-of-text
    stops nothing. Decoding ends at the first token that differs. Other than there, [MASK] is never predicted.

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
    """What the model is asked: M log-probabilities in N masked states; the estimate is their weighted sum.

    Attributes:
        masked: which of the target's tokens each state masks.
        state: of each question.
        place: the masked position each question is about.
        weight: of each answer.
    """

    masked: Bool[Tensor, "N L"]
    state: Int[Tensor, " M"]
    place: Int[Tensor, " M"]
    weight: Float[Tensor, " M"]

    def merged(self) -> Asked:
        """The same sum with every state and every question once, in the order of the states."""
        length = self.masked.shape[1]
        masked, state = self.masked.unique(dim=0, return_inverse=True)
        key, question = (state[self.state] * length + self.place).unique(return_inverse=True)
        weight = torch.zeros(len(key), dtype=self.weight.dtype).index_add_(0, question, self.weight)
        return Asked(masked, key.div(length, rounding_mode="floor"), key % length, weight)


def stratified_masks(rank: Int[Tensor, "S L"], first: int) -> Asked:
    """LLaDA's states, each asked about all that it masks with weight L / l / S.

    Args:
        rank: a permutation of the positions for each of the S samples, which masks those of rank below l.
        first: l of the first sample, from 1 to L; the others follow evenly spaced, round and round.
    """
    samples, length = rank.shape
    # In whole numbers, so that with `first` every l is uniform, whatever L and S are.
    further = (2 * length * torch.arange(samples) + samples).div(2 * samples, rounding_mode="floor")
    count = (first - 1 + further) % length + 1
    masked = rank < count[:, None]
    state, place = masked.nonzero(as_tuple=True)
    return Asked(masked, state, place, length / (samples * count[state].double()))


def along_orders(orders: Int[Tensor, "S L"]) -> Asked:
    """The states along S orders of the positions, each asked about the one that is next with weight 1 / S."""
    samples, length = orders.shape
    masked = orders.argsort(-1)[:, None] >= torch.arange(length)[:, None]
    weight = torch.full((samples * length,), 1 / samples, dtype=torch.float64)
    return Asked(masked.flatten(0, 1), torch.arange(samples * length), orders.flatten(), weight)


class _Text:
    """A prefix and its target on the model's device, of which any part of the target can be masked."""

    def __init__(self, lm: LanguageModel, prefix: Sequence[int], target: Sequence[int], cfg_scale: float) -> None:
        self.backbone, self.cfg_scale = lm.backbone, cfg_scale
        self.prefix = torch.tensor(list(prefix), dtype=torch.long, device=lm.device)
        self.target = torch.tensor(list(target), dtype=torch.long, device=lm.device)

    def logits(
        self, masked: Bool[Tensor, "A L"], state: Int[Tensor, " M"], place: Int[Tensor, " M"]
    ) -> Float[Tensor, "M V"]:
        """Logits of the asked positions of the target in the states given.

        Raises:
            ValueError: they are no numbers.
        """
        logits = self._logits(masked, state, place)
        # Read from the device: a forward over many states takes far longer, and none after it would help.
        if bool(not_finite(logits).any()):
            raise ValueError(reason("the model", self.backbone.dtype, "dtype="))
        return logits

    def _logits(
        self, masked: Bool[Tensor, "A L"], state: Int[Tensor, " M"], place: Int[Tensor, " M"]
    ) -> Float[Tensor, "M V"]:
        mask, given = self.backbone.mask_token_id, self.prefix.expand(len(masked), -1)
        target = self.target.masked_fill(masked, mask)
        tokens = torch.cat((given, target), dim=1)
        # The prediction for a column is read `logits_shift` to its left, that of column 0 at column 0.
        select = (len(self.prefix) + place - self.backbone.logits_shift).clamp(min=0) + state * tokens.shape[1]
        if self.cfg_scale == 0:
            return self.backbone(tokens, select=select).logits
        blind = torch.cat((torch.full_like(given, mask), target), dim=1)
        both = torch.cat((select, select + tokens.numel()))
        conditional, unconditional = self.backbone(torch.cat((tokens, blind)), select=both).logits.chunk(2)
        return unconditional + (self.cfg_scale + 1) * (conditional - unconditional)


def _weighted(text: _Text, asked: Asked, batch_size: int) -> Float[Tensor, ""]:
    """The weighted sum of what is asked, `batch_size` states a forward."""
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


def _surest_first(text: _Text) -> Float[Tensor, ""]:
    """The chain rule along the order that shows only on the way: the surest position is revealed next."""
    total = torch.zeros((), dtype=torch.float64, device=text.target.device)
    left = torch.arange(len(text.target), device=total.device)
    masked = torch.ones_like(left, dtype=torch.bool)[None]
    for _ in range(len(left)):
        logits = text.logits(masked, torch.zeros_like(left), left)
        asked, index = torch.ones_like(left, dtype=torch.bool)[None], torch.arange(len(left), device=total.device)
        surest = Prediction(logits, asked, index, text.backbone.mask_token_id, Sampling()).confidence.argmax(-1)
        place = left[surest]
        total += _log_probability(logits[surest], text.target[place])[0]
        masked = masked.index_fill(1, place, False)
        left = left[index[:-1] + (index[:-1] >= surest)]
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
    """Both as lists, once they are known to be ids that the model can be given."""
    backbone = lm.backbone
    vocabulary = backbone.config.vocab_size
    lists = []
    for name, given in (("prefix", prefix), ("target", target)):
        empty = isinstance(given, (Tensor, np.ndarray)) and entries(name, given) == []  # of floats by default
        if (tokens := [] if empty else token_list(given, name)) is None:
            raise ValueError(f"{name} is a {type(given).__name__} and no token ids; give a list of them")
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
