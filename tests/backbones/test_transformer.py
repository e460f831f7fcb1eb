"""The shared transformer: stores, masks, grouped-query attention and selected logits, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dllm.models import MaskedDiffusionModel
from dllm.models.base import check_config

BackboneMaker = Callable[..., MaskedDiffusionModel]

ROWS, LENGTH = 2, 12


class DictStore:
    """Keys and values of every column, one dict entry a layer."""

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            old_keys, old_values = self.layers[layer]
            keys = old_keys.index_copy(2, self.columns, keys)
            values = old_values.index_copy(2, self.columns, values)
        self.layers[layer] = keys, values
        return keys, values


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 38, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_computing_some_columns_with_a_store_equals_the_full_forward(backbone: MaskedDiffusionModel) -> None:
    ids, every = tokens(), torch.arange(LENGTH)
    full = backbone(ids).logits
    store = DictStore(every)
    torch.testing.assert_close(backbone(ids, store=store).logits, full)
    for columns in (torch.tensor([3]), torch.tensor([0, 5, 11]), torch.arange(4, 9)):
        store.columns = columns
        positions = columns.expand(ROWS, -1)
        some = backbone(ids[:, columns], position_ids=positions, store=store).logits
        torch.testing.assert_close(some, full[:, columns])


@torch.no_grad()
def test_a_store_serves_stale_columns_as_they_were(backbone: MaskedDiffusionModel) -> None:
    """Only the recomputed column sees the change, so the result is neither the old nor the new full forward."""
    before, after = tokens(), tokens()
    after[:, 7] = (after[:, 7] + 1) % 38
    store = DictStore(torch.arange(LENGTH))
    backbone(before, store=store)
    store.columns = torch.tensor([2])
    stale = backbone(after[:, 2:3], position_ids=torch.full((ROWS, 1), 2), store=store).logits[:, 0]
    torch.testing.assert_close(stale, backbone(before).logits[:, 2])
    assert (stale - backbone(after).logits[:, 2]).abs().max() > 1e-3


@torch.no_grad()
def test_columns_that_are_masked_out_change_nothing(backbone: MaskedDiffusionModel) -> None:
    alone = tokens()[:1, 4:]
    padded, mask = tokens()[:1], torch.ones(1, LENGTH, dtype=torch.long)
    mask[:, :4] = 0
    for garbage in (0, 39):
        padded[:, :4] = garbage
        torch.testing.assert_close(backbone(padded, mask).logits[:, 4:], backbone(alone).logits)


@torch.no_grad()
def test_a_row_with_one_real_column_stays_finite_and_leaves_its_neighbour_alone(backbone: MaskedDiffusionModel) -> None:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :-1] = 0
    logits = backbone(ids, mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1], backbone(ids[1:]).logits[0])


@torch.no_grad()
def test_a_mask_per_query_hides_columns_from_single_queries(backbone: MaskedDiffusionModel) -> None:
    """Two branches that do not see each other give what each gives alone: what tree drafts rely on."""
    prefix, left, right = torch.arange(6), torch.arange(6, 9), torch.arange(9, 12)
    ids = tokens()[:1]
    positions = torch.cat((prefix, torch.arange(6, 9), torch.arange(6, 9)))[None]
    branch = torch.cat((torch.zeros(6), torch.ones(3), torch.full((3,), 2.0)))
    mask = (branch[None, :] == 0) | (branch[None, :] == branch[:, None])
    mask[:6] = True
    mask[:6, 6:] = False  # the prefix looks at itself only, so that both branches find it the same
    both = backbone(ids, mask[None, None], positions).logits
    for columns in (left, right):
        kept = torch.cat((prefix, columns))
        alone = backbone(ids[:, kept], mask[kept][:, kept][None, None], positions[:, kept]).logits
        torch.testing.assert_close(both[:, columns], alone[:, 6:])


@torch.no_grad()
def test_selected_logits_are_those_of_the_full_projection(backbone: MaskedDiffusionModel) -> None:
    ids = tokens()
    select = torch.tensor([0, 5, LENGTH, ROWS * LENGTH - 1])
    chosen = backbone(ids, select=select).logits
    assert chosen.shape == (4, 40)
    torch.testing.assert_close(chosen, backbone(ids).logits.flatten(0, 1)[select])


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_equal_repeated_key_value_heads(make_backbone: BackboneMaker, kv_heads: int) -> None:
    grouped = make_backbone(heads=4, kv_heads=kv_heads)
    repeated = make_backbone(heads=4, kv_heads=4)
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if any(part in name for part in ("k_proj", "v_proj")):
            heads = weight.unflatten(0, (kv_heads, -1))
            weights[name] = heads.repeat_interleave(4 // kv_heads, dim=0).flatten(0, 1)
    repeated.load_state_dict(weights)
    torch.testing.assert_close(grouped(tokens()).logits, repeated(tokens()).logits)


@torch.no_grad()
def test_fused_and_spelled_out_attention_agree(backbone: MaskedDiffusionModel) -> None:
    ids, mask = tokens(), torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, :5] = 0
    fused = backbone(ids, mask).logits
    backbone.set_attn_implementation("eager")
    torch.testing.assert_close(backbone(ids, mask).logits, fused)


@torch.no_grad()
def test_attention_looks_both_ways(backbone: MaskedDiffusionModel) -> None:
    ids, changed = tokens(), tokens()
    changed[:, 6] = (changed[:, 6] + 1) % 38
    moved = (backbone(ids).logits - backbone(changed).logits).abs().amax((0, 2))
    assert (moved > 1e-6).all()


@torch.no_grad()
def test_only_distances_between_positions_matter(backbone: MaskedDiffusionModel) -> None:
    ids, positions = tokens(), torch.arange(LENGTH).expand(ROWS, -1)
    base = backbone(ids, position_ids=positions).logits
    torch.testing.assert_close(backbone(ids, position_ids=positions + 17).logits, base)
    assert (backbone(ids, position_ids=positions * 2).logits - base).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "value"), [("hidden_size", "32"), ("intermediate_size", None), ("rope_theta", "big")])
def test_a_config_of_the_wrong_type_is_refused_by_its_published_name(
    backbone: MaskedDiffusionModel, name: str, value: str | None
) -> None:
    config = backbone.config
    published = config.attribute_map.get(name, name)
    setattr(config, published, value)
    with pytest.raises(ValueError, match=f"{published}={value!r}"):
        check_config(config)
