"""The policy's proficiency level: an EMA of the moments of its own rewards."""

from typing import Any

from torch import Tensor

from adagrpo_train.errors import ConfigError
from adagrpo_train.functional.moments import Moments, batch_moments, ema_moments
from adagrpo_train.types import Level


class LevelTracker:
    """Mean and variance of rewards, each as new = alpha * old + (1 - alpha) * batch (AdaGRPO, arXiv:2606.06828).

    Raises:
        ConfigError: alpha outside [0, 1).
    """

    def __init__(self, *, alpha: float) -> None:
        if not 0 <= alpha < 1:
            raise ConfigError(f"curriculum.alpha={alpha}: the share of the past that is kept must be in [0, 1)")
        self._alpha = alpha
        self._moments: Moments | None = None

    @property
    def level(self) -> Level | None:
        return None if self._moments is None else Level(self._moments.mean, self._moments.std)

    def update(self, rewards: Tensor) -> Level:
        """Follow the rewards [N], at least one, all of them present."""
        self._moments = ema_moments(self._moments, batch_moments(rewards), alpha=self._alpha)
        return Level(self._moments.mean, self._moments.std)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._moments is None else {"mean": self._moments.mean, "var": self._moments.var}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moments = Moments(state["mean"], state["var"]) if state else None
