"""The denoiser's prediction at the requested positions: a token and its confidence each.

Only the requested positions are projected to the vocabulary; everything here is computed from
their N rows of logits, and returned aligned to the window: (B, K), with neutral values at
positions that were not requested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dllm.checks import choice, number
from dllm.decoding.nonfinite import not_finite
from dllm.decoding.window import Unforeseen

_ALIGNED = ("tokens", "confidence", "margin", "entropy", "broken")


@dataclass(frozen=True)
class Sampling:
    """How logits become tokens.

    Attributes:
        temperature: 0 takes the most probable token; above 0, Gumbel-max over logits / temperature.
        top_p: keep the smallest set of tokens with this much probability; None keeps all.
        top_k: keep this many tokens; None keeps all.
        eos_suppression: LLaDA's logits_eos_inf and confidence_eos_eot_inf. None; "logits": never predict
            the first of `eos_token_ids`; "confidence": exclude all of them from the probabilities after
            sampling, and assign a sampled one confidence 0 (margin -inf, entropy inf), so that every
            order except random commits it last; "both".
        eos_token_ids: end-of-text ids; the first one fills the rest of the canvas.
        tempered_confidence: confidence, margin and entropy are those of softmax(logits / temperature), from which
            tokens are drawn (Dream), instead of softmax(logits) (LLaDA); the same at temperature 0.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    eos_suppression: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    tempered_confidence: bool = False

    def __post_init__(self) -> None:
        number("temperature", self.temperature, "0 (greedy) or a positive number of at most 1e6", low=0, high=1e6)
        if self.top_p is not None:
            number("top_p", self.top_p, "a number in (0, 1], or null for all tokens", above=0, high=1)
        if self.top_k is not None:
            number("top_k", self.top_k, "a whole number of at least 1, or null for all tokens", low=1, whole=True)
        choice("eos_suppression", self.eos_suppression, (None, "logits", "confidence", "both"))


@dataclass(frozen=True)
class Part:
    """Positions with the same sampling options.

    Attributes:
        sampling: these options.
        at: (M,) indices into the N positions, ascending.
        generators: of these M.
    """

    sampling: Sampling
    at: Int[Tensor, " M"]
    generators: Sequence[tuple[torch.Generator, int]]


