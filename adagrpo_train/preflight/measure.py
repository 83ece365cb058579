"""What a run takes, from timed pieces of it at the shapes of training: none of them a whole iteration."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adagrpo_train.build import Assembly
from adagrpo_train.preflight.counts import Counts
from adagrpo_train.preflight.plan import Estimate
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.timing import peak_memory_bytes
from adagrpo_train.runtime.transfer import to_device
from adagrpo_train.types import Conditions, Images, Prompts, Rollout, Transitions, Trunks

Seconds = np.ndarray
"""[2]: by the clock, and of this process's processor time."""

_ENOUGH_SECONDS = 3.0
"""After so long a piece is not timed once more."""
_MOST_REPEATS = 5


@dataclass(frozen=True)
class Pieces:
    """Seconds of what an iteration consists of."""

    encode: Seconds  # a prompt
    trunk: Seconds  # a prompt's noise-free trajectory
    rollout: Seconds  # a prompt's groups
    decode: Seconds  # an image
    reward: Seconds  # an image, by all rewards that train
    judge: Seconds  # a held-out image, by all rewards
    update: Seconds  # a state: forward and backward pass
    repeat: Seconds  # a state: what is evaluated once more before the first update
    step: Seconds  # an optimizer step, and the weight average

    def iteration(self, counts: Counts) -> Seconds:
        """Of one process, its pieces one after the other.

        Rewards score while the next images are drawn: on the device of the model, which both want, nothing is gained
        by that, and elsewhere only what is longer than the drawing counts; this takes all of it.
        """
        return (
            self.encode * (counts.candidates + counts.chosen)
            + self.trunk * counts.trunks
            + self.rollout * counts.chosen
            + (self.decode + self.reward) * counts.images
            + self.update * counts.trained
            + self.repeat * counts.repeated
            + self.step * counts.updates
        )

    def evaluation(self, counts: Counts) -> Seconds:
        """Of the held-out images of one process."""
        return (self.encode + self.trunk + self.decode + self.judge) * counts.held_out


@dataclass(frozen=True)
class Batch:
    """A rollout of a few prompts, at the shapes of training."""

    prompts: Prompts
    conditions: Conditions
    trunks: Trunks | None
    rollout: Rollout
    images: Images


