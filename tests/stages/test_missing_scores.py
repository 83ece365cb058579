"""Missing scores in training: masked, skipped over, and in the end a stop that loses nothing."""

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from adagrpo_train.curriculum.scored import Boundary
from adagrpo_train.errors import RewardError
from adagrpo_train.interfaces import Objective
from adagrpo_train.runtime import checkpoint
from adagrpo_train.scoring.collector import Source
from adagrpo_train.trainer import Trainer
from rewards.client.batch import RewardUnavailableError
from rewards.client.inproc import InprocClient
from rewards.contract import ItemError, Sample
from rewards.shapes.reward import ShapesReward
from tests.support import Memory, make_trainer, use_reward

EVALUATION_IMAGES = 7
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
    trainer._update._optimizer = torch.optim.SGD(own, lr=1.0)
    trainer._update._rates = LambdaLR(trainer._update._optimizer, lambda step: 1.0)
    start = torch.cat([p.detach().clone().flatten() for p in own])
    memory = Memory()
    trainer.train(memory)
    return torch.cat([p.detach().flatten() for p in own]) - start, memory


def test_samples_that_are_not_trained_on_move_no_level_and_count_in_no_figure(tmp_path: Path) -> None:
    """Of the first group one of two samples is missing: the other one has a score, and nothing to compare it with."""
    trainer, _, _ = make_trainer("iterations=1", "reward.shapes.max_bad_fraction=0.5", run_dir=tmp_path)
    use_reward(trainer, Pixels(lambda number: number == EVALUATION_IMAGES))
    total = trainer._scorer.total
    seen: list[torch.Tensor] = []

    def remember(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        seen.append(total(parts))
        return seen[-1]

    trainer._scorer.total = remember  # type: ignore[method-assign]
    memory = Memory()
    trainer.train(memory)
    (rewards,) = [values for values in seen if len(values) == 4 and values.isnan().any()][:1]
    expected = float(rewards[2:].mean())
    assert abs(float(rewards[1]) - expected) > 1e-3
    (row,) = memory.training
    for name in ("reward/mean", "reward/smooth/mean", "reward/strict/level", "curriculum/level"):
        scale = row["reward/mean"] / row["reward/smooth/mean"] if name.startswith("reward/s") else 1.0
        assert row[name] * scale == pytest.approx(expected, rel=1e-5), name
    assert row["reward/unused_fraction"] == 0.5


def test_candidates_without_a_total_move_the_level_of_no_part(tmp_path: Path) -> None:
    settings = ["adagrpo=on", "curriculum.candidates=4", "iterations=1", "reward=[shapes,jpeg_size]"]
    settings += ["reward.shapes.max_bad_fraction=0.5"]
    trainer, _, _ = make_trainer(*settings, run_dir=tmp_path)
    first, second = trainer._scorer._sources
    reward = Pixels(lambda number: number in (EVALUATION_IMAGES, EVALUATION_IMAGES + 2))
    trainer._scorer._sources = (Source(first.entry, InprocClient(reward, device="cpu")), second)
    follow, seen = trainer._scorer.follow, []

    def remember(parts: Mapping[str, torch.Tensor], usable: torch.Tensor) -> dict[str, float]:
        seen.append(parts["jpeg_size"])
        return follow(parts, usable)

    trainer._scorer.follow = remember  # type: ignore[method-assign]
    memory = Memory()
    trainer.train(memory)
    (sizes,) = seen
    assert sizes.isfinite().all()
    assert memory.training[0]["reward/jpeg_size/level"] == pytest.approx(float(sizes[[1, 3]].mean()))


def test_an_update_without_a_usable_sample_moves_nothing_and_is_not_counted(tmp_path: Path) -> None:
    """Neither weight decay, nor the optimizer's moments, nor the rate, nor the average of the weights."""
    settings = ["model.num_steps=4", "updates_per_iteration=6", "micro_batch=2", "optimizer.lr=1e-2"]
    settings += ["lr_schedule.warmup_iterations=1", "reward.shapes.max_bad_fraction=0.5"]
    trainer, _, _ = make_trainer(*settings, run_dir=tmp_path)
    # Three batches of each of the two groups: those of the first are empty in the second iteration.
    use_reward(trainer, Pixels(lambda number: number == EVALUATION_IMAGES + 4))
    step, idle = trainer._update._step, []

    def watch(batches, conditions, advantages, usable, *others):
        before = _everything(trainer)
        step(batches, conditions, advantages, usable, *others)
        if not any(usable[batch.sample].any() for batch in batches):
            idle.append(_same(before, _everything(trainer)))
        else:
            assert not _same(before, _everything(trainer))

    trainer._update._step = watch  # type: ignore[method-assign]
    memory = Memory()
    trainer.train(memory)
    assert idle == [True] * 3
    assert [row["policy/updates"] for row in memory.training] == [6, 3]
    assert trainer._update._rates.last_epoch == trainer._update._updates == 9
    assert memory.training[1]["policy/first_ratio_deviation"] == 0  # of the first update that was made


def _everything(trainer: Trainer) -> list[torch.Tensor]:
    state = [value for own in trainer._update._optimizer.state.values() for value in own.values()]
    average = trainer._policy.average.values()
    rate = [torch.tensor(trainer._update._rates.last_epoch), torch.tensor(trainer._update._updates)]
    return [torch.as_tensor(v).detach().clone() for v in [*trainer._policy.parameters, *state, *average, *rate]]


def _same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@dataclass
class Probe:
    """The objective, and the numbers of the samples it was shown as one more figure."""

    inner: Objective

    def loss(self, policy, batch, conditions, advantages, sigma_max):
        loss = self.inner.loss(policy, batch, conditions, advantages, sigma_max)
        return replace(loss, metrics=loss.metrics | {"policy/probe": batch.sample.double().mean()})


@pytest.mark.parametrize("micro_batch", [2, 3])
def test_figures_of_an_update_are_means_over_the_transitions_trained_on(micro_batch: int, tmp_path: Path) -> None:
    """Of the samples 0 to 7 the first two are missing: with micro_batch=2 a whole batch, with 3 the most of one."""
    trainer, _, _ = make_trainer(*ONE_STEP, f"micro_batch={micro_batch}", run_dir=tmp_path)
    use_reward(trainer, Pixels(lambda number: EVALUATION_IMAGES <= number < EVALUATION_IMAGES + 2))
    trainer._update._objective = Probe(trainer._update._objective)
    memory = Memory()
    trainer.train(memory)
    assert memory.training[0]["policy/probe"] == pytest.approx((2 + 3 + 4 + 5 + 6 + 7) / 6)


def test_the_kl_is_that_of_the_samples_trained_on(tmp_path: Path) -> None:
    trainer, parts, _ = make_trainer("algorithm.objective.kl_weight=0.1", "optimizer.lr=1e-2", run_dir=tmp_path)
    use_reward(trainer, Pixels())
    trainer.train(Memory())
    prompts = trainer._prompts.next(2)
    conditions = parts.policy.encode(list(prompts.texts))
    batch = parts.sampler.roll_out(parts.policy.velocity, conditions, prompts, None, 5).transitions[0]
    kept = torch.tensor([True, False, False, False])
    (rows,) = torch.nonzero(kept[batch.sample], as_tuple=True)
    alone = replace(
        batch.of(kept),
        x=batch.x[rows],
        sigma=batch.sigma[rows],
        sigma_next=batch.sigma_next[rows],
        state=torch.arange(len(rows)),
    )
    figures = []
    for shape, states in ((batch.of(kept), batch.prompt), (alone, batch.prompt[rows])):
        advantages = torch.zeros(len(shape.sample))
        loss = trainer._update._objective.loss(
            parts.policy, shape, conditions[states], advantages, parts.sampler.sigma_max
        )
        figures.append(float(loss.metrics["policy/kl"]))
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)
    assert figures[0] > 1e-6


