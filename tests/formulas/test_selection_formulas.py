"""Which rows are selected, and in what order."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adagrpo_train.functional.selection import easiest, hardest, nearest_to, nearest_to_median

SCORES = torch.tensor([0.1, 0.9, 0.4, 0.6, 0.5])


def test_the_nearest_rows_come_in_order_of_distance():
    assert nearest_to(SCORES, 0.58, 3) == [3, 4, 2]


def test_ties_go_to_the_earlier_row():
    assert nearest_to(torch.tensor([3.0, 1.0, 3.0, 1.0]), 2.0, 2) == [0, 1]
    assert easiest(torch.tensor([1.0, 2.0, 2.0]), 2) == [1, 2]
    assert hardest(torch.tensor([2.0, 1.0, 1.0]), 2) == [1, 2]


def test_the_easiest_score_highest_and_the_hardest_lowest():
    assert easiest(SCORES, 2) == [1, 3]
    assert hardest(SCORES, 2) == [0, 2]


def test_the_median_is_that_of_the_batch():
    assert nearest_to_median(SCORES, 1) == [4]
    assert nearest_to_median(torch.tensor([0.0, 1.0, 4.0, 100.0]), 2) == [1, 2]


@given(scores=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20), level=st.floats(-10, 10), data=st.data())
def test_no_row_left_out_is_nearer_than_a_selected_one(scores: list[float], level: float, data: st.DataObject):
    values = torch.tensor(scores)
    rows = nearest_to(values, level, data.draw(st.integers(1, len(scores))))
    distances = (values - level).abs()
    left_out = [distance for row, distance in enumerate(distances) if row not in rows]
    assert len(set(rows)) == len(rows)
    assert max(distances[rows]) <= min(left_out, default=torch.tensor(torch.inf))


@pytest.mark.parametrize("count", [0, 6, -1])
@pytest.mark.parametrize("select", [easiest, hardest, nearest_to_median, lambda s, n: nearest_to(s, 0.5, n)])
def test_selecting_more_rows_than_there_are_or_none_is_refused(select: Callable[[Tensor, int], list[int]], count: int):
    with pytest.raises(ValueError, match="cannot select"):
        select(SCORES, count)


def test_selecting_from_nothing_is_refused():
    with pytest.raises(ValueError, match="cannot select"):
        nearest_to_median(torch.zeros(0), 1)
