"""A reward in the process of its caller, on a thread of its own."""

import logging
import math
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field

from rewards.client.batch import (
    Outcome,
    RewardBatch,
    RewardUnavailableError,
    check_samples,
    checked_score,
    columns,
    pack,
    reasons,
    units,
)
from rewards.contract import ItemError, Reward, RewardInfo, Sample, UnavailableError, is_lost, out_of_memory

_CLOSE_SECONDS = 10.0  # for the batch at hand
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    """One `submit`. Its future is settled under the lock of the client: by the worker, or by a timer that gave up."""

    samples: list[Sample]
    submitted: float  # of time.monotonic()
    future: Future[RewardBatch] = field(default_factory=Future)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    begun: bool = False
    given_up: bool = False
    timer: threading.Timer | None = None


class InprocClient:
    """Scores on one worker thread, which loads the reward first and is the only one to use it.

    No call of a plug-in can be ended from outside. A batch that is not scored in time is given up: what it lacks is
    missing, and until the call returns the reward counts as unavailable.

    Args:
        reward: not loaded yet.
        device: passed to the reward.
        deadline_seconds: longest time for the scores of one `submit`, counted from when the reward takes it up.

    Raises:
        ValueError: the deadline is none.
    """

    def __init__(self, reward: Reward, *, device: str, deadline_seconds: float = 120.0) -> None:
        if not 0 < deadline_seconds < math.inf:
            raise ValueError(f"deadline_seconds={deadline_seconds}: must be > 0 and finite")
        self._reward, self._device, self._max_batch = reward, device, reward.info.max_batch
        self._deadline_seconds = deadline_seconds
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._loaded: Future[str] = Future()
        self._closed = threading.Event()
        self._lock = threading.RLock()
        self._free = threading.Event()  # cleared while the reward is at work on what was given up
        self._free.set()
        self._progress = -math.inf  # when the reward last began or ended something, of time.monotonic()
        # A daemon, unlike the threads of an executor: a reward that hangs must not keep a failed process alive.
        self._thread = threading.Thread(target=self._work, name=f"reward-{reward.info.name}", daemon=True)
        self._thread.start()

    @property
    def info(self) -> RewardInfo:
        return self._reward.info

    @property
    def fingerprint(self) -> str:
        """Waits until the reward is loaded; raises what loading raised."""
        return self._loaded.result()

    def wait_ready(self, seconds: float) -> None:
        """Raises what loading raised, or RewardUnavailableError."""
        until = time.monotonic() + seconds
        try:
            self._loaded.result(seconds)
        except FutureTimeoutError as error:
            if self._loaded.done():  # loading itself ran into some time-out
                raise
            raise RewardUnavailableError(f"reward {self.info.name} is not loaded after {seconds:.0f} s") from error
        if not self._free.wait(max(0.0, until - time.monotonic())):
            raise RewardUnavailableError(f"reward {self.info.name} is still at work on images that were given up")

    def submit(self, samples: Sequence[Sample]) -> Future[RewardBatch]:
        check_samples(samples)
        if self._closed.is_set():
            raise RuntimeError(f"reward {self.info.name} is closed")
        job = _Job(list(samples), time.monotonic())
        self._look_in(self._deadline_seconds, job)
        job.future.add_done_callback(lambda _: job.timer and job.timer.cancel())
        self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """End the thread, and with it the reward; one that hangs is left behind."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._jobs.put(None)
        self._thread.join(_CLOSE_SECONDS if self._free.is_set() else 0.0)
        if not self._thread.is_alive():
            self._reward.close()
            return
        _log.warning("reward %s does not come back from a call: it is left to the end of the process", self.info.name)
        while not self._jobs.empty():
            job = self._jobs.get()
            if job is not None:
                job.future.cancel()

    def _work(self) -> None:
        try:
            self._reward.load(self._device)
            self._loaded.set_result(self._reward.fingerprint())
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for the reward
            self._loaded.set_exception(error)
        while (job := self._jobs.get()) is not None:
            if not self._begin(job):
                continue
            try:
                result = self._batch(job)
            except BaseException as error:  # noqa: BLE001 - raised again by whoever asks for the result
                self._end(job, error)
            else:
                self._end(job, result)

    def _begin(self, job: _Job) -> bool:
        with self._lock:
            if job.given_up:
                return False
            if self._closed.is_set():
                job.future.cancel()
            self._progress = time.monotonic()
            job.begun = job.future.set_running_or_notify_cancel()
            return job.begun

    def _end(self, job: _Job, outcome: RewardBatch | BaseException) -> None:
        with self._lock:
            self._progress = time.monotonic()
            self._free.set()
            if job.given_up:
                _log.warning("reward %s came back from images that were given up", self.info.name)
            elif isinstance(outcome, BaseException):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)

    def _look_in(self, seconds: float, job: _Job) -> None:
        job.timer = threading.Timer(seconds, self._give_up, (job,))
        job.timer.daemon = True
        job.timer.start()

    def _give_up(self, job: _Job) -> None:
        """Settle what is late; look in again later on what had to wait for its turn."""
        name, most = self.info.name, f"{self._deadline_seconds:g}"
        with self._lock:
            if job.future.done():
                return
            left = max(job.submitted, self._progress) + self._deadline_seconds - time.monotonic()
            if left > 0:
                self._look_in(left, job)
                return
            job.given_up = True
            key = f"reward.{name}.deadline_seconds={most}"
            if job.begun:
                self._free.clear()
                _log.error("reward %s does not score: images are given up after %s", name, key)
                late = f"deadline: reward {name} gave no score within {key}"
                job.future.set_result(self._result(job, late))
            else:
                what = "is still at work on images that were given up" if self._loaded.done() else "is not loaded"
                job.future.set_exception(RewardUnavailableError(f"reward {name} {what}, after {key}"))

    def _batch(self, job: _Job) -> RewardBatch:
        self._loaded.result()
        for batch in pack(job.samples, self.info, most=self._max_batch):
            self._score(batch, job)
        return self._result(job, "deadline: given up")

    def _result(self, job: _Job, late: str) -> RewardBatch:
        known = dict(job.outcomes)
        ordered = [known.get(sample.id, late) for sample in job.samples]
        stats = {"latency": time.monotonic() - job.submitted}
        return RewardBatch(columns(ordered, self.info.metrics), reasons(ordered), self._loaded.result(), stats)

    def _score(self, batch: list[Sample], job: _Job) -> None:
        """As behind a server: after a failure each unit is scored by itself, and the bad one fails alone. Where memory
        is short, batches are halved, for good. What concerns more than these images is raised."""
        if job.given_up:
            return
        parts = units(batch, self.info)
        try:
            job.outcomes |= self._checked(batch, self._reward.score(batch))
            return
        except Exception as error:
            if isinstance(error, UnavailableError):
                raise RewardUnavailableError(f"reward {self.info.name}: {error}") from error
            if is_lost(error):
                raise
            reason, size = self._reason(error, alone=len(parts) == 1), 1
            if out_of_memory(error):
                size = max(1, len(parts) // 2)
                self._max_batch = max(1, len(batch) // 2)
                _log.warning("reward %s: out of memory with %d images at once", self.info.name, len(batch))
        # Not inside the handler: the traceback would keep the tensors of the failed batch for as long.
        if len(parts) == 1:
            job.outcomes |= {sample.id: reason for sample in batch}
            return
        for at in range(0, len(parts), size):
            self._score([sample for part in parts[at : at + size] for sample in part], job)

    def _reason(self, error: Exception, *, alone: bool) -> str:
        if isinstance(error, ItemError):
            return f"unsupported_item: {error}"
        if out_of_memory(error):
            return f"out_of_memory: {error}"[:300]
        if alone:
            _log.error("reward %s failed on an image", self.info.name, exc_info=error)
        return f"scorer_error: {type(error).__name__}: {error}"[:300]

    def _checked(self, batch: list[Sample], scores: Sequence[Mapping[str, float]]) -> dict[str, Outcome]:
        if len(scores) != len(batch):
            raise RuntimeError(f"reward {self.info.name} gave {len(scores)} scores for {len(batch)} images")
        return {s.id: checked_score(score, self.info.metrics) for s, score in zip(batch, scores, strict=True)}
