"""Every engine with real processes: the same run, exact resume, and an end when a process fails."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel

from adagrpo_train import build
from adagrpo_train.cli.train import main
from adagrpo_train.errors import TrainingError
from adagrpo_train.rollout.sampler import FlowSampler
from adagrpo_train.runtime import checkpoint, fsdp
from adagrpo_train.settings import read_settings
from tests.ranks import launch, output, wait
from tests.support import Memory

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RUN = [
    "debug=smoke", "adagrpo=on", "curriculum.candidates=8", "curriculum.chosen=4", "group_size=2", "micro_batch=2",
    "model.num_steps=3", "model.decode_batch=2", "optimizer.lr=1e-4", "evaluation.images=4", "evaluation.grid_images=1",
    "reward.shapes.weights={smooth: 1.0}",
]  # fmt: skip
"""4 prompts in batches of 2: on 1, 2 and 4 processes the network sees the same batches."""

VARIANTS = {
    "lora": ["trainable=lora", "updates_per_iteration=2"],
    "full": [
        "trainable=full",
        "plan=branch",
        "plan.at=[0,1]",
        "algorithm.objective.kl_weight=0.1",
        *("inner_epochs=2", "updates_per_iteration=2"),  # 4 processes hold one batch each: one update an epoch
        "update_micro_batch=1",  # so forwards without a backward come in between, too
    ],
    "flux": ["model=tiny_flux", "trainable=full", "algorithm=dance_grpo", "updates_per_iteration=2"],
}
TABLE = [("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("ddp", 4), ("fsdp2", 2)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_result_does_not_depend_on_the_engine_or_the_number_of_processes(variant: str, tmp_path: Path) -> None:
    """Until the first update to the last bit; then up to the order in which gradients are summed."""
    alone = _trained(variant, "single", 1, tmp_path)
    assert _distance(alone["tensors"]["trainable"], alone["start"]) > 1e-3, "the runs hardly train"
    for engine, processes in TABLE[:4] if variant == "flux" else TABLE:
        other = _trained(variant, engine, processes, tmp_path)
        case = f"{engine} with {processes} processes"
        _check_rows(other, alone, case)
        for name, tensors in alone["tensors"].items():
            assert _distance(other["tensors"][name], tensors) < 1e-6, (case, name)
        _check_optimizer(other["optimizer"], alone["optimizer"])
        assert other["restored"], case
        assert other["refused"], case
        if variant != "lora":
            _check_export(tmp_path / f"{variant}-{engine}-{processes}" / "export", other["tensors"]["trainable"])


def _check_rows(ours: dict[str, Any], theirs: dict[str, Any], case: str) -> None:
    """The first iteration's prompts, scores, rewards and level are equal, and all figures of all iterations near."""
    assert ours["prompts"][0] == theirs["prompts"][0], case
    for first, second in zip(ours["prompts"], theirs["prompts"], strict=True):
        assert [(number, chosen) for number, _, chosen in first] == [(number, chosen) for number, _, chosen in second]
    assert len(ours["rows"]) == len(theirs["rows"]) == 5, case
    for own, other in zip(ours["rows"], theirs["rows"], strict=True):
        for key, value in other.items():
            if not key.startswith(("time/", "memory/")):
                before_update = own["iteration"] <= 1 and key.split("/")[0] in ("reward", "curriculum", "advantage")
                exact = before_update or key.split("/")[0] == "nfe" or key == "policy/updates"
                assert own[key] == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-6)), (case, key)


