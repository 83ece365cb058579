"""Figures of many batches and processes as one number each."""

from collections.abc import Mapping

import torch
from torch import Tensor

from adagrpo_train.runtime.engine import Engine


class Figures:
    """Means weighted by what was trained on, and maxima (names ending in "_max"), over batches and ranks.

    What nobody added is not there: a batch that taught nothing is not averaged in as 0. Tensors are read when all is
    added: the host does not wait for a GPU in between.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float | Tensor, float]] = {}  # weighted sum and sum of weights
        self._maxima: dict[str, float | Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sums or name in self._maxima

    def add(self, figures: Mapping[str, float | Tensor], weight: float) -> None:
        """Take in figures about `weight` transitions, or updates."""
        for name, figure in figures.items():
            # Sums of many batches are float64, as the host's would be.
            value = figure.detach().double() if isinstance(figure, Tensor) else figure
            if name.endswith("_max"):
                self._maxima[name] = _larger(value, self._maxima.get(name, value))
            else:
                total, weights = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (total + weight * value, weights + weight)

    def reduced(self, engine: Engine) -> dict[str, float]:
        """Over all ranks, equal on each; maxima without their "_max"."""
        everyone = Figures()
        own = {name: (float(total), weights) for name, (total, weights) in self._sums.items()}
        for sums, maxima in engine.gather_objects((own, {name: float(value) for name, value in self._maxima.items()})):
            for name, (total, weights) in sums.items():
                everyone.add({name: total / weights}, weights)
            everyone.add(maxima, 1.0)
        means = {name: float(total) / weights for name, (total, weights) in everyone._sums.items()}
        return means | {name.removesuffix("_max"): float(value) for name, value in everyone._maxima.items()}


def _larger(one: float | Tensor, other: float | Tensor) -> float | Tensor:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return torch.maximum(torch.as_tensor(one), torch.as_tensor(other))
    return max(one, other)
