"""Collects images of all requests into batches, and scores them on a thread of their own."""

import asyncio
import faulthandler
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rewards.contract import ItemError, LostError, Reward, Sample, UnavailableError, is_lost, out_of_memory
from rewards.server.limits import Limits
from rewards.server.metrics import Metrics
from rewards.server.trial import load_and_try
from rewards.wire import Failure

Outcome = dict[str, float] | Failure
_log = logging.getLogger(__name__)
_GIVE_UP = 70  # exit status: the supervisor should start a fresh process
_LACKING = 2  # exit status: a library is missing, and will be again
LATE = Failure("deadline", "not scored within the time asked for")
AWAY = Failure("unavailable", "the reward cannot score now, and may later")


@dataclass
class _Job:
    sample: Sample
    outcome: asyncio.Future[Outcome]


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
        self._at_hand: list[_Job] = []
        self._afterwards: list[Callable[[], None]] = []  # to be done when the batch at hand is
        self._arrived = asyncio.Event()
        self._batch_started: float | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.fingerprint = ""
        self.ready = False

    async def start(self) -> None:
        """Load the reward and try it, then score whatever comes. A reward that cannot be loaded ends the process."""
        loop = asyncio.get_running_loop()
        self.fingerprint = await loop.run_in_executor(self._thread, self._load)
        self.ready = True
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """Stop after the batch at hand, and close the reward. Watched to the end: a batch may hang now as well."""
        self.ready = False
        for task in self._tasks[:1]:
            task.cancel()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._reward.close)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._thread.shutdown()

    @property
    def overdue(self) -> bool:
        """Whether the batch at hand has taken longer than it may."""
        started = self._batch_started
        return started is not None and time.monotonic() - started > self._limits.batch_seconds

    async def score(self, samples: Sequence[Sample], deadline: float) -> list[Outcome]:
        """Scores, or the reason why there is none, of each sample, at the deadline at the latest. What was not scored
        then, or when this is cancelled, is not scored at all.

        Args:
            samples: at least one.
            deadline: of time.monotonic().
        """
        loop = asyncio.get_running_loop()
        jobs = [_Job(sample, loop.create_future()) for sample in samples]
        self._jobs.extend(jobs)
        self._arrived.set()
        outcomes = [job.outcome for job in jobs]
        try:
            await asyncio.wait(outcomes, timeout=max(0.0, deadline - time.monotonic()))
            return [outcome.result() if outcome.done() else LATE for outcome in outcomes]
        finally:
            if not all(outcome.done() for outcome in outcomes):
                for outcome in outcomes:
                    outcome.cancel()
                # At once, not when the batch at hand is done: their bytes are given back now.
                self._jobs = deque(job for job in self._jobs if not job.outcome.done())

    def when_let_go(self, samples: Sequence[Sample], then: Callable[[], None]) -> None:
        """Call when no batch works on these samples: now, or when the batch at hand is done."""
        own = {id(sample) for sample in samples}
        if any(id(job.sample) in own for job in self._at_hand):
            self._afterwards.append(then)
        else:
            then()

    def _load(self) -> str:
        try:
            return load_and_try(self._reward, self._device)
        except Exception as error:
            _log.critical("the reward could not be loaded, ending", exc_info=True)
            self._give_up(_LACKING if isinstance(error, ImportError) else _GIVE_UP)
            raise

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
        self._batch_started, self._at_hand = time.monotonic(), batch
        try:
            outcomes = await loop.run_in_executor(self._thread, self._score, [job.sample for job in batch])
        finally:
            self._at_hand, afterwards, self._afterwards = [], self._afterwards, []
            for then in afterwards:
                then()
        self._metrics.batch_seconds.observe(time.monotonic() - self._batch_started)
        self._metrics.batch_images.observe(len(batch))
        self._batch_started = None
        for job, outcome in zip(batch, outcomes, strict=True):
            if not job.outcome.done():
                job.outcome.set_result(outcome)

    async def _watch(self) -> None:
        """End the process when a batch takes too long; also when its call lets no other thread run, not even this."""
        patience = self._limits.batch_seconds
        pause = min(1.0, patience / 4)
        try:
            while True:
                faulthandler.dump_traceback_later(patience + pause, exit=True, file=2)  # stderr
                await asyncio.sleep(pause)
                if self.overdue:
                    _log.critical("a batch takes longer than %s s: the scorer hangs, ending", patience)
                    self._give_up(_GIVE_UP)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _next_batch(self) -> list[_Job]:
        """The oldest jobs that anyone still waits for, of one size if the reward wants that."""
        batch: list[_Job] = []
        later: deque[_Job] = deque()
        while self._jobs and len(batch) < self._max_batch:
            job = self._jobs.popleft()
            if job.outcome.done():
                continue
            if batch and self._reward.info.same_size and job.sample.image.shape != batch[0].sample.image.shape:
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
            if isinstance(error, UnavailableError):
                _log.warning("the reward cannot score now: %s", error)
                return [AWAY] * len(samples)
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
        """Where every later call would fail too, only a fresh process helps."""
        if is_lost(error):
            what = "the reward" if isinstance(error, LostError) else "the GPU"
            _log.critical("%s is lost, ending", what, exc_info=error)
            self._give_up(_GIVE_UP)
