"""A reward in the process of its caller, on a thread of its own."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

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
from rewards.contract import ItemError, Reward, RewardInfo, Sample, out_of_memory

_log = logging.getLogger(__name__)


class InprocClient:
    """Scores on one worker thread, which loads the reward first and is the only one to use it.

    Args:
        reward: not loaded yet.
        device: passed to the reward.
    """

    def __init__(self, reward: Reward, *, device: str) -> None:
        self._reward, self._max_batch = reward, reward.info.max_batch
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._loaded: Future[str] = self._enqueue(lambda: self._load(device))
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
        try:
            self._loaded.result(seconds)
        except FutureTimeoutError as error:
            if self._loaded.done():  # loading itself ran into some time-out
                raise
            raise RewardUnavailableError(f"reward {self.info.name} is not loaded after {seconds:.0f} s") from error

    def submit(self, samples: Sequence[Sample]) -> Future[RewardBatch]:
        check_samples(samples)
        if self._closed.is_set():
            raise RuntimeError(f"reward {self.info.name} is closed")
        own = list(samples)
        return self._enqueue(lambda: self._batch(own))

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._jobs.put(None)
        self._thread.join()
        self._reward.close()

    def _enqueue(self, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.put((future, call))
        return future

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, call = job
            if self._closed.is_set():
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised again by whoever asks for the result
                future.set_exception(error)

    def _load(self, device: str) -> str:
        self._reward.load(device)
        return self._reward.fingerprint()

    def _batch(self, samples: list[Sample]) -> RewardBatch:
        fingerprint, started = self._loaded.result(), time.monotonic()
        outcomes: dict[str, Outcome] = {}
        for batch in pack(samples, self.info, most=self._max_batch):
            outcomes |= self._score(batch)
        ordered = [outcomes[sample.id] for sample in samples]
        stats = {"latency": time.monotonic() - started}
        return RewardBatch(columns(ordered, self.info.metrics), reasons(ordered), fingerprint, stats)

    def _score(self, batch: list[Sample]) -> dict[str, Outcome]:
        """Outcomes by id. After an ItemError each unit is scored by itself: the bad one fails alone. Where memory is
        short, batches are halved, for good."""
        parts = units(batch, self.info)
        try:
            return self._checked(batch, self._reward.score(batch))
        except ItemError as error:
            reason, size = f"unsupported_item: {error}", 1
        except Exception as error:
            if not out_of_memory(error):
                raise
            reason, size = f"out_of_memory: {error}"[:300], max(1, len(parts) // 2)
            self._max_batch = max(1, len(batch) // 2)
            _log.warning("reward %s: out of memory with %d images at once", self.info.name, len(batch))
        # Not inside the handler: the traceback would keep the tensors of the failed batch for as long.
        if len(parts) == 1:
            return {sample.id: reason for sample in batch}
        outcomes: dict[str, Outcome] = {}
        for at in range(0, len(parts), size):
            outcomes |= self._score([sample for part in parts[at : at + size] for sample in part])
        return outcomes

    def _checked(self, batch: list[Sample], scores: Sequence[Mapping[str, float]]) -> dict[str, Outcome]:
        if len(scores) != len(batch):
            raise RuntimeError(f"reward {self.info.name} gave {len(scores)} scores for {len(batch)} images")
        return {s.id: checked_score(score, self.info.metrics) for s, score in zip(batch, scores, strict=True)}
