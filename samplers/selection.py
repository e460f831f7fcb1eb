"""Selection rules shared by several policies. Ties always go to the leftmost position."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dllm.decoding.window import Window


def ranks(score: Float[Tensor, "B K"]) -> Int[Tensor, "B K"]:
    """Rank of each position by descending score, 0 for the best; the leftmost of equals comes first."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def top(
    score: Float[Tensor, "B K"], count: Int[Tensor, " B"] | int, eligible: Bool[Tensor, "B K"]
) -> Bool[Tensor, "B K"]:
    """The `count` best eligible positions of each row, including those with a score of -inf if there are no others."""
    place = ranks(score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~eligible, -torch.inf))
    limit = count[:, None] if isinstance(count, Tensor) else count
    return (place < limit) & eligible


def perturbed(score: Float[Tensor, "B K"], temperature: float, uniform: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Scores whose top n are n draws without replacement from softmax(score / temperature) (Gumbel-top-k).

    Args:
        score: of the positions.
        temperature: above 0; clamped to 1e-30, the range of float32.
        uniform: numbers in [0, 1).
    """
    double = uniform.double().clamp(min=torch.finfo(torch.float32).tiny)
    return score / max(temperature, 1e-30) - (-double.log()).log()


def leftmost(where: Bool[Tensor, "B K"]) -> Bool[Tensor, "B K"]:
    """The first True of each row."""
    return where & (where.cumsum(-1) == 1)


def remember(kept: Shaped[Tensor, "rows L"], window: Window, values: Shaped[Tensor, "B K"]) -> None:
    """Keep values of the positions to generate of the window, by row number and column."""
    own = kept[window.rows]
    spare = torch.cat((own, own[:, :1]), dim=1)  # the last column absorbs other positions
    columns = window.columns.where(window.inside, own.shape[1])
    kept[window.rows] = spare.scatter(1, columns, values.to(kept.dtype))[:, :-1]


def is_eos(tokens: Int[Tensor, "B K"], window: Window) -> Bool[Tensor, "B K"]:
    """Where a token ends its row's text."""
    return (tokens[..., None] == window.ends[:, None]).any(-1)


def stopped(window: Window, mask_token_id: int) -> Bool[Tensor, " B"]:
    """Rows finished by `stop_at_eos`: everything up to the first end-of-text of `region` is decoded."""
    ended = is_eos(window.tokens, window) & window.region
    masks = ((window.tokens == mask_token_id) & window.region).cumsum(-1)
    done = masks.gather(1, ended.int().argmax(-1, keepdim=True))[:, 0] == 0
    return window.stop_at_eos & ended.any(-1) & done


def enter_next_blocks(views: Window, mask_token_id: int) -> Window:
    """Where a draft completed its block, move its view to the block of its next mask."""
    masked = (views.tokens == mask_token_id) & views.region
    enters = views.inside.any(-1) & ~views.masked.any(-1) & masked.any(-1)
    own = views.block_length
    ahead = (masked.int().argmax(-1) - views.columns[:, 0]).div(own, rounding_mode="floor").where(enters, 0)
    length = views.tokens.shape[1]
    offset = torch.arange(views.columns.shape[1], device=ahead.device)
    columns = views.columns[:, :1] + (ahead * own)[:, None] + offset
    exists = (columns < length) & (offset < own[:, None])
    columns = columns.clamp(max=length - 1)
    inside = torch.where(enters[:, None], views.region.gather(1, columns) & exists, views.inside)
    masked = inside & masked.gather(1, columns)
    return replace(
        views,
        columns=columns,
        inside=inside,
        masked=masked,
        block=views.block + ahead,
        entry_masks=masked.sum(-1).where(enters, views.entry_masks),
        step=views.step.masked_fill(enters, 0),
    )
