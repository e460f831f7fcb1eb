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

Models whose attention is causal over blocks (SDAR, LLaDA2, Fast-dLLM v2) were trained with clean earlier blocks. For
them the estimate is that of block diffusion (BD3-LM, arXiv 2503.09573, section 3.1),

    log p(x | prefix) = sum over blocks b of log p(x_b | prefix, clean x_1 .. x_(b-1))

where each term is one of the two estimates above within block b: L is the number of the continuation's tokens in it,
and an order is one of these. Blocks are counted from the first token of the prefix, so the end of the prefix may share
the first of them; the last one ends with the continuation, as in decoding. As in BD3-LM's training, one forward
computes all blocks: a row has a clean copy of the text, causal over blocks, and a copy with masks, whose positions
attend to their own block of it and to the earlier blocks of the clean one.
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
from torch.nn.functional import pad

from dllm.api import stream
from dllm.checks import choice, number
from dllm.decoding.nonfinite import not_finite, reason
from dllm.decoding.prediction import Prediction, Sampling
from dllm.decoding.prompts import entries, token_list
from dllm.models import leading
from dllm.models.attention import BlockCausal
from dllm.models.base import own_precision
from dllm.models.loading import LanguageModel
from dllm.samplers import Vanilla

METHODS = ("monte_carlo", "chain")
_MOST = 1 << 30  # positions of all states of a text
ORDERS = ("random", "left_to_right", "confidence")
# Rows of logits that are converted to float32 at a time: those of a long continuation take gigabytes.
_CHUNK = 512


@dataclass(frozen=True)
class Estimate:
    """How a log-likelihood is estimated.

    Attributes:
        method: monte_carlo (LLaDA's bound) or chain (chain rule along orders).
        samples: masked states of monte_carlo, or random orders of chain, of every block where attention is causal
            over blocks; an order costs up to L forwards.
        order: of chain: random; left_to_right; or confidence, which next reveals the most confident
            position. The last two are a single deterministic order.
        seed: every pair of prefix and target has its own stream, whatever else is scored.
        batch_size: maximum rows of a forward; order=confidence uses one row.
        cfg_scale: classifier-free guidance against the masked prefix (LLaDA's convention: 0 is off).
        block_length: positions of a block, of models whose attention is causal over blocks; None for the model's own.

    Raises:
        ValueError: a value out of range, or one that would have no effect.
    """

    method: Literal["monte_carlo", "chain"] = "monte_carlo"
    samples: int = 128
    order: Literal["random", "left_to_right", "confidence"] = "random"
    seed: int = 0
    batch_size: int = 32
    cfg_scale: float = 0.0
    block_length: int | None = None

    def __post_init__(self) -> None:
        choice("method", self.method, METHODS)
        number("samples", self.samples, "a whole number from 1 to 100000", low=1, high=100_000, whole=True)
        choice("order", self.order, ORDERS)
        number("seed", self.seed, "a whole number of at least 0", low=0, high=2**63 - 1, whole=True)
        number("batch_size", self.batch_size, "a whole number of at least 1", low=1, whole=True)
        number("cfg_scale", self.cfg_scale, "0 (off) or a positive number", low=0, high=1e6)
        if self.block_length is not None:
            number("block_length", self.block_length, "a whole number of at least 1, or null", low=1, whole=True)
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
    pattern = _pattern(lm, estimate.block_length)
    if len(target) == 0:
        return 0.0
    with torch.inference_mode(), torch.device("cpu"), own_precision(lm.device):  # whatever the user's defaults are
        text = _Text(lm, prefix, target, estimate.cfg_scale, pattern)
        sizes = block_sizes(pattern, len(prefix), len(target))
        if estimate.order == "confidence":
            return float(_most_confident_first(text, sizes))
        generator = torch.Generator().manual_seed(_own_seed(estimate.seed, prefix, target))
        asked = side_by_side([_asked(estimate, size, generator).merged() for size in sizes])
        return float(_weighted(text, asked, estimate.batch_size))