def _trained(variant: str, engine: str, processes: int, folder: Path) -> dict[str, Any]:
    """What three iterations leave behind on the main rank."""
    run = folder / f"{variant}-{engine}-{processes}"
    settings = [*RUN, *VARIANTS[variant], "iterations=3", f"engine={engine}"]

    def work(rank: int) -> None:
        if engine == "fsdp2":
            fsdp._refuse_cpu = lambda: None  # its code runs on gloo as well
        values = read_settings([*settings, f"hydra.run.dir={run}"])
        made = build.make_engine(values)
        trainer, parts = build.make_trainer(values, made, run, None)
        memory = Memory()
        start = {name: value.clone() for name, value in parts.policy.state_dict()["trainable"].items()}
        trainer.train(memory if made.is_main else None)
        result = {
            "start": start,
            "rows": memory.rows,
            "prompts": [[(p.prompt_id, p.score, p.chosen) for p in drawn] for drawn in memory.prompts],
            "tensors": parts.policy.state_dict(),
            "optimizer": made.optimizer_state(trainer._update._optimizer),
        }
        exported = parts.policy.exported()
        if made.is_main:
            torch.save(result, run / "result.pt")
            parts.policy.export(run / "export", exported)
        made.wait()
        restored = _restored(made, trainer, parts, torch.load(run / "result.pt", weights_only=True))
        refused = _refused(made, trainer, parts)
        if made.is_main:
            torch.save(result | {"restored": restored, "refused": refused}, run / "result.pt")

    run.mkdir()
    statuses = wait(launch(work, processes, run / "log"))
    assert statuses == [0] * processes, output(run / "log", processes)[-6000:]
    return torch.load(run / "result.pt", weights_only=True)


def _restored(engine: Any, trainer: Any, parts: Any, saved: dict[str, Any]) -> bool:
    """Whether weights, average and optimizer are again what they were, once set to something else and back."""
    before = [saved["tensors"], saved["optimizer"]["state"]]
    for change in (lambda value: value + 1, lambda value: value):
        parts.policy.load_state_dict(_each(change, saved["tensors"]))
        engine.load_optimizer_state(trainer._update._optimizer, _each(change, saved["optimizer"]))
        now = [parts.policy.state_dict(), engine.optimizer_state(trainer._update._optimizer)["state"]]
        same = engine.is_main and all(torch.equal(a, b) for a, b in zip(_tensors(now), _tensors(before), strict=True))
        if engine.is_main and same != (change(0) == 0):
            return False
    return True


def _refused(engine: Any, trainer: Any, parts: Any) -> bool:
    """Whether gradients of the last process that are not finite stop all, and move no weight."""
    advantages, before = trainer._advantages, _each(lambda value: value, parts.policy.state_dict())

    def poisoned(*arguments: Any) -> Any:
        values, usable, metrics = advantages(*arguments)
        return values * (float("nan") if engine.rank == engine.world_size - 1 else 1.0), usable, metrics

    trainer._advantages = poisoned
    steps = engine.optimizer_steps
    with pytest.raises(TrainingError, match=r"gradient norm is (nan|inf)"):
        trainer._train_once(0)
    same = all(torch.equal(a, b) for a, b in zip(_tensors(parts.policy.state_dict()), _tensors(before), strict=True))
    return same and engine.optimizer_steps == steps


def _each(change: Any, value: Any) -> Any:
    """A copy of nested containers with every tensor changed."""
    if isinstance(value, dict):
        return {key: _each(change, child) for key, child in value.items()}
    return change(value.clone()) if isinstance(value, torch.Tensor) else value


def _tensors(value: Any) -> list[torch.Tensor]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] if isinstance(value, torch.Tensor) else [t for child in children for t in _tensors(child)]


def _distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Of two weight sets, relative to their size."""
    assert ours.keys() == theirs.keys()
    first, second = (torch.cat([each[key].flatten() for key in theirs]) for each in (ours, theirs))
    return float((first - second).norm() / second.norm())


def _check_optimizer(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Steps, settings and moments of whole parameters, as torch's optimizer has them by itself."""
    assert ours["state"].keys() == theirs["state"].keys()
    for group, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "params")} == {
            key: other[key] for key in ("lr", "betas", "eps", "weight_decay", "params")
        }
    for number, entry in theirs["state"].items():
        for key, value in entry.items():
            # Moments of gradients that nearly cancel are tiny, and rounding is large beside them.
            assert float((ours["state"][number][key] - value).norm()) <= 1e-3 * float(value.norm()), (number, key)


