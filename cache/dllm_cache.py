"""dLLM-Cache: refreshes the prompt rarely, the response often, and in between what changed most (arXiv 2506.06295).

Rule:

    s mod prompt_interval = 0      compute the prompt
    s mod response_interval = 0    compute the response
    else, in every layer           compute the values v of the response, and of its n columns the
                                   floor(ratio * n) with the lowest cosine similarity of v and the stored
                                   values; the others reuse their keys and the outputs of attention and
                                   feed-forward part

s counts the row's forwards so far (section 3.2 and algorithm 1). The first layer is always computed for the whole
response, because it sees new tokens. The response, n positions with values v, is everything after the prompt and, in
families with shifted logits, the position at which its first prediction is read.

Selection by rank in every layer amplifies rounding: in float32, results of this cache differ between batch sizes more
often than those of other caches.

Differences from the reference: similarities are ranked without the cancellation of 1 - x near 1, so that float32 ranks
like float64; ties, including all columns that changed by no more than rounding, go to the leftmost; a revoked or
rewritten position is computed in every layer; rows have their own steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.cache.base import Flags, Metered, Plan, Question
from dllm.cache.selection import Selection
from dllm.cache.store import KeyValues, PerRow, Reuse
from dllm.checks import number
from dllm.decoding.setup import Setup

_ROUNDING = 16  # relative change, in machine epsilons, up to which a column counts as unchanged


@dataclass(frozen=True)
class DLLMCache(Metered):
    """Compute what changed most.

    Args:
        prompt_interval: forwards between refreshes of the prompt.
        response_interval: the same for the response; 1 is no reuse of it.
        ratio: share of the response computed in between.

    Raises:
        ValueError: an option out of range.
    """

    prompt_interval: int = 50
    response_interval: int = 7
    ratio: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt_interval", "response_interval"):
            number(name, getattr(self, name), "a whole number of at least 1", low=1, whole=True)
        number("ratio", self.ratio, "a number from 0 to 1", low=0, high=1)

    @property
    def refuses(self) -> Mapping[str, str]:
        """Requirements of samplers that this cache does not meet, with the reason."""
        reasons = {"graphs": "each layer selects its own positions", "shadows": "each layer selects its own positions"}
        return {**super().refuses, **reasons}

    def start(self, setup: Setup) -> Reuse:
        """Allocate keys, values and sublayer outputs of every position."""
        store = Features(self.ratio, setup)
        return Reuse(setup, _ByChange(self, setup, store), store)


class _ByChange(PerRow):
    def __init__(self, options: DLLMCache, setup: Setup, store: Features) -> None:
        super().__init__(setup)
        self.options, self.store = options, store
        self.forwards = self.per_row(0)

    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        options, rows = self.options, question.rows
        step = self.forwards[rows]
        self.forwards[rows[question.first]] = step[question.first] + 1
        prompt = due | (step % options.prompt_interval == 0)
        response = due | (step % options.response_interval == 0)
        visible = question.visible
        within = question.since(question.canvas.start[rows] - self.setup.logits_shift) & visible
        self.store.response[rows] = within
        self.store.needed[rows] = np.where(within, response[:, None], prompt[:, None]) | stale
        # The first layer computes the whole response, the others part of it.
        length, layers = within.sum(1), self.setup.kv_shape[0]
        part = (length + (layers - 1) * np.floor(options.ratio * length)) / layers
        cost = np.ceil(np.where(response, length, part)) + np.where(prompt, (visible & ~within).sum(1), 0)
        return Plan(within | prompt[:, None], cost=cost.astype(np.int64))


class Features(KeyValues):
    """Keys, values, and the outputs of attention and feed-forward part: (layers, slots, L, d) each.

    Bytes: 2 * layers * slots * L * (H * D + d) * (bytes per number).

    Attributes:
        response: (rows, L) columns that may be computed in part.
        needed: (rows, L) columns that are computed in every layer of the next forward.
    """

    joinable = False
    spare = 0

    def __init__(self, ratio: float, setup: Setup) -> None:
        super().__init__(setup)
        self.ratio = ratio
        shape = setup.kv_shape[0], setup.slots, setup.length, setup.hidden_size
        self.added = {part: setup.tensor(part, shape) for part in ("attention", "mlp")}
        self.response = np.zeros((setup.slots, setup.length), dtype=bool)
        self.needed = np.zeros((setup.slots, setup.length), dtype=bool)

    def tensors(self) -> Sequence[Tensor]:
        """All stored tensors, (layers, slots, ...) each."""
        return self.keys, self.values, *self.added.values()

    def bind(self, selection: Selection) -> _Partial:
        """Access for a forward that computes those of these columns that changed."""
        return _Partial(self, selection)


@dataclass(frozen=True)
class _Share:
    """What a layer computes of A sequences of C slots.

    Attributes:
        rank: (A, C) 0 where a slot is always selected, 1 where by its change, 2 where never.
        width: slots U of the sequence with the most.
        chosen: the sequences and ranks of the selected slots.
        renewed: the sequences and slots whose values are replaced.
    """

    rank: Tensor
    width: int
    chosen: tuple[Tensor, Tensor]
    renewed: tuple[Tensor, Tensor]


class _Partial:
    """One forward over columns of which each layer selects some."""

    def __init__(self, store: Features, selection: Selection) -> None:
        self.store, self.columns = store, selection.columns
        rows, host = selection.rows, selection.host
        self.at, self.kept = self._put(selection.slots), self._put(np.flatnonzero(selection.first))
        self.whole, self.span = selection.neighbours, slice(*selection.span)
        own = selection.own  # the repeated columns of a short sequence are never selected
        response, needed = store.response[rows[:, None], host] & own, store.needed[rows[:, None], host] & own
        n = np.floor(store.ratio * response.sum(1)).astype(np.int64)
        optional = response & ~needed & (n > 0)[:, None]
        self.shares = (
            self._share(response | needed, np.zeros_like(own), n),
            self._share(needed, optional, np.minimum(n, optional.sum(1))),
        )
        self.slots: Int[Tensor, "B U"] | None = None

    def _share(self, needed: Flags, optional: Flags, n: NDArray[np.int64]) -> _Share:
        count = needed.sum(1) + np.where(optional.any(1), n, 0)
        width = int(count.max())
        chosen = np.nonzero(np.arange(width) < count[:, None])
        renewed = np.nonzero(needed | optional)
        return _Share(
            self._put(np.where(needed, 0, np.where(optional, 1, 2))),
            width,
            (self._put(chosen[0]), self._put(chosen[1])),
            (self._put(renewed[0]), self._put(renewed[1])),
        )

    def stale(self, layer: int, values: Float[Tensor, "B H C D"]) -> Int[Tensor, "B U"]:
        """The columns that are always computed and those whose values changed most."""
        share = self.shares[layer > 0]
        stored = self._held(self.store.values[layer]).transpose(1, 2)
        stored = stored.gather(1, self.columns[..., None, None].expand(-1, -1, *stored.shape[2:]))
        # Squared distance of the unit vectors, 2 - 2 * similarity, without the cancellation that makes all small
        # changes equal in float32, and nearly all in bfloat16.
        wide = torch.promote_types(values.dtype, torch.float32)
        both = (self.store.all_heads(each, 2).flatten(2) for each in (values.transpose(1, 2), stored))
        fresh, stored = (F.normalize(each.to(wide), dim=-1) for each in both)
        change = (fresh - stored).square().sum(-1)
        # A difference by rounding alone counts as no change: ties go to the leftmost.
        change = change.masked_fill(change < (_ROUNDING * torch.finfo(wide).eps) ** 2, 0)
        # Needed columns come first and excluded ones last.
        ranked = change.masked_fill(share.rank == 0, torch.inf).masked_fill(share.rank == 2, -1)
        self.slots = ranked.argsort(dim=-1, descending=True, stable=True)[:, : share.width]
        return self.slots

    def update(
        self, layer: int, keys: Float[Tensor, "B H U D"], values: Float[Tensor, "B H C D"]
    ) -> tuple[Float[Tensor, "B H S D"], Float[Tensor, "B H S D"]]:
        """Overwrite stored keys and values by fresh ones."""
        share = self.shares[layer > 0]
        entry, slot = share.renewed
        renewed = entry, self.columns[entry, slot], values.transpose(1, 2)[entry, slot]
        k = self._keep(self.store.keys[layer].transpose(1, 2), *self._chosen(layer, keys.transpose(1, 2)))
        v = self._keep(self.store.values[layer].transpose(1, 2), *renewed)
        return k.transpose(1, 2)[:, :, self.span], v.transpose(1, 2)[:, :, self.span]

    def blend(self, part: str, layer: int, fresh: Float[Tensor, "B U d"]) -> Float[Tensor, "B C d"]:
        """Overwrite the stored outputs by the computed ones; return those of all columns."""
        whole = self._keep(self.store.added[part][layer], *self._chosen(layer, fresh))
        return whole.gather(1, self.columns[..., None].expand(-1, -1, fresh.shape[-1]))

    def _chosen(self, layer: int, fresh: Float[Tensor, "B U ..."]) -> tuple[Tensor, Tensor, Tensor]:
        """Sequence, canvas column and content of every computed slot."""
        assert self.slots is not None
        entry, place = self.shares[layer > 0].chosen
        return entry, self.columns[entry, self.slots[entry, place]], fresh[entry, place]

    def _keep(
        self, stored: Float[Tensor, "slots L ..."], entry: Tensor, column: Tensor, content: Tensor
    ) -> Float[Tensor, "B L ..."]:
        """Write columns of each sequence; only those of a row's first draft go to the store."""
        whole = self._held(stored).index_put_((entry, column), content)
        if self.whole is None:
            stored[self.at[self.kept]] = whole[self.kept]
        return whole

    def _held(self, stored: Float[Tensor, "slots ..."]) -> Float[Tensor, "B ..."]:
        return stored[self.at] if self.whole is None else stored[self.whole]

    def _put(self, array: NDArray[Any]) -> Tensor:
        return torch.as_tensor(array, device=self.columns.device)
