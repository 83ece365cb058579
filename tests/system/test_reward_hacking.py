"""A run that is rewarded for images which compress well, and forgets its prompts over it."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from adagrpo_train.runtime import checkpoint
from tests.runs import Strike, begin, end_oneself, rows, run, succeed, weights

pytestmark = pytest.mark.slow

SETTINGS = ["reward=[jpeg_size,shapes]", "reward.shapes.role=evaluation", "weight_average.decay=0"]
SETTINGS += ["group_size=6", "micro_batch=64", "model.num_steps=4", "optimizer.lr=5e-3", "iterations=5"]
SETTINGS += ["evaluation.every=1", "checkpoint.every=2", "health.tolerance=0.4"]


def alerts(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "alerts.jsonl").read_text().splitlines()]


def test_reward_hacking_stops_a_run_that_can_be_killed_and_continued_bit_for_bit(tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    said = succeed(*SETTINGS, f"hydra.run.dir={straight}")
    assert "WARNING at 3: reward hacking: held-out smooth falls" in said
    assert {row["iteration"]: row["health/hacking"] for row in rows(straight) if "health/hacking" in row} == {
        0: 0.0, 1: 0.0, 2: 0.0, 3: 1.0, 4: 1.0, 5: 1.0,
    }  # fmt: skip

    # Two of the three evaluations have counted when it is killed.
    struck = Strike("_advantages", 3, end_oneself)
    killed = begin(*SETTINGS, "health.stop=true", f"hydra.run.dir={stopped}", strike=struck)
    assert killed.wait() == [-signal.SIGKILL], killed.said()
    state = checkpoint.load(checkpoint.find(stopped)).state["health"]
    assert state["last"] == state["streaks"]["smooth"]["count"] == 2
    assert "run stopped" in succeed(*SETTINGS, "health.stop=true", f"resume={stopped}")
    assert checkpoint.find(stopped).name == "iteration_000003"
    assert rows(stopped) == [row for row in rows(straight) if row["iteration"] <= 3]
    assert not (stopped / "summary.json").exists()
    succeed(*SETTINGS, f"resume={stopped}")
    assert rows(stopped) == rows(straight)
    assert alerts(stopped) == alerts(straight) != []
    for name, tensors in weights(straight).items():
        assert all(torch.equal(value, weights(stopped)[name][key]) for key, value in tensors.items())
    states = [checkpoint.load(checkpoint.find(folder)).state["health"] for folder in (straight, stopped)]
    assert states[0] == states[1]

    # What fell from the first update on was best after it: beyond the two newest, and below the plain model.
    for folder in (straight, stopped):
        assert json.loads((folder / "summary.json").read_text())["best"]["iteration"] == 1
        assert sorted(path.name for path in (folder / "checkpoints").glob("iteration_*"))[0] == "iteration_000001"
    assert "of iteration 1, in checkpoints/best; exported are those of 5; -" in said
    best = f"resume={stopped / 'checkpoints' / 'best'}"
    done = run(*SETTINGS, best, "evaluation.samples=0", f"hydra.run.dir={tmp_path}", module="evaluate")
    first = next(row for row in rows(straight) if row["iteration"] == 1 and "eval/smooth" in row)
    assert f"{first['eval/smooth']:.4f}" in done.stdout
