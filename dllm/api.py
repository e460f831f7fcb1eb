"""The Python API: `generate`, `as_completed`, `stream` and `infill` over one engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dllm.cache.base import Cache
from dllm.drift import Measurement
from dllm.generation import Generation, Recorder
from dllm.loading import LanguageModel
from dllm.plan import Answer, Callback, Plan, eos_ids, parse_options
from dllm.prompts import Mask, Prompts, encode
from dllm.samplers.base import Sampler
from dllm.step import Step


@dataclass(frozen=True)
class Frame:
    """The canvas after one step, for all B rows.

    Attributes:
        tokens: (B, L) prompts, left-padded, and what is decoded so far; [MASK] elsewhere.
        provisional: (B, L) the tokens this step predicted but did not commit; [MASK] elsewhere.
        committed: (B, L) True where this step committed a token.
        revoked: (B, L) True where this step took a token back.
        nfe: (B,) forwards so far.
        drift: how far the cache was off in forwards of this step that were compared with exact ones.
        errors: why a row failed so far; None where it did not.
    """

    tokens: Int[Tensor, "B L"]
    provisional: Int[Tensor, "B L"]
    committed: Bool[Tensor, "B L"]
    revoked: Bool[Tensor, "B L"]
    nfe: Int[Tensor, " B"]
    drift: tuple[Measurement, ...] = ()
    errors: tuple[str | None, ...] = ()


def generate(
    lm: LanguageModel,
    prompts: Prompts,
    sampler: str | Sampler = "vanilla",
    cache: str | Cache = "none",
    *,
    attention_mask: Mask | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **options: Any,
) -> Generation:
    """Generate after each prompt.

    Args:
        lm: a loaded model.
        prompts: a text, texts, chat messages, chats, or token ids: lists, a (B, P) LongTensor, or what a tokenizer
            returns. A chat that ends with the beginning of the assistant's message is continued.
        sampler: the policy that decides what is written when: a name of conf/sampler or an object.
        cache: what is reused between steps: a name of conf/cache or an object.
        attention_mask: of token ids: 1 at tokens, 0 at padding on either side. Left out where a tokenizer's own comes
            with them. A tensor that seems padded is refused without one (`dllm.prompts.encode`).
        callback: called after every step of every batch.
        progress: draw a progress bar.
        **options: fields of `dllm.Options`.

    Raises:
        ValueError: an unknown option or name, a value out of range, a prompt that does not fit the
            model, a sampler and cache that do not go together, or no answer at all: where the logits of some
            prompts are no numbers, these have an entry in `Generation.errors`, and the others their answers.
    """
    plan = _plan(lm, prompts, sampler, cache, attention_mask, options)
    return plan.run(callback, progress)


def as_completed(
    lm: LanguageModel,
    prompts: Prompts,
    sampler: str | Sampler = "vanilla",
    cache: str | Cache = "none",
    *,
    attention_mask: Mask | None = None,
    callback: Callback | None = None,
    infill: bool = False,
    **options: Any,
) -> Iterator[Answer]:
    """Generate as `generate` does, yielding each row as soon as it is finished, in the order they finish.

    A row that fails is yielded too, with its `error`. With `infill` masks in the prompts are filled, as `infill` does.

    Raises:
        ValueError: as `generate`; options and prompts are checked at the call, not at the first step.
    """
    plan = _plan(lm, prompts, sampler, cache, attention_mask, options, infill)
    return plan.answers(callback)


def stream(
    lm: LanguageModel,
    prompts: Prompts,
    sampler: str | Sampler = "vanilla",
    cache: str | Cache = "none",
    *,
    attention_mask: Mask | None = None,
    **options: Any,
) -> Iterator[Frame]:
    """Generate as `generate` does, all prompts in one batch, yielding the canvas after every step.

    Raises:
        ValueError: as `generate`; options and prompts are checked at the call, not at the first step. When all is
            decoded, that every row failed.
    """
    if "batch_size" in options:
        raise ValueError("batch_size has no effect on stream, which decodes all prompts together; leave it out")
    plan = _plan(lm, prompts, sampler, cache, attention_mask, options, together=True)
    return _frames(plan)


def infill(
    lm: LanguageModel,
    texts: Prompts,
    sampler: str | Sampler = "vanilla",
    cache: str | Cache = "none",
    *,
    attention_mask: Mask | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **options: Any,
) -> Generation:
    """Fill the [MASK] tokens of each text, wherever they stand; everything else stays.

    The mask is written as the tokenizer writes it (``lm.tokenizer.mask_token``) or as its id. Blocks
    are counted from a row's first mask. In the result the whole text is the completion, and only
    former masks count as generated; end-of-text does not stop anything.

    Raises:
        ValueError: as `generate`, or a text without a mask.
    """
    return _plan(lm, texts, sampler, cache, attention_mask, options, infill=True).run(callback, progress)


def _plan(
    lm: LanguageModel,
    prompts: Prompts,
    sampler: str | Sampler,
    cache: str | Cache,
    attention_mask: Mask | None,
    options: dict[str, Any],
    infill: bool = False,
    together: bool = False,
) -> Plan:
    """What is to be decoded; with `together` all prompts in one batch."""
    if not isinstance(lm, LanguageModel):
        raise ValueError(f"lm={lm!r} is no loaded model; give dllm.load({str(lm)!r})")
    for name in ("gen_length", "stop_at_eos", "stop"):
        if infill and name in options:
            raise ValueError(f"{name} has no effect on infill; leave it out")
    ids = encode(prompts, lm.tokenizer, attention_mask, eos_ids(options.get("eos_token_id"), lm))
    fixed = {"stop_at_eos": False} if infill else {"batch_size": len(ids)} if together else {}
    return Plan(lm, ids, sampler, cache, parse_options(options | fixed), infill)


def _frames(plan: Plan) -> Iterator[Frame]:
    for recorder, step in plan.steps(partial=True):
        yield _frame(recorder, step)
    plan.check_answered()


def _frame(recorder: Recorder, step: Step) -> Frame:
    rows, shape = step.change.rows, recorder.canvas.host.shape
    provisional = np.full(shape, recorder.canvas.mask_token_id)
    provisional[rows] = step.provisional
    committed, revoked = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    committed[rows], revoked[rows] = step.change.committed, step.change.revoked
    return Frame(
        tokens=torch.from_numpy(recorder.canvas.host.copy()),
        provisional=torch.from_numpy(provisional),
        committed=torch.from_numpy(committed),
        revoked=torch.from_numpy(revoked),
        nfe=torch.from_numpy(recorder.nfe.copy()),
        drift=step.drift,
        errors=tuple(recorder.canvas.errors.get(row) for row in range(len(recorder.canvas.host))),
    )
