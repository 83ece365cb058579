"""Weight sets of one network: how a process holds them, the running average, and swapping sets in and out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adagrpo_train.errors import ConfigError
from adagrpo_train.functional.moments import weight_ema_decay


class Weights:
    """Parameters of a network as one process holds them: whole ones here, shares of them in other engines.

    A weight set is a list of tensors shaped like local(), one per parameter.

    Args:
        parameters: of the prepared network.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters

    def local(self) -> list[Tensor]:
        """What this process holds, not copied."""
        return [parameter.detach() for parameter in self._parameters]

    @contextmanager
    def swapped(self, values: list[Tensor]) -> Iterator[None]:
        """Inside, the network computes with a weight set; outside, with what it held before."""
        own = [parameter.data for parameter in self._parameters]
        try:
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.data = value
            yield
        finally:
            for parameter, value in zip(self._parameters, own, strict=True):
                parameter.data = value

    def whole(self, values: list[Tensor]) -> Iterator[Tensor]:
        """The tensors of a weight set in the shapes of their parameters, one after the other; every rank asks."""
        yield from values

    def shares(self, whole: list[Tensor]) -> list[Tensor]:
        """The weight set of whole tensors, on the device of the parameters."""
        return [value.to(own.device, own.dtype) for value, own in zip(whole, self.local(), strict=True)]

    @torch.no_grad()
    def load(self, whole: list[Tensor]) -> None:
        """Set the parameters, and whatever the optimizer keeps of them, to whole tensors."""
        for own, value in zip(self.local(), self.shares(whole), strict=True):
            own.copy_(value)

    @property
    def shapes(self) -> list[list[int]]:
        """Shapes of the whole parameters."""
        return [list(parameter.shape) for parameter in self._parameters]


@contextmanager
def replaced(network: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the network owns plain whole parameters of these names: to be written, not to be called."""
    own: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            module = network.get_submodule(path)
            own.append((module, leaf, dict(module.named_parameters(recurse=False))[leaf]))
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        yield
    finally:
        for module, leaf, parameter in own:
            setattr(module, leaf, parameter)


class WeightAverage:
    """EMA of the trainable weights with Flow-GRPO's warm-up, min((1 + n) / (10 + n), decay) after update n.

    Args:
        weights: the trainable weights.
        decay: in [0, 1); 0 keeps no average, so that evaluation uses the weights themselves.
        interval: updates between two averages.
    """

    def __init__(self, weights: Weights, *, decay: float, interval: int) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"weight_average.decay={decay}: must be in [0, 1); 0 switches the average off")
        if interval < 1:
            raise ConfigError(f"weight_average.interval={interval}: must be >= 1")
        self._weights, self._decay, self._interval = weights, decay, interval
        self._average = [value.clone() for value in weights.local()] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights after optimizer update number `step`, counted from 0."""
        if self._average and (step + 1) % self._interval == 0:
            decay = weight_ema_decay(step, decay=self._decay)
            torch._foreach_lerp_(self._average, self._weights.local(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network holds the averaged weights."""
        if not self._average:
            yield
            return
        with self._weights.swapped(self._average):
            yield

    def values(self) -> list[Tensor]:
        """The averaged weight set, [] without an average."""
        return self._average

    def load(self, whole: list[Tensor]) -> None:
        """Set the average to whole tensors."""
        for value, saved in zip(self._average, self._weights.shares(whole), strict=True):
            value.copy_(saved)
