"""Sampling steps of flow models and their log-probabilities, as pure functions of tensors.

x_sigma = (1 - sigma) x_0 + sigma eps and the velocity predicts eps - x_0; a step goes from sigma to
sigma_next < sigma. Arithmetic is float32, or float64 when an input is: bfloat16 and float16 inputs are
widened first, because a step's drift and a log-ratio of 1e-4 both drown in their rounding.

Every step with its noise switched off is the Euler step.
"""
# ruff: noqa: F722 - shapes in annotations are not code; the leading space keeps linters from reading names

import math

import torch
from jaxtyping import Float
from torch import Tensor

from adagrpo_train.types import Gaussian


def flow_sde_step(
    x: Float[Tensor, " rows *latent"],
    velocity: Float[Tensor, " rows *latent"],
    sigma: Float[Tensor, " rows"],
    sigma_next: Float[Tensor, " rows"],
    *,
    noise_level: float,
    sigma_max: float,
) -> Gaussian:
    """State at sigma_next under Flow-GRPO's SDE: mean [rows, *latent], std [rows, 1...], latent units.

    Args:
        x: [rows, *latent] state at sigma.
        velocity: [rows, *latent] predicted eps - x_0 at (x, sigma).
        sigma: [rows] in (0, 1].
        sigma_next: [rows] in [0, sigma).
        noise_level: the paper's a, unitless, >= 0; 0 gives std 0, where no density exists.
        sigma_max: in [0, 1), the grid's second sigma; see flow_sde_diffusion.

    Raises:
        ValueError: noise_level is negative or sigma_max lies outside [0, 1).

    Source: Flow-GRPO, arXiv:2505.05470; yifan123/flow_grpo@ac4c86e, sde_step_with_logprob.
    """
    diffusion = flow_sde_diffusion(sigma, noise_level=noise_level, sigma_max=sigma_max)
    return _sde_step(x, velocity, sigma, sigma_next, diffusion)


def flow_sde_diffusion(
    sigma: Float[Tensor, " rows"], *, noise_level: float, sigma_max: float
) -> Float[Tensor, " rows"]:
    """noise_level * sqrt(sigma / (1 - sigma)) [rows], in latent units per sqrt(sigma).

    It is infinite at sigma = 1. Where sigma is exactly 1, sigma_max takes its place in the denominator,
    and only there. A grid that starts just below 1 gets no such help: 0.995 gives 14 noise_level.

    Args:
        sigma: [rows] in (0, 1].
        noise_level: unitless, >= 0.
        sigma_max: in [0, 1), the grid's second sigma.

    Raises:
        ValueError: noise_level is negative or sigma_max lies outside [0, 1).

    Source: yifan123/flow_grpo@ac4c86e, std_dev_t of sde_step_with_logprob; the same expression is
    flowsde_std of Bujiazi/GRPO-Series@c4028f9, whose training code passes the step's own sigma_next.
    """
    _require_non_negative("noise_level", noise_level)
    if not 0 <= sigma_max < 1:
        raise ValueError(f"sigma_max must lie in [0, 1), got {sigma_max}; pass the second sigma of the grid")
    (sigma,) = _widened(sigma)
    return noise_level * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma)))


def constant_sde_step(
    x: Float[Tensor, " rows *latent"],
    velocity: Float[Tensor, " rows *latent"],
    sigma: Float[Tensor, " rows"],
    sigma_next: Float[Tensor, " rows"],
    *,
    eta: float,
) -> Gaussian:
    """State at sigma_next under DanceGRPO's SDE, whose diffusion is eta at every sigma.

    Args:
        x: [rows, *latent] state at sigma.
        velocity: [rows, *latent] predicted eps - x_0 at (x, sigma).
        sigma: [rows] in (0, 1].
        sigma_next: [rows] in [0, sigma).
        eta: latent units per sqrt(sigma), >= 0; 0 gives std 0, where no density exists.

    Returns:
        mean [rows, *latent] and std [rows, 1...] = eta sqrt(sigma - sigma_next), latent units.

    Raises:
        ValueError: eta is negative.

    Source: DanceGRPO, arXiv:2505.07818; XueZeyue/DanceGRPO@15cc71d, flux_step. The official code leaves
    a bfloat16 velocity in bfloat16 while scaling it; here it is widened first.
    """
    _require_non_negative("eta", eta)
    return _sde_step(x, velocity, sigma, sigma_next, torch.full_like(_widened(sigma)[0], eta))


