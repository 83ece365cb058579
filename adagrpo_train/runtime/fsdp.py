"""FSDP2: weights, gradients and the optimizer's state divided among GPUs by torch alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from adagrpo_train.errors import ConfigError
from adagrpo_train.runtime.engine import Engine, check_elementwise, keeps_whole_weights
from adagrpo_train.runtime.launch import be_a_group_of_one, check_launch, forget_launch, process_options, use_cpu
from adagrpo_train.runtime.weights import Weights


class ShardedEngine(Engine):
    """torch's fully_shard on each transformer block and on what is left; gradients are averaged in float32.

    Args:
        device: "auto"; "cpu" is refused.
        timeout_seconds: a rank that waits longer for another fails.
        gather_for_rollout: "always" keeps the whole weights from their first use until the next backward, "never"
            gathers each block anew in every forward, "auto" is always if free memory allows.

    Raises:
        ConfigError: there is no GPU, or the setting does not fit how the run was launched.
    """

    def __init__(self, *, device: str, timeout_seconds: int, gather_for_rollout: str) -> None:
        if gather_for_rollout not in ("auto", "always", "never"):
            raise ConfigError(f"engine.gather_for_rollout={gather_for_rollout}: choose auto, always or never")
        cpu = use_cpu(device)
        if cpu:
            _refuse_cpu()
        check_launch("fsdp2")
        forget_launch()
        be_a_group_of_one()
        options = process_options(cpu=cpu, timeout_seconds=timeout_seconds)
        super().__init__(
            Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=options),
            expected={DistributedType.MULTI_GPU, DistributedType.MULTI_CPU},
        )
        self._gather, self._steps = gather_for_rollout, 0
        self._network: nn.Module | None = None

    @property
    def divides_weights(self) -> bool:
        return True

    @property
    def optimizer_steps(self) -> int:
        return self._steps

    def prepare(self, network: nn.Module, optimizer: Optimizer | None) -> nn.Module:
        """The network, its parameters divided; unchanged when nothing is trained, for evaluation needs no division.

        Raises:
            ConfigError: the optimizer's state cannot be divided.
        """
        if optimizer is None:
            return network
        check_elementwise(optimizer, "fsdp2")
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        keep = keeps_whole_weights(self, network, self._gather)
        _divide(network, init_device_mesh(self.device.type, (self.world_size,)), keep=keep)
        divided = dict(network.named_parameters())
        if not all(isinstance(parameter, DTensor) for parameter in divided.values()):
            raise RuntimeError("fully_shard left a parameter undivided")
        for group in optimizer.param_groups:
            group["params"] = [divided[names[id(parameter)]] for parameter in group["params"]]
        self._network = network
        return network

    def weights(self, parameters: list[nn.Parameter]) -> Weights:
        return Weights(parameters) if self._network is None else _ShardedWeights(parameters, self._network)

    @contextmanager
    def micro_step(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        # Every micro-batch divides its gradients: whole ones would take the memory that dividing is to save.
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, optimizer: Optimizer, parameters: list[nn.Parameter], *, max_grad_norm: float) -> float:
        norm: Any = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if value < float("inf"):
            assert self._network is not None
            _forget_whole_weights(self._network)
            optimizer.step()
            self._steps += 1
        optimizer.zero_grad(set_to_none=True)
        return value

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        saved = optimizer.state_dict()
        state: dict[int, dict[str, Any]] = {}
        for number, entry in saved["state"].items():
            whole = {name: v.full_tensor().cpu() if isinstance(v, DTensor) else v for name, v in entry.items()}
            if self.is_main:
                state[number] = whole
        return saved | {"state": state}

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        parameters: list[Any] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        divided: dict[int, dict[str, Any]] = {}
        for number, entry in state["state"].items():
            own = parameters[number]
            divided[number] = {
                name: _like(own, _share(value, own)) if value.shape == own.shape else value
                for name, value in entry.items()
            }
        optimizer.load_state_dict(state | {"state": divided})


class _ShardedWeights(Weights):
    """Each rank holds some rows of each weight."""

    def __init__(self, parameters: list[Any], network: nn.Module) -> None:
        super().__init__(parameters)
        self._sharded, self._network = parameters, network

    def local(self) -> list[Tensor]:
        return [parameter.detach().to_local() for parameter in self._sharded]

    @contextmanager
    @torch.no_grad()
    def swapped(self, values: list[Tensor]) -> Iterator[None]:
        # Copied, for FSDP gathers from storage of its own.
        own = [value.clone() for value in self.local()]
        self._set(values)
        try:
            yield
        finally:
            self._set(own)

    def whole(self, values: list[Tensor]) -> Iterator[Tensor]:
        for parameter, value in zip(self._sharded, values, strict=True):
            yield _like(parameter, value).full_tensor()

    def shares(self, whole: list[Tensor]) -> list[Tensor]:
        return [_share(value, parameter) for value, parameter in zip(whole, self._sharded, strict=True)]

    def load(self, whole: list[Tensor]) -> None:
        self._set(self.shares(whole))

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        _forget_whole_weights(self._network)
        for own, value in zip(self.local(), values, strict=True):
            own.copy_(value)


def _divide(network: nn.Module, mesh: DeviceMesh, *, keep: bool) -> None:
    """Divide the parameters of each block that diffusers calls indivisible, and then the remaining ones.

    Args:
        keep: whether whole weights stay after a forward.
    """
    names = getattr(network, "_no_split_modules", None) or []
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    for module in [*blocks, network]:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=not keep,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        )


def _forget_whole_weights(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _like(parameter: Any, share: Tensor) -> DTensor:
    """A divided tensor of this rank's share, as a parameter is divided."""
    return DTensor.from_local(
        share, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def _share(whole: Tensor, parameter: Any) -> Tensor:
    """This rank's rows of a whole tensor, on the device of the parameter."""
    assert parameter.placements == (Shard(0),)
    mesh = parameter.device_mesh
    rows = whole.chunk(mesh.size(), dim=0)
    own = rows[mesh.get_local_rank()] if mesh.get_local_rank() < len(rows) else whole[:0]
    return own.to(mesh.device_type, copy=True)


def _refuse_cpu() -> None:
    raise ConfigError(
        "engine=fsdp2 is for GPUs: on a CPU accelerate would train plain DDP under that name, and dividing weights "
        "there gains nothing; use engine=ddp, zero1, zero2 or zero3"
    )
