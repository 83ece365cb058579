"""AdaGRPO's online curriculum filter and the arms it is compared with."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from adagrpo_train.curriculum.level import LevelTracker
from adagrpo_train.errors import ConfigError
from adagrpo_train.functional import selection
from adagrpo_train.types import Level, Selection


class ScoredCurriculum(ABC):
    """Scores every candidate by one noise-free sample, updates the level with all of them, then selects.

    Args:
        candidates: prompts scored per iteration, over all ranks.
        chosen: prompts trained on per iteration, over all ranks.
        alpha: share of the past kept when the level is updated, in [0, 1).
        per_rank: select on every rank among its own candidates against its own level, as the released AdaGRPO
            code does; results then depend on the number of ranks.

    Raises:
        ConfigError: chosen < 1, more chosen than candidates, or alpha outside [0, 1).
    """

    scores_candidates = True

    def __init__(self, *, candidates: int, chosen: int, alpha: float, per_rank: bool) -> None:
        if not 1 <= chosen <= candidates:
            raise ConfigError(
                f"curriculum.chosen={chosen}, curriculum.candidates={candidates}: need 1 <= chosen <= candidates"
            )
        self.candidates, self.chosen, self.per_rank = candidates, chosen, per_rank
        self._tracker = LevelTracker(alpha=alpha)

    def select(self, rewards: Tensor | None, count: int) -> Selection:
        """Update the level with the candidates' rewards [B] and choose `count` of them, none whose reward is missing.

        Args:
            rewards: [B], NaN where missing.
            count: at most as many as have a reward.

        Raises:
            ValueError: rewards is None; this curriculum needs one reward per candidate.
        """
        if rewards is None:
            raise ValueError("a scored curriculum needs the candidates' rewards")
        rows = torch.nonzero(rewards.isfinite()).flatten()
        level = self._tracker.update(rewards[rows])
        picked = self.pick(rewards[rows], level, count)
        return Selection(tuple(rows[picked].tolist()), level)

    @abstractmethod
    def pick(self, rewards: Tensor, level: Level, count: int) -> list[int]:
        """The `count` rows of the chosen candidates, best first."""

    def observe(self, rewards: Tensor) -> Level | None:
        """The level, unchanged: it follows noise-free candidates only, not the stochastic training samples."""
        return self._tracker.level

    def state_dict(self) -> dict[str, Any]:
        return self._tracker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._tracker.load_state_dict(state)


class Boundary(ScoredCurriculum):
    """AdaGRPO: the prompts nearest to the policy's proficiency level (arXiv:2606.06828)."""

    def pick(self, rewards: Tensor, level: Level, count: int) -> list[int]:
        return selection.nearest_to(rewards, level.mean, count)


class Easiest(ScoredCurriculum):
    """The prompts with the highest rewards."""

    def pick(self, rewards: Tensor, level: Level, count: int) -> list[int]:
        return selection.easiest(rewards, count)


class Hardest(ScoredCurriculum):
    """The prompts with the lowest rewards."""

    def pick(self, rewards: Tensor, level: Level, count: int) -> list[int]:
        return selection.hardest(rewards, count)


class Median(ScoredCurriculum):
    """The prompts nearest to the median of this batch of candidates."""

    def pick(self, rewards: Tensor, level: Level, count: int) -> list[int]:
        return selection.nearest_to_median(rewards, count)
