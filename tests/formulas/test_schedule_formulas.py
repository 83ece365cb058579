"""Sigma grids against diffusers and closed forms, and the learning-rate multiplier."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adagrpo_train.functional.schedules import (
    flux_shift_exponent,
    flux_sigmas,
    sd3_sigmas,
    shifted_sigmas,
    truncated_timesteps,
    warmup_constant_anneal,
)


@pytest.mark.parametrize("shift", [1.0, 1.7, 3.0, 6.0])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 28, 40])
def test_sd3_sigmas_are_those_of_diffusers(num_steps: int, shift: float):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(sd3_sigmas(num_steps, shift=shift), scheduler.sigmas, rtol=2e-7, atol=0)


def test_sd3_sigmas_follow_the_number_of_training_timesteps_as_in_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=250)
    scheduler.set_timesteps(10)
    torch.testing.assert_close(sd3_sigmas(10, shift=3.0, num_train_timesteps=250), scheduler.sigmas, rtol=2e-7, atol=0)


def test_the_last_positive_sd3_sigma_is_shifted_twice():
    once = 3 * 0.001 / (1 + 2 * 0.001)
    assert float(sd3_sigmas(10, shift=3.0)[-2]) == pytest.approx(3 * once / (1 + 2 * once), rel=1e-6)


@pytest.mark.parametrize("image_seq_len", [256, 1024, 2025, 4096])
@pytest.mark.parametrize("num_steps", [1, 6, 28])
def test_flux_sigmas_are_those_of_diffusers(num_steps: int, image_seq_len: int):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    exponent = 0.5 + (1.15 - 0.5) * (image_seq_len - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_steps, num_steps).tolist(), mu=exponent)
    ours = flux_sigmas(num_steps, image_seq_len=image_seq_len)
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=5e-7, atol=0)


def test_the_flux_shift_grows_on_a_straight_line_between_its_anchors():
    assert flux_shift_exponent(256) == pytest.approx(0.5, rel=1e-12)
    assert flux_shift_exponent(4096) == pytest.approx(1.15, rel=1e-12)
    assert flux_shift_exponent((256 + 4096) // 2) == pytest.approx(0.825, rel=1e-12)


def test_shifted_sigmas_without_a_shift_are_evenly_spaced():
    torch.testing.assert_close(shifted_sigmas(8, shift=1.0), torch.arange(8, -1, -1) / 8, rtol=0, atol=1e-7)


def test_shifted_sigmas_have_their_closed_form():
    expected = [3 * (1 - i / 16) / (1 + 2 * (1 - i / 16)) for i in range(17)]
    torch.testing.assert_close(shifted_sigmas(16, shift=3.0), torch.tensor(expected), rtol=2e-7, atol=0)


@given(num_steps=st.integers(1, 60), shift=st.floats(0.2, 12))
def test_every_grid_falls_from_exactly_one_to_exactly_zero(num_steps: int, shift: float):
    grids = (
        sd3_sigmas(num_steps, shift=shift),
        flux_sigmas(num_steps, image_seq_len=1024, base_shift=math.log(shift)),
        shifted_sigmas(num_steps, shift=shift),
    )
    for grid in grids:
        assert grid.shape == (num_steps + 1,)
        assert grid.dtype == torch.float32
        assert grid[0] == 1
        assert grid[-1] == 0
        assert (grid.diff() < 0).all()


def test_truncated_timesteps_drop_the_fraction():
    assert truncated_timesteps(torch.tensor([1.0, 0.9783, 0.5, 0.0])).tolist() == [1000, 978, 500, 0]


@pytest.mark.parametrize(
    "grid",
    [
        lambda: sd3_sigmas(0, shift=3.0),
        lambda: sd3_sigmas(4, shift=0.0),
        lambda: sd3_sigmas(4, shift=math.nan),
        lambda: sd3_sigmas(4, shift=3.0, num_train_timesteps=0),
        lambda: flux_sigmas(-1, image_seq_len=1024),
        lambda: flux_sigmas(4, image_seq_len=0),
        lambda: flux_sigmas(4, image_seq_len=1024, base_image_seq_len=7, max_image_seq_len=7),
        lambda: shifted_sigmas(0, shift=3.0),
        lambda: shifted_sigmas(4, shift=-1.0),
    ],
)
def test_an_impossible_grid_is_refused(grid: Callable[[], Tensor]):
    with pytest.raises(ValueError, match="must"):
        grid()


def test_the_learning_rate_rises_stays_and_falls_in_straight_lines():
    rates = [warmup_constant_anneal(step, warmup_steps=4, anneal_steps=2, total_steps=10) for step in range(13)]
    assert rates == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.5, 0, 0, 0]


def test_without_warmup_and_annealing_the_learning_rate_is_constant():
    assert {warmup_constant_anneal(step, warmup_steps=0, anneal_steps=0, total_steps=5) for step in range(9)} == {1.0}


@pytest.mark.parametrize("warmup, anneal, total", [(3, 2, 5), (-1, 0, 5), (0, -1, 5), (0, 0, 0)])
def test_an_impossible_learning_rate_schedule_is_refused(warmup: int, anneal: int, total: int):
    with pytest.raises(ValueError, match="_steps"):
        warmup_constant_anneal(0, warmup_steps=warmup, anneal_steps=anneal, total_steps=total)