def is_greedy(
    lm: LanguageModel,
    prefix: Sequence[int],
    target: Sequence[int],
    cfg_scale: float = 0.0,
    block_length: int | None = None,
) -> bool:
    """Whether greedy decoding, one token per step by confidence, gives exactly `target` after `prefix`.

    LLaDA's suffix_greedy_prediction: one block of as many masks as `target` has tokens, without stopping at
    end-of-text; in models whose attention is causal over blocks, block after block, of `block_length` or the model's
    own length. Decoding ends at the first token that differs. Difference: [MASK] is never predicted.

    Raises:
        ValueError: as `loglikelihood`.
    """
    prefix, target = _check(lm, prefix, target)
    _pattern(lm, block_length)
    if len(target) == 0:
        return True
    wanted = torch.tensor(list(target), device="cpu")
    steps = stream(
        lm, [list(prefix)], Vanilla(), gen_length=len(target), block_length=block_length, stop_at_eos=False,
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


def block_sizes(pattern: BlockCausal | None, before: int, length: int) -> list[int]:
    """The number of the target's tokens in each block, after `before` tokens; full attention is a single block."""
    if pattern is None:
        return [length]
    first = min(length, pattern.length - before % pattern.length)
    full, rest = divmod(length - first, pattern.length)
    return [first, *[pattern.length] * full, *[rest] * (rest > 0)]


def side_by_side(blocks: Sequence[Asked]) -> Asked:
    """The sum of the estimates of consecutive blocks, whose states share rows: a block does not attend to the others'.

    Blocks with fewer states are not masked in the rows that are left.
    """
    rows = max(len(block.masked) for block in blocks)
    masked = torch.cat([pad(block.masked, (0, 0, 0, rows - len(block.masked))) for block in blocks], dim=1)
    starts = np.cumsum([0, *(block.masked.shape[1] for block in blocks)]).tolist()
    state, order = torch.cat([block.state for block in blocks]).sort(stable=True)
    place = torch.cat([block.place + start for block, start in zip(blocks, starts, strict=False)])
    return Asked(masked, state, place[order], torch.cat([block.weight for block in blocks])[order])


def _asked(estimate: Estimate, length: int, generator: torch.Generator) -> Asked:
    if estimate.order == "left_to_right":
        return along_orders(torch.arange(length)[None])
    if estimate.method == "chain" and estimate.samples * length**2 > _MOST:
        raise ValueError(
            f"samples={estimate.samples} of method=chain is too many for {length} tokens; use at most "
            f"{_MOST // length**2}, or method=monte_carlo"
        )
    shuffled = torch.rand((estimate.samples, length), generator=generator, dtype=torch.float64).argsort(-1)
    first = int(torch.randint(1, length + 1, (), generator=generator))
    return along_orders(shuffled) if estimate.method == "chain" else stratified_masks(shuffled, first)


def _pattern(lm: LanguageModel, block_length: int | None) -> BlockCausal | None:
    """The attention pattern for blocks of this length.

    Raises:
        ValueError: a block length for a model without blocks.
    """
    pattern = lm.backbone.pattern_of(block_length)
    if pattern is None and block_length is not None:
        raise ValueError(f"block_length={block_length} has no effect on a bidirectional model; leave it out")
    return pattern


class _Text:
    """A prefix and its target on the model's device; any part of the target can be masked.

    A row has the clean text before the last block, and from the first block of the target on the text with masks.
    With full attention it is the latter alone.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prefix: Sequence[int],
        target: Sequence[int],
        cfg_scale: float,
        pattern: BlockCausal | None,
    ) -> None:
        self.backbone, self.cfg_scale, self.pattern = lm.backbone, cfg_scale, pattern
        self.prefix = torch.tensor(list(prefix), dtype=torch.long, device=lm.device)
        self.target = torch.tensor(list(target), dtype=torch.long, device=lm.device)
        end = len(prefix) + len(target)
        self.clean = 0 if pattern is None else (end - 1) // pattern.length * pattern.length
        self.first = 0 if pattern is None else len(prefix) // pattern.length * pattern.length
        self.inputs: dict[str, Tensor] = {}
        if pattern is not None:
            positions = torch.cat((torch.arange(self.clean), torch.arange(self.first, end)))
            copy = torch.arange(len(positions)) >= self.clean
            ends = pattern.end(positions)
            own = (ends[:, None] == ends) & (copy[:, None] == copy)
            seen = own | ((ends < ends[:, None]) & ~copy)
            self.inputs = {"position_ids": positions[None], "attention_mask": seen[None, None]}
            self.inputs = {name: each.to(lm.device) for name, each in self.inputs.items()}

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
        rows = self._rows(self.prefix, masked)
        # The prediction for position i is read at position i - logits_shift, that for position 0 at position 0; before
        # the block of i, it is read in the clean copy.
        position = len(self.prefix) + place
        read = (position - self.backbone.logits_shift).clamp(min=0)
        start = 0 if self.pattern is None else self.pattern.end(position) - self.pattern.length
        select = torch.where(read >= start, read + self.clean - self.first, read) + state * rows.shape[1]
        if self.cfg_scale == 0:
            return self._forward(rows, select)
        blind = self._rows(torch.full_like(self.prefix, self.backbone.mask_token_id), masked)
        both = self._forward(torch.cat((rows, blind)), torch.cat((select, select + rows.numel())))
        conditional, unconditional = both.chunk(2)
        return unconditional + (self.cfg_scale + 1) * (conditional - unconditional)

    def _rows(self, prefix: Int[Tensor, " P"], masked: Bool[Tensor, "A L"]) -> Int[Tensor, "A C"]:
        clean = torch.cat((prefix, self.target))[: self.clean].expand(len(masked), -1)
        target = self.target.masked_fill(masked, self.backbone.mask_token_id)
        return torch.cat((clean, prefix[self.first :].expand(len(masked), -1), target), dim=1)

    def _forward(self, rows: Int[Tensor, "A C"], select: Int[Tensor, " M"]) -> Float[Tensor, "M V"]:
        inputs = {name: each.expand(len(rows), *each.shape[1:]) for name, each in self.inputs.items()}
        inputs |= {"input_ids": rows, "select": select}
        if self.backbone.number is not None:
            told = {name: each.cpu() for name, each in inputs.items()}
            leading.tell(self.backbone.number, "forward", told)
        logits: Tensor = self.backbone(**inputs).logits
        return logits


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


def _most_confident_first(text: _Text, sizes: Sequence[int]) -> Float[Tensor, ""]:
    """The chain rule along the order of confidence: the most confident position of the block is revealed next."""
    total = torch.zeros((), dtype=torch.float64, device=text.target.device)
    places = torch.arange(len(text.target), device=total.device)
    masked = torch.ones_like(places, dtype=torch.bool)[None]
    for left in places.split(list(sizes)):
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