def cps_step(
    x: Float[Tensor, " rows *latent"],
    velocity: Float[Tensor, " rows *latent"],
    sigma: Float[Tensor, " rows"],
    sigma_next: Float[Tensor, " rows"],
    *,
    noise_level: float,
) -> Gaussian:
    """State at sigma_next under coefficient-preserving sampling.

    Part of the predicted noise is exchanged for fresh noise; the two parts add up to sigma_next in
    quadrature, so that the state carries exactly the noise the network expects there.

    Args:
        x: [rows, *latent] state at sigma.
        velocity: [rows, *latent] predicted eps - x_0 at (x, sigma).
        sigma: [rows] in (0, 1].
        sigma_next: [rows] in [0, sigma).
        noise_level: share of a quarter turn, unitless, in [0, 1]; 1 exchanges all predicted noise.

    Returns:
        mean [rows, *latent] and std [rows, 1...] = sigma_next sin(noise_level pi / 2), latent units.
        std is 0 at sigma_next = 0.

    Raises:
        ValueError: noise_level lies outside [0, 1]. The sine folds back beyond 1: 1.2 would silently be 0.8.

    Source: Flow-CPS, arXiv:2509.05952; IamCreateAI/FlowCPS@b402c7a, sde_step_with_logprob.
    """
    if not 0 <= noise_level <= 1:
        raise ValueError(f"noise_level of CPS must lie in [0, 1], got {noise_level}")
    sigma_next_column = _column(sigma_next, _widened(x, velocity)[0])
    angle = noise_level * math.pi / 2
    kept_noise = sigma_next_column * math.cos(angle)
    mean = (1 - sigma_next_column) * clean_estimate(x, velocity, sigma)
    return Gaussian(mean + kept_noise * noise_estimate(x, velocity, sigma), sigma_next_column * math.sin(angle))


def ode_step(
    x: Float[Tensor, " rows *latent"],
    velocity: Float[Tensor, " rows *latent"],
    sigma: Float[Tensor, " rows"],
    sigma_next: Float[Tensor, " rows"],
) -> Float[Tensor, " rows *latent"]:
    """Euler step x + (sigma_next - sigma) velocity [rows, *latent], widened; casting back is the caller's.

    Bitwise what FlowMatchEulerDiscreteScheduler.step of diffusers computes from float32 inputs.

    Args:
        x: [rows, *latent] state at sigma.
        velocity: [rows, *latent] predicted eps - x_0 at (x, sigma).
        sigma: [rows] in (0, 1].
        sigma_next: [rows] in [0, sigma).
    """
    x, velocity = _widened(x, velocity)
    return x + (_column(sigma_next, x) - _column(sigma, x)) * velocity


def clean_estimate(
    x: Float[Tensor, " rows *latent"], velocity: Float[Tensor, " rows *latent"], sigma: Float[Tensor, " rows"]
) -> Float[Tensor, " rows *latent"]:
    """x - sigma velocity [rows, *latent]: the image the network sees in x.

    Args:
        x: [rows, *latent] state at sigma.
        velocity: [rows, *latent] predicted eps - x_0 at (x, sigma).
        sigma: [rows] in [0, 1].
    """
    x, velocity = _widened(x, velocity)
    return x - _column(sigma, x) * velocity


def noise_estimate(
    x: Float[Tensor, " rows *latent"], velocity: Float[Tensor, " rows *latent"], sigma: Float[Tensor, " rows"]
) -> Float[Tensor, " rows *latent"]:
    """x + (1 - sigma) velocity [rows, *latent]: the noise the network sees in x.

    Args:
        x: [rows, *latent] state at sigma.
        velocity: [rows, *latent] predicted eps - x_0 at (x, sigma).
        sigma: [rows] in [0, 1].
    """
    x, velocity = _widened(x, velocity)
    return x + (1 - _column(sigma, x)) * velocity


def gaussian_log_prob(x_next: Float[Tensor, " items *latent"], step: Gaussian) -> Float[Tensor, " items"]:
    """Log-density of x_next under step [items], in nats per latent element: the mean over *latent, not the sum.

    Every published flow-GRPO code averages, so clip ranges from papers fit only this scale.

    Args:
        x_next: [items, *latent] reached states, rounded as they were stored.
        step: of as many rows as x_next, or of one row that every item started from; std > 0, else nan.

    Source: yifan123/flow_grpo@ac4c86e, sde_step_with_logprob; XueZeyue/DanceGRPO@15cc71d, flux_step.
    """
    return gaussian_log_prob_unnormalised(x_next, step) - torch.log(step.std.flatten()) - 0.5 * math.log(2 * math.pi)


