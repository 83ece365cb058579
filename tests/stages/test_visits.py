"""What each optimizer step visits, and what its ratios compare with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adagrpo_train.algorithms.visits import Visits
from adagrpo_train.errors import ConfigError
from adagrpo_train.types import Transitions
from rewards.shapes.reward import ShapesReward
from tests.support import Memory, make_trainer, use_reward

ONE_IMAGE = ("evaluation.images=1", "evaluation.grid_images=1")


def batch(states: int, branches: int, number: int = 0) -> Transitions:
    """Values that tell which state and transition they belong to."""
    state = torch.arange(states).repeat_interleave(branches)
    value = 1000 * number + 10.0 * state + torch.arange(branches).repeat(states)
    own = torch.arange(states) + 1000.0 * number
    return Transitions(own[:, None], own, own - 1, own.long(), value[:, None], state, value.long(), value, value + 0.5)


def visits(**changes: Any) -> Visits:
    settings = {"inner_epochs": 1, "updates": 1, "states": 4, "rollout_states": 4, "same_program": True, "seed": 0}
    return Visits(**(settings | changes))


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("states", [1, 2, 3, 5, 9])
def test_parts_of_a_batch_are_the_batch(states: int, branches: int) -> None:
    whole = batch(5, branches)
    parts = whole.split(states)
    assert all(1 <= len(part.x) <= states for part in parts)
    for part in parts:  # each transition stays with its state
        assert torch.equal(part.x[part.state].flatten(), whole.x[part.sample // 10].flatten())
    for name in ("x", "sigma", "sigma_next", "prompt", "x_next", "sample", "log_prob", "rollout_log_prob"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_a_part_without_its_masked_transitions_still_evaluates_its_states() -> None:
    (first, second) = batch(4, 2).split(2)
    usable = torch.zeros(40, dtype=torch.bool)
    usable[10] = True
    assert (len(first.of(usable).x), first.of(usable).sample.tolist()) == (2, [10])
    assert (len(second.of(usable).x), second.of(usable).sample.tolist()) == (2, [])


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_the_size_of_the_parts_does_not_decide_which_transitions_a_step_has(updates: int) -> None:
    batches = [batch(4, 2, number) for number in range(5)]
    whole, split = (visits(updates=updates, states=s).of(batches, 7, 0, lambda b: b.rollout_log_prob) for s in (4, 3))
    assert len(whole) == len(split) == updates
    for one, other in zip(whole, split, strict=True):
        assert torch.equal(*(torch.cat([part.sample for part in step]) for step in (one, other)))


def test_log_probs_of_the_rollout_serve_where_the_update_runs_what_the_rollout_ran() -> None:
    def never(part: Transitions) -> torch.Tensor:
        raise AssertionError("nothing needs to be evaluated once more")

    for step in visits(updates=2).of([batch(4, 1, number) for number in range(4)], 0, 0, never):
        assert all(torch.equal(part.log_prob, batch(4, 1, int(part.x[0]) // 1000).log_prob) for part in step)


@pytest.mark.parametrize("change", [{"states": 2}, {"same_program": False}])
def test_elsewhere_the_first_step_compares_with_itself_and_later_ones_with_what_was_before_it(change: Any) -> None:
    batches = [batch(4, 1, number) for number in range(4)]
    asked = []

    def log_prob(part: Transitions) -> torch.Tensor:
        asked.append(part)
        return -part.rollout_log_prob

    first, second = visits(updates=2, **change).of(batches, 0, 0, log_prob)
    assert [part.log_prob for part in first] == [None] * len(first)
    assert all(torch.equal(part.log_prob, -part.rollout_log_prob) for part in second)
    assert len(asked) == len(second)  # one update: nothing is evaluated twice
    again = visits(updates=2, inner_epochs=2, **change).of(batches, 0, 0, log_prob)[1]
    assert all(torch.equal(part.log_prob, -part.rollout_log_prob) for part in again)


@pytest.mark.parametrize("states", [0, 5])
def test_parts_are_not_empty_and_not_above_the_batches(states: int) -> None:
    with pytest.raises(ConfigError, match=f"update_micro_batch={states}: must be from 1 to micro_batch=4"):
        visits(states=states)


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("states", [4, 3])
def test_first_ratios_are_one_although_the_rollout_computed_other_log_probs(
    states: int, trainable: str, tmp_path: Path
) -> None:
    """Moved by 0.01, as another kernel might: only an update on the very batches of the rollout takes them over."""
    settings = [f"trainable={trainable}", "micro_batch=4", f"update_micro_batch={states}", "iterations=1"]
    settings += ["updates_per_iteration=4", "inner_epochs=2", "optimizer.lr=1e-5"]
    settings += [
        "model.num_steps=3",
        "plan=fixed",
        "plan.noisy=[0,1]",
        "evaluation.images=1",
        "evaluation.grid_images=1",
    ]
    trainer, parts, _ = make_trainer(*settings, run_dir=tmp_path)
    roll_out = parts.sampler.roll_out

    def moved(*arguments: Any) -> Any:
        rollout = roll_out(*arguments)
        shifted = [(batch, batch.rollout_log_prob + 0.01) for batch in rollout.transitions]
        return replace(rollout, transitions=[replace(batch, log_prob=s, rollout_log_prob=s) for batch, s in shifted])

    parts.sampler.roll_out = moved  # type: ignore[method-assign]
    memory = Memory()
    trainer.train(memory)
    (row,) = memory.training
    assert row["policy/rollout_deviation"] == pytest.approx(0.01, rel=1e-2)
    if states == 4:
        assert row["policy/first_ratio_deviation"] == pytest.approx(0.01, rel=1e-2)
    else:
        assert row["policy/first_ratio_deviation"] == 0
        assert 0 < row["policy/ratio_max_deviation"] < 0.005  # of later steps: what training did, without the 0.01


def test_an_update_in_parts_has_the_gradient_of_the_whole(tmp_path: Path) -> None:
    class Pixels(ShapesReward):
        """Spread inside every group."""

        def score(self, batch: Any) -> Any:
            return [dict.fromkeys(self.info.metrics, float(sample.image.mean()) / 255) for sample in batch]

    gradients = []
    for states in (4, 3):
        trainer, parts, _ = make_trainer("plan=branch", "plan.at=[0,2]", *ONE_IMAGE, run_dir=tmp_path)
        use_reward(trainer, Pixels())
        trainer._update._visits = replace(trainer._update._visits, states=states)

        def keep(*_: Any, parts: Any = parts) -> None:
            gradients.append(torch.cat([p.grad.flatten() for p in parts.policy.parameters if p.grad is not None]))

        trainer._update._optimizer.register_step_pre_hook(keep)
        assert trainer._train_once(0)["nfe/training"] == 4  # parts, not repetitions
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-5