def _check_export(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Stock diffusers reads the very weights that were trained."""
    network = AutoModel.from_pretrained(str(folder), subfolder="transformer")
    assert all(
        torch.equal(read, weights[str(number)]) for number, read in enumerate(dict(network.named_parameters()).values())
    )


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(engine: str, tmp_path: Path) -> None:
    """The checkpoint then continues on one process without DeepSpeed as well, up to rounding."""
    settings = [*RUN, "trainable=lora", "iterations=3", "checkpoint.every=1", "checkpoint.keep=3", "optimizer.lr=1e-3"]

    def run(name: str, *overrides: str, processes: int = 2, kill_in: int | None = None, status: int = 0) -> Path:
        def work(rank: int) -> int:
            if kill_in is not None:
                _call_in_rollout(kill_in, lambda: os.kill(os.getpid(), signal.SIGKILL))
            return main([*settings, *overrides])

        statuses = wait(launch(work, processes, tmp_path / f"{name}.log"))
        assert statuses == [status] * processes, output(tmp_path / f"{name}.log", processes)[-6000:]
        return tmp_path / name

    straight = run("straight", f"engine={engine}", f"hydra.run.dir={tmp_path / 'straight'}")
    killed = run("killed", f"engine={engine}", f"hydra.run.dir={tmp_path / 'killed'}", kill_in=2, status=-9)
    assert checkpoint.find(killed).name == "iteration_000002"
    shutil.copytree(killed, tmp_path / "elsewhere")
    run("resumed", f"engine={engine}", f"resume={killed}")
    ours, theirs = (checkpoint.load(checkpoint.find(path)) for path in (killed, straight))
    for name, tensors in theirs.tensors.items():
        assert all(torch.equal(ours.tensors[name][key], value) for key, value in tensors.items()), name
    assert _rows(killed) == _rows(straight)
    for number, entry in theirs.optimizer["state"].items():
        assert all(torch.equal(ours.optimizer["state"][number][key], value) for key, value in entry.items())

    if engine != "ddp":
        run("moved", "engine=single", f"resume={tmp_path / 'elsewhere'}", processes=1)
        moved = checkpoint.load(checkpoint.find(tmp_path / "elsewhere"))
        assert _distance(moved.tensors["trainable"], theirs.tensors["trainable"]) < 1e-5


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_process_that_fails_ends_the_others_which_say_why(engine: str, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("out of marbles")

    statuses, seconds, log = _run_until(fail, engine, tmp_path / "raises")
    assert all(statuses)
    assert "RuntimeError: out of marbles" in log[1]
    assert "error: ended because another process failed first, rank 1: RuntimeError: out of marbles" in log[0]
    assert seconds < 60

    statuses, seconds, log = _run_until(lambda: os.kill(os.getpid(), signal.SIGKILL), engine, tmp_path / "killed")
    assert (statuses[0], statuses[1]) == (2, -9)
    assert "error: lost another process: it was killed" in log[0]
    assert seconds < 60


def test_a_process_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    statuses, seconds, log = _run_until(
        lambda: time.sleep(3600), "ddp", tmp_path / "hangs", "engine.timeout_seconds=5", give_up=True
    )
    assert statuses[0] == 2
    assert "did not answer within engine.timeout_seconds" in log[0]
    assert 4 < seconds < 60


def _run_until(
    event: Any, engine: str, folder: Path, *overrides: str, give_up: bool = False
) -> tuple[list[int], float, list[str]]:
    """Two processes, the second of which meets an event in its second rollout; how they end and how long that took.

    Args:
        give_up: end the second process once the first has ended.
    """
    folder.mkdir()

    def work(rank: int) -> int:
        if rank == 1:
            _call_in_rollout(1, lambda: ((folder / "now").touch(), event()))
        return main([*RUN, "iterations=100", f"engine={engine}", f"hydra.run.dir={folder / 'run'}", *overrides])

    first, second = launch(work, 2, folder / "log")
    statuses = wait([first])
    if give_up:
        os.kill(second, signal.SIGKILL)
    statuses += wait([second])
    return statuses, time.time() - (folder / "now").stat().st_mtime, [(folder / f"log.{r}").read_text() for r in (0, 1)]


def _call_in_rollout(iteration: int, event: Any) -> None:
    """Let something happen in the middle of an iteration, after other processes have begun to wait."""
    roll_out = FlowSampler.roll_out

    def watched(self: Any, velocity: Any, conditions: Any, prompts: Any, trunks: Any, now: int, *others: Any) -> Any:
        if now == iteration:
            event()
        return roll_out(self, velocity, conditions, prompts, trunks, now, *others)

    FlowSampler.roll_out = watched  # type: ignore[method-assign]


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]
