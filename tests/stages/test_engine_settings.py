"""An engine that does not fit the launch, the machine or the optimizer is refused; a step that went wrong is named."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from torch import nn

from adagrpo_train.errors import ConfigError, TrainingError
from adagrpo_train.runtime.deepspeed import ZeroEngine
from adagrpo_train.runtime.engine import check_elementwise, check_one_step
from adagrpo_train.runtime.fsdp import ShardedEngine
from adagrpo_train.runtime.launch import check_launch
from adagrpo_train.runtime.replicated import ReplicatedEngine
from adagrpo_train.settings import config_dir, group_options, read_settings
from tests.support import alone

ROOT = Path(__file__).parents[2]
ENGINES = [name for name in group_options()["engine"] if name != "single"]


def _say(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """What accelerate's launcher leaves in the environment for a file of ours."""
    file = yaml.safe_load((config_dir() / "accelerate" / f"{engine}.yaml").read_text())
    if file["distributed_type"] == "DEEPSPEED":
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(file["deepspeed_config"]["zero_stage"]))
    elif file["distributed_type"] == "FSDP":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", str(file["fsdp_config"]["fsdp_version"]))


def test_there_is_a_launch_file_for_every_engine() -> None:
    assert {path.stem for path in (config_dir() / "accelerate").iterdir()} == set(ENGINES)
    assert "accelerate" not in group_options()


@pytest.mark.parametrize("launched", ENGINES)
@pytest.mark.parametrize("engine", [*ENGINES, "single"])
def test_a_launch_file_of_another_engine_is_refused(
    engine: str, launched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of ddp only starts processes, as torchrun does, and so fits every engine."""
    _say(monkeypatch, launched)
    if launched in (engine, "ddp"):
        check_launch(engine)
        return
    with pytest.raises(ConfigError, match=rf"engine={engine}, but accelerate .* launch {launched}; .*\.yaml"):
        check_launch(engine)


def test_a_launch_configuration_does_not_compile_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is compiled is network.compile's: what log-probabilities the ratios use depends on it."""
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    network = nn.Linear(1, 1)
    assert alone().prepare(network, torch.optim.SGD(network.parameters())) is network


def test_offload_has_to_agree_and_a_file_of_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _say(monkeypatch, "zero2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    check_launch("zero2", offload_optimizer="cpu")
    with pytest.raises(ConfigError, match=r"engine\.offload_optimizer=none"):
        check_launch("zero2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json")
    with pytest.raises(ConfigError, match="deepspeed_config_file"):
        check_launch("zero2", offload_optimizer="cpu")


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (ReplicatedEngine, {"kind": "dpp"}, r"engine\.kind=dpp: choose single or ddp"),
        (ReplicatedEngine, {"kind": "ddp", "device": "cuda9"}, r"engine\.device=cuda9"),
        (ReplicatedEngine, {"kind": "ddp", "timeout_seconds": 0}, r"engine\.timeout_seconds=0"),
        (ZeroEngine, {"stage": 4}, r"engine\.stage=4"),
        (ZeroEngine, {"stage": 2, "offload_optimizer": "nvme"}, r"engine\.offload_optimizer=nvme"),
        (ZeroEngine, {"stage": 3, "gather_for_rollout": "yes"}, r"engine\.gather_for_rollout=yes"),
        (ShardedEngine, {"gather_for_rollout": "yes"}, r"engine\.gather_for_rollout=yes"),
        (ShardedEngine, {}, "engine=fsdp2 is for GPUs: on a CPU accelerate would train plain DDP"),
    ],
)
def test_a_wrong_setting_names_its_key(make: Any, changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"device": "cpu", "timeout_seconds": 60}
    if make is not ReplicatedEngine:
        settings |= {"gather_for_rollout": "auto"}
    if make is ZeroEngine:
        settings |= {"offload_optimizer": "none"}
    with pytest.raises(ConfigError, match=message):
        make(**(settings | changes))


@pytest.mark.parametrize("engine", [*ENGINES, "single"])
def test_every_engine_composes(engine: str) -> None:
    read_settings([f"engine={engine}", "engine.timeout_seconds=60"])


def test_an_optimizer_that_cannot_be_divided_is_refused() -> None:
    class Adam8bit(torch.optim.Adam):
        pass

    parameter = torch.nn.Parameter(torch.zeros(1))
    check_elementwise(torch.optim.AdamW([parameter]), "zero2")
    with pytest.raises(ConfigError, match="optimizer=Adam8bit with engine=zero2"):
        check_elementwise(Adam8bit([parameter]), "zero2")


def test_an_update_makes_one_optimizer_step() -> None:
    check_one_step(3, 4)
    for after in (3, 7):
        with pytest.raises(Exception, match=f"made {after - 3} optimizer steps"):
            check_one_step(3, after)


@pytest.mark.parametrize("script", ["torchrun", "slurm"])
def test_a_launch_script_explains_itself_and_refuses_what_it_does_not_know(script: str) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "scripts" / f"{script}.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert f"scripts/{script}.sh" in run("--help").stdout
    assert "set -euo" not in run("--help").stdout
    wrong = run("--nodes", "2")
    assert wrong.returncode == 2
    assert "--first HOST" in wrong.stderr if script == "torchrun" else "sbatch" in wrong.stderr


@pytest.mark.parametrize(
    ("overflow", "said", "norm"), [(False, 0.5, 0.5), (True, -1.0, float("inf")), (True, float("nan"), float("inf"))]
)
def test_zero_tells_the_norm_or_that_there_was_no_step(overflow: bool, said: float, norm: float) -> None:
    assert _zero_step(overflow, said) == norm


def test_a_step_that_deepspeed_could_not_clip_is_not_called_harmless() -> None:
    with pytest.raises(TrainingError, match="made the step without clipping"):
        _zero_step(overflow=False, said=-1.0)


def _zero_step(overflow: bool, said: float) -> float:
    """What an engine makes of what DeepSpeed says after a step."""
    zero: Any = SimpleNamespace(global_steps=3, get_global_grad_norm=lambda: said)
    zero.optimizer = SimpleNamespace(overflow=overflow, clip_grad=0.0)
    zero.step = lambda: setattr(zero, "global_steps", 4)
    engine = object.__new__(ZeroEngine)
    engine._zero = zero
    optimizer: Any = None
    norm = engine.step(optimizer, [], max_grad_norm=0.7)
    assert zero.optimizer.clip_grad == 0.7
    return norm
