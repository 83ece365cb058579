"""Running statistics of rewards and of weights, as pure updates."""
# ruff: noqa: F722 - shapes in annotations are not code; the leading space keeps linters from reading names

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_SMALLEST_VARIANCE = 1e-8  # reward units squared


@dataclass(frozen=True)
class Moments:
    """Mean and variance of rewards, in reward units and their square."""

    mean: float
    var: float

    @property
    def std(self) -> float:
        """sqrt(max(var, 1e-8)), reward units: never 0 (Bujiazi/GRPO-Series@c4028f9, train.py)."""
        return math.sqrt(max(self.var, _SMALLEST_VARIANCE))

    @property
    def flat(self) -> bool:
        """Whether `std` is that floor, which says nothing about the rewards."""
        return self.var < _SMALLEST_VARIANCE


def batch_moments(scores: Float[Tensor, " candidates"]) -> Moments:
    """Mean and population variance of scores, summed in float64.

    Args:
        scores: [candidates] reward units, at least one.

    Raises:
        ValueError: scores is empty.

    Source: Bujiazi/GRPO-Series@c4028f9, sample_evaluate_and_select_ema.
    """
    if scores.numel() == 0:
        raise ValueError("the moments of no scores are undefined")
    values = scores.double()
    return Moments(float(values.mean()), float(values.var(correction=0)))


def ema_moments(old: Moments | None, new: Moments, *, alpha: float) -> Moments:
    """alpha old + (1 - alpha) new, for mean and variance alike; new itself on the first call.

    Args:
        old: the running moments, None before the first update.
        new: moments of the present batch.
        alpha: weight on the past, in [0, 1); 0.8 in the official script.

    Raises:
        ValueError: alpha lies outside [0, 1).

    Source: Bujiazi/GRPO-Series@c4028f9, sample_evaluate_and_select_ema.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha, the weight on the past, must lie in [0, 1), got {alpha}")
    if old is None:
        return new
    return Moments(alpha * old.mean + (1 - alpha) * new.mean, alpha * old.var + (1 - alpha) * new.var)


def weight_ema_decay(step: int, *, decay: float) -> float:
    """min((1 + step) / (10 + step), decay), unitless: the average of weights forgets its start quickly.

    Args:
        step: >= 0, optimizer steps taken so far.
        decay: weight on the past in the long run, in [0, 1].

    Raises:
        ValueError: an argument is out of range.

    Source: yifan123/flow_grpo@ac4c86e, EMAModuleWrapper.
    """
    if step < 0 or not 0 <= decay <= 1:
        raise ValueError(f"step must be >= 0 and decay in [0, 1], got step={step}, decay={decay}")
    return min((1 + step) / (10 + step), decay)


def weight_ema(
    average: Float[Tensor, "*shape"], weight: Float[Tensor, "*shape"], *, decay: float
) -> Float[Tensor, "*shape"]:
    """average + (1 - decay) (weight - average) [*shape].

    Args:
        average: running average of a weight.
        weight: its present value.
        decay: weight on the past, in [0, 1], from weight_ema_decay.

    Source: yifan123/flow_grpo@ac4c86e, EMAModuleWrapper.step.
    """
    return torch.lerp(average, weight.to(average.dtype), 1 - decay)
