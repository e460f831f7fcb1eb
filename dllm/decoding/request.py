"""A request of the engine: tokens and per-request options."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from dllm.decoding.prediction import Sampling
from dllm.structure import Constraint


@dataclass(frozen=True, eq=False)
class Request:
    """The tokens and options of one row.

    Attributes:
        tokens: prompt and masks; [MASK] at the positions to generate.
        mask_token_id: id of [MASK].
        eos_token_ids: ids that end the text; the first one fills the rest.
        blocks: block length in positions; None for one block.
        sampling: how tokens are chosen from logits.
        seed: of the row's generator.
        stop_at_eos: the row is finished once everything up to its first end-of-text is decoded.
        stops: stop strings.
        tokenizer: decodes the text; None if not needed.
        infill: the answer is the whole text, not only what follows the prompt.
        max_forwards: denoiser forwards after which the request fails; None for no limit.
        from_start: blocks are counted from the first token, and not from the first position to generate.
        open_ended: the sampler is to find the length (gen_length=auto).
        prompt: tokens before the answer, of an infilled one.
        constraint: the language of the answer; None for any.
    """

    tokens: Int[np.ndarray, " n"]
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    blocks: int | None
    sampling: Sampling
    seed: int
    stop_at_eos: bool = True
    stops: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    infill: bool = False
    max_forwards: int | None = None
    from_start: bool = False
    open_ended: bool = False
    prompt: int = 0
    constraint: Constraint | None = None

    @cached_property
    def region(self) -> Bool[np.ndarray, " n"]:
        """The positions to generate."""
        return np.asarray(self.tokens == self.mask_token_id)

    @cached_property
    def start(self) -> int:
        """The first position to generate."""
        return int(self.region.argmax())

    @property
    def answer_start(self) -> int:
        """The first position of the answer."""
        return self.prompt if self.infill else self.start

    @cached_property
    def end(self) -> int:
        """The position after the last one to generate."""
        return len(self.region) - int(self.region[::-1].argmax())

    @property
    def span(self) -> int:
        """Positions from the first to the last to generate."""
        return self.end - self.start

    @property
    def origin(self) -> int:
        """Start of the first block."""
        return 0 if self.from_start else self.start

    @property
    def block_length(self) -> int:
        """Positions of a block."""
        return self.blocks or self.end - self.origin

    @property
    def block_count(self) -> int:
        """Number of blocks, from the one with the first position to generate."""
        first, last = ((at - self.origin) // self.block_length for at in (self.start, self.end - 1))
        return last - first + 1

    @property
    def has_gaps(self) -> bool:
        """Whether there are given tokens after the first mask."""
        return not bool(self.region[self.start :].all())
