"""Advantages against closed forms, and the sums they must keep."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adagrpo_train.functional.advantages import (
    capability_advantages_absolute,
    capability_advantages_official,
    global_mean_std_advantages,
    global_std_advantages,
    group_advantages,
    mean_group_std,
    misjudged,
    zero_variance_fraction,
)

GroupAdvantages = Callable[[Tensor, Tensor], Tensor]

WITHIN_GROUPS: dict[str, GroupAdvantages] = {
    "group, unbiased": lambda rewards, group: group_advantages(rewards, group, eps=1e-8, unbiased=True),
    "group, biased": lambda rewards, group: group_advantages(rewards, group, eps=1e-8, unbiased=False),
    "global std": lambda rewards, group: global_std_advantages(rewards, group, eps=1e-8),
    "official": lambda rewards, group: capability_advantages_official(rewards, group, mean=0.2, std=0.05),
}
reward_lists = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=24)


def one_group(rewards: Tensor) -> Tensor:
    return torch.zeros(len(rewards), dtype=torch.int64)


@pytest.mark.parametrize("name", WITHIN_GROUPS)
@given(reward=st.floats(-1e3, 1e3, width=32), size=st.integers(2, 40))
def test_identical_rewards_give_exactly_zero(name: str, reward: float, size: int):
    # A second, spread-out group keeps the global std away from 0.
    rewards = torch.cat([torch.full((size,), reward), torch.tensor([0.0, 1.0, 5.0])])
    group = torch.cat([torch.zeros(size), torch.ones(3)]).long()
    assert torch.equal(WITHIN_GROUPS[name](rewards, group)[:size], torch.zeros(size))


@given(reward=st.floats(-1e3, 1e3, width=32), size=st.integers(2, 40), unbiased=st.booleans())
def test_identical_rewards_of_the_whole_batch_give_exactly_zero(reward: float, size: int, unbiased: bool):
    advantages = global_mean_std_advantages(torch.full((size,), reward), eps=1e-8, unbiased=unbiased)
    assert torch.equal(advantages, torch.zeros(size))


@pytest.mark.parametrize("name", WITHIN_GROUPS)
def test_interleaved_groups_are_scored_as_if_they_were_contiguous(name: str):
    rewards, group = torch.randn(12, dtype=torch.float64), torch.arange(12) % 3
    order = torch.argsort(group, stable=True)
    contiguous = WITHIN_GROUPS[name](rewards[order], group[order])
    torch.testing.assert_close(WITHIN_GROUPS[name](rewards, group)[order], contiguous, rtol=1e-12, atol=0)


@pytest.mark.parametrize("unbiased", [True, False])
def test_group_advantages_have_mean_zero_and_std_one_in_every_group(unbiased: bool):
    rewards, group = torch.randn(20, dtype=torch.float64) * 3 + 7, torch.arange(20) % 4
    advantages = group_advantages(rewards, group, eps=0.0, unbiased=unbiased)
    for key in range(4):
        own = advantages[group == key]
        assert float(own.mean()) == pytest.approx(0, abs=1e-12)
        assert float(own.std(correction=int(unbiased))) == pytest.approx(1, rel=1e-12)


def test_group_advantages_of_a_pair_are_plus_and_minus_one_over_root_two():
    advantages = group_advantages(torch.tensor([3.0, 5.0]), torch.tensor([9, 9]), eps=0.0, unbiased=True)
    torch.testing.assert_close(advantages, torch.tensor([-(0.5**0.5), 0.5**0.5]))


def test_eps_is_added_to_the_std_and_not_to_the_variance():
    advantages = group_advantages(torch.tensor([0.0, 2.0]), torch.tensor([0, 0]), eps=1.0, unbiased=False)
    torch.testing.assert_close(advantages, torch.tensor([-0.5, 0.5]))


def test_an_unbiased_std_of_a_single_sample_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples"):
        group_advantages(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]), eps=1e-8, unbiased=True)
    with pytest.raises(ValueError, match="at least 2 samples"):
        global_mean_std_advantages(torch.tensor([1.0]), eps=1e-8, unbiased=True)


def test_a_single_sample_has_no_advantage_where_its_std_is_zero():
    rewards, group = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1])
    assert float(group_advantages(rewards, group, eps=1e-4, unbiased=False)[2]) == 0
    assert float(global_std_advantages(rewards, group, eps=1e-4)[2]) == 0


def test_the_global_std_scales_all_groups_alike():
    rewards, group = torch.tensor([0.0, 2.0, 10.0, 16.0], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    std = math.sqrt((49 + 25 + 9 + 81) / 4)  # around the mean of 7
    expected = torch.tensor([-1, 1, -3, 3], dtype=torch.float64) / (std + 0.5)
    torch.testing.assert_close(global_std_advantages(rewards, group, eps=0.5), expected, rtol=1e-12, atol=0)


def test_the_global_mean_and_std_ignore_groups():
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    expected = (rewards - 2.5) / math.sqrt(5 / 3)
    ours = global_mean_std_advantages(rewards, eps=0.0, unbiased=True)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


@given(rewards=reward_lists, level=st.floats(-20, 20), std=st.floats(0.01, 10))
def test_official_advantages_share_one_unit_on_each_side_or_are_centred(rewards: list[float], level: float, std: float):
    values = torch.tensor(rewards, dtype=torch.float64)
    advantages = capability_advantages_official(values, one_group(values), mean=level, std=std)
    z = (values - level) / (std + 1e-8)
    if min(float(z.clamp(min=0).sum()), float((-z).clamp(min=0).sum())) >= 1e-6:
        assert float(advantages[values > level].sum()) == pytest.approx(1, rel=1e-9)
        assert float(advantages[values < level].sum()) == pytest.approx(-1, rel=1e-9)
        assert torch.equal(advantages[values == level], torch.zeros(int((values == level).sum())).double())
    else:
        assert float(advantages.sum()) == pytest.approx(0, abs=1e-9 * float(z.abs().max() + 1) * len(rewards))


def test_a_lone_success_outweighs_each_of_its_many_failures():
    rewards = torch.tensor([0.4] + [0.2] * 11, dtype=torch.float64)
    advantages = capability_advantages_official(rewards, one_group(rewards), mean=0.3, std=0.1)
    torch.testing.assert_close(advantages, torch.tensor([1.0] + [-1 / 11] * 11).double(), rtol=1e-7, atol=0)


def test_official_advantages_are_balanced_group_by_group():
    rewards, group = (
        torch.tensor([1.0, -1.0, 2.0, -3.0, 1.0, 2.0], dtype=torch.float64),
        torch.tensor([0, 0, 1, 1, 2, 2]),
    )
    advantages = capability_advantages_official(rewards, group, mean=0.0, std=1.0, eps=0.0)
    torch.testing.assert_close(advantages, torch.tensor([1.0, -1, 1, -1, -0.5, 0.5]).double(), rtol=1e-12, atol=0)


def test_official_advantages_do_not_reward_a_group_that_beats_the_level_but_absolute_ones_do():
    rewards = torch.tensor([1.0, 1.2, 1.4], dtype=torch.float64)
    official = capability_advantages_official(rewards, one_group(rewards), mean=0.5, std=0.5)
    absolute = capability_advantages_absolute(rewards, mean=0.5, std=0.5, limit=5.0)
    assert float(official.sum()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(absolute, torch.tensor([1.0, 1.4, 1.8]).double(), rtol=1e-7, atol=0)


def test_absolute_advantages_are_clamped_on_both_sides():
    rewards = torch.tensor([-10.0, 0.0, 10.0])
    assert capability_advantages_absolute(rewards, mean=0.0, std=1.0, limit=5.0).tolist() == [-5, 0, 5]


@pytest.mark.parametrize("std, limit", [(0.0, 5.0), (-1.0, 5.0), (math.nan, 5.0), (1.0, 0.0), (1.0, math.nan)])
def test_an_absolute_scale_that_is_not_positive_is_refused(std: float, limit: float):
    with pytest.raises(ValueError, match="must be positive"):
        capability_advantages_absolute(torch.tensor([1.0, 2.0]), mean=0.0, std=std, limit=limit)


def test_an_official_scale_that_is_not_positive_is_refused():
    rewards = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="must be positive"):
        capability_advantages_official(rewards, one_group(rewards), mean=0.0, std=0.0, eps=0.0)


@pytest.mark.parametrize("name", WITHIN_GROUPS)
def test_a_reward_that_is_not_a_number_does_not_pass_for_one(name: str):
    rewards, group = torch.tensor([1.0, math.nan, 3.0, 4.0]), torch.tensor([0, 0, 0, 0])
    assert WITHIN_GROUPS[name](rewards, group).isnan().any()


def test_narrow_rewards_are_widened():
    rewards = torch.tensor([256.0, 257.0, 258.0, 260.0]).bfloat16()
    wide = group_advantages(rewards.float(), one_group(rewards), eps=1e-8, unbiased=True)
    assert torch.equal(group_advantages(rewards, one_group(rewards), eps=1e-8, unbiased=True), wide)


def test_the_share_of_groups_that_teach_nothing_counts_groups_not_samples():
    rewards, group = torch.tensor([0.3, 0.3, 0.3, 1.0, 2.0, 0.7, 0.7, 5.0]), torch.tensor([4, 4, 4, 1, 1, 2, 2, 0])
    assert float(zero_variance_fraction(rewards, group)) == 0.75


def test_the_mean_group_std_weighs_groups_alike():
    rewards, group = torch.tensor([0.0, 2.0, 5.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1, 1])
    assert float(mean_group_std(rewards, group)) == pytest.approx(0.5)


def test_misjudged_counts_each_side_of_the_level_by_itself() -> None:
    # Group of the publication's example: the mean of the group is below, then above the level.
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0, 7.0, 8.0])
    local = torch.tensor([-1.0, 0.0, 1.0, -1.0, 0.0, 1.0])
    assert misjudged(local, rewards, 4.0) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert misjudged(local, rewards, 6.5) == (pytest.approx(1 / 4), 0.0)
    assert misjudged(local, rewards, 0.0) == (None, pytest.approx(2 / 6))
    assert misjudged(local, rewards, 9.0) == (pytest.approx(2 / 6), None)
