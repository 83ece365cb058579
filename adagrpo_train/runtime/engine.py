"""Processes and devices, through accelerate: who I am, how tensors meet, how gradients flow."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, KwargsHandler, broadcast_object_list, gather_object
from torch import Tensor, nn

from adagrpo_train.errors import AdaGRPOError, ConfigError

T = TypeVar("T")


class Engine:
    """One process of a run.

    Args:
        kind: "single" refuses more than one process, "ddp" takes any number (one included).
        device: "auto" or "cpu".

    Raises:
        ConfigError: the setting does not fit how the run was launched.
    """

    def __init__(self, *, kind: str, device: str) -> None:
        if kind not in ("single", "ddp"):
            raise ConfigError(f"engine.kind={kind}: choose single or ddp")
        if device not in ("auto", "cpu"):
            raise ConfigError(f"engine.device={device}: choose auto or cpu")
        # The position embedding is a constant buffer; broadcasting it in every forward would only cost time. torch
        # 2.13 announces another name for the option, which older versions do not know.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
        # What `accelerate config` once wrote must not change the arithmetic: precision is model.dtype, and
        # accumulation is ours.
        os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
        if not torch.cuda.is_available():
            # Libraries import DeepSpeed when they find it; unasked it warns of what is right here.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self._accelerator = Accelerator(
            cpu=device == "cpu" or not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=handlers
        )
        kind_launched = self._accelerator.distributed_type
        if kind_launched in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise ConfigError(f"launched with {kind_launched.value}; this version trains with engine=ddp or single")
        if kind == "single" and self.world_size > 1:
            raise ConfigError(f"engine=single, but {self.world_size} processes were launched; use engine=ddp")

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

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module to call in training and sampling; wrapped when there are several processes."""
        return self._accelerator.prepare(module)

    @contextmanager
    def micro_step(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; ranks average their gradients in that of the last one."""
        with nullcontext() if last or self.world_size == 1 else self._accelerator.no_sync(module):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss []."""
        self._accelerator.backward(loss)

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
