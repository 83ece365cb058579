"""The network that is trained, as a velocity field; it counts every evaluation it makes."""

from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from adagrpo_train.errors import CheckpointError
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.prompt_cache import PromptEncoder
from adagrpo_train.runtime.weights import WeightAverage
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

    def reference(self) -> AbstractContextManager[None]: ...
    def export(self, folder: Path) -> None: ...


class Policy:
    """One network in three guises: being trained, averaged (for evaluation) and frozen (reference).

    Args:
        model: the flow model, its trainable weights already chosen.
        trainable: gives the reference.
        encoder: gives the embeddings of prompts.
        average: decay and interval of the weight average.
        engine: wraps the network for several processes.
    """

    def __init__(
        self,
        *,
        model: FlowModel,
        trainable: Trainable,
        encoder: PromptEncoder,
        average: dict[str, float],
        engine: Engine,
    ) -> None:
        self._model, self._trainable, self._encoder, self._engine = model, trainable, encoder, engine
        self.parameters = [p for p in model.transformer.parameters() if p.requires_grad]
        self.average = WeightAverage(self.parameters, decay=average["decay"], interval=int(average["interval"]))
        self.network = engine.prepare(model.transformer)
        self.evaluations: Counter[str] = Counter()
        """Network rows evaluated so far: "sampling" without gradient, "training" with, "reference"."""

    def encode(self, texts: list[str]) -> Conditions:
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

    def export(self, folder: Path) -> None:
        """Write the trained weights for stock diffusers."""
        self._trainable.export(folder)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The trained weights and their average, by position."""
        trainable = {str(i): parameter.detach() for i, parameter in enumerate(self.parameters)}
        return {"trainable": trainable, "average": self.average.state_dict()}

    def load_state_dict(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Undo state_dict().

        Raises:
            CheckpointError: the weights are not those of this model and choice of trainable weights.
        """
        saved = tensors["trainable"]
        if [list(p.shape) for p in self.parameters] != [list(saved[str(i)].shape) for i in range(len(saved))]:
            raise CheckpointError("the checkpoint's weights do not fit `model` and `trainable` of this run")
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(saved[str(i)])
        self.average.load_state_dict(tensors.get("average", {}))

    def _count(self, kind: str, x: Tensor) -> None:
        self.evaluations[kind] += len(x) * self._model.evaluations_per_velocity
