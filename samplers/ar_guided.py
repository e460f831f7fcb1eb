"""AR-guided diffusion: a causal model verifies the draft (FlashDLM, arXiv 2505.21467, section 3.3).

Rule:

    commit the drafts before the first mask i whose draft y the guide does not accept, given everything to its left;
    and at i  the draft itself, if it is the first (on_reject=draft),
              or the guide's token (on_reject=guide, accept=sample)

Per step: the denoiser drafts every masked position of the block at once, whatever its confidence. The
guide reads the row up to the first mask and the drafts after it. With p the guide's distribution at
position i given everything to its left, a draft y at i is accepted under

    argmax  y = argmax p
    topk    y among the `top_k` most probable
    ratio   y among the `top_k`, and p(y) >= ratio * max p
    sample  with probability min(1, p(y) / q(y)), q being the distribution that y was drawn from

and the longest accepted prefix from the first mask on is committed; tokens committed earlier count as
accepted. If even the first draft is rejected, the denoiser's draft is committed there anyway
(on_reject=draft, the reference: the guide only decides how many), or the guide's token replaces the
first rejected draft (on_reject=guide, as in speculative decoding). Every step commits at least one token.

With on_reject=guide this is Speculative Diffusion Decoding (arXiv 2408.05636): the denoiser drafts for the guide. Under
argmax the text is the one that the guide writes greedily. Under sample the token at the first rejected position is
always drawn from max(0, p - q), normalized, so that every token is distributed as p, whatever the drafts; p is subject
to the temperature, top_p and top_k of the request, as q is. Tokens that the denoiser lacks are excluded from p.
The first token of an empty prompt is the draft, as the guide has nothing to judge it by.

Differences from the reference:
- The block is drafted, with block_length=null the whole remainder, as published; one forward verifies all of it.
- The guide's KV cache keeps the accepted prefix of each row, in batches; the reference's is misaligned after
  several fully accepted chunks. With on_reject=draft a single last draft is committed without calling the guide.
- A guide with other tokens reads the text (`dllm.guide.alignment`); the reference keeps a first subtoken each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from dllm.checks import choice, number
from dllm.decoding.flags import flagged
from dllm.decoding.nonfinite import Broken, not_finite, reason
from dllm.decoding.prediction import Prediction
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.guide import Guide, Judging, guide_folder, load_guide
from dllm.guide.alignment import Aligned, Aligner, SameVocabulary, align
from dllm.guide.rejection import accepted, remainder
from dllm.samplers.base import Denoise, Policy, commit
from dllm.samplers.selection import leftmost


@dataclass
class GuideState:
    """State of an engine.

    Attributes:
        judging: the guide and its KV cache.
        aligner: maps the canvas to the guide's tokens.
        numbers: the guide's id of each token that may be written, -1 for others; None where their tokens differ.
        mask_token_id: of the denoiser.
    """

    judging: Judging
    aligner: Aligner
    numbers: Int[Tensor, " V"] | None
    mask_token_id: int


@dataclass(frozen=True)
class ARGuided(Policy):
    """Commit the longest prefix of drafts that a causal model accepts.

    Args:
        guide: the causal model: a bundled name, a local folder, a hub id, or a loaded model (one that
            takes the denoiser's token ids, or a `dllm.guide.Guide` with its tokenizer) on the denoiser's device.
        accept: when a draft is accepted: argmax, topk, ratio or sample.
        top_k: drafts among the k most probable tokens are accepted, under topk and ratio; None for 5.
        ratio: minimum probability of a draft as a fraction of the highest, under ratio; None for 0.5.
        on_reject: token at the first rejected position: the draft, or the guide's prediction; under sample always one
            that is drawn by the guide.

    Raises:
        ValueError: an option out of range or without effect; at the start of a run: a guide that cannot be
            loaded, cropped or aligned, is on another device, or cannot read a prompt.
    """

    kind = "guided"

    guide: str | Path | Guide | PreTrainedModel = "tiny-guide"
    accept: Literal["argmax", "topk", "ratio", "sample"] = "argmax"
    top_k: int | None = None
    ratio: float | None = None
    on_reject: Literal["draft", "guide"] = "draft"

    def __post_init__(self) -> None:
        if isinstance(self.guide, Path):
            object.__setattr__(self, "guide", str(self.guide))
        if not isinstance(self.guide, (str, Guide, PreTrainedModel)):
            raise ValueError(
                f"guide={self.guide!r} is not a guide; use a name, a folder, a hub id or a loaded causal model"
            )
        choice("accept", self.accept, ("argmax", "topk", "ratio", "sample"))
        if self.top_k is not None:
            number("top_k", self.top_k, "a whole number of at least 1, or null for 5", low=1, whole=True)
            if self.accept not in ("topk", "ratio"):
                raise ValueError(
                    f"top_k={self.top_k} has no effect with accept={self.accept}; use accept=topk or ratio"
                )
        if self.ratio is not None:
            number("ratio", self.ratio, "a number from 0 to 1, or null for 0.5", low=0, high=1)
            if self.accept != "ratio":
                raise ValueError(f"ratio={self.ratio} has no effect with accept={self.accept}; use accept=ratio")
        choice("on_reject", self.on_reject, ("draft", "guide"))

    @property
    def _replaces(self) -> bool:
        """Whether the guide's token is committed at the first rejected position."""
        return self.on_reject == "guide" or self.accept == "sample"

    def files(self) -> Iterable[Path]:
        """The folder of the guide."""
        return [guide_folder(self.guide)] if isinstance(self.guide, str) else ()

    def start(self, setup: Setup) -> GuideState:
        """Load the guide and align its vocabulary."""
        match self.guide:
            case str():
                guide = load_guide(self.guide, setup.device)
            case Guide():
                guide = self.guide
            case PreTrainedModel():
                guide = Guide(self.guide, setup.tokenizer)
        if guide.model.device != setup.device:
            raise ValueError(
                f"guide={guide.name!r} is on {guide.model.device} and the model on {setup.device}; move one of them "
                "(.to)"
            )
        aligner = align(guide, setup.tokenizer, setup.vocab_size)
        numbers = None
        if isinstance(aligner, SameVocabulary):
            numbers = aligner.numbers.masked_fill(aligner.numbers >= guide.vocab_size, -1)
            numbers[setup.mask_token_id : setup.mask_token_id + 1] = -1
        elif self._replaces:
            own, use = ("accept=sample", "argmax") if self.accept == "sample" else ("on_reject=guide", "draft")
            raise ValueError(f"{own} needs a guide with the model's own vocabulary; use {own.partition('=')[0]}={use}")
        return GuideState(Judging.of(guide, setup), aligner, numbers, setup.mask_token_id)

    def check(self, state: GuideState, request: Request) -> None:
        """Reject a prompt that the guide cannot represent."""
        state.aligner.check(request.tokens[: request.start].tolist(), request.eos_token_ids)

    def enter(self, state: GuideState, row: int, request: Request) -> None:
        """Drop what the guide's cache holds of this row number."""
        state.judging.forget(row)

    def step(self, window: Window, denoise: Denoise, state: GuideState) -> Edit:
        """Draft the block, verify it with the guide, commit the accepted prefix."""
        prediction = denoise()
        drafted = commit(window, prediction, window.masked).on(window.tokens)
        # Drawn in every step, whoever is judged in it: what a row draws does not depend on the others.
        chances = (window.uniform(), window.uniform()) if self.accept == "sample" else None
        aligned = state.aligner(drafted, window.first, window.columns, window.masked, window.ends)
        asks = (window.masked.sum(-1) > (0 if self._replaces else 1)) & (aligned.lengths > aligned.start)
        before = state.judging.seconds
        judged = state.judging.logits(
            window.rows, aligned.ids, aligned.lengths.where(asks, aligned.start), aligned.start
        )
        if judged is None:
            return commit(window, prediction, leftmost(window.masked))
        edit, held = self._judge(window, prediction, aligned, judged, state.numbers, chances)
        forwards = asks.long().cpu().numpy()  # synchronizes: forwards are counted on the host, per row
        # A rejected draft that is committed anyway does not count as a draft.
        judged_drafts = window.masked & asks[:, None] & (held | ~edit.write)
        guide, (logits, about) = state.judging.guide, judged
        lost = (not_finite(logits) & (about < aligned.ids.shape[1])).any(-1)
        return replace(
            edit,
            broken=Broken(lost, reason(f"guide={guide.name!r}", guide.model.dtype)),
            drafted=prediction.tokens.masked_fill(~judged_drafts, state.mask_token_id),
            guide_forwards=forwards,
            guide_seconds=state.judging.seconds - before,
        )

    def _judge(
        self,
        window: Window,
        prediction: Prediction,
        aligned: Aligned,
        judged: tuple[Tensor, Tensor],
        numbers: Int[Tensor, " V"] | None,
        chances: tuple[Tensor, Tensor] | None,
    ) -> tuple[Edit, Bool[Tensor, "B K"]]:
        """The edit, and which drafts are accepted."""
        logits, about = judged
        length = aligned.ids.shape[1]
        expected = None
        if chances is not None and numbers is not None:
            holds, expected = _drawn(prediction, aligned.slots(about), logits, numbers, chances)
            about = (aligned.upto - 1).where(window.masked, length).clamp(max=length)
        else:
            draft = torch.cat((aligned.ids, aligned.ids[:, :1]), dim=1).gather(1, about)
            holds = self._holds(logits, draft)
            if self._replaces and numbers is not None:
                ours, asked = _ours(prediction, aligned.slots(about), logits, numbers)
                expected = prediction.aligned(ours.argmax(-1).where(asked & (ours > -torch.inf).any(-1), -1), -1)
        index = torch.arange(length, device=about.device)
        # Tokens that were not judged are accepted where they precede the drafts or are committed.
        verdict = (index < aligned.start[:, None]) | (index == 0) | aligned.free
        verdict = flagged(torch.cat((verdict, verdict[:, :1]), dim=1), about, holds)[:, :length]
        count = verdict.long().cumprod(-1).sum(-1)
        held = (aligned.upto <= count[:, None]) & window.masked
        if expected is None:
            return commit(window, prediction, held | leftmost(window.masked)), held
        rejected = (aligned.upto == count[:, None] + 1) & window.masked
        tokens = torch.where(rejected & (expected >= 0), expected, prediction.tokens)
        return Edit(window.columns, tokens, held | rejected), held

    def _holds(self, logits: Tensor, draft: Int[Tensor, "B N"]) -> Bool[Tensor, "B N"]:
        """Whether each draft is accepted given the guide's logits at its position."""
        known = (draft >= 0) & (draft < logits.shape[-1])
        value = logits.gather(-1, draft.where(known, 0)[..., None])
        if self.accept == "argmax":
            return (logits.argmax(-1) == draft) & known
        among = (logits > value).sum(-1) < (self.top_k or 5)
        if self.accept == "ratio":
            # p(y) >= r max p; the normalizer cancels.
            least = 0.5 if self.ratio is None else self.ratio
            among &= (value - logits.amax(-1, keepdim=True)).exp()[..., 0] >= least
        return among & known


def _ours(
    prediction: Prediction, slots: Int[Tensor, "B K"], logits: Float[Tensor, "B N G"], numbers: Int[Tensor, " V"]
) -> tuple[Float[Tensor, "M V"], Bool[Tensor, " M"]]:
    """The guide's logits of the tokens that the denoiser may write at the requested positions, and which it judged."""
    at = prediction.index
    row, slot = at // slots.shape[1], slots.flatten()[at]
    ours = logits[row, slot.clamp(min=0)][:, numbers.clamp(min=0)].masked_fill(numbers < 0, -torch.inf)
    return prediction.permitted(ours.masked_fill(prediction.given == -torch.inf, -torch.inf)), slot >= 0


def _drawn(
    prediction: Prediction,
    slots: Int[Tensor, "B K"],
    logits: Float[Tensor, "B N G"],
    numbers: Int[Tensor, " V"],
    chances: tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]],
) -> tuple[Bool[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Whether each draft is accepted by rejection sampling, and what replaces it if not; -1 where it was not judged."""
    at, (ours, asked) = prediction.index, _ours(prediction, slots, logits, numbers)
    p = prediction.distribution(ours.to(prediction.given.dtype))
    q = prediction.distribution()
    first, second = (each.flatten()[at] for each in chances)
    holds = accepted(p, q, prediction.tokens.flatten()[at], first) & asked
    tokens = remainder(p, q, second).where(asked, -1)
    return prediction.aligned(holds, False), prediction.aligned(tokens, -1)
