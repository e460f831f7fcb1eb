"""The Python API: `load`, and `generate`, `as_completed`, `stream` and `infill`, each of which runs an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from dllm.cache.base import Cache
from dllm.decoding.engine import Engine, check_model
from dllm.decoding.html import Vocabulary
from dllm.decoding.options import Options, eos_ids, make_request, parse_options, seeds
from dllm.decoding.prompts import Mask, Prompts, encode
from dllm.decoding.request import Request
from dllm.decoding.result import Generation, Tally, assemble, padded
from dllm.decoding.step import Answer, Frame, Step
from dllm.models import loading
from dllm.models.loading import LanguageModel
from dllm.progress import progress_bar
from dllm.samplers import Calibrated
from dllm.samplers.base import Sampler

Callback: TypeAlias = Callable[[Step], None]


def load(name: str | Path, *, calibration: str | Path | None = None, **options: Any) -> LanguageModel:
    """Load a denoiser and its tokenizer.

    Args:
        name: a model of conf/model such as "tiny-llada" or "llada-8b-instruct", a local folder, or a hub id.
        calibration: card of `dllm calibrate`, whose policy is used where no sampler is given; None for vanilla.
        **options: of `dllm.models.loading.load`: device, dtype, device_map, attn_implementation, revision, pack,
            adapter, tp and quantization.

    Raises:
        ValueError: as `dllm.models.loading.load`; a card that is damaged, certifies nothing, or is of another model.
    """
    if calibration is None:
        return loading.load(name, **options)
    sampler = Calibrated(calibration)
    lm = loading.load(name, **options)
    sampler.card.check(lm.backbone.fingerprint())
    return replace(lm, sampler=sampler)


def generate(
    lm: LanguageModel,
    prompts: Prompts,
    sampler: str | Sampler | None = None,
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
            returns. A chat that ends with a partial assistant message is continued.
        sampler: the unmasking policy: a name of conf/sampler or an object; None for that of the model's card (`load`),
            else vanilla.
        cache: the cache: a name of conf/cache or an object.
        attention_mask: of token ids: 1 at tokens, 0 at padding on either side. Not needed with the output of a
            tokenizer. A tensor that may be padded is rejected without one (`dllm.decoding.prompts.encode`).
        callback: called after every step of every batch.
        progress: draw a progress bar.
        **options: fields of `dllm.Options`.

    Raises:
        ValueError: an unknown option or name, a value out of range, a prompt that does not fit the
            model, an incompatible sampler and cache, or no answer at all: prompts whose logits are not finite
            have an entry in `Generation.errors` while the others are answered.
    """
    requests, engine = _prepare(lm, prompts, sampler, cache, attention_mask, options)
    return _run(requests, engine, callback, progress)


def as_completed(
    lm: LanguageModel,
    prompts: Prompts,
    sampler: str | Sampler | None = None,
    cache: str | Cache = "none",
    *,
    attention_mask: Mask | None = None,
    callback: Callback | None = None,
    infill: bool = False,
    **options: Any,
) -> Iterator[Answer]:
    """Generate like `generate`, yielding each row as soon as it is finished, in order of completion.

    A failed row is yielded too, with its `error`. With `infill`, masks in the prompts are filled, like `infill`.

    Raises:
        ValueError: as `generate`; options and prompts are checked at the call, not at the first step.
    """
    _, engine = _prepare(lm, prompts, sampler, cache, attention_mask, options, infill)
    return _answers(engine, callback)


def stream(
    lm: LanguageModel,
    prompts: Prompts,
    sampler: str | Sampler | None = None,
    cache: str | Cache = "none",
    *,
    attention_mask: Mask | None = None,
    **options: Any,
) -> Iterator[Frame]:
    """Generate like `generate`, all prompts in one batch, yielding the canvas after every step.

    Raises:
        ValueError: as `generate`; options and prompts are checked at the call, not at the first step. At the end,
            if every row failed.
    """
    if "batch_size" in options:
        raise ValueError("batch_size has no effect on stream, which decodes all prompts together; leave it out")
    return _frames(*_prepare(lm, prompts, sampler, cache, attention_mask, options, together=True))


def infill(
    lm: LanguageModel,
    texts: Prompts,
    sampler: str | Sampler | None = None,
    cache: str | Cache = "none",
    *,
    attention_mask: Mask | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **options: Any,
) -> Generation:
    """Fill the [MASK] tokens of each text, wherever they are; everything else is unchanged.

    A mask is the tokenizer's mask token (``lm.tokenizer.mask_token``) or its id. Blocks are counted
    from a row's first mask. In the result the whole text is the completion, and only former masks
    count as generated; end-of-text does not stop decoding.

    Raises:
        ValueError: as `generate`, or a text without a mask.
    """
    requests, engine = _prepare(lm, texts, sampler, cache, attention_mask, options, infill=True)
    return _run(requests, engine, callback, progress)


