"""Missing scores in training: masked, skipped over, and in the end a stop that loses nothing."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from adagrpo_train.curriculum.scored import Boundary
from adagrpo_train.errors import RewardError
from adagrpo_train.runtime import checkpoint
from adagrpo_train.trainer import Trainer
from rewards.contract import ItemError, Sample
from rewards.shapes.reward import ShapesReward
from tests.support import Memory, make_trainer, use_reward

ONE_STEP = ["iterations=1", "group_size=4", "reward.shapes.max_bad_fraction=0.5", "reward.shapes.weights={smooth: 1.0}"]


class Pixels(ShapesReward):
    """Spread inside every group; nothing for the images that `missing` picks by their number among all so far."""

    def __init__(self, missing: Callable[[int], bool] = lambda number: False) -> None:
        self._missing, self._number = missing, 0
        self._scores: dict[bytes, Mapping[str, float] | None] = {}

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        for sample in batch:
            if sample.image.tobytes() not in self._scores:
                value = None if self._missing(self._number) else float(sample.image.mean()) / 255
                self._scores[sample.image.tobytes()] = (
                    None if value is None else dict.fromkeys(self.info.metrics, value)
                )
                self._number += 1
        scores = [self._scores[sample.image.tobytes()] for sample in batch]
        if None in scores:
            raise ItemError("not this one")
        return [score for score in scores if score is not None]


def moved(trainer: Trainer, reward: ShapesReward) -> tuple[torch.Tensor, Memory]:
    """How far one step of plain gradient descent moves the weights, without clipping."""
    use_reward(trainer, reward)
    own = trainer._policy.parameters
    trainer._optimizer = torch.optim.SGD(own, lr=1.0)
    trainer._rates = LambdaLR(trainer._optimizer, lambda step: 1.0)
    start = torch.cat([p.detach().clone().flatten() for p in own])
    memory = Memory()
    trainer.train(memory)
    return torch.cat([p.detach().flatten() for p in own]) - start, memory


@pytest.mark.parametrize("plan", ["every_step", "branch"])
def test_a_sample_without_a_score_leaves_the_loss_and_its_denominator(plan: str, tmp_path: Path) -> None:
    """Where an advantage of 0 would only dilute the gradient: here 1 of 8 samples, or of 16 with two branches."""
    settings = [*ONE_STEP, f"plan={plan}", "max_grad_norm=1e9", *(["plan.at=[0,2]"] if plan == "branch" else [])]
    trainer, _, _ = make_trainer(*settings, run_dir=tmp_path)
    evaluation_images = 7
    masked, memory = moved(trainer, Pixels(lambda number: number == evaluation_images + 2))
    samples = 16 if plan == "branch" else 8
    assert memory.training[0]["reward/unused_fraction"] == pytest.approx(1 / samples)
    assert memory.training[0]["reward/shapes/missing"] == 1

    trainer, _, _ = make_trainer(*settings, run_dir=tmp_path)
    local = trainer._scorer.local_advantages

    def without(parts, group, size, advantage):  # as if the score were missing
        parts = {name: values.clone() for name, values in parts.items()}
        for values in parts.values():
            values[2] = torch.nan
        return local(parts, group, size, advantage)

    trainer._scorer.local_advantages = without  # type: ignore[method-assign]
    diluted, memory = moved(trainer, Pixels())
    assert memory.training[0]["reward/unused_fraction"] == 0
    assert diluted.norm() > 1e-4
    assert torch.allclose(masked, diluted * samples / (samples - 1), rtol=1e-3, atol=1e-7)


def test_an_iteration_that_lacks_too_many_scores_is_skipped_and_the_run_goes_on(tmp_path: Path) -> None:
    trainer, parts, _ = make_trainer("iterations=2", "reward.shapes.max_bad_fraction=0.2", run_dir=tmp_path)
    use_reward(trainer, Pixels(lambda number: number in (7, 8)))  # of the 4 images of the first iteration
    before = [p.detach().clone() for p in parts.policy.parameters]
    memory = Memory()
    log = memory.log

    def look(metrics: dict[str, float], iteration: int) -> None:
        log(metrics, iteration)
        if metrics.get("reward/skipped"):
            assert all(torch.equal(a, b) for a, b in zip(before, parts.policy.parameters, strict=True))

    memory.log = look  # type: ignore[method-assign]
    assert trainer.train(memory) == "completed"
    assert [row.get("reward/skipped", 0.0) for row in memory.rows if "nfe/sampling" in row] == [1.0, 0.0]
    assert any(not torch.equal(a, b) for a, b in zip(before, parts.policy.parameters, strict=True))


def test_skipping_again_and_again_stops_with_the_state_before_the_last_iteration(tmp_path: Path) -> None:
    settings = ["iterations=9", "reward.shapes.max_bad_fraction=0.2", "scoring.max_skipped=2", "checkpoint.every=0"]
    trainer, _, _ = make_trainer(*settings, run_dir=tmp_path)
    use_reward(trainer, Pixels(lambda number: number >= 7 + 4 and number % 2 == 0))
    with pytest.raises(RewardError, match=r"3 iterations in a row lack scores.*50% of the scores of reward shapes"):
        trainer.train(Memory())
    saved = checkpoint.find(tmp_path)
    assert saved.name == "iteration_000003"  # one trained, two skipped
    resumed, _, _ = make_trainer(*settings, run_dir=tmp_path)
    resumed.restore(checkpoint.load(saved))
    use_reward(resumed, Pixels())
    memory = Memory()
    assert resumed.train(memory) == "completed"
    assert [row["iteration"] for row in memory.training] == [4, 5, 6, 7, 8, 9]


def test_a_curriculum_never_chooses_a_prompt_without_a_score() -> None:
    curriculum = Boundary(candidates=4, chosen=2, alpha=0.5, per_rank=False)
    selection = curriculum.select(torch.tensor([torch.nan, 0.0, 1.0, 0.4]), 2)
    assert selection.rows == (3, 1)
    assert selection.level is not None
    assert selection.level.mean == pytest.approx(1.4 / 3)


def test_candidates_without_scores_are_passed_over(tmp_path: Path) -> None:
    trainer, _, _ = make_trainer(
        "adagrpo=on", "curriculum.candidates=4", "iterations=1", "reward.shapes.max_bad_fraction=0.5", run_dir=tmp_path
    )
    use_reward(trainer, Pixels(lambda number: number in (7, 9)))  # the first and third candidate
    memory = Memory()
    trainer.train(memory)
    assert [row.chosen for row in memory.prompts[0]] == [False, True, False, True]


def test_too_few_candidates_with_scores_skip_the_iteration(tmp_path: Path) -> None:
    trainer, _, _ = make_trainer(
        "adagrpo=on", "curriculum.candidates=4", "iterations=1", "reward.shapes.max_bad_fraction=0.9", run_dir=tmp_path
    )
    use_reward(trainer, Pixels(lambda number: number in (7, 8, 9)))
    memory = Memory()
    assert trainer.train(memory) == "completed"
    assert memory.training == []
    assert [row["reward/skipped"] for row in memory.rows if "nfe/sampling" in row] == [1.0]


def test_groups_of_which_none_can_be_compared_skip_the_iteration(tmp_path: Path) -> None:
    trainer, _, _ = make_trainer("iterations=1", "reward.shapes.max_bad_fraction=0.5", run_dir=tmp_path)
    use_reward(trainer, Pixels(lambda number: number in (7, 9)))  # one of two samples of either group
    memory = Memory()
    assert trainer.train(memory) == "completed"
    assert [row["reward/skipped"] for row in memory.rows if "nfe/sampling" in row] == [1.0]


def test_a_reward_lost_at_an_evaluation_costs_no_training(tmp_path: Path) -> None:
    settings = ["iterations=3", "evaluation.every=1", "checkpoint.every=0"]
    trainer, _, _ = make_trainer(*settings, run_dir=tmp_path)
    use_reward(trainer, Pixels(lambda number: number >= 7 + 2 * 4 + 7))  # from the evaluation after iteration 2 on
    with pytest.raises(RewardError, match="got a score"):
        trainer.train(Memory())
    saved = checkpoint.find(tmp_path)
    assert saved.name == "iteration_000002"
    resumed, _, _ = make_trainer(*settings, run_dir=tmp_path)
    resumed.restore(checkpoint.load(saved))
    memory = Memory()
    assert resumed.train(memory) == "completed"
    assert [row["iteration"] for row in memory.rows if "eval/total" in row] == [2, 3]