def test_a_stop_while_a_reward_is_waited_for_saves_the_state_before_the_iteration(tmp_path: Path) -> None:
    settings = ["iterations=3", "checkpoint.every=0", "reward.shapes.on_unavailable=wait", "optimizer.lr=1e-3"]
    calm, parts, _ = make_trainer(*settings, run_dir=tmp_path / "calm")
    use_reward(calm, Pixels())
    calm.train(Memory())
    expected = [p.detach().clone() for p in parts.policy.parameters]

    class Away(Pixels):
        """Gone for good from the second iteration on; somebody who notices stops the run."""

        def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
            scores = super().score(batch)
            if self._number > EVALUATION_IMAGES + 4:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RewardUnavailableError("away")
            return scores

    hit, _, _ = make_trainer(*settings, run_dir=tmp_path / "hit")
    use_reward(hit, Away())
    assert hit.train(Memory()) == "interrupted"
    saved = checkpoint.find(tmp_path / "hit")
    assert saved.name == "iteration_000001"
    resumed, parts, _ = make_trainer(*settings, run_dir=tmp_path / "hit")
    resumed.restore(checkpoint.load(saved))
    use_reward(resumed, Pixels())
    assert resumed.train(Memory()) == "completed"
    assert all(torch.equal(a, b) for a, b in zip(expected, parts.policy.parameters, strict=True))


@pytest.mark.parametrize("plan", ["every_step", "branch"])
def test_a_sample_without_a_score_leaves_the_loss_and_its_denominator(plan: str, tmp_path: Path) -> None:
    """Where an advantage of 0 would only dilute the gradient: here 1 of 8 samples, or of 16 with two branches."""
    settings = [*ONE_STEP, f"plan={plan}", "max_grad_norm=1e9", *(["plan.at=[0,2]"] if plan == "branch" else [])]
    trainer, _, _ = make_trainer(*settings, run_dir=tmp_path)
    masked, memory = moved(trainer, Pixels(lambda number: number == EVALUATION_IMAGES + 2))
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
