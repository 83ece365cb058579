"""The clipped policy loss and its diagnostics against closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adagrpo_train.functional.losses import approx_kl, clip_fraction, clipped_policy_loss


def gradient(log_ratio: list[float], advantages: list[float], clip_range: float) -> Tensor:
    leaf = torch.tensor(log_ratio, requires_grad=True)
    clipped_policy_loss(leaf, torch.tensor(advantages), clip_range=clip_range).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("clip_range", [0.0, 1e-5, 1e-4, 0.2, math.inf])
def test_on_policy_gradient_is_minus_the_advantage(clip_range: float):
    advantages = [1.5, -2.0, 0.0, 5.0]
    assert torch.equal(gradient([0.0] * 4, advantages, clip_range), -torch.tensor(advantages))


def test_on_policy_loss_is_minus_the_advantage():
    advantages = torch.tensor([1.5, -2.0, 0.0])
    assert torch.equal(clipped_policy_loss(torch.zeros(3), advantages, clip_range=1e-4), -advantages)


def test_clipping_stops_only_the_profitable_side():
    log_ratio, advantages = [0.5, -0.5, 0.5, -0.5], [1.0, 1.0, -1.0, -1.0]
    # Up with A > 0 and down with A < 0 are done; the two other items must still be pulled back.
    expected = torch.tensor([0.0, -math.exp(-0.5), math.exp(0.5), 0.0])
    torch.testing.assert_close(gradient(log_ratio, advantages, 0.2), expected)


def test_a_clipped_item_has_the_loss_of_the_edge_of_its_range():
    loss = clipped_policy_loss(torch.tensor([0.5, -0.5]), torch.tensor([2.0, -2.0]), clip_range=0.2)
    torch.testing.assert_close(loss, torch.tensor([-2.4, 1.6]))


def test_an_infinite_clip_range_leaves_the_ratio_alone():
    log_ratio, advantages = torch.tensor([3.0, -3.0, 0.1]), torch.tensor([2.0, -1.0, -0.5])
    loss = clipped_policy_loss(log_ratio, advantages, clip_range=math.inf)
    torch.testing.assert_close(loss, -advantages * log_ratio.exp())


@given(log_ratio=st.floats(-2, 2), advantage=st.floats(-5, 5), clip_range=st.floats(0, 0.9))
def test_clipping_never_makes_the_loss_look_better(log_ratio: float, advantage: float, clip_range: float):
    ours = clipped_policy_loss(
        torch.tensor([log_ratio], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        clip_range=clip_range,
    )
    assert float(ours) >= -advantage * math.exp(log_ratio) - 1e-12


def test_a_negative_clip_range_is_refused():
    with pytest.raises(ValueError, match="clip_range"):
        clipped_policy_loss(torch.zeros(2), torch.zeros(2), clip_range=-1e-4)
    with pytest.raises(ValueError, match="clip_range"):
        clip_fraction(torch.zeros(2), -1e-4)


def test_the_clip_fraction_counts_ratios_outside_their_range_on_either_side():
    log_ratio = torch.tensor([0.0, math.log(1.3), math.log(0.7), math.log(1.1)])
    assert float(clip_fraction(log_ratio, 0.2)) == 0.5
    assert float(clip_fraction(log_ratio, math.inf)) == 0


def test_the_approximate_divergence_is_half_the_mean_squared_log_ratio():
    assert float(approx_kl(torch.tensor([0.1, -0.3, 0.0, 0.2]))) == pytest.approx(0.5 * (0.01 + 0.09 + 0.04) / 4)
