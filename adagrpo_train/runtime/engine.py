"""Processes and devices, through accelerate: who I am, how tensors meet, how the network and its optimizer step."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from adagrpo_train.errors import AdaGRPOError, ConfigError, TrainingError
from adagrpo_train.runtime.launch import launched_world_size
from adagrpo_train.runtime.weights import Weights

T = TypeVar("T")

_FOR_ACTIVATIONS = 0.3
"""Share of a GPU's memory that gather_for_rollout=auto leaves free beside whole weights, gradients and moments."""


class Engine(ABC):
    """One process of a run.

    An update is micro_step() and backward() for each micro-batch, the last one marked, and then one step().
    Ranks average their gradients, accumulate them in float32, and all make that step or none does.

    Args:
        accelerator: started with the process group of the engine.
        expected: what accelerate should have made of it when there are several processes.
    """

    def __init__(self, accelerator: Accelerator, *, expected: set[DistributedType]) -> None:
        self._accelerator = accelerator
        found, world = accelerator.distributed_type, launched_world_size()
        if world is not None and world != self.world_size:
            raise RuntimeError(f"{world} processes were launched, accelerate sees {self.world_size}")
        if self.world_size > 1 and found not in expected:
            raise RuntimeError(f"accelerate made {found.value} of {type(self).__name__}")

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    @property
    def rank(self) -> int:
        return self._accelerator.process_index

    @property
    def world_size(self) -> int:
        return self._accelerator.num_processes

    @property
    def local_rank(self) -> int:
        """Place of this process on its node."""
        return self._accelerator.local_process_index

    @property
    def is_main(self) -> bool:
        return self._accelerator.is_main_process

    @property
    @abstractmethod
    def divides_weights(self) -> bool:
        """Whether processes hold shares of the network, which every forward then gathers together."""

    @property
    @abstractmethod
    def optimizer_steps(self) -> int:
        """Steps made since the network was prepared."""

    @abstractmethod
    def prepare(self, network: nn.Module, optimizer: Optimizer | None) -> nn.Module:
        """The module to call in training and sampling.

        Args:
            network: on the device, its trainable weights chosen.
            optimizer: of exactly those weights, without state yet; None when nothing is trained.
        """

    @abstractmethod
    def weights(self, parameters: list[nn.Parameter]) -> Weights:
        """How this engine holds parameters of the prepared network."""

    @abstractmethod
    def micro_step(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Forward and backward of one micro-batch; `last` marks the one before step()."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss []."""

    @abstractmethod
    def step(self, optimizer: Optimizer, parameters: list[nn.Parameter], *, max_grad_norm: float) -> float:
        """One optimizer step with gradients scaled down to `max_grad_norm`; none if they are not finite.

        Returns:
            Norm of the averaged gradients before that, the same on every rank; inf or NaN when there was no step.
        """

    @abstractmethod
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of whole parameters, as Optimizer.state_dict() has it; every rank asks, the main one need keep it."""

    @abstractmethod
    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Undo optimizer_state(), of this or another engine."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all ranks [world * N, ...], rank by rank; every rank holds equally many."""
        if self.world_size == 1:
            return tensor
        if tensor.numel() == 0:
            # Backends differ in whether they can gather nothing.
            return tensor.new_empty((self.world_size * len(tensor), *tensor.shape[1:]))
        return self._accelerator.gather(tensor.contiguous().to(self.device)).to(tensor.device)  # pyright: ignore[reportAttributeAccessIssue]

    def gather_objects(self, value: T) -> list[T]:
        """Values of all ranks, rank by rank."""
        return gather_object([value])

    def broadcast(self, value: T) -> T:
        """The main rank's value."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        broadcast_object_list(box)
        return box[0]

    def together(self, function: Callable[[], T]) -> T:
        """What a function returns on this rank; an error of any rank is raised on every rank, so that none hangs."""
        outcome: T | AdaGRPOError
        try:
            outcome = function()
        except AdaGRPOError as error:
            outcome = error
        errors = self.gather_objects(outcome if isinstance(outcome, AdaGRPOError) else None)
        for error in errors:
            if error is not None:
                error.on_every_rank = True
                raise error
        assert not isinstance(outcome, AdaGRPOError)
        return outcome

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        self._accelerator.end_training()


def check_one_step(before: int, after: int) -> None:
    """Refuse an update that made no optimizer step, or several."""
    if after != before + 1:
        raise TrainingError(f"an update made {after - before} optimizer steps; it must make 1")


def check_elementwise(optimizer: Optimizer, engine: str) -> None:
    """Refuse an optimizer whose state is not one number per weight, which is what dividing it needs.

    Raises:
        ConfigError: names the optimizer.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        raise ConfigError(
            f"optimizer={type(optimizer).__name__} with engine={engine}: only optimizers of torch.optim can be divided "
            "and saved whole; use optimizer=adamw, or engine=ddp"
        )


def keeps_whole_weights(engine: Engine, network: nn.Module, gather: str) -> bool:
    """Whether an engine that divides weights should keep them whole once gathered; the same on every rank.

    Args:
        network: still whole, on the device.
        gather: engine.gather_for_rollout.
    """
    if gather != "auto" or engine.device.type == "cpu":
        return gather != "never"
    # Beside the whole network there will be gradients and two moments, all float32 and divided.
    free, total = torch.cuda.mem_get_info(engine.device)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return all(engine.gather_objects(free - 12 * trained / engine.world_size > _FOR_ACTIVATIONS * total))
