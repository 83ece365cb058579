"""Ask the reward for scores, and let nothing through that is not a score."""

import math

import numpy as np
import torch

from adagrpo_train.errors import ConfigError, RewardError
from adagrpo_train.interfaces import Reward
from adagrpo_train.types import Scores


class WeightedScorer:
    """A weighted sum of the named parts that a reward returns.

    Args:
        reward: returns one list of numbers per part.
        weights: part -> weight in the total; parts without a weight are logged only.

    Raises:
        ConfigError: no weight, or one that is not a finite number.
    """

    def __init__(self, *, reward: Reward, weights: dict[str, float]) -> None:
        if not weights:
            raise ConfigError("reward.weights is empty: name at least one part of the reward")
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ConfigError(f"reward.weights.{name}={weight}: expected a finite number")
        self._reward, self._weights = reward, weights

    def score(self, images: np.ndarray, prompts: list[str]) -> Scores:
        """Score N images.

        Args:
            images: uint8 [N, H, W, 3].
            prompts: N texts.

        Raises:
            RewardError: a part is missing, has the wrong count, or holds a value that is not finite. A failed
                reward stops the run; it never becomes a number.
        """
        try:
            parts = self._reward.score(images, prompts)
        except ValueError as error:
            raise RewardError(f"the reward refused an image or a prompt: {error}") from error
        missing = sorted(set(self._weights) - set(parts))
        if missing:
            raise RewardError(f"reward.weights names {missing}; the reward returns {sorted(parts)}")
        for name, values in parts.items():
            _check(name, values, prompts)
        columns = {name: torch.tensor(values, dtype=torch.float32) for name, values in parts.items()}
        total = torch.stack([weight * columns[name] for name, weight in self._weights.items()]).sum(0)
        return Scores(total, columns)


def _check(name: str, values: list[float], prompts: list[str]) -> None:
    if len(values) != len(prompts):
        raise RewardError(f"reward {name}: {len(values)} scores for {len(prompts)} images")
    for value, prompt in zip(values, prompts, strict=True):
        if not math.isfinite(value):
            raise RewardError(f"reward {name}: the score of an image for prompt {prompt!r} is {value}")
