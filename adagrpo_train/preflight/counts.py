"""How much of everything an iteration does, in closed form."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adagrpo_train.algorithms.visits import Visits
from adagrpo_train.interfaces import Curriculum
from adagrpo_train.rollout.sampler import FlowSampler
from adagrpo_train.trainer import Schedule


@dataclass(frozen=True)
class Counts:
    """What one process does in one iteration, and how often.

    A state is one row of a velocity call; guidance makes two network evaluations of it.
    """

    processes: int
    candidates: int  # prompts whose noise-free sample is scored; 0 without a scored curriculum
    chosen: int  # prompts trained on
    samples: int  # images of the groups
    trunks: int  # noise-free trajectories
    steps: int  # of sampling
    drawn: int  # states evaluated by the rollout, its trunks aside
    trained: int  # states with a backward pass
    repeated: int  # states evaluated once more before the first update, with gradient
    compared: int  # states evaluated with the reference
    updates: int  # optimizer steps
    evaluations_per_state: int
    iterations: int  # of the whole run
    held_out_images: int  # of one evaluation, of all processes
    held_out: int  # of one evaluation, of this process; where that does not divide, some are drawn twice
    held_out_evaluations: int  # in the whole run

    @property
    def images(self) -> int:
        return self.candidates + self.samples

    @property
    def network(self) -> dict[str, int]:
        """Network evaluations of all processes in an iteration, by the names that the log gives them."""
        states = {
            "sampling": self.trunks * self.steps + self.drawn,
            "training": self.trained + self.repeated,
            "reference": self.compared,
        }
        return {kind: count * self.evaluations_per_state * self.processes for kind, count in states.items()}


def drawn_states(sampler: FlowSampler, prompts: int) -> int:
    """States that a rollout of so many prompts evaluates, its trunks aside.

    Trajectories: every sample takes every step. Branches at steps S: one state each, and each of its samples goes on
    with T - 1 - k noise-free steps.
    """
    trained, steps, size = sampler.steps(0).trained, sampler.num_steps, sampler.group_size
    if not sampler.branches:
        return prompts * size * steps
    return prompts * len(trained) + prompts * size * sum(steps - 1 - step for step in trained)


def count(
    values: Mapping[str, Any],
    *,
    sampler: FlowSampler,
    curriculum: Curriculum,
    schedule: Schedule,
    visits: Visits,
    evaluations_per_state: int,
    processes: int,
) -> Counts:
    """What the settings of a run make of it."""
    chosen = curriculum.chosen // processes
    candidates = curriculum.candidates // processes if curriculum.scores_candidates else 0
    groups = chosen * (len(sampler.steps(0).trained) if sampler.branches else 1)
    epoch = sum(sampler.batch_sizes(chosen))
    every, last = schedule.evaluate_every, schedule.iterations
    return Counts(
        processes=processes,
        candidates=candidates,
        chosen=chosen,
        samples=groups * sampler.group_size,
        trunks=candidates or (chosen if sampler.branches else 0),
        steps=sampler.num_steps,
        drawn=drawn_states(sampler, chosen),
        trained=epoch * schedule.inner_epochs,
        repeated=_repeated(sampler.batch_sizes(chosen), visits),
        compared=epoch * schedule.inner_epochs if values["algorithm"]["objective"]["kl_weight"] > 0 else 0,
        updates=schedule.updates_per_iteration,
        evaluations_per_state=evaluations_per_state,
        iterations=last,
        held_out_images=values["evaluation"]["images"],
        held_out=-(-values["evaluation"]["images"] // processes),
        held_out_evaluations=2 + ((last - 1) // every if every else 0),
    )


def _repeated(sizes: list[int], visits: Visits) -> int:
    """States of the batches that a later update visits, where the update computes otherwise than the rollout."""
    return sum(sizes[row] for row in visits.visited_later(len(sizes))) if not visits.exact else 0


def agrees(before: Counter[str], after: Counter[str], expected: int) -> bool:
    """Whether a rollout evaluated the network as often as it should."""
    return (after - before) == Counter({"sampling": expected} if expected else {})
