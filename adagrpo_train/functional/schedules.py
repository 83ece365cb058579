"""Grids of sigma for sampling, and the learning-rate multiplier."""
# ruff: noqa: F722 - shapes in annotations are not code; the leading space keeps linters from reading names

import math

import torch
from jaxtyping import Float32, Int64
from torch import Tensor


def sd3_sigmas(num_steps: int, *, shift: float, num_train_timesteps: int = 1000) -> Float32[Tensor, " points"]:
    """[num_steps + 1] sigmas from 1 to 0, unitless: the grid diffusers samples Stable Diffusion 3 with.

    The smallest sigma is shifted twice, once when the scheduler is built and once when the grid is made.
    That leaves a last step of tiny width: with shift 3 the grid ends ..., 0.0089, 0.

    Args:
        num_steps: >= 1.
        shift: > 0; above 1 spends more steps near noise.
        num_train_timesteps: >= 1; its inverse is the smallest sigma before shifting.

    Raises:
        ValueError: an argument is out of range.

    Source: arXiv:2403.03206, eq. 23; diffusers 0.42, FlowMatchEulerDiscreteScheduler.set_timesteps.
    """
    _require_positive(num_steps=num_steps, shift=shift, num_train_timesteps=num_train_timesteps)
    sigma_min = _shifted(torch.tensor(1 / num_train_timesteps, dtype=torch.float64), shift)
    return _grid(_shifted(torch.linspace(1, float(sigma_min), num_steps, dtype=torch.float64), shift))


def flux_sigmas(
    num_steps: int,
    *,
    image_seq_len: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 4096,
) -> Float32[Tensor, " points"]:
    """[num_steps + 1] sigmas from 1 to 0, unitless: the grid diffusers samples FLUX.1 with.

    Args:
        num_steps: >= 1.
        image_seq_len: >= 1, tokens of one image: (pixels / 16)^2 for a square one.
        base_shift: exponent of the shift at base_image_seq_len tokens, unitless.
        max_shift: exponent of the shift at max_image_seq_len tokens, unitless.
        base_image_seq_len: tokens.
        max_image_seq_len: tokens, other than base_image_seq_len.

    Raises:
        ValueError: an argument is out of range.

    Source: diffusers 0.42, calculate_shift of FluxPipeline and FlowMatchEulerDiscreteScheduler.
    """
    _require_positive(num_steps=num_steps)
    exponent = flux_shift_exponent(
        image_seq_len,
        base_shift=base_shift,
        max_shift=max_shift,
        base_image_seq_len=base_image_seq_len,
        max_image_seq_len=max_image_seq_len,
    )
    return _grid(_shifted(torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64), math.exp(exponent)))


def flux_shift_exponent(
    image_seq_len: int,
    *,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 4096,
) -> float:
    """Natural logarithm of FLUX.1's shift, unitless: a straight line in the number of image tokens.

    Args:
        image_seq_len: >= 1, tokens.
        base_shift: value at base_image_seq_len tokens, unitless.
        max_shift: value at max_image_seq_len tokens, unitless.
        base_image_seq_len: tokens.
        max_image_seq_len: tokens, other than base_image_seq_len.

    Raises:
        ValueError: an argument is out of range.

    Source: diffusers 0.42, calculate_shift of FluxPipeline.
    """
    _require_positive(image_seq_len=image_seq_len)
    if base_image_seq_len == max_image_seq_len:
        raise ValueError(f"base_image_seq_len and max_image_seq_len must differ, both are {max_image_seq_len}")
    slope = (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len)
    return base_shift + slope * (image_seq_len - base_image_seq_len)


def shifted_sigmas(num_steps: int, *, shift: float) -> Float32[Tensor, " points"]:
    """[num_steps + 1] sigmas, evenly spaced from 1 to 0 and then shifted, unitless.

    Args:
        num_steps: >= 1.
        shift: > 0; above 1 spends more steps near noise.

    Raises:
        ValueError: an argument is out of range.

    Source: XueZeyue/DanceGRPO@15cc71d, sd3_time_shift; Bujiazi/GRPO-Series@c4028f9, train.py.
    """
    _require_positive(num_steps=num_steps, shift=shift)
    # In float32 as the sources do: truncated_timesteps reacts to the last bit.
    return _grid(_shifted(torch.linspace(1, 0, num_steps + 1), shift)[:-1])


def truncated_timesteps(sigmas: Float32[Tensor, " points"]) -> Int64[Tensor, " points"]:
    """1000 sigma without its fraction [points]: the time DanceGRPO conditions its model on.

    Args:
        sigmas: in [0, 1].

    Source: XueZeyue/DanceGRPO@15cc71d, fastvideo/train_grpo_flux.py.
    """
    return (sigmas * 1000).long()


def warmup_constant_anneal(step: int, *, warmup_steps: int, anneal_steps: int, total_steps: int) -> float:
    """Learning-rate multiplier in [0, 1]: a linear rise from 0, then 1, then a linear fall to 0.

    Args:
        step: >= 0, optimizer steps taken so far; beyond total_steps the multiplier stays where it ended.
        warmup_steps: >= 0, length of the rise; 0 starts at 1.
        anneal_steps: >= 0, length of the fall, which ends at total_steps; 0 leaves the fall out.
        total_steps: more than warmup_steps + anneal_steps.

    Raises:
        ValueError: an argument is out of range.

    Source: Bujiazi/GRPO-Series@c4028f9, get_warmup_constant_anneal_scheduler. That code falls to 0 after
    total_steps even without annealing; here the multiplier then stays 1.
    """
    if min(step, warmup_steps, anneal_steps) < 0:
        raise ValueError(f"step={step}, warmup_steps={warmup_steps} and anneal_steps={anneal_steps} must be >= 0")
    if total_steps <= warmup_steps + anneal_steps:
        raise ValueError(f"total_steps={total_steps} must exceed warmup_steps={warmup_steps} + {anneal_steps=}")
    if step < warmup_steps:
        return step / warmup_steps
    if anneal_steps == 0:
        return 1.0
    return min(1.0, max(0.0, (total_steps - step) / anneal_steps))


def _shifted(sigmas: Tensor, shift: float) -> Tensor:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _grid(sigmas: Tensor) -> Tensor:
    grid = torch.cat([sigmas.float(), torch.zeros(1)])
    # Rounding may leave 1 - 6e-8, at which the diffusion of Flow-SDE is 4000 instead of finite by its rule for 1.
    grid[0] = 1
    return grid


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}")
