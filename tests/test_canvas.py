"""Blocks, rows that finish, and end-of-text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dllm.decoding.canvas import Canvas
from dllm.decoding.prediction import Sampling
from dllm.decoding.request import Request
from dllm.decoding.window import Change, Edit
from engine_rig import applied

MASK, EOS, FILL = 9, 7, 8


def requests(rows: list[list[int]], block: int | None = 3, stop: bool = True) -> list[Request]:
    return [Request(np.array(row), MASK, (FILL, EOS), block, Sampling(), seed, stop) for seed, row in enumerate(rows)]


def canvas(rows: list[list[int]], block: int | None = 3, stop: bool = True) -> Canvas:
    """A canvas as wide as its longest row."""
    made = Canvas(len(rows), max(map(len, rows)), MASK, torch.device("cpu"))
    made.exchange((), requests(rows, block, stop))
    return made


def write(target: Canvas, row: int, tokens: dict[int, int]) -> Change:
    """Write tokens at columns of one row through an edit."""
    window = target.window()
    columns = torch.tensor(sorted(tokens)).expand(len(window.rows), -1)
    values = torch.tensor([tokens[column] for column in sorted(tokens)]).expand(len(window.rows), -1)
    change = applied(target, Edit(columns, values, (window.rows == row)[:, None].expand_as(columns)))
    target.exchange({*change.finished.tolist(), *change.failed.tolist()}, ())
    return change


def test_rows_are_padded_on_the_left_and_blocks_counted_from_the_first_mask() -> None:
    c = canvas([[1, 2, MASK, MASK, MASK, MASK, MASK], [1, MASK, MASK]])
    assert c.host[1].tolist() == [FILL] * 4 + [1, MASK, MASK]
    window = c.window()
    assert window.columns.tolist() == [[2, 3, 4], [5, 6, 6]]
    assert window.inside.tolist() == [[True] * 3, [True, True, False]]
    assert window.masked.tolist() == window.inside.tolist()
    assert window.entry_masks.tolist() == [3, 2]
    assert c.spans.tolist() == [5, 2]


def test_rows_advance_on_their_own() -> None:
    c = canvas([[1, MASK, MASK, MASK, MASK], [1, MASK, MASK, MASK, MASK]], stop=False)
    write(c, 0, {1: 2, 2: 2, 3: 2})
    window = c.window()
    assert window.block.tolist() == [1, 0]
    assert window.columns.tolist() == [[4, 4, 4], [1, 2, 3]]
    assert window.step.tolist() == [0, 1]
    assert window.entry_masks.tolist() == [1, 3]


def test_an_edit_may_end_a_row_early() -> None:
    c = canvas([[1, 2, 3, MASK, MASK, MASK, MASK], [1, MASK, MASK, MASK, MASK]], stop=False)
    assert c.host.shape == (2, 7)
    c.window()
    columns = torch.tensor([[3], [3]])
    edit = Edit(columns, torch.full((2, 1), 5), torch.ones(2, 1, dtype=torch.bool), end=torch.tensor([5, 7]))
    change = applied(c, edit)
    assert c.host.tolist() == [[1, 2, 3, 5, MASK, FILL, FILL], [FILL, FILL, 1, 5, MASK, MASK, MASK]]
    assert change.filled.sum(1).tolist() == [2, 0]
    assert not (change.committed & change.filled).any()
    assert c.window().region.tolist()[0] == [False, False, False, True, True, False, False]
    # What was cut off is looked at no more.
    assert c.visible(np.arange(2)).tolist() == [[True] * 5 + [False] * 2, [False] * 2 + [True] * 5]
    write(c, 0, {4: 6})
    assert c.rows.tolist() == [1]


def test_a_row_does_not_end_later_again() -> None:
    c = canvas([[1, MASK, MASK, MASK, MASK, MASK]], stop=False)
    for column, end in ((1, 4), (2, 6)):
        one = torch.tensor([[column]])
        c.window()
        applied(c, Edit(one, one, one > 0, end=torch.tensor([end])))
    assert c.host[0].tolist() == [1, 1, 2, MASK, FILL, FILL]
    assert c.visible(np.arange(1))[0].tolist() == [True] * 4 + [False] * 2


def test_a_finished_row_leaves() -> None:
    c = canvas([[1, MASK], [1, 2, 3, MASK, MASK]])
    write(c, 0, {4: 5})
    window = c.window()
    assert window.rows.tolist() == [1]
    assert window.tokens.tolist() == [[1, 2, 3, MASK, MASK]]


def test_end_of_text_stops_a_row_only_when_everything_before_it_is_decoded() -> None:
    c = canvas([[1, MASK, MASK, MASK, MASK, MASK]])
    assert not write(c, 0, {2: EOS}).filled.any()
    assert c.rows.tolist() == [0]
    change = write(c, 0, {1: 5})
    assert c.host[0].tolist() == [1, 5, EOS, FILL, FILL, FILL]
    assert change.filled[0].tolist() == [False, False, False, True, True, True]
    assert change.committed[0].tolist() == [False, True, False, False, False, False]
    assert c.rows.size == 0


def test_what_was_decoded_behind_end_of_text_is_kept() -> None:
    c = canvas([[1, MASK, MASK, MASK, MASK]])
    write(c, 0, {3: 4})
    write(c, 0, {1: EOS})
    assert c.host[0].tolist() == [1, EOS, FILL, 4, FILL]


def test_end_of_text_in_the_prompt_stops_nothing() -> None:
    c = canvas([[EOS, FILL, MASK, MASK]])
    write(c, 0, {2: 5})
    assert c.host[0].tolist() == [EOS, FILL, 5, MASK]


def test_end_of_text_can_be_ignored() -> None:
    c = canvas([[1, MASK, MASK]], stop=False)
    write(c, 0, {1: EOS})
    assert c.rows.tolist() == [0]


def test_revoking_goes_back_to_the_block() -> None:
    c = canvas([[1, MASK, MASK, MASK, MASK]], block=2, stop=False)
    write(c, 0, {1: 2, 2: 3})
    assert c.window().block.tolist() == [1]
    change = write(c, 0, {2: MASK, 3: 4})
    assert change.revoked[0].tolist() == [False, False, True, False, False]
    assert change.committed[0].tolist() == [False, False, False, True, False]
    assert c.window().block.tolist() == [0]
    assert c.window().masked.tolist() == [[False, True]]


def test_masks_anywhere_leave_the_rest_alone() -> None:
    c = canvas([[1, MASK, 2, 3, MASK, 4]], stop=False)
    assert c.window().masked.tolist() == [[True, False, False]]
    with pytest.raises(RuntimeError, match="outside the generated region"):
        write(c, 0, {2: 5})


def test_one_block_for_all() -> None:
    assert canvas([[1, MASK, MASK, MASK], [MASK] * 5], block=None).window().columns.shape == (2, 5)


def test_an_edit_hides_columns_in_the_next_step_alone() -> None:
    c = canvas([[1, 2, MASK, MASK, MASK, MASK], [1, MASK, MASK, MASK, MASK]], block=4, stop=False)
    assert c.visible(c.rows).sum(1).tolist() == [6, 5]
    window = c.window()
    nothing = torch.zeros_like(window.masked)
    first = nothing.clone()
    first[:, 0] = True
    hidden = Edit(window.columns, torch.full_like(window.columns, 5), first, until=torch.tensor([4, 6]))
    applied(c, hidden)
    assert c.visible(c.rows).tolist() == [[True] * 4 + [False] * 2, [False] + [True] * 5]
    window = c.window()
    assert window.masked.tolist() == [[False, True, False, False], [False, True, True, True]]
    applied(c, Edit(window.columns, window.columns, nothing))
    assert c.window().masked.sum(1).tolist() == [3, 3]
    assert c.visible(c.rows).sum(1).tolist() == [6, 5]


def test_who_takes_the_place_of_a_row_sees_everything() -> None:
    c = canvas([[1, MASK, MASK, MASK]], stop=False)
    window = c.window()
    tokens = torch.full_like(window.columns, 5)
    change = applied(c, Edit(window.columns, tokens, window.masked, until=torch.tensor([2])))
    c.exchange(change.finished.tolist(), requests([[1, 2, MASK, MASK]]))
    assert c.visible(c.rows).all()
