"""How this process was launched, and whether that fits `engine`."""

import os
import socket
from datetime import timedelta

import torch
from accelerate import DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import KwargsHandler

from adagrpo_train.errors import ConfigError

_PASSED_ON = (
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_GRADIENT_CLIPPING",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "FSDP_VERSION",
)
_OFFLOADS = ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE")


def check_launch(engine: str, *, offload_optimizer: str = "none") -> None:
    """Refuse a launch whose accelerate configuration speaks of another engine.

    A launcher that names none (torchrun, `accelerate launch --multi_gpu`) fits all.

    Args:
        engine: "single", "ddp", "zero1" to "zero3" or "fsdp2".
        offload_optimizer: where the engine keeps the optimizer's state, "none" or "cpu".

    Raises:
        ConfigError: names what was launched, and the file and the key that would agree.
    """
    launched = _launched()
    if launched not in ("", engine):
        file = f"configs/accelerate/{'ddp' if engine == 'single' else engine}.yaml"
        raise ConfigError(
            f"engine={engine}, but accelerate was told to launch {launched}; set engine={launched}, or launch with "
            f"--config_file {file}"
        )
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        raise ConfigError(
            "deepspeed_config_file of the accelerate configuration would have no effect: DeepSpeed's settings are "
            f"those of engine={engine}; launch with configs/accelerate/{engine}.yaml"
        )
    wanted, param = (os.environ.get(name, "none") for name in _OFFLOADS)
    if launched.startswith("zero") and (wanted != offload_optimizer or param != "none"):
        raise ConfigError(
            f"the accelerate configuration offloads optimizer: {wanted}, parameters: {param}, but "
            f"engine.offload_optimizer={offload_optimizer} and parameters stay on the device; let them agree"
        )


def forget_launch() -> None:
    """Take away what accelerate's launcher passes on to its library: the settings of the run decide.

    ACCELERATE_USE_CPU would turn DeepSpeed into plain data parallelism without a word; the accumulation of an old
    `accelerate config` would change the arithmetic, and its `dynamo_backend` would compile the network behind
    network.compile's back.
    """
    for name in list(os.environ):
        if name in _PASSED_ON or name.startswith(("ACCELERATE_DEEPSPEED_", "ACCELERATE_DYNAMO_")):
            del os.environ[name]


def use_cpu(device: str) -> bool:
    """Whether to train on the CPU.

    Args:
        device: "auto" or "cpu"; auto takes GPUs where there are some, unless the launcher says otherwise.
    """
    if device not in ("auto", "cpu"):
        raise ConfigError(f"engine.device={device}: choose auto or cpu")
    return device == "cpu" or _is_true("ACCELERATE_USE_CPU") or not torch.cuda.is_available()


def process_options(*, cpu: bool, timeout_seconds: int) -> list[KwargsHandler]:
    """What accelerate is told about the process group.

    Args:
        cpu: gloo instead of NCCL.
        timeout_seconds: a rank that waits longer for another fails.
    """
    if timeout_seconds < 1:
        raise ConfigError(f"engine.timeout_seconds={timeout_seconds}: must be >= 1")
    # The position embedding is a constant buffer; broadcasting it in every forward would only cost time.
    options: list[KwargsHandler] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    if launched_world_size() is not None:  # without a group the option is an error
        timeout = timedelta(seconds=timeout_seconds)
        options.append(InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=timeout))
    return options


def launched_world_size() -> int | None:
    """Processes of the run by the launcher's account; None without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else None


def be_a_group_of_one() -> None:
    """Give a process that nobody launched the variables of a group with one member."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in one.items():
        os.environ.setdefault(name, value)


def _launched() -> str:
    """The engine that the accelerate configuration names, "" if it names none."""
    if _is_true("ACCELERATE_USE_DEEPSPEED"):
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if _is_true("ACCELERATE_USE_FSDP"):
        return f"fsdp{os.environ.get('FSDP_VERSION', '1')}"
    return ""


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
