"""Checkpoints: atomic, checked, refused when they belong to another run."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from adagrpo_train.errors import CheckpointError
from adagrpo_train.runtime import checkpoint
from adagrpo_train.runtime.checkpoint import Checkpoints, Snapshot


def snapshot(iteration: int) -> Snapshot:
    parameter = torch.nn.Parameter(torch.arange(3.0))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return Snapshot(
        iteration=iteration,
        tensors={"trainable": {"0": parameter.detach()}, "average": {}},
        optimizer=optimizer.state_dict(),
        state={"prompts": {"epoch": 1}},
        per_rank=[{"curriculum": {"mean": 0.1 + 0.2}}],
        config={"seed": 0, "optimizer": {"lr": 0.1}},
    )


def save(tmp_path: Path, *iterations: int, keep: int = 3) -> Path:
    for iteration in iterations:
        Checkpoints(tmp_path / "checkpoints", keep=keep).save(snapshot(iteration))
    return tmp_path / "checkpoints"


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    save(tmp_path, 7)
    loaded, saved = checkpoint.load(checkpoint.find(tmp_path)), snapshot(7)
    assert (loaded.iteration, loaded.state, loaded.per_rank, loaded.config) == (
        saved.iteration, saved.state, saved.per_rank, saved.config,
    )  # fmt: skip
    assert torch.equal(loaded.tensors["trainable"]["0"], saved.tensors["trainable"]["0"])
    for key, value in saved.optimizer["state"][0].items():
        assert torch.equal(loaded.optimizer["state"][0][key], value)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(p.name for p in folder.iterdir()) == ["iteration_000003", "iteration_000004"]


def test_what_was_just_written_is_never_the_one_to_go(tmp_path: Path) -> None:
    folder = save(tmp_path, 80, 100, 40, keep=2)
    assert (folder / "iteration_000040").is_dir()
    assert sorted(p.name for p in save(tmp_path, 90, keep=4).iterdir()) == [
        f"iteration_{n:06d}" for n in (40, 80, 90, 100)
    ]


def test_the_best_one_is_kept_whatever_its_age_and_found_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for iteration, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        checkpoints.save(snapshot(iteration), best=best)
    assert sorted(p.name for p in folder.iterdir()) == ["best", *(f"iteration_{n:06d}" for n in (2, 4, 5))]
    best, newest = checkpoint.find(folder / "best"), checkpoint.find(tmp_path)
    assert (best.name, newest.name) == ("iteration_000002", "iteration_000005")
    assert [path.name for path in checkpoint.later_than(best)] == ["iteration_000004", "iteration_000005"]
    copied = shutil.copytree(folder, tmp_path / "elsewhere" / "checkpoints")
    assert checkpoint.find(copied / "best") == copied / "iteration_000002"
    checkpoints.save(snapshot(6), best=6)  # what was the best is now one of many
    assert sorted(p.name for p in folder.iterdir()) == ["best", "iteration_000005", "iteration_000006"]
    assert checkpoints.holds(6) and not checkpoints.holds(2)


def test_a_kill_while_older_ones_are_dropped_leaves_a_best_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, remove = tmp_path / "checkpoints", shutil.rmtree
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(snapshot(1), best=1)

    def removed_and_killed(path: Path, ignore_errors: bool = False) -> None:
        remove(path, ignore_errors=ignore_errors)
        if path.name == "iteration_000001":
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", removed_and_killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(snapshot(2), best=2)
    assert checkpoint.find(folder / "best").name == "iteration_000002"


def test_a_best_checkpoint_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    best = save(tmp_path, 1) / "best"
    best.write_text("iteration_000009\n")
    with pytest.raises(CheckpointError, match=r"iteration_000009: manifest\.json is missing"):
        checkpoint.find(best)


@pytest.mark.parametrize("damage", ["cut", "absent", "manifest", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_named(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = save(tmp_path, 1, 2) / "iteration_000002"
    victim = newest / ("manifest.json" if damage == "manifest" else "optimizer.pt")
    if damage in ("absent", "manifest"):
        victim.unlink()
    else:
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content[:-5] if damage == "cut" else content)
    assert checkpoint.find(tmp_path).name == "iteration_000001"
    assert "iteration_000002 is damaged" in caplog.text
    with pytest.raises(CheckpointError, match="give the run folder"):
        checkpoint.find(newest)


def test_only_intact_checkpoints_count_as_later_ones(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, 2, 3)
    (folder / "iteration_000003" / "optimizer.pt").unlink()
    assert [path.name for path in checkpoint.later_than(folder / "iteration_000001")] == ["iteration_000002"]
    assert checkpoint.later_than(folder / "iteration_000002") == []


def test_a_draft_left_by_a_kill_is_not_a_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "iteration_000001").rename(folder / ".draft_iteration_000001")
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        checkpoint.find(tmp_path)


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.find(tmp_path / "nowhere")


def test_another_configuration_is_refused_with_every_differing_key() -> None:
    saved = {"seed": 0, "optimizer": {"lr": 0.1}, "iterations": 5}
    checkpoint.check_compatible(saved, saved | {"iterations": 9}, free=("iterations",))
    with pytest.raises(CheckpointError, match=r"optimizer.lr: 0.1 -> 0.2\n  seed: 0 -> 1"):
        checkpoint.check_compatible(saved, {"seed": 1, "optimizer": {"lr": 0.2}, "iterations": 5}, free=("iterations",))


def test_random_generators_go_on_where_they_were() -> None:
    state = json.loads(json.dumps(checkpoint.random_state()))
    expected = (random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1))
    checkpoint.restore_random_state(state)
    assert (random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1)) == expected