def prepare(
    lm: LanguageModel,
    ids: Sequence[Sequence[int]],
    sampler: str | Sampler | None,
    cache: str | Cache,
    options: Options,
    infill: bool = False,
) -> tuple[list[Request], Engine]:
    """The requests for some prompts, and an engine of their size with these queued.

    Args:
        lm: a loaded model.
        ids: token ids of each prompt, or of each text with masks.
        sampler: a name of conf/sampler or an object; None for the model's own.
        cache: a name of conf/cache or an object.
        options: everything else.
        infill: `ids` contain the masks.

    Raises:
        ValueError: as `generate`.
    """
    block_length = options.block_length if isinstance(options.block_length, int) else None
    pattern = lm.backbone.pattern_of(block_length)
    block_length = None if pattern is None else block_length
    requests = [
        make_request(lm, prompt, options, seed, infill, f"prompts[{place}]", pattern)
        for place, (prompt, seed) in enumerate(zip(ids, seeds(options.seed, len(ids)), strict=True))
    ]
    engine = Engine(
        lm, sampler, cache, batch_size=min(options.batch_size, len(ids)),
        max_length=max(len(request.tokens) for request in requests),
        cfg_scale=options.cfg_scale, cuda_graphs=options.cuda_graphs, block_length=block_length,
    )  # fmt: skip
    for request in requests:
        engine.submit(request)
    return requests, engine


def _prepare(
    lm: LanguageModel,
    prompts: Prompts,
    sampler: str | Sampler | None,
    cache: str | Cache,
    attention_mask: Mask | None,
    options: dict[str, Any],
    infill: bool = False,
    together: bool = False,
) -> tuple[list[Request], Engine]:
    """As `prepare`, from user input; with `together` all prompts in one batch."""
    check_model(lm)
    for name in ("gen_length", "stop_at_eos", "stop"):
        if infill and name in options:
            raise ValueError(f"{name} has no effect on infill; leave it out")
    ids = encode(prompts, lm.tokenizer, attention_mask, eos_ids(options.get("eos_token_id"), lm))
    fixed = {"batch_size": len(ids)} if together else {}
    return prepare(lm, ids, sampler, cache, parse_options(options | fixed), infill)


def _run(requests: Sequence[Request], engine: Engine, callback: Callback | None, progress: bool) -> Generation:
    """Decode everything and collect the results."""
    tally = Tally(engine.lm.device)
    total = sum(int(request.region.sum()) for request in requests)
    with progress_bar("decoding", total, note="tokens", show=progress) as update, engine:
        for step in engine.steps():
            tally.update(step)
            if callback is not None:
                callback(step)
            update(advance=int(step.change.gained.sum()))
    _check_answered({name: answer.error for name, answer in tally.answers.items()})
    return assemble(requests, tally, engine.measuring_seconds)


def _answers(engine: Engine, callback: Callback | None) -> Iterator[Answer]:
    """Decode everything, yielding requests as they finish."""
    with engine:
        for step in engine.steps():
            if callback is not None:
                callback(step)
            for name in sorted(step.answers):
                yield step.answers[name]


def _frames(requests: Sequence[Request], engine: Engine) -> Iterator[Frame]:
    """Decode everything, yielding all canvases after each step."""
    mask = engine.lm.backbone.mask_token_id
    vocabulary = Vocabulary(engine.lm.tokenizer, mask, requests[0].eos_token_ids)
    tokens = padded([request.tokens for request in requests], requests[0].eos_token_ids[0], left=True)
    nfe, errors = np.zeros(len(tokens), dtype=np.int64), dict.fromkeys(range(len(tokens)))
    with engine:
        for step in engine.steps():
            provisional, committed, revoked = np.full_like(tokens, mask), *np.zeros((2, *tokens.shape), dtype=bool)
            tokens[step.ids], nfe[step.ids], provisional[step.ids] = step.tokens, step.nfe, step.provisional
            committed[step.ids], revoked[step.ids] = step.change.committed, step.change.revoked
            errors |= {name: answer.error for name, answer in step.answers.items()}
            yield Frame(
                tokens=torch.from_numpy(tokens.copy()),
                provisional=torch.from_numpy(provisional),
                committed=torch.from_numpy(committed),
                revoked=torch.from_numpy(revoked),
                nfe=torch.from_numpy(nfe.copy()),
                drift=step.drift,
                errors=tuple(errors.values()),
                vocabulary=vocabulary,
            )
    _check_answered(errors)


def _check_answered(errors: Mapping[int, str | None]) -> None:
    """Raise an error if no prompt has an answer."""
    if None not in errors.values():
        first = min(errors)
        raise ValueError(f"prompts[{first}] has no answer: {errors[first]}")
