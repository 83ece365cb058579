"""How much scores changed, and how surely."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Change(NamedTuple):
    """Difference of two means with its standard error; NaN where there are too few scores to tell."""

    before: float
    after: float
    standard_error: float

    @property
    def gain(self) -> float:
        return self.after - self.before

    @property
    def standard_errors(self) -> float:
        """The gain in standard errors."""
        if self.standard_error == 0:
            return math.copysign(math.inf, self.gain) if self.gain else 0.0
        return self.gain / self.standard_error


def paired(before: Sequence[float], after: Sequence[float]) -> Change:
    """Of scores of the same images in the same order, over the images that have both; NaN where one is missing."""
    pairs = np.array([before, after], dtype=np.float64)
    first, second = pairs[:, np.isfinite(pairs).all(0)]
    return Change(_mean(first), _mean(second), _error(second - first))


def unpaired(before: Sequence[float], after: Sequence[float]) -> Change:
    """Of two independent samples with variances of their own (Welch, Biometrika 34, 1947)."""
    return Change(_mean(before), _mean(after), math.hypot(_error(before), _error(after)))


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _error(values: Sequence[float] | np.ndarray) -> float:
    """Standard error of a mean; NaN for fewer than two values."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
