"""Records of whole runs: killed and resumed, and of several processes."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adagrpo_train.cli.replay import main
from adagrpo_train.recording.record import read_records
from adagrpo_train.replay.run import replay
from tests import ranks
from tests.runs import Strike, begin, end_oneself, succeed
from tests.support import Memory, make_trainer

pytestmark = pytest.mark.slow


def test_records_of_a_killed_and_resumed_run_are_those_of_an_uninterrupted_one(tmp_path: Path, capsys: Any) -> None:
    settings = ["iterations=3", "checkpoint.every=1", "record.every=1", "model.num_steps=4"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    succeed(*settings, f"hydra.run.dir={straight}")
    # The record of the second iteration is written, its checkpoint is not.
    forks = begin(*settings, f"hydra.run.dir={killed}", strike=Strike("_save", 2, end_oneself))
    assert forks.wait() == [-signal.SIGKILL], forks.said()
    first, second = (killed / "record" / name for name in ("000001", "000002"))
    assert first.is_dir() and second.is_dir()
    before = second.stat().st_mtime_ns
    succeed(*settings, f"resume={killed}")
    assert second.stat().st_mtime_ns > before
    ours, theirs = read_records(killed), read_records(straight)
    assert [record.iteration for record in ours] == [record.iteration for record in theirs] == [1, 2, 3]
    for one, other in zip(ours, theirs, strict=True):
        assert _same(one.tensors, other.tensors)
        assert _same(_latents(killed, one.iteration), _latents(straight, one.iteration))
        assert one.head["curriculum"] == other.head["curriculum"]
    assert main([str(killed), "advantage.weight=0.5"]) == 0
    assert "bit for bit" in capsys.readouterr().out


def test_two_processes_record_what_one_does(tmp_path: Path) -> None:
    """Each with its own level, and with one level over both; the latter as one process has it, up to rounding."""
    settings = ["adagrpo=on", "curriculum.candidates=4", "record.every=1", "micro_batch=2", "evaluation.images=2"]
    settings += ["evaluation.grid_images=1", "optimizer.lr=1e-3", "model.num_steps=4"]

    def train(folder: str, *extra: str) -> None:
        trainer, _, engine = make_trainer(*settings, *extra, run_dir=tmp_path / folder)
        trainer.train(Memory() if engine.is_main else None)

    def rank(number: int) -> None:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        train("two", "iterations=2", "updates_per_iteration=3")
        train("own", "iterations=1", "curriculum.per_rank=true", "advantage.mode=absolute")

    pids = ranks.launch(rank, 2, tmp_path / "log")
    train("one", "iterations=1", "updates_per_iteration=3")
    assert ranks.wait(pids) == [0, 0], ranks.output(tmp_path / "log", 2)
    for folder in ("two", "own"):
        assert replay(tmp_path / folder, [])["reproduced"]["exact"]
    own = read_records(tmp_path / "own")[0]
    assert own.head["levels"][0] != own.head["levels"][1]
    assert own.tensors["batch.rank"].unique().tolist() == [0, 1]
    one, two = (read_records(tmp_path / folder)[0] for folder in ("one", "two"))
    assert one.prompts == two.prompts
    assert one.head["selection"]["rows"] == two.head["selection"]["rows"]
    assert set(one.tensors) == set(two.tensors)
    for name in (name for name in one.tensors if name.startswith(("candidate.", "sample.", "transition."))):
        torch.testing.assert_close(one.tensors[name], two.tensors[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_latents(tmp_path / "one", 1), _latents(tmp_path / "two", 1), rtol=0, atol=1e-4)


def _latents(run_dir: Path, iteration: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "record" / f"{iteration:06d}" / "latents.safetensors")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