class Measurement:
    """Times pieces of a run, and looks at the memory that they leave as the highest.

    Weights are changed by it: an optimizer step is one of the pieces.
    """

    def __init__(self, run: Assembly, engine: Engine, batch: Batch, counts: Counts) -> None:
        self._run, self._engine, self._batch, self._counts = run, engine, batch, counts

    def pieces(self) -> Pieces:
        """Every rank measures, since engines that divide weights need all of them."""
        batch, parts, counts = self._batch, self._run.parts, self._counts
        policy, sampler = parts.policy, parts.sampler
        prompts, texts = batch.prompts, list(batch.prompts.texts)
        several = self._several(max(1, min(sampler.micro_batch, max(counts.trunks, counts.held_out))))
        conditions = policy.encode(list(several.texts))
        count, images = len(prompts), len(batch.images)
        update, repeat = self._update_seconds()
        return Pieces(
            encode=self._seconds(lambda: policy.encode(texts)) / count,
            trunk=self._seconds(lambda: sampler.trunks(policy.velocity, conditions, several, 0)) / len(several),
            rollout=self._seconds(lambda: sampler.roll_out(policy.velocity, batch.conditions, prompts, batch.trunks, 0))
            / count,
            decode=self._seconds(lambda: policy.decode(batch.rollout.x0)) / images,
            reward=self._seconds(lambda: self._score(evaluation=False)) / images,
            judge=self._seconds(lambda: self._score(evaluation=True)) / images,
            update=update,
            repeat=repeat,
            step=self._seconds(self._step, before=self._last_batch),
        )

    def estimate(self, pieces: Pieces) -> tuple[Estimate, Estimate]:
        """By the clock, and in processor seconds of this process; of the slowest rank and the largest."""
        seconds = np.stack([pieces.iteration(self._counts), pieces.evaluation(self._counts)])
        slowest = np.max(self._engine.gather_objects(seconds), axis=0)
        peak = float(max(self._engine.gather_objects(self.peak())))
        what = "GPU" if self._engine.device.type == "cuda" else "process"
        clock, processor = (Estimate(float(slowest[0][kind]), float(slowest[1][kind]), peak, what) for kind in range(2))
        return clock, processor

    def peak(self) -> int:
        """Bytes at the highest: what the pieces have reached, and what a whole iteration or evaluation has beside."""
        rollout, counts = self._batch.rollout, self._counts
        more = counts.chosen / len(self._batch.prompts) - 1
        beside = more * (_bytes_of(rollout.transitions) + rollout.x0.nbytes)
        if self._engine.device.type == "cpu":
            image = self._batch.images[0].nbytes
            held_out = 2 * counts.held_out * image  # once in pieces, and once together
            beside = max(beside + counts.images * image, held_out)
        return round(peak_memory_bytes() + beside)

    def _several(self, count: int) -> Prompts:
        """So many prompts, drawn ones over and over."""
        own = self._batch.prompts
        return own[[row % len(own) for row in range(count)]]

    def _score(self, *, evaluation: bool) -> None:
        collector = self._run.parts.scorer.collect(evaluation=evaluation)
        rollout, texts = self._batch.rollout, self._batch.prompts.texts
        collector.add(self._batch.images, [texts[row] for row in rollout.prompt.tolist()], rollout.group.tolist())
        collector.scores()

    def _update_seconds(self) -> tuple[Seconds, Seconds]:
        """Of a state of an update, and of one that is evaluated before it."""
        visits = self._run.choices.visits
        part = self._batch.rollout.transitions[0].split(visits.states)[0]
        update = self._seconds(lambda: self._forward_and_backward(part, last=False)) / len(part.x)
        if not self._counts.repeated:
            return update, np.zeros(2)
        return update, self._seconds(lambda: self._log_prob(part)) / len(part.x)

    def _forward_and_backward(self, part: Transitions, *, last: bool) -> None:
        policy, sampler, objective = self._run.parts.policy, self._run.parts.sampler, self._run.choices.objective
        advantages = torch.ones(len(part.x_next), device=self._engine.device)
        with self._engine.micro_step(policy.network, last=last):
            loss = objective.loss(policy, part, self._conditions(part), advantages, sampler.sigma_max)
            self._engine.backward(loss.value)

    def _log_prob(self, part: Transitions) -> None:
        policy, sampler = self._run.parts.policy, self._run.parts.sampler
        with self._engine.micro_step(policy.network, last=False):
            self._run.choices.objective.log_prob(policy, part, self._conditions(part), sampler.sigma_max)

    def _conditions(self, part: Transitions) -> Conditions:
        return self._batch.conditions[to_device(part.prompt, self._engine.device)]

    def _last_batch(self) -> None:
        visits = self._run.choices.visits
        self._forward_and_backward(self._batch.rollout.transitions[0].split(visits.states)[0], last=True)

    def _step(self) -> None:
        policy, optimizer = self._run.parts.policy, self._run.parts.optimizer
        assert optimizer is not None
        self._engine.step(optimizer, policy.parameters, max_grad_norm=self._run.choices.schedule.max_grad_norm)
        policy.average.update(0)

    def _seconds(self, function: Callable[[], Any], *, before: Callable[[], Any] = lambda: None) -> Seconds:
        """Of a call, the median of several; the first one, in which much is done for the first time, only warms up.

        Ranks make the same number of calls.

        Args:
            before: called each time, and not timed.
        """
        before()
        first = self._timed(function)
        most = max(self._engine.gather_objects(float(first[0])))
        times = []
        for _ in range(max(1, min(_MOST_REPEATS, int(_ENOUGH_SECONDS / max(most, 1e-9))))):
            before()
            times.append(self._timed(function))
        return np.array([statistics.median(values) for values in zip(*times, strict=True)])

    def _timed(self, function: Callable[[], Any]) -> Seconds:
        self._wait()
        clock, processor = time.perf_counter(), time.process_time()
        function()
        self._wait()
        return np.array([time.perf_counter() - clock, time.process_time() - processor])

    def _wait(self) -> None:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)


def _bytes_of(transitions: list[Transitions]) -> int:
    return sum(batch.x.nbytes + batch.x_next.nbytes for batch in transitions)
