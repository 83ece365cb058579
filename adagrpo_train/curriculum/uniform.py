"""Take prompts as they come."""

from typing import Any

from torch import Tensor

from adagrpo_train.curriculum.level import LevelTracker
from adagrpo_train.errors import ConfigError
from adagrpo_train.types import Level, Selection


class Uniform:
    """No filter: every prompt drawn is trained on. The level follows the rewards of the training samples.

    Args:
        chosen: prompts per iteration, over all ranks.
        alpha: share of the past kept when the level is updated, in [0, 1).
    """

    scores_candidates = False

    def __init__(self, *, chosen: int, alpha: float, per_rank: bool) -> None:
        if chosen < 1:
            raise ConfigError(f"curriculum.chosen={chosen}: must be >= 1")
        self.candidates = self.chosen = chosen
        self.per_rank = per_rank
        self._tracker = LevelTracker(alpha=alpha)

    def select(self, rewards: Tensor | None, count: int) -> Selection:
        return Selection(tuple(range(count)), self._tracker.level)

    def observe(self, rewards: Tensor) -> Level | None:
        """Update the level with the usable rewards of the training samples; None before the first one."""
        return self._tracker.update(rewards) if len(rewards) else self._tracker.level

    def state_dict(self) -> dict[str, Any]:
        return self._tracker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._tracker.load_state_dict(state)
