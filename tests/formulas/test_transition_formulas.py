"""Sampling steps, log-probabilities and divergences against closed forms, torch.distributions and diffusers."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from adagrpo_train.functional.schedules import sd3_sigmas
from adagrpo_train.functional.transitions import (
    clean_estimate,
    constant_sde_step,
    cps_kl,
    cps_log_prob,
    cps_step,
    flow_grpo_kl,
    flow_sde_diffusion,
    flow_sde_step,
    gaussian_kl,
    gaussian_log_prob,
    gaussian_log_prob_unnormalised,
    noise_estimate,
    ode_step,
)
from adagrpo_train.types import Gaussian

Step = Callable[[Tensor, Tensor, Tensor, Tensor], Gaussian]

SIGMA = torch.tensor([1.0, 0.75, 0.3], dtype=torch.float64)
SIGMA_NEXT = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)


def flow_sde(noise_level: float) -> Step:
    return lambda x, v, sigma, sigma_next: flow_sde_step(
        x, v, sigma, sigma_next, noise_level=noise_level, sigma_max=0.9
    )


def constant_sde(eta: float) -> Step:
    return lambda x, v, sigma, sigma_next: constant_sde_step(x, v, sigma, sigma_next, eta=eta)


def cps(noise_level: float) -> Step:
    return lambda x, v, sigma, sigma_next: cps_step(x, v, sigma, sigma_next, noise_level=noise_level)


NOISY_STEPS = {"flow_sde": flow_sde(0.7), "constant_sde": constant_sde(0.3), "cps": cps(0.8)}
NOISELESS_STEPS = {"flow_sde": flow_sde(0.0), "constant_sde": constant_sde(0.0), "cps": cps(0.0)}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 6, 5, dtype=torch.float64)


@pytest.fixture
def velocity() -> Tensor:
    return torch.randn(3, 4, 6, 5, dtype=torch.float64)


@pytest.fixture
def step(x: Tensor) -> Gaussian:
    return Gaussian(x, torch.tensor([0.5, 0.01, 2.0], dtype=torch.float64).view(3, 1, 1, 1))


@pytest.mark.parametrize("name", NOISELESS_STEPS)
def test_a_step_without_noise_is_the_euler_step(name: str, x: Tensor, velocity: Tensor):
    mean, std = NOISELESS_STEPS[name](x, velocity, SIGMA, SIGMA_NEXT)
    euler = x + (SIGMA_NEXT - SIGMA).view(3, 1, 1, 1) * velocity
    torch.testing.assert_close(mean, euler, rtol=0, atol=1e-14)
    assert torch.equal(std, torch.zeros(3, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["flow_sde", "constant_sde"])
def test_an_sde_step_without_noise_is_bitwise_the_euler_step(
    name: str, dtype: torch.dtype, x: Tensor, velocity: Tensor
):
    inputs = (x.to(dtype), velocity.to(dtype), SIGMA.to(dtype), SIGMA_NEXT.to(dtype))
    assert torch.equal(NOISELESS_STEPS[name](*inputs).mean, ode_step(*inputs))


@pytest.mark.parametrize("shape", [(1, 3), (2, 16, 8, 8), (3, 64, 64)])
def test_the_euler_step_is_bitwise_that_of_diffusers(shape: tuple[int, ...]):
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x = torch.randn(shape)
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(shape)
        theirs = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        sigma, sigma_next = (scheduler.sigmas[i].expand(len(x)) for i in (index, index + 1))
        assert torch.equal(ode_step(x, velocity, sigma, sigma_next), theirs)
        x = theirs


def test_the_estimates_recover_image_and_noise_from_the_true_velocity(x: Tensor):
    image, noise, sigma = x, torch.randn_like(x), SIGMA.view(3, 1, 1, 1)
    state = (1 - sigma) * image + sigma * noise
    torch.testing.assert_close(clean_estimate(state, noise - image, SIGMA), image, rtol=0, atol=1e-14)
    torch.testing.assert_close(noise_estimate(state, noise - image, SIGMA), noise, rtol=0, atol=1e-14)


def test_the_flow_sde_mean_is_equation_nine_of_flow_grpo(x: Tensor, velocity: Tensor):
    s, dt = SIGMA.view(3, 1, 1, 1), (SIGMA_NEXT - SIGMA).view(3, 1, 1, 1)
    diffusion = 0.7 * torch.sqrt(torch.tensor([1 / 0.1, 0.75 / 0.25, 0.3 / 0.7], dtype=torch.float64)).view(3, 1, 1, 1)
    mean, std = flow_sde(0.7)(x, velocity, SIGMA, SIGMA_NEXT)
    expected = x + (velocity + diffusion**2 / (2 * s) * (x + (1 - s) * velocity)) * dt
    torch.testing.assert_close(mean, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(std, diffusion * torch.sqrt(-dt), rtol=1e-13, atol=0)


def test_the_constant_sde_mean_follows_the_score_of_dance_grpo(x: Tensor, velocity: Tensor):
    s, dt = SIGMA.view(3, 1, 1, 1), (SIGMA_NEXT - SIGMA).view(3, 1, 1, 1)
    score = -(x - (x - s * velocity) * (1 - s)) / s**2
    mean, std = constant_sde(0.3)(x, velocity, SIGMA, SIGMA_NEXT)
    torch.testing.assert_close(mean, x + velocity * dt - 0.5 * 0.3**2 * score * dt, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(std, 0.3 * torch.sqrt(-dt), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["flow_sde", "constant_sde"])
def test_an_sde_step_preserves_the_distribution_of_the_data_to_second_order(name: str):
    """For data N(0, s^2) the velocity is linear in x, so the variance after a step has a closed form."""

    def variance_error(length: float) -> float:
        spread, sigma = 0.6, 0.5
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        one = torch.ones(1, 1, dtype=torch.float64)
        velocity = one * (sigma - (1 - sigma) * spread**2) / variance  # E[eps - x_0 | x = 1]
        mean, std = NOISY_STEPS[name](one, velocity, one[0] * sigma, one[0] * (sigma - length))
        reached = float(mean) ** 2 * variance + float(std) ** 2
        wanted = (1 - sigma + length) ** 2 * spread**2 + (sigma - length) ** 2
        return abs(reached - wanted)

    assert variance_error(1e-3) < 1e-5
    assert variance_error(1e-3) / variance_error(5e-4) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("name", ["flow_sde", "constant_sde"])
def test_many_sde_steps_carry_noise_to_the_distribution_of_the_data(name: str):
    spread, num_steps = 0.6, 1000
    sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    one, reached = torch.ones(1, 1, dtype=torch.float64), 1.0
    for sigma, sigma_next in pairwise(sigmas):
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        velocity = one * (sigma - (1 - sigma) * spread**2) / variance
        at = {"flow_sde": flow_sde_at_second_sigma(float(sigmas[1])), "constant_sde": constant_sde(0.3)}[name]
        mean, std = at(one, velocity, sigma[None], sigma_next[None])
        reached = float(mean) ** 2 * reached + float(std) ** 2
    assert reached == pytest.approx(spread**2, rel=5e-3)


def flow_sde_at_second_sigma(second: float) -> Step:
    return lambda x, v, sigma, sigma_next: flow_sde_step(x, v, sigma, sigma_next, noise_level=0.7, sigma_max=second)


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.8, 1.0])
def test_cps_keeps_the_coefficients_of_image_and_noise(noise_level: float, x: Tensor):
    image, noise, sigma = x, torch.randn_like(x), SIGMA.view(3, 1, 1, 1)
    state = (1 - sigma) * image + sigma * noise
    mean, std = cps(noise_level)(state, noise - image, SIGMA, SIGMA_NEXT)
    wanted = SIGMA_NEXT.view(3, 1, 1, 1)
    kept = torch.sqrt(wanted**2 - std**2)  # what is left for the predicted noise
    torch.testing.assert_close(std, wanted * math.sin(noise_level * math.pi / 2), rtol=1e-14, atol=0)
    # The square root is off by sqrt(eps) where its argument is a rounding error.
    torch.testing.assert_close(mean, (1 - wanted) * image + kept * noise, rtol=0, atol=1e-7)


def test_the_excess_noise_of_flow_sde_has_its_closed_form():
    """Fresh and predicted noise do not add up to sigma_next: Flow-CPS, arXiv:2509.05952, sec. 3."""
    s, s_next = SIGMA[1:], SIGMA_NEXT[1:]
    length, diffusion = s - s_next, flow_sde_diffusion(s, noise_level=0.7, sigma_max=0.9)
    state = s.view(2, 1)  # image 0, noise 1
    mean, std = flow_sde(0.7)(state, torch.ones(2, 1, dtype=torch.float64), s, s_next)
    excess = diffusion**2 * length**2 / s + diffusion**4 * length**2 / (4 * s**2)
    torch.testing.assert_close((mean**2 + std**2).flatten(), s_next**2 + excess, rtol=1e-12, atol=0)


def test_cps_ends_at_the_clean_estimate_without_noise(x: Tensor, velocity: Tensor):
    mean, std = cps(0.8)(x[2:], velocity[2:], SIGMA[2:], SIGMA_NEXT[2:])
    assert torch.equal(mean, clean_estimate(x[2:], velocity[2:], SIGMA[2:]))
    assert float(std) == 0


@pytest.mark.parametrize("num_steps", [2, 6, 28])
def test_the_first_flow_sde_step_has_the_noise_level_as_std_on_every_grid(num_steps: int):
    sigmas = sd3_sigmas(num_steps, shift=3.0).double()
    noise = torch.zeros(1, 2, dtype=torch.float64)
    step = flow_sde_step(noise, noise, sigmas[:1], sigmas[1:2], noise_level=0.7, sigma_max=float(sigmas[1]))
    assert float(step.std) == pytest.approx(0.7, rel=1e-12)


def test_sigma_max_replaces_only_a_sigma_of_exactly_one():
    sigma = torch.tensor([1.0, 0.995, 0.95], dtype=torch.float64)
    diffusion = flow_sde_diffusion(sigma, noise_level=1.0, sigma_max=0.9)
    expected = torch.sqrt(torch.tensor([1 / 0.1, 0.995 / 0.005, 0.95 / 0.05], dtype=torch.float64))
    torch.testing.assert_close(diffusion, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NOISY_STEPS)
def test_rows_at_different_sigmas_do_not_touch_each_other(name: str, x: Tensor, velocity: Tensor):
    together = NOISY_STEPS[name](x, velocity, SIGMA, SIGMA_NEXT)
    for row in range(3):
        one = slice(row, row + 1)
        alone = NOISY_STEPS[name](x[one], velocity[one], SIGMA[one], SIGMA_NEXT[one])
        assert torch.equal(together.mean[one], alone.mean)
        assert torch.equal(together.std[one], alone.std)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NOISY_STEPS)
def test_narrow_inputs_are_widened_before_any_arithmetic(name: str, narrow: torch.dtype, x: Tensor, velocity: Tensor):
    sigma, sigma_next = SIGMA.float(), SIGMA_NEXT.float()
    mean, std = NOISY_STEPS[name](x.to(narrow), velocity.to(narrow), sigma, sigma_next)
    assert mean.dtype == std.dtype == torch.float32
    assert torch.equal(
        mean, NOISY_STEPS[name](x.to(narrow).float(), velocity.to(narrow).float(), sigma, sigma_next).mean
    )


@pytest.mark.parametrize("log_prob", [gaussian_log_prob, gaussian_log_prob_unnormalised, cps_log_prob])
def test_a_narrow_next_state_is_widened_before_its_log_probability(log_prob: Callable, step: Gaussian):
    narrow, single = step.mean.bfloat16(), Gaussian(step.mean.float(), step.std.float())
    assert log_prob(narrow, single).dtype == torch.float32
    assert torch.equal(log_prob(narrow, single), log_prob(narrow.float(), single))


def test_the_log_probability_is_the_mean_of_normal_log_densities(step: Gaussian):
    x_next = step.mean + step.std * torch.randn_like(step.mean)
    expected = Normal(*step).log_prob(x_next).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_log_prob(x_next, step), expected, rtol=1e-12, atol=1e-12)


def test_log_ratios_do_not_depend_on_the_constants(step: Gaussian):
    x_next = step.mean + step.std * torch.randn_like(step.mean)
    other = Gaussian(step.mean + 0.01 * torch.randn_like(step.mean), step.std)
    full = gaussian_log_prob(x_next, other) - gaussian_log_prob(x_next, step)
    bare = gaussian_log_prob_unnormalised(x_next, other) - gaussian_log_prob_unnormalised(x_next, step)
    torch.testing.assert_close(full, bare, rtol=1e-10, atol=1e-12)


def test_the_cps_log_ratio_is_twice_the_variance_times_the_gaussian_one(step: Gaussian):
    x_next = step.mean + step.std * torch.randn_like(step.mean)
    other = Gaussian(step.mean + 0.01 * torch.randn_like(step.mean), step.std)
    gaussian = gaussian_log_prob(x_next, other) - gaussian_log_prob(x_next, step)
    surrogate = cps_log_prob(x_next, other) - cps_log_prob(x_next, step)
    torch.testing.assert_close(surrogate, gaussian * 2 * step.std.flatten() ** 2, rtol=1e-8, atol=1e-12)


def test_many_branches_of_one_state_have_the_log_probabilities_of_separate_transitions(step: Gaussian):
    root = Gaussian(step.mean[:1], step.std[:1])
    branches = root.mean + root.std * torch.randn(7, *root.mean.shape[1:], dtype=torch.float64)
    separate = [gaussian_log_prob(branch[None], root) for branch in branches]
    assert torch.equal(gaussian_log_prob(branches, root), torch.cat(separate))


def test_the_gradient_of_the_log_probability_is_the_scaled_residual(step: Gaussian):
    mean = step.mean.clone().requires_grad_()
    x_next = step.mean + step.std * torch.randn_like(step.mean)
    gaussian_log_prob(x_next, Gaussian(mean, step.std)).sum().backward()
    expected = (x_next - step.mean) / step.std**2 / step.mean[0].numel()
    torch.testing.assert_close(mean.grad, expected, rtol=1e-12, atol=1e-14)


def test_the_divergence_is_that_of_two_normals_per_element(step: Gaussian):
    reference = step.mean + torch.randn_like(step.mean)
    expected = kl_divergence(Normal(*step), Normal(reference, step.std)).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_kl(step, reference), expected, rtol=1e-12, atol=0)


def test_the_flow_grpo_penalty_is_the_divergence_times_the_length_of_the_step(x: Tensor, velocity: Tensor):
    step = flow_sde(0.7)(x, velocity, SIGMA, SIGMA_NEXT)
    reference = step.mean + torch.randn_like(x)
    penalty = flow_grpo_kl(step, reference, flow_sde_diffusion(SIGMA, noise_level=0.7, sigma_max=0.9))
    torch.testing.assert_close(penalty, (SIGMA - SIGMA_NEXT) * gaussian_kl(step, reference), rtol=1e-12, atol=0)


def test_the_cps_penalty_is_the_squared_distance_of_the_means(step: Gaussian):
    torch.testing.assert_close(cps_kl(step, step.mean + 0.5), torch.full((3,), 0.25).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("step", [flow_sde(-0.1), constant_sde(-0.1), cps(-0.1), cps(1.2), cps(math.nan)])
def test_noise_out_of_range_is_refused(step: Step, x: Tensor, velocity: Tensor):
    with pytest.raises(ValueError, match=r"noise_level|eta"):
        step(x, velocity, SIGMA, SIGMA_NEXT)


@pytest.mark.parametrize("sigma_max", [1.0, -0.1, math.nan])
def test_a_sigma_max_that_leaves_the_first_step_undefined_is_refused(sigma_max: float):
    with pytest.raises(ValueError, match="sigma_max"):
        flow_sde_diffusion(SIGMA, noise_level=0.7, sigma_max=sigma_max)


def test_shapes_in_signatures_are_checked_in_tests(x: Tensor, velocity: Tensor):
    with pytest.raises(Exception, match="sigma_next"):
        ode_step(x, velocity, SIGMA, SIGMA_NEXT[:2])
