"""Collects images of all requests into batches, and scores them on a thread of their own."""

import asyncio
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from rewards.contract import ItemError, Reward, Sample, out_of_memory
from rewards.server.limits import Limits
from rewards.server.metrics import Metrics
from rewards.wire import Failure

Outcome = dict[str, float] | Failure
_log = logging.getLogger(__name__)
_TRIAL_SIDE = 64  # pixels
_GIVE_UP = 70  # exit status: the supervisor should start a fresh process


@dataclass
class _Job:
    sample: Sample
    outcome: asyncio.Future[Outcome]
    deadline: float  # of time.monotonic()


class Batcher:
    """One queue, one scoring thread.

    Args:
        reward: loaded by `start`, on the scoring thread, which is the only one that ever touches it.
        device: passed to the reward.
        give_up: ends the process; a test may pass its own.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        device: str,
        limits: Limits,
        metrics: Metrics,
        give_up: Callable[[int], object] = os._exit,
    ) -> None:
        self._reward, self._device, self._limits, self._metrics = reward, device, limits, metrics
        self._give_up = give_up
        self._max_batch = reward.info.max_batch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._jobs: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._batch_started: float | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.ready = False

    async def start(self) -> None:
        """Load the reward and try it, then score whatever comes. A reward that cannot be loaded ends the process."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._load)
        self.ready = True
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """Stop after the batch at hand, and close the reward."""
        self.ready = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._reward.close)
        self._thread.shutdown()

    @property
    def overdue(self) -> bool:
        """Whether the batch at hand has taken longer than it may."""
        started = self._batch_started
        return started is not None and time.monotonic() - started > self._limits.batch_seconds

    async def score(self, samples: Sequence[Sample], deadline: float) -> list[Outcome]:
        """Scores, or the reason why there is none, of each sample. Cancelling drops what was not scored yet.

        Args:
            deadline: of time.monotonic(); what is not scored by then is not scored at all.
        """
        loop = asyncio.get_running_loop()
        jobs = [_Job(sample, loop.create_future(), deadline) for sample in samples]
        self._jobs.extend(jobs)
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(job.outcome for job in jobs)))
        except asyncio.CancelledError:
            for job in jobs:
                job.outcome.cancel()
            # At once, not when the batch at hand is done: their bytes are given back now.
            self._jobs = deque(job for job in self._jobs if not job.outcome.done())
            raise

    def _load(self) -> None:
        try:
            self._reward.load(self._device)
            picture = np.full((_TRIAL_SIDE, _TRIAL_SIDE, 3), 127, np.uint8)
            outcome = self._trial(Sample("trial", self._reward.info.example_prompts[0], picture))
            if outcome is not None:
                raise RuntimeError(f"the reward cannot score a grey picture: {outcome.message}")
        except Exception:
            _log.critical("the reward could not be loaded, ending", exc_info=True)
            self._give_up(_GIVE_UP)
            raise

    def _trial(self, sample: Sample) -> Failure | None:
        try:
            (outcome,) = self._checked([sample], self._reward.score([sample]))
        except ItemError:  # it wants another picture, and says so properly
            return None
        return outcome if isinstance(outcome, Failure) else None

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            if len(self._jobs) < self._max_batch:
                await asyncio.sleep(self._limits.collect_seconds)
            # No name for it here: while waiting for more it would keep the bodies alive that its images came in.
            await self._answer(self._next_batch())

    async def _answer(self, batch: list[_Job]) -> None:
        if not batch:
            return
        loop = asyncio.get_running_loop()
        self._batch_started = time.monotonic()
        outcomes = await loop.run_in_executor(self._thread, self._score, [job.sample for job in batch])
        self._metrics.batch_seconds.observe(time.monotonic() - self._batch_started)
        self._metrics.batch_images.observe(len(batch))
        self._batch_started = None
        for job, outcome in zip(batch, outcomes, strict=True):
            if not job.outcome.done():
                job.outcome.set_result(outcome)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._limits.batch_seconds / 4))
            if self.overdue:
                _log.critical("a batch takes longer than %s s: the scorer hangs, ending", self._limits.batch_seconds)
                self._give_up(_GIVE_UP)

    def _next_batch(self) -> list[_Job]:
        """The oldest jobs that anyone still waits for, of one size if the reward wants that."""
        batch: list[_Job] = []
        later: deque[_Job] = deque()
        while self._jobs and len(batch) < self._max_batch:
            job = self._jobs.popleft()
            if job.outcome.done():
                continue
            if time.monotonic() > job.deadline:
                job.outcome.set_result(Failure("deadline", "not scored within the time asked for"))
            elif batch and self._reward.info.same_size and job.sample.image.shape != batch[0].sample.image.shape:
                later.append(job)
            else:
                batch.append(job)
        self._jobs.extendleft(reversed(later))
        if not self._jobs:
            self._arrived.clear()
        return batch

    def _score(self, samples: list[Sample]) -> list[Outcome]:
        """On the scoring thread. A batch that fails is scored one by one: a poisoned image fails alone."""
        try:
            return self._checked(samples, self._reward.score(samples))
        except Exception as error:  # noqa: BLE001 - whatever a plug-in raises is an answer to its client
            self._consider(error)
            if len(samples) == 1:
                return [self._failure(error)]
            part = 1
            if out_of_memory(error):
                part = self._max_batch = len(samples) // 2
                _log.warning("out of memory with %d images; from now on at most %d", len(samples), part)
        # Not inside the handler: the traceback would keep the tensors of the failed batch for as long.
        return [outcome for at in range(0, len(samples), part) for outcome in self._score(samples[at : at + part])]

    def _checked(self, samples: list[Sample], scores: Sequence[Mapping[str, float]]) -> list[Outcome]:
        if len(scores) != len(samples):
            raise RuntimeError(f"the reward gave {len(scores)} scores for {len(samples)} images")
        return [self._finite(score) for score in scores]

    def _finite(self, score: Mapping[str, float]) -> Outcome:
        values = {name: float(score[name]) for name in self._reward.info.metrics}
        if all(math.isfinite(value) for value in values.values()):
            return values
        return Failure("non_finite", "the score is not a finite number")

    def _failure(self, error: Exception) -> Failure:
        if isinstance(error, ItemError):
            return Failure("unsupported_item", str(error)[:200])
        _log.error("the reward failed on an image", exc_info=error)
        return Failure("scorer_error", "the reward failed on this image")

    def _consider(self, error: Exception) -> None:
        """After some errors of a GPU every later call fails too: only a fresh process helps."""
        if "CUDA error" in str(error) and not out_of_memory(error):
            _log.critical("the GPU is lost, ending", exc_info=error)
            self._give_up(_GIVE_UP)
