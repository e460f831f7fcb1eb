"""The options of requests and engines, and building a request from them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from dllm.checks import choice, is_text, known, number, seed
from dllm.decoding.formatted import check_room, constraint_of, with_scaffold
from dllm.decoding.prediction import Sampling
from dllm.decoding.prompts import entries
from dllm.decoding.request import Request
from dllm.models.attention import BlockCausal
from dllm.models.loading import LanguageModel
from dllm.structure import ResponseFormat, read_format

_BLOCK_LENGTH = 32  # of models that attend to every position


@dataclass(frozen=True)
class Options:
    """All options of a run except model, prompts, sampler and cache.

    Attributes:
        gen_length: positions G to generate per prompt; unused by `infill`. "auto" is what the model's context leaves,
            for samplers that find the length themselves (`daedal`); the rest is filled with end-of-text.
        block_length: positions K decoded at a time, left to right; None for all at once. The last block is shorter
            where K does not divide G. "auto" is 32, or the block of a model whose attention is causal over blocks; such
            a model attends in blocks of K, and None is its own.
        temperature: 0 is greedy; above 0, Gumbel-max sampling.
        top_p: nucleus sampling; None for all tokens.
        top_k: sample from the k most probable tokens; None for all. At temperature 0, too, both change the confidences,
            which are those of the tokens kept, and so what a policy commits (as in Dream).
        tempered_confidence: above temperature 0, compute confidence, margin and entropy from the distribution that
            tokens are drawn from, softmax(logits / temperature), instead of softmax(logits); None for the published
            sampler of the model: Dream's the former, LLaDA's the latter.
        cfg_scale: classifier-free guidance against the masked prompt (LLaDA's convention:
            0 is off); it computes every row twice and counts as one forward.
        seed: row i uses seed + i; a sequence gives each row its own; None for a random seed.
        stop_at_eos: finish a row once everything up to its first end-of-text is decoded; the text
            up to there is the same either way (where `freedave`, `ssd` or `s2d2` sample: of the same distribution).
        eos_token_id: id or ids that end a text; None for the backbone's.
        stop: stop string or strings, before which a text ends; a row is finished once everything up to one is decoded,
            and the text is the same as if decoding had continued. Special tokens are written as the tokenizer decodes
            them. None for none.
        eos_suppression: None, "logits" (never predict the first end-of-text id), "confidence"
            (commit end-of-text last) or "both".
        response_format: what the text of an answer has to be (`dllm.structure.formats`): a mapping with a type, as of
            the OpenAI API, or a JSON file with one; None for any text.
        batch_size: rows decoded together; a finished row is replaced at once by a waiting one.
        cuda_graphs: replay small forwards from CUDA graphs, which avoids the launch overhead of their kernels;
            None: if there is a CUDA device.

    Raises:
        ValueError: a value out of range.
    """

    gen_length: int | Literal["auto"] = 128
    block_length: int | Literal["auto"] | None = "auto"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    tempered_confidence: bool | None = None
    cfg_scale: float = 0.0
    seed: int | Sequence[int] | None = None
    stop_at_eos: bool = True
    eos_token_id: int | Sequence[int] | None = None
    stop: str | Sequence[str] | None = None
    eos_suppression: str | None = None
    response_format: Mapping[str, Any] | str | Path | ResponseFormat | None = None
    batch_size: int = 8
    cuda_graphs: bool | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, _plain(name, value))
        if self.gen_length != "auto":
            number("gen_length", self.gen_length, "a whole number of at least 1, or auto", low=1, whole=True)
        if self.block_length is not None and self.block_length != "auto":
            number("block_length", self.block_length, "a whole number of at least 1, auto, or null", low=1, whole=True)
        number("cfg_scale", self.cfg_scale, "0 (off) or a positive number", low=0, high=1e6)
        number("batch_size", self.batch_size, "a whole number of at least 1", low=1, whole=True)
        if self.seed is not None:
            if isinstance(self.seed, (int, float, str)):
                seed("seed", self.seed, use=", or null")
            elif not isinstance(self.seed, (Sequence, np.ndarray)):
                raise ValueError(f"seed={self.seed!r} is of the wrong type; give a whole number, a list, or null")
            else:
                for each in self.seed:
                    use = "a whole number from 0 to 2**63 - 1, or null"
                    number("seed", each, use, low=0, high=2**63 - 1, whole=True)
        choice("stop_at_eos", self.stop_at_eos, (True, False))
        choice("tempered_confidence", self.tempered_confidence, (True, False, None))
        choice("cuda_graphs", self.cuda_graphs, (True, False, None))
        _stop_strings(self.stop)
        object.__setattr__(self, "response_format", read_format(self.response_format))
        if self.response_format is not None:
            _check_beside_format(self)
        # The rest is checked where it is used; this rejects bad values before a model is loaded.
        Sampling(self.temperature, self.top_p, self.top_k, self.eos_suppression)


def make_request(
    lm: LanguageModel,
    ids: Sequence[int],
    options: Options,
    seed: int,
    infill: bool,
    name: str,
    pattern: BlockCausal | None,
    most: int | None = None,
) -> Request:
    """Build the request for one prompt.

    Args:
        lm: a loaded model.
        ids: token ids of the prompt, or of a text with masks.
        options: of the request; their seed is ignored.
        seed: of this request.
        infill: `ids` contain the masks.
        name: of the prompt in errors.
        pattern: the attention pattern of the engine.
        most: positions of a row; None for the model's context.

    Raises:
        ValueError: an option or a prompt that does not fit the model.
    """
    backbone = lm.backbone
    stops, tempered = _stop_strings(options.stop), options.tempered_confidence
    if stops and lm.tokenizer is None:
        raise ValueError(f"stop={options.stop!r} needs a tokenizer, and this model has none; use eos_token_id")
    if tempered is not None and options.temperature == 0:
        problem = f"tempered_confidence={str(tempered).lower()} has no effect at temperature=0"
        raise ValueError(f"{problem}; set temperature, or leave it out")
    eos = eos_ids(options.eos_token_id, lm)
    sampling = Sampling(
        options.temperature, options.top_p, options.top_k, options.eos_suppression, eos,
        backbone.tempered_confidence if tempered is None else tempered,
    )  # fmt: skip
    open_ended = not infill and options.gen_length == "auto"
    room = most or backbone.max_length
    length = max(1, room - len(ids)) if options.gen_length == "auto" else options.gen_length
    constraint, prompt = None, 0
    if isinstance(options.response_format, ResponseFormat):
        constraint = constraint_of(options.response_format, lm, eos)
        if options.response_format.scaffold:
            prompt = len(ids)
            ids, infill = with_scaffold(options.response_format, lm, ids, length, room, infill), True
    _check_prompt(lm, ids, length, infill, name)
    tokens = np.asarray([*ids, *[backbone.mask_token_id] * (0 if infill else length)], dtype=np.int64)
    request = Request(
        tokens=tokens,
        mask_token_id=backbone.mask_token_id,
        eos_token_ids=eos,
        blocks=block_length_of(options.block_length, backbone.max_length, pattern),
        sampling=sampling,
        seed=seed,
        stop_at_eos=options.stop_at_eos and not infill,
        stops=() if infill else stops,
        tokenizer=lm.tokenizer,
        infill=infill,
        from_start=pattern is not None and pattern.from_start,
        open_ended=open_ended,
        prompt=prompt,
        constraint=constraint,
    )
    check_room(request, name)
    return request


def block_length_of(wanted: int | Literal["auto"] | None, most: int, pattern: BlockCausal | None) -> int | None:
    """Positions of a block: of a block-causal model those of its attention pattern.

    Raises:
        ValueError: another length than that of the pattern.
    """
    if pattern is None:
        return None if wanted is None else min(_BLOCK_LENGTH if wanted == "auto" else wanted, most)
    if isinstance(wanted, int) and wanted != pattern.length:
        raise ValueError(
            f"block_length={wanted} differs from that of the engine, which attends in blocks of {pattern.length}; "
            f"leave it out, or make an engine with block_length={wanted}"
        )
    return min(pattern.length, most)


def _check_prompt(lm: LanguageModel, row: Sequence[int], gen_length: int, infill: bool, name: str) -> None:
    backbone, vocabulary = lm.backbone, lm.backbone.logits_size
    mask = backbone.mask_token_id
    wrong = next((token for token in row if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ValueError(f"{name} has token id {wrong}; this model's ids are 0 to {vocabulary - 1}")
    if not infill and mask in row:
        raise ValueError(f"{name} contains [MASK]; use infill (infill=true) to fill masks within a text")
    if infill and mask not in row:
        written = None if lm.tokenizer is None else lm.tokenizer.mask_token
        put = f"id {mask}" if written is None else written
        raise ValueError(f"{name} has no [MASK]; put one ({put}) for each token to fill in")
    room = backbone.max_length - (0 if infill else gen_length)
    if len(row) > room:
        beside = "" if infill else f" beside gen_length={gen_length}"
        raise ValueError(
            f"{name} has {len(row)} tokens; the model's context of {backbone.max_length} leaves "
            f"room for {max(0, room)}{beside}: shorten one of them"
        )


def eos_ids(eos: int | Sequence[int] | None, lm: LanguageModel) -> tuple[int, ...]:
    """The ids that end a text: those given, or the backbone's.

    Raises:
        ValueError: one that the model does not have.
    """
    if eos is None:
        return lm.backbone.eos_token_ids
    eos = _plain("eos_token_id", eos)
    ids = tuple(eos) if isinstance(eos, Sequence) and not isinstance(eos, str) else (eos,)
    most = lm.backbone.logits_size - 1
    use = f"ids from 0 to {most}, or null for the model's own"
    if not ids:
        raise ValueError(f"eos_token_id={eos!r} is empty; use {use}")
    for token in ids:
        number("eos_token_id", token, use, low=0, high=most, whole=True)
    if (mask := lm.backbone.mask_token_id) in ids:
        raise ValueError(f"eos_token_id={mask} is the id of [MASK], which is never generated; leave it out")
    return tuple(map(int, ids))


def _plain(name: str, value: Any) -> Any:
    """Arrays, tensors and their scalars as Python objects; other values unchanged."""
    return entries(name, value) if isinstance(value, (np.generic, np.ndarray, Tensor)) else value


def _check_beside_format(options: Options) -> None:
    """Reject (ValueError) options that would end a text elsewhere than its format does."""
    if _stop_strings(options.stop):
        raise ValueError(f"stop={options.stop!r} would cut an answer that response_format completes; leave it out")
    if options.eos_suppression in ("logits", "both"):
        raise ValueError(
            f"eos_suppression={options.eos_suppression} excludes end-of-text, which follows an answer with "
            "response_format; use confidence or null"
        )


def _stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    given: Any = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(given, Sequence) or not all(isinstance(each, str) for each in given):
        raise ValueError(f"stop={stop!r} is of the wrong type; give a string or a list of strings, or null for none")
    if not all(map(is_text, given)):
        raise ValueError(f"stop={stop!r} is not valid UTF-8; give UTF-8")
    if "" in given:
        raise ValueError(f"stop={stop!r} contains an empty string, which would end every text; leave it out")
    return tuple(given)


def seeds(seed: int | Sequence[int] | None, rows: int) -> Sequence[int]:
    """A seed for each row.

    Raises:
        ValueError: the numbers of seeds and rows differ.
    """
    if seed is None:
        seed = random.randrange(2**31)
    if isinstance(seed, int):
        return range(seed, seed + rows)
    if len(seed) != rows:
        raise ValueError(f"seed has {len(seed)} entries for {rows} prompts; give one per prompt, or a single number")
    return [int(each) for each in seed]


def parse_options(options: dict[str, Any]) -> Options:
    """Build options from keyword arguments.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """
    known(options, Options.__dataclass_fields__)
    return Options(**options)
