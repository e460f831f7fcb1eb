"""Certainty-forcing distillation, dParallel (arXiv 2509.26488, section 3): data of a step, and its loss.

The targets are the model's own results of a decode block by block, one token per step, so that it keeps following that
trajectory while becoming certain of many tokens at once. Per example one block is drawn; what is before it is clean,
what is after it masked. A share of the block is masked, and the rest of it in a second copy, so that every token of the
block is a target. Per copy, over its masked positions M and those C of them that are predicted right,

    loss = mean over M of -log p(x)  +  w * mean over C of H(p^(1/T) normalised)

Differences from the published code: it draws one block for all examples of a batch, which there is one example, and
with blocks after the end-of-text, which a decode that stops there never reaches. Its code for Dream has one block, the
whole answer (`block_length=null`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm.checks import number
from dllm.models.attention import BlockCausal
from dllm.models.base import MaskedDiffusionModel


@dataclass(frozen=True)
class Forcing:
    """Settings of the loss.

    Attributes:
        mask_ratio: share of the block that is masked, 0.5 as published; None for a random share per example.
        temperature: T of the entropy, 0.5 as published.
        weight: w of the entropy, 2 as published for LLaDA, 1 for Dream; 0 is distillation without certainty forcing.

    Raises:
        ValueError: a value out of range.
    """

    mask_ratio: float | None = 0.5
    temperature: float = 0.5
    weight: float = 2.0

    def __post_init__(self) -> None:
        if self.mask_ratio is not None:
            number("mask_ratio", self.mask_ratio, "a share above 0 and up to 1, or null", above=0, high=1)
        number("entropy_temperature", self.temperature, "a number above 0 (0.5 is published)", above=0, high=1e3)
        number("entropy_weight", self.weight, "0 or more (2 is published for LLaDA, 1 for Dream)", low=0, high=1e6)


def draw_masks(
    blocks: Int[Tensor, "B G"], ends: Int[Tensor, " B"], ratio: float | None, rng: torch.Generator
) -> tuple[Bool[Tensor, "B2 G"], Bool[Tensor, "B2 G"]]:
    """Draw the block of each example, and the masks of its two copies.

    Args:
        blocks: number of each generated position's block.
        ends: last position of each example that is decoded.
        ratio: share of the block that is masked in the first copy; None for a random one.
        rng: source of randomness.

    Returns:
        The masked positions of all first copies, then of all second ones; and those of them that are targets.
    """
    first, last = blocks[:, 0], blocks.gather(1, ends[:, None])[:, 0]
    block = first + (torch.rand(len(blocks), generator=rng) * (last - first + 1)).long()
    shares = torch.rand((len(blocks), 1), generator=rng) if ratio is None else torch.full((len(blocks), 1), ratio)
    chosen = torch.rand(blocks.shape, generator=rng) < shares
    inside, after = blocks == block[:, None], blocks > block[:, None]
    targets = torch.cat((inside & chosen, inside & ~chosen))
    return targets | torch.cat((after, after)), targets


def forcing_loss(
    logits: Float[Tensor, "B2 G V"], targets: Bool[Tensor, "B2 G"], tokens: Int[Tensor, "B2 G"], how: Forcing
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The loss of both copies.

    Args:
        logits: at the generated positions, those of all first copies first.
        targets: where the loss is taken.
        tokens: of the trajectory.
        how: its settings.

    Returns:
        The sum over the copies of the cross-entropy, and of the entropy (before its weight).
    """
    right = targets & (logits.argmax(-1) == tokens)
    cross = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    logs = (logits / how.temperature).log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    means = [
        (values * where).sum() / where.sum().clamp(min=1)
        for each, places in ((cross, targets), (entropy, right))
        for values, where in zip(each.chunk(2), places.chunk(2), strict=True)
    ]
    return means[0] + means[1], means[2] + means[3]


def answer_logits(
    backbone: MaskedDiffusionModel,
    ids: Int[Tensor, "B L"],
    valid: Int[Tensor, "B L"],
    width: int,
    pattern: BlockCausal | None = None,
) -> Float[Tensor, "B G V"]:
    """Logits of the predictions for the generated positions, in float32 or wider.

    Args:
        backbone: the model.
        ids: tokens.
        valid: nonzero where a column is not padding.
        width: first generated column.
        pattern: of attention; None for full attention.
    """
    mask, positions = valid, (valid.cumsum(-1) - 1).clamp(min=0)
    if pattern is not None:
        itself = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)  # a query without keys would give NaN
        mask = pattern(positions, positions) & valid.bool()[:, None, None, :] | itself
    logits = backbone(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    shift = backbone.logits_shift
    logits = logits[:, width - shift : logits.shape[1] - shift]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
