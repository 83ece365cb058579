"""Which sampling steps draw noise, which are trained, and how the samples of a group relate."""

import math
from dataclasses import dataclass

import torch

from adagrpo_train.errors import ConfigError
from adagrpo_train.types import StepPlan


@dataclass(frozen=True, kw_only=True)
class EveryStep:
    """Noise at every step but the last, all of them trained (Flow-GRPO, Flow-CPS).

    The last step ends at sigma 0, where noise would stay visible in the image and its density is too sharp to
    train on; the published codes draw it all the same and then leave it out of the loss.
    """

    shared_noise: bool
    branches: bool = False

    def steps(self, iteration: int, num_steps: int, seed: int) -> StepPlan:
        every = tuple(range(num_steps - 1))
        return StepPlan(noisy=every, trained=every)


@dataclass(frozen=True, kw_only=True)
class RandomSteps:
    """Noise at every step but the last; a fresh random fraction of those is trained (DanceGRPO)."""

    fraction: float
    shared_noise: bool
    branches: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"plan.fraction={self.fraction}: the share of trained steps must be in (0, 1]")

    def steps(self, iteration: int, num_steps: int, seed: int) -> StepPlan:
        noisy = tuple(range(num_steps - 1))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
        count = max(1, math.floor(self.fraction * len(noisy)))
        chosen = torch.randperm(len(noisy), generator=generator)[:count].tolist()
        return StepPlan(noisy=noisy, trained=tuple(sorted(chosen)))


@dataclass(frozen=True, kw_only=True)
class FixedSteps:
    """Noise at the listed steps only, all of them trained; the other steps follow the ODE."""

    noisy: list[int]
    shared_noise: bool
    branches: bool = False

    def steps(self, iteration: int, num_steps: int, seed: int) -> StepPlan:
        steps = _checked(self.noisy, num_steps, "plan.noisy")
        return StepPlan(noisy=steps, trained=steps)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Noise inside a window of consecutive steps whose start is drawn per iteration (Flow-GRPO-Fast).

    Args:
        size: steps in the window.
        low, high: the window lies inside steps low .. high - 1.
    """

    size: int
    low: int
    high: int
    shared_noise: bool
    branches: bool = False

    def steps(self, iteration: int, num_steps: int, seed: int) -> StepPlan:
        if not 0 < self.size <= self.high - self.low:
            raise ConfigError(
                f"plan.size={self.size}: a window inside steps {self.low} to {self.high - 1} "
                f"(plan.low, plan.high) has 1 to {self.high - self.low} steps"
            )
        _checked([self.low, self.high - 1], num_steps, "plan.low, plan.high - 1")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
        start = int(torch.randint(self.low, self.high - self.size + 1, (), generator=generator))
        window = tuple(range(start, start + self.size))
        return StepPlan(noisy=window, trained=window)


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Singular stochastic sampling: a noise-free trunk per prompt; at each listed step a group branches off it
    with one stochastic step and follows the ODE to the end (G2RPO, arXiv:2510.01982; the AdaGRPO release)."""

    at: list[int]
    branches: bool = True
    shared_noise: bool = True

    def steps(self, iteration: int, num_steps: int, seed: int) -> StepPlan:
        steps = _checked(self.at, num_steps, "plan.at")
        return StepPlan(noisy=steps, trained=steps)


def _checked(steps: list[int], num_steps: int, key: str) -> tuple[int, ...]:
    """Ascending unique steps, all before the last one. Raises ConfigError naming the key."""
    if not steps:
        raise ConfigError(f"{key} is empty: the policy gradient needs at least one stochastic step")
    outside = [step for step in steps if not 0 <= step < num_steps - 1]
    if outside:
        raise ConfigError(
            f"{key}={list(steps)}: steps {outside} are outside 0 .. {num_steps - 2} "
            f"(model.num_steps={num_steps}, and the last step stays deterministic)"
        )
    return tuple(sorted(set(steps)))
