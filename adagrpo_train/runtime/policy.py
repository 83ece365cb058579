"""The network that is trained, as a velocity field; it counts every evaluation it makes."""

import math
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adagrpo_train.errors import CheckpointError
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.prompt_cache import PromptEncoder
from adagrpo_train.runtime.weights import WeightAverage, Weights, replaced
from adagrpo_train.types import Conditions


class FlowModel(Protocol):
    """A text-to-image flow model; nothing about RL."""

    @property
    def transformer(self) -> nn.Module: ...
    @property
    def evaluations_per_velocity(self) -> int: ...
    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor: ...
    def decode(self, x0: Tensor) -> np.ndarray: ...


class Trainable(Protocol):
    """Which weights are trained; see runtime/trainable.py."""

    def hold(self, weights: Weights) -> None: ...
    def reference(self) -> AbstractContextManager[None]: ...
    def export(self, folder: Path) -> None: ...


class Policy:
    """One network in three guises: being trained, averaged (for evaluation) and frozen (reference).

    Args:
        model: the flow model, its trainable weights already chosen.
        trainable: gives the reference.
        encoder: gives the embeddings of prompts.
        optimizer: of the trainable weights; None when nothing will be trained.
        average: decay and interval of the weight average.
        engine: holds the network's weights, whole or divided among processes.
    """

    def __init__(
        self,
        *,
        model: FlowModel,
        trainable: Trainable,
        encoder: PromptEncoder,
        optimizer: Optimizer | None,
        average: dict[str, float],
        engine: Engine,
    ) -> None:
        self._model, self._trainable, self._encoder, self._engine = model, trainable, encoder, engine
        self.network = engine.prepare(model.transformer, optimizer)
        trained = {name: p for name, p in model.transformer.named_parameters() if p.requires_grad}
        self._names, self.parameters = list(trained), list(trained.values())
        self._weights = engine.weights(self.parameters)
        trainable.hold(self._weights)
        self.average = WeightAverage(self._weights, decay=average["decay"], interval=int(average["interval"]))
        self.evaluations: Counter[str] = Counter()
        """Network rows evaluated so far: "sampling" without gradient, "training" with, "reference"."""

    @property
    def trained_sizes(self) -> list[int]:
        """Number of weights of every trained tensor, of which this process may hold a share."""
        return [math.prod(shape) for shape in self._weights.shapes]

    def encode(self, texts: list[str]) -> Conditions:
        """Embeddings of texts, one row each."""
        return self._encoder.encode(texts)

    def decode(self, x0: Tensor) -> np.ndarray:
        return self._model.decode(x0)

    def velocity(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Velocity [R, *latent] of the present weights. Rollouts and training both come through here."""
        self._count("training" if torch.is_grad_enabled() else "sampling", x)
        return self._model.velocity(self.network, x, sigma, conditions)

    @torch.no_grad()
    def reference_velocity(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Velocity [R, *latent] of the frozen reference, without gradient."""
        self._count("reference", x)
        with self._trainable.reference():
            return self._model.velocity(self._model.transformer, x, sigma, conditions)

    def exported(self) -> dict[str, Tensor]:
        """The present trained weights by name, whole, on the host; every rank asks, the main one has them."""
        return dict(zip(self._names, self._whole(self._weights.local()), strict=self._engine.is_main))

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write weights from exported() for stock diffusers."""
        with replaced(self._model.transformer, weights):
            self._trainable.export(folder)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The trained weights and their average, whole, on the host, by position.

        Every rank asks, the main one has them.
        """
        sets = {"trainable": self._weights.local(), "average": self.average.values()}
        return {name: {str(i): value for i, value in enumerate(self._whole(values))} for name, values in sets.items()}

    def load_state_dict(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Undo state_dict().

        Raises:
            CheckpointError: the weights are not those of this model and choice of trainable weights.
        """
        saved, average = (_by_position(tensors.get(name, {})) for name in ("trainable", "average"))
        if self._weights.shapes != [list(value.shape) for value in saved]:
            raise CheckpointError("the checkpoint's weights do not fit `model` and `trainable` of this run")
        self._weights.load(saved)
        if self.average.values():
            self.average.load(average)

    def _whole(self, values: list[Tensor]) -> list[Tensor]:
        # One after the other into the host's memory: a GPU that holds a share has no room for the whole network.
        whole = self._weights.whole(values)
        return [value.cpu() for value in whole if self._engine.is_main]

    def _count(self, kind: str, x: Tensor) -> None:
        self.evaluations[kind] += len(x) * self._model.evaluations_per_velocity


def _by_position(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[str(i)] for i in range(len(tensors))]
