"""Every base algorithm runs under every curriculum and advantage, with adapters and with every weight."""

from itertools import product
from pathlib import Path

import pytest

from adagrpo_train.settings import group_options
from tests.support import Memory, make_trainer

OPTIONS = group_options()


@pytest.mark.slow
@pytest.mark.parametrize("trainable", OPTIONS["trainable"])
@pytest.mark.parametrize(
    ("algorithm", "curriculum", "advantage"),
    list(product(OPTIONS["algorithm"], ("uniform", "boundary"), OPTIONS["advantage"])),
)
def test_a_combination_of_groups_trains(
    algorithm: str, curriculum: str, advantage: str, trainable: str, tmp_path: Path
) -> None:
    overrides = [
        f"algorithm={algorithm}",
        f"curriculum={curriculum}",
        f"advantage={advantage}",
        f"trainable={trainable}",
    ]
    overrides += ["curriculum.candidates=4"] if curriculum == "boundary" else []
    trainer, _, _ = make_trainer(*overrides, "iterations=1", "group_size=3", run_dir=tmp_path)
    memory = Memory()
    assert trainer.train(memory) == "completed"
    (row,) = memory.training
    assert row["policy/updates"] == 1
    assert row["policy/first_ratio_deviation"] == 0
    assert sum(prompt.chosen for prompt in memory.prompts[0]) == 2
