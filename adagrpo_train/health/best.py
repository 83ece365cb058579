"""Which evaluation is the best, on a scale that scores of any unit share. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adagrpo_train.health.change import paired

_LEAST_SPREAD = 1e-4


class Best(NamedTuple):
    """The best evaluation after training began.

    Attributes:
        iteration: its number.
        gain: its heldout_gain(); below 0, the model before training was better.
    """

    iteration: int
    gain: float

    @classmethod
    def of(cls, state: Sequence[Any] | None) -> "Best | None":
        """Undo what JSON made of it."""
        return None if state is None else cls(*state)


def heldout_gain(first: Mapping[str, Sequence[float]], now: Mapping[str, Sequence[float]]) -> float:
    """How much better the held-out scores are than in the first evaluation: a sum of z-scores, so no unit outweighs.

    Each score adds the mean gain of its images, in standard deviations of its first scores over the images. One whose
    first scores are all equal (within 1e-4) has no such unit and adds its gain as it is.

    Args:
        first, now: name -> [images], NaN where missing.

    Returns:
        NaN if fewer than half of the images have both scores, in any of the names.
    """
    return sum(_gain(first[name], now[name]) for name in sorted(now))


def _gain(first: Sequence[float], now: Sequence[float]) -> float:
    both = np.isfinite([first, now]).all(0)
    if 2 * both.sum() < max(2, len(now)):
        return math.nan
    spread = float(np.std(np.asarray(first)[both]))
    return paired(first, now).gain / (spread if spread > _LEAST_SPREAD else 1.0)
