"""The 8-bit optimizer: of an optional library, with states of a byte, resumed exactly.

What needs bitsandbytes is skipped without it; scripts/test.sh has it beside the trainer's environment.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adagrpo_train.errors import ConfigError
from adagrpo_train.runtime import checkpoint
from rewards.shapes.reward import ShapesReward
from tests.support import Memory, make_trainer, use_reward

SETTINGS = ("optimizer=adamw_8bit", "optimizer.lr=1e-4", "trainable=full", "evaluation.images=1")
SETTINGS += ("evaluation.grid_images=1", "model.num_steps=3", "checkpoint.every=1", "checkpoint.keep=3", "iterations=3")


def test_without_its_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes: pip install 'adagrpo-train\[adamw-8bit\]'"):
        make_trainer(*SETTINGS, run_dir=tmp_path)


def test_a_resumed_run_of_the_8_bit_optimizer_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")

    class Pixels(ShapesReward):
        """Spread inside every group."""

        def score(self, batch: Any) -> Any:
            return [dict.fromkeys(self.info.metrics, float(sample.image.mean()) / 255) for sample in batch]

    straight, parts, _ = make_trainer(*SETTINGS, run_dir=tmp_path)
    use_reward(straight, Pixels())
    assert straight.train(Memory()) == "completed"
    resumed, others, _ = make_trainer(*SETTINGS, run_dir=tmp_path / "resumed")
    use_reward(resumed, Pixels())
    resumed.restore(checkpoint.load(tmp_path / "checkpoints" / "iteration_000001"))
    assert resumed.train(Memory()) == "completed"
    for one, other in zip(parts.policy.parameters, others.policy.parameters, strict=True):
        assert torch.equal(one, other)
    states = [straight._update._optimizer.state[p] for p in parts.policy.parameters]
    weights = sum(p.numel() for p in parts.policy.parameters)
    assert sum(state[name].nbytes for state in states for name in ("state1", "state2")) < 2.2 * weights  # 8 with AdamW
    assert all(state["state1"].dtype == torch.uint8 for state in states if state["state1"].numel() >= 4096)
