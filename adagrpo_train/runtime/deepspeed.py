"""DeepSpeed ZeRO: the optimizer's state, the gradients and the weights divided among the processes.

Facts about DeepSpeed that this file rests on, each seen to fail without:
    - accelerate.backward() makes an optimizer step of its own; so backward and step are DeepSpeed's, boundary marked.
    - without a named backend, ranks on a CPU each believe to be alone; with ACCELERATE_USE_CPU it is DDP in disguise.
    - accelerate swaps AdamW for DeepSpeedCPUAdam under offload and drops betas and eps, unless told not to.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedType
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from transformers.integrations import unset_hf_deepspeed_config

from adagrpo_train.errors import ConfigError, TrainingError
from adagrpo_train.runtime.engine import Engine, check_elementwise, check_one_step, keeps_whole_weights
from adagrpo_train.runtime.launch import be_a_group_of_one, check_launch, forget_launch, process_options, use_cpu
from adagrpo_train.runtime.weights import Weights

_WITHOUT_LIMIT = 2**60
_DEEPSPEED_LIMIT = 10**9


class ZeroEngine(Engine):
    """DeepSpeed's ZeRO stages 1 to 3 around an optimizer of torch.

    Weights that are trained are float32, and so are gradients, their sums and the optimizer's state.

    Args:
        stage: 1 divides the optimizer's state among the processes, 2 the gradients too, 3 the weights too.
        device: "auto" or "cpu".
        timeout_seconds: a rank that waits longer for another fails.
        offload_optimizer: "none", or "cpu" to keep the optimizer's state and step in the host's memory.
        gather_for_rollout: of stage 3. "always" keeps the whole weights from their first use until the next step,
            "never" gathers each layer anew in every forward, "auto" is always if free memory allows.

    Raises:
        ConfigError: DeepSpeed is missing, or the setting does not fit how the run was launched.
    """

    def __init__(
        self, *, stage: int, device: str, timeout_seconds: int, offload_optimizer: str, gather_for_rollout: str
    ) -> None:
        if stage not in (1, 2, 3):
            raise ConfigError(f"engine.stage={stage}: choose 1, 2 or 3")
        if offload_optimizer not in ("none", "cpu"):
            raise ConfigError(f"engine.offload_optimizer={offload_optimizer}: choose none or cpu")
        if gather_for_rollout not in ("auto", "always", "never"):
            raise ConfigError(f"engine.gather_for_rollout={gather_for_rollout}: choose auto, always or never")
        cpu = use_cpu(device)
        if cpu and torch.cuda.is_available():
            raise ConfigError(
                f"engine=zero{stage} on the CPU of a machine with GPUs: DeepSpeed would take the GPUs; hide them with "
                "CUDA_VISIBLE_DEVICES="
            )
        check_launch(f"zero{stage}", offload_optimizer=offload_optimizer)
        forget_launch()
        be_a_group_of_one()
        _import_deepspeed(stage, cpu=cpu)
        self._stage, self._gather = stage, gather_for_rollout
        plugin = DeepSpeedPlugin(hf_ds_config=_settings(stage, offload_optimizer), zero3_init_flag=False)
        options = process_options(cpu=cpu, timeout_seconds=timeout_seconds)
        super().__init__(
            Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=options),
            expected={DistributedType.DEEPSPEED},
        )
        # At stage 3 transformers would divide every model that it loads: text encoders and rewards too.
        unset_hf_deepspeed_config()
        self._zero: Any = None
        self._groups: list[list[nn.Parameter]] = []

    @property
    def divides_weights(self) -> bool:
        return self._stage == 3

    @property
    def optimizer_steps(self) -> int:
        return self._zero.global_steps - self._zero.skipped_steps

    def prepare(self, network: nn.Module, optimizer: Optimizer | None) -> nn.Module:
        """The network as DeepSpeed's engine; unchanged when nothing is trained, for evaluation needs no ZeRO.

        Raises:
            ConfigError: the optimizer's state cannot be divided.
        """
        if optimizer is None:
            return network
        check_elementwise(optimizer, f"zero{self._stage}")
        if self._stage == 3:
            keep = keeps_whole_weights(self, network, self._gather)
            plugin: Any = self._accelerator.state.deepspeed_plugin
            limits = plugin.deepspeed_config["zero_optimization"]
            limits["stage3_max_live_parameters"] = _WITHOUT_LIMIT if keep else _DEEPSPEED_LIMIT
            limits["stage3_max_reuse_distance"] = _WITHOUT_LIMIT if keep else 0
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._zero, _ = self._accelerator.prepare(network, optimizer)
        if type(self._zero).__name__ != "DeepSpeedEngine" or self._zero.zero_optimization_stage() != self._stage:
            raise RuntimeError(f"accelerate made {type(self._zero).__name__} of the network, not ZeRO-{self._stage}")
        if self._zero.optimizer.optimizer is not optimizer:
            raise RuntimeError(f"DeepSpeed took {type(self._zero.optimizer.optimizer).__name__} for the optimizer")
        return self._zero

    def weights(self, parameters: list[nn.Parameter]) -> Weights:
        if self._zero is None:
            return Weights(parameters)
        return (_DividedWeights if self._stage == 3 else _MirroredWeights)(parameters, self._zero.optimizer)

    @contextmanager
    def micro_step(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        self._zero.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._zero.backward(loss)

    def step(self, optimizer: Optimizer, parameters: list[nn.Parameter], *, max_grad_norm: float) -> float:
        before = self._zero.global_steps
        self._zero.optimizer.clip_grad = max_grad_norm
        self._zero.step()
        check_one_step(before, self._zero.global_steps)
        if self._zero.optimizer.overflow:
            return float("inf")
        norm = float(self._zero.get_global_grad_norm())
        if norm < 0:  # DeepSpeed's -1: of finite gradients, a norm beyond float32
            raise TrainingError(
                "the gradient norm is beyond float32, and DeepSpeed made the step without clipping it: the weights are "
                "spoiled. Continue from the last checkpoint with a lower optimizer.lr"
            )
        return norm

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of whole parameters; only the main rank's holds them."""
        flats = self._flats()
        known: dict[str, Any] = optimizer.state.get(flats[0], {})
        names = sorted(known)
        state: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(self._parameters()):
            entry = {}
            for name in names:
                value = known[name]
                divided = isinstance(value, Tensor) and value.shape == flats[0].shape
                # A count is copied: shared among parameters it would, once loaded, rise with each of them.
                entry[name] = self._whole_state(optimizer, parameter, name) if divided else deepcopy(value)
            if names and self.is_main:
                state[number] = entry
        return {"state": state, "param_groups": self._param_groups(optimizer)}

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        if not state["state"]:
            return
        parameters, first = self._parameters(), state["state"][0]
        whole = _shape(parameters[0])
        divided = {name for name, value in first.items() if isinstance(value, Tensor) and list(value.shape) == whole}
        for flat in self._flats():
            optimizer.state[flat] = {
                name: torch.zeros_like(flat) if name in divided else deepcopy(value) for name, value in first.items()
            }
        for number, parameter in enumerate(parameters):
            for name in divided:
                self._set_state(optimizer, parameter, name, state["state"][number][name])

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._groups for parameter in group]

    def _flats(self) -> list[Tensor]:
        """What torch's optimizer steps: this rank's float32 share of the parameters, joined."""
        zero = self._zero.optimizer
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _param_groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        numbers = iter(range(len(self._parameters())))
        return [
            {key: value for key, value in group.items() if key != "params"} | {"params": [next(numbers) for _ in own]}
            for group, own in zip(optimizer.param_groups, self._groups, strict=True)
        ]

    def _whole_state(self, optimizer: Optimizer, parameter: Any, name: str) -> Tensor:
        """One state tensor of one parameter; all ranks ask together."""
        if self._stage == 3:
            from deepspeed.utils import safe_get_local_optimizer_state

            return _joined(safe_get_local_optimizer_state(parameter, name), parameter).cpu()
        whole = torch.zeros(parameter.numel(), device=self.device)
        for own, share in self._shares(optimizer, parameter, name, whole):
            own.copy_(share)
        distributed.all_reduce(whole)
        return whole.view_as(parameter).cpu()

    def _set_state(self, optimizer: Optimizer, parameter: Any, name: str, value: Tensor) -> None:
        if self._stage == 3:
            from deepspeed.utils import safe_set_local_optimizer_state

            safe_set_local_optimizer_state(parameter, _share(value, parameter), name)
            return
        for own, share in self._shares(optimizer, parameter, name, value.flatten()):
            share.copy_(own)

    def _shares(
        self, optimizer: Optimizer, parameter: Any, name: str, whole: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The part of a flattened parameter that this rank keeps the state of, if any, and that state."""
        mapping = parameter._hp_mapping
        if mapping is not None:
            inside, kept = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = self._flats()[mapping.param_group_index]
            yield (
                whole.narrow(0, inside.start, inside.numel),
                optimizer.state[flat][name].narrow(0, kept.start, kept.numel),
            )


class _MirroredWeights(Weights):
    """Whole weights of which DeepSpeed steps a float32 copy, its rank's share of it."""

    def __init__(self, parameters: list[nn.Parameter], zero: Any) -> None:
        super().__init__(parameters)
        self._zero = zero

    def load(self, whole: list[Tensor]) -> None:
        super().load(whole)
        self._zero.refresh_fp32_params()


class _DividedWeights(Weights):
    """Each rank holds an equal part of each flattened weight, the last one padded."""

    def __init__(self, parameters: list[Any], zero: Any) -> None:
        super().__init__(parameters)
        self._divided, self._zero = parameters, zero

    @property
    def shapes(self) -> list[list[int]]:
        return [_shape(parameter) for parameter in self._divided]

    def local(self) -> list[Tensor]:
        return [parameter.ds_tensor.detach() for parameter in self._divided]

    @contextmanager
    def swapped(self, values: list[Tensor]) -> Iterator[None]:
        own = [parameter.ds_tensor.data for parameter in self._divided]
        self._zero.empty_partition_cache()  # whole weights that lie about are of the other set
        try:
            for parameter, value in zip(self._divided, values, strict=True):
                parameter.ds_tensor.data = value
            yield
        finally:
            self._zero.empty_partition_cache()
            for parameter, value in zip(self._divided, own, strict=True):
                parameter.ds_tensor.data = value

    def whole(self, values: list[Tensor]) -> Iterator[Tensor]:
        for parameter, value in zip(self._divided, values, strict=True):
            yield _joined(value, parameter)

    def shares(self, whole: list[Tensor]) -> list[Tensor]:
        return [_share(value, parameter) for value, parameter in zip(whole, self._divided, strict=True)]

    def load(self, whole: list[Tensor]) -> None:
        self._zero.empty_partition_cache()
        super().load(whole)
        self._zero.refresh_fp32_params()


def _joined(share: Tensor, parameter: Any) -> Tensor:
    """The whole tensor of every rank's share, in the shape of the parameter."""
    shares = share.new_empty(distributed.get_world_size() * share.numel())
    distributed.all_gather_into_tensor(shares, share.detach().contiguous())
    return shares[: parameter.ds_numel].view(parameter.ds_shape)


def _share(whole: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a whole tensor, padded with zeros, on the device of the parameter."""
    share = torch.zeros_like(parameter.ds_tensor)
    start = distributed.get_rank() * share.numel()
    own = whole.flatten()[start : start + share.numel()]
    share[: own.numel()] = own.to(share.device)
    return share


def _shape(parameter: Any) -> list[int]:
    """Shape of the whole parameter, whatever this rank holds of it."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def _settings(stage: int, offload_optimizer: str) -> dict[str, Any]:
    """DeepSpeed's configuration. Accumulation, clipping and the learning rate are ours."""
    zero: dict[str, Any] = {"stage": stage}
    if offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        # Small weights that DeepSpeed would keep whole for ever could not be swapped for their average.
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "train_micro_batch_size_per_gpu": 1,  # not used: batches are ours; but DeepSpeed wants a number
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }


def _import_deepspeed(stage: int, *, cpu: bool) -> None:
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"engine=zero{stage} needs DeepSpeed, which is not installed: pip install 'adagrpo-train[deepspeed]'"
        ) from error
    # It would be compiled at start, and serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]
