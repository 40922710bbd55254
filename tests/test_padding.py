"""Test the padding of ragged rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gisting.padding import pad_rows

TABLE = [
    pytest.param([[1, 2, 3], [4], [5, 6]], True, ["1 2 3", "9 9 4", "9 5 6"], ["111", "..1", ".11"], id="left"),
    pytest.param([[1, 2, 3], [4], [5, 6]], False, ["1 2 3", "4 9 9", "5 6 9"], ["111", "1..", "11."], id="right"),
    pytest.param([[1], []], True, ["1", "9"], ["1", "."], id="empty-row-left"),
    pytest.param([[1], []], False, ["1", "9"], ["1", "."], id="empty-row-right"),
    pytest.param([[9, 9], [9]], True, ["9 9", "9 9"], ["11", ".1"], id="a-token-that-is-the-pad-id-stays-a-token"),
    pytest.param([(1, 2), range(3, 5)], True, ["1 2", "3 4"], ["11", "11"], id="any-sequence"),
]


@pytest.mark.parametrize(("rows", "left", "ids", "tokens"), TABLE)
def test_pad_rows(rows: list[list[int]], left: bool, ids: list[str], tokens: list[str]) -> None:
    have, is_token = pad_rows(rows, 9, left=left)
    assert have.tolist() == [[int(number) for number in line.split()] for line in ids]
    assert is_token.tolist() == [[character == "1" for character in line] for line in tokens]
    assert (have.dtype, is_token.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize(("rows", "shape"), [([], (0, 0)), ([[]], (1, 0)), ([[], []], (2, 0))])
def test_nothing_to_pad(rows: list[list[int]], shape: tuple[int, int], left: bool) -> None:
    ids, is_token = pad_rows(rows, 0, left=left)
    assert ids.shape == is_token.shape == shape
    assert (ids.dtype, is_token.dtype) == (torch.int64, torch.bool)


@given(rows=st.lists(st.lists(st.integers(0, 2**40), max_size=12), max_size=6), left=st.booleans())
@settings(deadline=None, max_examples=50, derandomize=True)
def test_every_row_comes_back(rows: list[list[int]], left: bool) -> None:
    before = [list(row) for row in rows]
    ids, is_token = pad_rows(rows, 7, left=left)
    assert rows == before
    assert ids.shape == (len(rows), max(map(len, rows), default=0))
    for row, line, flags in zip(rows, ids, is_token, strict=True):
        assert line[flags].tolist() == row
        assert (line[~flags] == 7).all()
        width = len(flags)
        assert flags.tolist() == [
            (column >= width - len(row)) if left else (column < len(row)) for column in range(width)
        ]