def gaussian_log_prob_unnormalised(x_next: Float[Tensor, " items *latent"], step: Gaussian) -> Float[Tensor, " items"]:
    """-mean squared error / (2 std^2) [items]: gaussian_log_prob without its constants.

    The constants do not depend on the policy and cancel in every ratio.

    Args:
        x_next: [items, *latent] reached states, rounded as they were stored.
        step: of as many rows as x_next, or of one row that every item started from; std > 0, else nan or -inf.

    Source: Bujiazi/GRPO-Series@c4028f9, flowsde_prob_func.
    """
    return -_mean_squared_error(x_next, step.mean) / (2 * step.std.flatten() ** 2)


def cps_log_prob(x_next: Float[Tensor, " items *latent"], step: Gaussian) -> Float[Tensor, " items"]:
    """-mean squared error [items], squared latent units: what Flow-CPS uses for a log-probability.

    Without the 1 / (2 std^2) it is finite at std = 0, but its log-ratio is 2 std^2 times the Gaussian one:
    clip ranges do not carry over.

    Args:
        x_next: [items, *latent] reached states, rounded as they were stored.
        step: of as many rows as x_next, or of one row that every item started from.

    Source: Flow-CPS, arXiv:2509.05952; IamCreateAI/FlowCPS@b402c7a, sde_step_with_logprob.
    """
    return -_mean_squared_error(x_next, step.mean)


def gaussian_kl(step: Gaussian, reference_mean: Float[Tensor, " rows *latent"]) -> Float[Tensor, " rows"]:
    """KL divergence of step from a step of the same std around reference_mean [rows], nats per latent element.

    Args:
        step: std > 0.
        reference_mean: [rows, *latent] mean under the reference policy.

    Source: closed form, mean((m - m_ref)^2) / (2 std^2).
    """
    return _mean_squared_error(reference_mean, step.mean) / (2 * step.std.flatten() ** 2)


def flow_grpo_kl(
    step: Gaussian, reference_mean: Float[Tensor, " rows *latent"], diffusion: Float[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """mean((m - m_ref)^2) / (2 diffusion^2) [rows]: Flow-GRPO's penalty.

    It divides by the diffusion instead of the step's std, which makes it sigma - sigma_next times gaussian_kl.
    KL coefficients from the Flow-GRPO paper belong to this scale.

    Args:
        step: only its mean is used.
        reference_mean: [rows, *latent] mean under the reference policy.
        diffusion: [rows] > 0, from flow_sde_diffusion.

    Source: yifan123/flow_grpo@ac4c86e, scripts/train_sd3.py.
    """
    return _mean_squared_error(reference_mean, step.mean) / (2 * diffusion**2)


def cps_kl(step: Gaussian, reference_mean: Float[Tensor, " rows *latent"]) -> Float[Tensor, " rows"]:
    """mean((m - m_ref)^2) [rows], squared latent units: Flow-CPS's penalty, not divided by any variance.

    Args:
        step: only its mean is used.
        reference_mean: [rows, *latent] mean under the reference policy.

    Source: IamCreateAI/FlowCPS@b402c7a, scripts/train_sd3.py.
    """
    return _mean_squared_error(reference_mean, step.mean)


def _sde_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, diffusion: Tensor) -> Gaussian:
    x, velocity = _widened(x, velocity)
    sigma, sigma_next, diffusion = _column(sigma, x), _column(sigma_next, x), _column(diffusion, x)
    noise = x + (1 - sigma) * velocity
    drift = velocity + diffusion**2 / (2 * sigma) * noise
    return Gaussian(x + (sigma_next - sigma) * drift, diffusion * torch.sqrt(sigma - sigma_next))


def _mean_squared_error(value: Tensor, mean: Tensor) -> Tensor:
    value, mean = _widened(value, mean)
    return ((value - mean) ** 2).flatten(1).mean(1)


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _column(per_row: Tensor, like: Tensor) -> Tensor:
    return per_row.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _require_non_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0, got {value}")
