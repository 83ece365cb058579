"""The stochastic sampling steps an algorithm is built from: constants around functional/transitions."""

from copy import copy
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from adagrpo_train.errors import ConfigError
from adagrpo_train.functional import transitions as f
from adagrpo_train.types import Gaussian

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FlowSDE:
    """Flow-GRPO's marginal-preserving SDE (arXiv:2505.05470)."""

    noise_level: float

    def __post_init__(self) -> None:
        _require_positive("FlowSDE.noise_level", self.noise_level)

    def step(self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: float) -> Gaussian:
        return f.flow_sde_step(x, velocity, sigma, sigma_next, noise_level=self.noise_level, sigma_max=sigma_max)

    def log_prob(self, x_next: Tensor, step: Gaussian) -> Tensor:
        return f.gaussian_log_prob(x_next, step)

    def noiseless(self) -> "FlowSDE":
        return _with(self, "noise_level", 0.0)


@dataclass(frozen=True, kw_only=True)
class ConstantSDE:
    """DanceGRPO's SDE with a constant diffusion coefficient (arXiv:2505.07818)."""

    eta: float

    def __post_init__(self) -> None:
        _require_positive("ConstantSDE.eta", self.eta)

    def step(self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: float) -> Gaussian:
        return f.constant_sde_step(x, velocity, sigma, sigma_next, eta=self.eta)

    def log_prob(self, x_next: Tensor, step: Gaussian) -> Tensor:
        return f.gaussian_log_prob(x_next, step)

    def noiseless(self) -> "ConstantSDE":
        return _with(self, "eta", 0.0)


@dataclass(frozen=True, kw_only=True)
class CPS:
    """Flow-CPS: coefficients-preserving sampling (arXiv:2509.05952)."""

    noise_level: float

    def __post_init__(self) -> None:
        _require_positive("CPS.noise_level", self.noise_level)
        if self.noise_level > 1:
            # sin(noise_level * pi / 2) mirrors above 1, so 1.2 would silently mean 0.8.
            raise ConfigError(f"algorithm.transition.noise_level={self.noise_level}: CPS needs a value in (0, 1]")

    def step(self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: float) -> Gaussian:
        return f.cps_step(x, velocity, sigma, sigma_next, noise_level=self.noise_level)

    def log_prob(self, x_next: Tensor, step: Gaussian) -> Tensor:
        return f.cps_log_prob(x_next, step)

    def noiseless(self) -> "CPS":
        return _with(self, "noise_level", 0.0)


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        key = name.split(".")[1]
        raise ConfigError(
            f"algorithm.transition.{key}={value}: a policy gradient needs stochastic steps, so this must be > 0"
        )


def _with(transition: T, name: str, value: float) -> T:
    """A copy with a value that the constructor refuses, since nothing could be trained on it."""
    changed = copy(transition)
    object.__setattr__(changed, name, value)
    return changed
