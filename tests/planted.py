"""Mistakes of users and developers, for the check to find: named in settings as `_target_` or as a reward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor

from adagrpo_train.algorithms.transitions import FlowSDE
from adagrpo_train.models.sd3 import SD3Model
from adagrpo_train.types import Gaussian
from rewards.contract import ItemError, Sample
from rewards.jpeg_size import JpegSize
from rewards.shapes.reward import ShapesReward


@dataclass(frozen=True, kw_only=True)
class Drifting(FlowSDE):
    """Forgets that a step is from sigma down to sigma_next, not to where the noise of sigma belongs."""

    def step(self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: float) -> Gaussian:
        return super().step(x, velocity, sigma, sigma_next * 0.9, sigma_max)


@dataclass(frozen=True, kw_only=True)
class Guessing(FlowSDE):
    """Estimates its log-probability from some of the latent, other ones each time."""

    def log_prob(self, x_next: Tensor, step: Gaussian) -> Tensor:
        kept = torch.rand(x_next.shape[1:], generator=self._generator) < 0.9
        return super().log_prob(x_next * kept, Gaussian(step.mean * kept, step.std))

    _generator: ClassVar[torch.Generator] = torch.Generator().manual_seed(0)


class Dropping(SD3Model):
    """Leaves dropout on, as a network that was just pretrained may have it."""

    @wraps(SD3Model.__init__)  # its keywords, which settings are compared with
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.transformer.train()
        for module in self.transformer.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1


class Flat(JpegSize):
    """Gives every picture the same score."""

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        return [{"jpeg_size": 1.0} for _ in batch]


class Blind(JpegSize):
    """Cannot score any picture."""

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        raise ItemError("the picture is too small")


class Generous(ShapesReward):
    """Scores otherwise than where it was recorded, as another version of a library may make it."""

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        return [{name: 0.9 * value for name, value in score.items()} for score in super().score(batch)]


class Versioned(JpegSize):
    """Of another make each time that `version` changes."""

    version: ClassVar[int] = 1

    def fingerprint(self) -> str:
        return f"versioned@{self.version}"
