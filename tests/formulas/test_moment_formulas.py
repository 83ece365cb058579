"""Running moments and weight averages against closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adagrpo_train.functional.moments import Moments, batch_moments, ema_moments, weight_ema, weight_ema_decay


def test_batch_moments_are_the_mean_and_the_population_variance():
    moments = batch_moments(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert (moments.mean, moments.var) == (3.0, 3.5)


@given(score=st.floats(-1e3, 1e3, width=32), size=st.integers(1, 64))
def test_identical_scores_have_exactly_no_variance(score: float, size: int):
    assert batch_moments(torch.full((size,), score)) == Moments(mean=score, var=0.0)


def test_moments_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no scores"):
        batch_moments(torch.zeros(0))


def test_the_std_has_a_floor():
    assert Moments(mean=0.0, var=4.0).std == 2.0
    assert Moments(mean=0.0, var=0.0).std == pytest.approx(1e-4, rel=1e-12)


def test_the_first_moments_are_those_of_the_batch():
    assert ema_moments(None, Moments(1.0, 2.0), alpha=0.8) == Moments(1.0, 2.0)


def test_alpha_weighs_the_past():
    moments = ema_moments(Moments(1.0, 10.0), Moments(2.0, 20.0), alpha=0.75)
    assert (moments.mean, moments.var) == (1.25, 12.5)


def test_a_constant_stream_is_approached_geometrically():
    moments = Moments(0.0, 0.0)
    for _ in range(20):
        moments = ema_moments(moments, Moments(1.0, 3.0), alpha=0.8)
    assert moments.mean == pytest.approx(1 - 0.8**20, rel=1e-12)
    assert moments.var == pytest.approx(3 * (1 - 0.8**20), rel=1e-12)


@pytest.mark.parametrize("alpha", [-0.1, 1.0, math.nan])
def test_a_weight_on_the_past_outside_its_range_is_refused(alpha: float):
    with pytest.raises(ValueError, match="alpha"):
        ema_moments(None, Moments(0.0, 1.0), alpha=alpha)


def test_the_decay_of_weights_warms_up_to_its_limit():
    assert weight_ema_decay(0, decay=0.9) == 0.1
    assert weight_ema_decay(8, decay=0.9) == 0.5
    assert weight_ema_decay(10_000, decay=0.9) == 0.9


@pytest.mark.parametrize("step, decay", [(-1, 0.9), (0, -0.1), (0, 1.1)])
def test_an_impossible_decay_is_refused(step: int, decay: float):
    with pytest.raises(ValueError, match="decay"):
        weight_ema_decay(step, decay=decay)


def test_the_average_of_weights_moves_by_the_share_the_decay_leaves():
    average = weight_ema(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0]), decay=0.75)
    torch.testing.assert_close(average, torch.tensor([1.5, 1.0]))
