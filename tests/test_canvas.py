"""Blocks, rows that finish, and end-of-text."""

from __future__ import annotations

import pytest
import torch

from dllm.canvas import Canvas, Change, Edit

MASK, EOS, FILL = 9, 7, 8


def canvas(rows: list[list[int]], block: int | None = 3, stop: bool = True) -> Canvas:
    return Canvas(rows, MASK, (FILL, EOS), block, stop, range(len(rows)), torch.device("cpu"))


def write(target: Canvas, row: int, tokens: dict[int, int]) -> Change:
    """Write tokens at columns of one row through an edit."""
    window = target.window()
    columns = torch.tensor(sorted(tokens)).expand(len(window.rows), -1)
    values = torch.tensor([tokens[column] for column in sorted(tokens)]).expand(len(window.rows), -1)
    return target.apply(window, Edit(columns, values, (window.rows == row)[:, None].expand_as(columns)))


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
    with pytest.raises(RuntimeError, match="outside the positions"):
        write(c, 0, {2: 5})


def test_one_block_for_all() -> None:
    assert canvas([[1, MASK, MASK, MASK], [MASK] * 5], block=None).window().columns.shape == (2, 5)