class Prediction:
    """Predicted tokens and confidences of one forward, aligned to the (B, K) positions of the window.

    Args:
        logits: (N, V) logits of the requested positions, row by row.
        asked: (B, K) True at those N positions; (B, D, K) for D drafts a row.
        index: (N,) their flat indices into `asked`.
        mask_token_id: never predicted, but part of the softmax.
        sampling: how to choose tokens.
        generators: of the N positions as (generator, count) runs; used above temperature 0.

    Attributes:
        asked: the requested positions.
        given: (N, V) logits as the model gave them.
        logits: (N, V) logits after the options, of which the probabilities are.
    """

    def __init__(
        self,
        logits: Float[Tensor, "N V"],
        asked: Bool[Tensor, "*B K"],
        index: Int[Tensor, " N"],
        mask_token_id: int,
        sampling: Sampling,
        generators: Sequence[tuple[torch.Generator, int]] = (),
    ) -> None:
        part = Part(sampling, torch.arange(len(logits), device=logits.device), generators)
        self._set(logits, asked, index, mask_token_id, [part])

    @classmethod
    def mixed(
        cls,
        logits: Float[Tensor, "N V"],
        asked: Bool[Tensor, "*B K"],
        index: Int[Tensor, " N"],
        mask_token_id: int,
        parts: Sequence[Part],
    ) -> Prediction:
        """The same for positions with different `sampling`.

        Args:
            logits: (N, V) logits of the requested positions, row by row.
            asked: (B, K) True at those N positions; (B, D, K) for D drafts per row.
            index: (N,) their flat indices into `asked`.
            mask_token_id: never predicted.
            parts: positions with the same sampling; together all of them.
        """
        prediction = object.__new__(cls)
        prediction._set(logits, asked, index, mask_token_id, parts)
        return prediction

    def _set(
        self,
        logits: Float[Tensor, "N V"],
        asked: Bool[Tensor, "*B K"],
        index: Int[Tensor, " N"],
        mask_token_id: int,
        parts: Sequence[Part],
    ) -> None:
        self.asked, self._shape, self._index = asked, asked.shape, index
        self._arrange: Callable[[Tensor], Tensor] = lambda values: values
        self.given = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self._mask_token_id, self._parts = mask_token_id, parts
        chosen = _choose_in_parts(self.given, mask_token_id, parts)
        self._within: Tensor | None = None
        self._indexed = True
        self.logits, self._chosen, self._broken, self._last = chosen.logits, chosen.tokens, chosen.broken, chosen.last

    def adjusted(self, tokens: Int[Tensor, "N S"], by: Float[Tensor, "N S"]) -> Prediction:
        """The prediction of other logits, by the same sampling, which draws again.

        Args:
            tokens: tokens of each requested position; repeated ones add up.
            by: what is added to their logits, as the model gave them.
        """
        other, logits = object.__new__(Prediction), self.given.scatter_add(-1, tokens, by.to(self.given.dtype))
        other._set(logits, self.asked, self._index, self._mask_token_id, self._parts)
        other._within, other._indexed = self._within, self._indexed
        return other

    def arranged(self, arrange: Callable[[Tensor], Tensor]) -> Prediction:
        """The same predictions, with everything aligned to the window passed through `arrange`.

        Args:
            arrange: reshapes or selects; its input has the shape of this prediction.
        """
        other, inner = object.__new__(Prediction), self._arrange
        # Properties computed already have the old arrangement.
        vars(other).update({name: value for name, value in vars(self).items() if name not in _ALIGNED})
        other.asked, other._arrange = arrange(self.asked), lambda values: arrange(inner(values))
        other._within = None if self._within is None else arrange(self._within)
        return other

    def within(self, asked: Bool[Tensor, "*B K"]) -> Prediction:
        """The same predictions as if only these of the requested positions had been requested."""
        other = object.__new__(Prediction)
        vars(other).update({name: value for name, value in vars(self).items() if name not in _ALIGNED})
        other.asked = other._within = asked
        return other

    def foreseen(self) -> Prediction:
        """The same predictions within `asked`, of more positions than that; which of them, only the device knows."""
        other = self.within(self.asked)
        other._indexed = False
        return other

    def kept(self, arrange: Callable[[Tensor], Tensor], also: Sequence[str] = ()) -> Prediction:
        """The properties computed so far, and `also` these, passed through `arrange`, without the logits."""
        for name in also:
            getattr(self, name)
        other = object.__new__(Prediction)
        vars(other).update({name: arrange(value) for name, value in vars(self).items() if name in _ALIGNED})
        return other

    @cached_property
    def tokens(self) -> Int[Tensor, "*B K"]:
        """The predicted token of each requested position, 0 elsewhere."""
        return self._spread(self._chosen, 0)

    @cached_property
    def confidence(self) -> Float[Tensor, "*B K"]:
        """Probability of the predicted token, in float64; -inf where not requested."""
        own, others = _weights(self.logits, self._chosen)
        probability = own / (own + others.sum(-1).double())
        return self._spread(probability.masked_fill(self._last, 0.0), -torch.inf)

    def probability(self, tokens: Int[Tensor, "*B K"]) -> Float[Tensor, "*B K"]:
        """Probability of given tokens, in float64; -inf where not requested."""
        count = len(self.logits)
        place = self._spread(torch.arange(count, device=tokens.device), count)  # of each position among the requested
        of = tokens.new_zeros(count + 1).scatter_(0, place.flatten(), tokens.flatten())[:count]
        own, others = _weights(self.logits, of)
        found = F.pad(own / (own + others.sum(-1).double()), (0, 1), value=-torch.inf)
        return found[place]

    def ranked(self, count: int) -> tuple[Float[Tensor, "*B K S"], Int[Tensor, "*B K S"]]:
        """Log-probabilities, in float64, and ids of the most probable tokens, best first; never [MASK].

        Args:
            count: of tokens, at most those of the vocabulary; -inf and 0 where not requested.
        """
        rows = len(self.logits)
        place = self._spread(torch.arange(rows, device=self.logits.device), rows)
        shares = _without(self.logits.double().log_softmax(-1), [self._mask_token_id])
        best = shares.topk(min(count, self.logits.shape[-1]), dim=-1)
        values, tokens = F.pad(best.values, (0, 0, 0, 1), value=-torch.inf), F.pad(best.indices, (0, 0, 0, 1))
        return values[place], tokens[place]

    def distribution(self, logits: Float[Tensor, "N V"] | None = None) -> Float[Tensor, "N V"]:
        """The probabilities that the tokens of the requested positions are drawn with, in float64.

        Args:
            logits: others for the same positions; None for those of the model.
        """
        given = self.given if logits is None else logits
        return self._in_parts(given, lambda own, sampling: _distribution(own, self._mask_token_id, sampling))

    def permitted(self, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Logits for the requested positions, with -inf for what is never predicted there (`eos_suppression`)."""
        return self._in_parts(logits, _permitted)

    def _in_parts(self, logits: Float[Tensor, "N V"], change: Callable[[Tensor, Sampling], Tensor]) -> Tensor:
        """Logits that are changed as the sampling of each part says."""
        found = [change(logits[part.at], part.sampling) for part in self._parts]
        return torch.cat(found)[torch.cat([part.at for part in self._parts]).argsort()]

    @cached_property
    def margin(self) -> Float[Tensor, "*B K"]:
        """Probability of the most probable token minus that of the second, in float64; -inf where not requested."""
        own, others = _weights(self.logits, self.logits.argmax(-1))
        margin = (own - others.amax(-1).double()) / (own + others.sum(-1).double())
        return self._spread(margin.masked_fill(self._last, -torch.inf), -torch.inf)

    @cached_property
    def entropy(self) -> Float[Tensor, "*B K"]:
        """Entropy in nats, in float64; +inf where not requested."""
        own, others = _weights(self.logits, self.logits.argmax(-1))
        rest = others.sum(-1).double()
        entropy = rest.log1p() + torch.special.entr(others).sum(-1).double() / (own + rest)
        return self._spread(entropy.masked_fill(self._last, torch.inf), torch.inf)

    @cached_property
    def broken(self) -> Bool[Tensor, "*B K"]:
        """Where the logits are not finite and the prediction is invalid; False where not requested."""
        return self._spread(self._broken, False)

    @property
    def index(self) -> Int[Tensor, " N"]:
        """Flat indices of the requested positions into what was asked, before any arrangement."""
        if not self._indexed:
            raise Unforeseen("the host does not know what was asked")
        return self._index

    def aligned(self, values: Shaped[Tensor, " N"], fill: float) -> Shaped[Tensor, "*B K"]:
        """Values of the requested positions, aligned to the window; `fill` elsewhere."""
        return self._spread(values, fill)

    def _spread(self, values: Tensor, fill: float) -> Tensor:
        out = values.new_full((self._shape.numel(),), fill)
        arranged = self._arrange(out.index_copy_(0, self._index, values).view(self._shape))
        return arranged if self._within is None else arranged.masked_fill(~self._within, fill)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Tokens chosen from logits.

    Attributes:
        logits: for confidence, margin and entropy.
        tokens: the chosen tokens.
        broken: where the logits are not finite.
        last: where the confidence is set to 0.
    """

    logits: Float[Tensor, "N V"]
    tokens: Int[Tensor, " N"]
    broken: Bool[Tensor, " N"]
    last: Bool[Tensor, " N"]


def _choose_in_parts(logits: Float[Tensor, "N V"], mask_token_id: int, parts: Sequence[Part]) -> _Chosen:
    if len(parts) == 1:
        return _choose(logits, mask_token_id, parts[0].sampling, parts[0].generators)
    chosen = [_choose(logits[part.at], mask_token_id, part.sampling, part.generators) for part in parts]
    order = torch.cat([part.at for part in parts]).argsort()
    return _Chosen(*(torch.cat([getattr(each, name) for each in chosen])[order] for name in _Chosen.__slots__))


def _choose(
    logits: Float[Tensor, "N V"],
    mask_token_id: int,
    sampling: Sampling,
    generators: Sequence[tuple[torch.Generator, int]],
) -> _Chosen:
    broken, logits = not_finite(logits), _permitted(logits, sampling)
    best = _argmax(logits, mask_token_id)
    # Where only [MASK] and suppressed tokens are finite, nothing is left to predict.
    broken |= logits.gather(-1, best[:, None])[:, 0] == -torch.inf
    logits = _filter(logits, sampling)
    tokens = best
    if sampling.temperature > 0:
        drawn = _gumbel_max(logits, mask_token_id, sampling.temperature, generators)
        tokens = drawn.where(drawn >= 0, best)
        if sampling.tempered_confidence:
            logits = _tempered(logits, sampling.temperature)
    last = torch.zeros_like(tokens, dtype=torch.bool)
    if sampling.eos_suppression in ("confidence", "both"):
        logits = _without(logits, sampling.eos_token_ids)
        last = torch.isin(tokens, torch.tensor(sampling.eos_token_ids, device=logits.device))
    return _Chosen(logits, tokens, broken, last)


def _permitted(logits: Float[Tensor, "N V"], sampling: Sampling) -> Float[Tensor, "N V"]:
    suppressed = sampling.eos_token_ids[:1] if sampling.eos_suppression in ("logits", "both") else ()
    return _without(logits, suppressed) if suppressed else logits


def _distribution(logits: Float[Tensor, "N V"], mask_token_id: int, sampling: Sampling) -> Float[Tensor, "N V"]:
    """What `_choose` draws from; 1 for its token where it does not draw."""
    logits = _permitted(logits, sampling)
    certain = F.one_hot(_argmax(logits, mask_token_id), logits.shape[-1]).double()
    if sampling.temperature == 0:
        return certain
    left = _without(_filter(logits, sampling), [mask_token_id])
    drawn = _tempered(left.double(), sampling.temperature).softmax(-1)
    return drawn.where((left > -torch.inf).any(-1, keepdim=True), certain)


def _weights(
    logits: Float[Tensor, "N V"], token: Int[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
    """Unnormalized probabilities (the most probable token has 1): of one token, in float64, and of all others.

    Summing the others separately distinguishes probabilities that all round to 1 in float32, as is common for trained
    models; the published samplers rank them by a softmax in float64.
    """
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    own = weights.gather(-1, token[:, None])[:, 0].double()
    return own, weights.scatter_(-1, token[:, None], 0)


def _without(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    return logits.index_fill(-1, torch.tensor(tokens, device=logits.device), -torch.inf)


def _filter(logits: Tensor, sampling: Sampling) -> Tensor:
    """Exclude tokens by nucleus, then top-k, in Dream's order."""
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked, order = _tempered(logits, sampling.temperature or 1.0).sort(dim=-1, descending=True, stable=True)
        probabilities = ranked.softmax(-1)
        # A token is kept while the probability before it does not exceed top_p: the first always is.
        beyond = probabilities.cumsum(-1) - probabilities > sampling.top_p
        logits = logits.masked_fill(torch.empty_like(beyond).scatter_(-1, order, beyond), -torch.inf)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature, up to a constant; the temperature is clamped to 1e-30, the range of float32."""
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)


def _argmax(logits: Tensor, mask_token_id: int) -> Tensor:
    """The most probable token other than [MASK]; the logits are restored."""
    kept = logits[:, mask_token_id].clone()
    logits[:, mask_token_id] = -torch.inf
    best = logits.argmax(-1)
    logits[:, mask_token_id] = kept
    return best


def _gumbel_max(
    logits: Tensor, mask_token_id: int, temperature: float, generators: Sequence[tuple[torch.Generator, int]]
) -> Tensor:
    """Sample tokens in float64: argmax of logits - temperature * log(-log u); -1 where only [MASK] is left."""
    chosen = []
    # Row by row on purpose: each has its own generator, and the float64 noise of one row at a time saves memory.
    for part, (generator, count) in zip(logits.split([n for _, n in generators]), generators, strict=True):
        u = torch.rand((count, logits.shape[-1]), generator=generator, dtype=torch.float64, device=logits.device)
        noisy = part.double() - temperature * (-u.log()).log()
        noisy[:, mask_token_id] = -torch.inf
        best = noisy.max(-1)
        chosen.append(best.indices.where(best.values > -torch.inf, -1))
    return torch.cat(chosen)
