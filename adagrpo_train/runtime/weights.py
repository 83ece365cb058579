"""Weight sets of one network: the running average for evaluation, and swapping sets in and out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adagrpo_train.errors import ConfigError
from adagrpo_train.functional.moments import weight_ema_decay


@contextmanager
def swapped(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """Inside, the parameters hold `values`; outside, what they held before."""
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value


class WeightAverage:
    """EMA of the trainable weights with Flow-GRPO's warm-up, min((1 + n) / (10 + n), decay) after update n.

    Args:
        parameters: the trainable weights.
        decay: in [0, 1); 0 keeps no average, so that evaluation uses the weights themselves.
        interval: updates between two averages.
    """

    def __init__(self, parameters: list[nn.Parameter], *, decay: float, interval: int) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"weight_average.decay={decay}: must be in [0, 1); 0 switches the average off")
        if interval < 1:
            raise ConfigError(f"weight_average.interval={interval}: must be >= 1")
        self._parameters, self._decay, self._interval = parameters, decay, interval
        self._average = [parameter.detach().clone() for parameter in parameters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights after optimizer update number `step`, counted from 0."""
        if self._average and (step + 1) % self._interval == 0:
            decay = weight_ema_decay(step, decay=self._decay)
            torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network holds the averaged weights."""
        if not self._average:
            yield
            return
        with swapped(self._parameters, self._average):
            yield

    def state_dict(self) -> dict[str, Tensor]:
        return {str(i): value for i, value in enumerate(self._average)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for i, value in enumerate(self._average):
            value.copy_(state[str(i)])
