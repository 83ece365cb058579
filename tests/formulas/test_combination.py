"""Several rewards as one, against cases computed by hand."""

import math

import pytest
import torch

from adagrpo_train.functional.advantages import group_advantages
from adagrpo_train.functional.combination import comparable, weighted_advantages, weighted_sum
from adagrpo_train.functional.moments import Moments

NAN = math.nan


def centred(rewards: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Distance from the group mean: easy to compute by hand."""
    means = {int(g): rewards[group == g].mean() for g in group.unique()}
    return torch.stack([r - means[int(g)] for r, g in zip(rewards, group, strict=True)])


def test_weighted_sum_of_raw_scores():
    parts = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([10.0, -10.0]), "logged": torch.tensor([7.0, 7.0])}
    assert weighted_sum(parts, {"a": 2.0, "b": 0.1}).tolist() == pytest.approx([3.0, 3.0])


def test_a_sum_that_lacks_a_term_is_missing_and_not_smaller():
    parts = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([NAN, 0.0])}
    total = weighted_sum(parts, {"a": 1.0, "b": 1.0})
    assert math.isnan(total[0])
    assert total[1] == 1.0
    parts["b"], parts["c"] = torch.tensor([0.0, 0.0]), torch.tensor([NAN, NAN])
    assert weighted_sum(parts, {"a": 1.0, "b": 1.0}).tolist() == [1.0, 1.0]


def test_calibrated_scores_count_in_their_own_deviations():
    parts = {"a": torch.tensor([0.3, 0.1]), "b": torch.tensor([25.0, 35.0])}
    scales = {"a": Moments(0.2, 0.01), "b": Moments(30.0, 25.0)}
    # a: +1, -1 deviations; b: -1, +1.
    assert weighted_sum(parts, {"a": 1.0, "b": 0.5}, scales=scales).tolist() == pytest.approx([0.5, -0.5])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1, 2, 3, 4], [True] * 4),
        ([1, NAN, 3, 4], [True, False, True, True]),
        ([1, NAN, NAN, 4], [True, False, False, True]),
        ([1, NAN, NAN, NAN], [False] * 4),
        ([math.inf, 1, 2, 3], [False, True, True, True]),
    ],
)
def test_half_a_group_is_enough_to_compare(scores: list[float], expected: list[bool]):
    group = torch.zeros(4, dtype=torch.int64)
    assert comparable(torch.tensor(scores, dtype=torch.float32), group, group_size=4).tolist() == expected


def test_two_samples_are_the_least_to_compare():
    group = torch.tensor([0, 0, 1, 1])
    assert comparable(torch.tensor([1.0, 2.0, 3.0, NAN]), group, group_size=2).tolist() == [True, True, False, False]


def test_each_reward_is_compared_by_itself_before_it_is_weighted():
    group = torch.tensor([0, 0, 1, 1])
    parts = {"a": torch.tensor([1.0, 3.0, 0.0, 0.0]), "b": torch.tensor([200.0, 100.0, 100.0, 300.0])}
    got = weighted_advantages(parts, {"a": 1.0, "b": 0.25}, group, group_size=2, advantage=centred)
    assert got.tolist() == pytest.approx([-1 + 12.5, 1 - 12.5, -25, 25])
    # With each divided by its own deviation, the size of b no longer matters.
    scaled = weighted_advantages(
        parts,
        {"a": 1.0, "b": 0.25},
        group,
        group_size=2,
        advantage=lambda r, g: group_advantages(r, g, eps=0.0, unbiased=False),
    )
    assert scaled.tolist() == pytest.approx([-1 + 0.25, 1 - 0.25, -0.25, 0.25])


def test_the_rewards_that_are_there_take_over_the_weight_of_a_missing_one():
    group = torch.zeros(4, dtype=torch.int64)
    parts = {"a": torch.tensor([0.0, 2.0, 4.0, 6.0]), "b": torch.tensor([NAN, 1.0, 2.0, 3.0])}
    got = weighted_advantages(parts, {"a": 1.0, "b": 3.0}, group, group_size=4, advantage=centred)
    # Sample 0 has a alone, -3, which counts four times; the others have a - 3 and 3 (b - 2).
    assert got.tolist() == pytest.approx([-12.0, -1 - 3, 1 + 0, 3 + 3])


def test_a_missing_score_is_left_out_of_the_mean_of_its_group():
    group = torch.zeros(4, dtype=torch.int64)
    total = {"total": torch.tensor([NAN, 1.0, 2.0, 3.0])}
    got = weighted_advantages(total, {"total": 1.0}, group, group_size=4, advantage=centred)
    assert got.tolist() == pytest.approx([0.0, -1.0, 0.0, 1.0])


def test_a_reward_may_count_against_an_image():
    group = torch.zeros(2, dtype=torch.int64)
    parts = {"a": torch.tensor([0.0, 2.0]), "length": torch.tensor([0.0, 4.0])}
    got = weighted_advantages(parts, {"a": 1.0, "length": -0.25}, group, group_size=2, advantage=centred)
    # a: -1, 1; length: -0.25 times -2, 2. Nothing is missing, so nothing takes over a weight.
    assert got.tolist() == pytest.approx([-0.5, 0.5])
