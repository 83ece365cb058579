"""Whole weights on every process: one process, or several that average their gradients."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from adagrpo_train.errors import ConfigError
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.launch import check_launch, forget_launch, process_options, use_cpu
from adagrpo_train.runtime.weights import Weights


class ReplicatedEngine(Engine):
    """One process, or torch's DistributedDataParallel.

    Args:
        kind: "single" refuses more than one process, "ddp" takes any number (one included).
        device: "auto" or "cpu".
        timeout_seconds: a rank that waits longer for another fails.

    Raises:
        ConfigError: the setting does not fit how the run was launched.
    """

    def __init__(self, *, kind: str, device: str, timeout_seconds: int) -> None:
        if kind not in ("single", "ddp"):
            raise ConfigError(f"engine.kind={kind}: choose single or ddp")
        cpu = use_cpu(device)
        check_launch(kind)
        forget_launch()
        # torch 2.13 announces another name for broadcast_buffers, which older versions do not know.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        if not torch.cuda.is_available():
            # Libraries import DeepSpeed when they find it; unasked it warns of what is right here.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        options = process_options(cpu=cpu, timeout_seconds=timeout_seconds)
        super().__init__(
            Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=options),
            expected={DistributedType.MULTI_CPU, DistributedType.MULTI_GPU},
        )
        self._steps = 0
        if kind == "single" and self.world_size > 1:
            raise ConfigError(f"engine=single, but {self.world_size} processes were launched; use engine=ddp")

    @property
    def divides_weights(self) -> bool:
        return False

    @property
    def optimizer_steps(self) -> int:
        return self._steps

    def prepare(self, network: nn.Module, optimizer: Optimizer | None) -> nn.Module:
        if optimizer is None:  # evaluation: nothing to average, and accelerate would keep the network for good
            return network
        prepared = self._accelerator.prepare(network)
        if self.world_size > 1 and not isinstance(prepared, DistributedDataParallel):
            raise RuntimeError(f"accelerate made {type(prepared).__name__} of the network, not DDP")
        return prepared

    def weights(self, parameters: list[nn.Parameter]) -> Weights:
        return Weights(parameters)

    @contextmanager
    def micro_step(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        with nullcontext() if last or self.world_size == 1 else self._accelerator.no_sync(module):
            yield

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def step(self, optimizer: Optimizer, parameters: list[nn.Parameter], *, max_grad_norm: float) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
        if norm < float("inf"):
            optimizer.step()
            self._steps += 1
        optimizer.zero_grad(set_to_none=True)
        return norm

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        optimizer.load_state_dict(state)
