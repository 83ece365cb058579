"""Images on their way to their scores, and what is done when a reward does not answer."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adagrpo_train.errors import AdaGRPOError, RewardError, StoppedError
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.stopping import StopRequest
from adagrpo_train.scoring.entry import RewardEntry
from adagrpo_train.types import Images, Scores
from rewards.client.batch import RewardBatch, RewardClient, RewardUnavailableError
from rewards.contract import Sample

_log = logging.getLogger(__name__)
_HEARTBEAT_SECONDS = 5.0  # well below the time-out of a process group, and what a launcher leaves for stopping
_PAUSE_SECONDS = 0.2  # before asking again one that says it is ready and then does not answer
_SILENT_SECONDS = 60.0  # between two lines about the same waiting


@dataclass(frozen=True)
class Source:
    """A reward of this run and who answers for it."""

    entry: RewardEntry
    client: RewardClient


@dataclass(frozen=True)
class _Answer:
    """What a reward says about the samples of this rank."""

    columns: dict[str, Tensor]  # metric -> [N] float32, NaN where missing
    reason: str  # why the first missing score is missing, "" if none is


class _Report(NamedTuple):
    """What a rank tells the others about a reward."""

    pending: bool  # it has not answered yet
    failure: str  # why it failed as a whole, "" if it did not
    final: bool  # asking again does not help
    stop: bool  # this rank was asked to stop


class Collector:
    """Images added piece by piece, scored while the next ones are drawn, except by rewards that compare a group.

    Args:
        sources: the rewards to ask.
        names: (reward, metric) -> name of the part.
        total: parts -> what training maximises [N].
        traffic: figures about each reward are added here, as "reward/figure".
        engine: ranks decide together, so that none waits for another that has given up.
        stop: whether the run was asked to stop, which ends the waiting for scores.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        names: Mapping[tuple[str, str], str],
        total: Callable[[Mapping[str, Tensor]], Tensor],
        traffic: defaultdict[str, list[float]],
        engine: Engine,
        stop: StopRequest,
    ) -> None:
        self._sources, self._names, self._total, self._traffic = sources, names, total, traffic
        self._engine, self._stop = engine, stop
        self._samples: list[Sample] = []
        self._waiting: dict[str, list[Future[RewardBatch]]] = {source.entry.name: [] for source in sources}

    def add(self, images: Images, prompts: Sequence[str], groups: Sequence[int] | None = None) -> None:
        """Hand N images [N, H, W, 3] to the rewards; `groups` says which belong together."""
        owners = prompts if groups is None else groups
        first = len(self._samples)
        piece = [
            Sample(str(first + n), prompt, image, group=str(owner))
            for n, (image, prompt, owner) in enumerate(zip(images, prompts, owners, strict=True))
        ]
        self._samples += piece
        for source in self._sources:
            if not source.client.info.groupwise:
                self._waiting[source.entry.name].append(source.client.submit(piece))

    def scores(self) -> Scores:
        """The scores of everything added, NaN where one is missing.

        Raises:
            RewardError: a reward of any rank failed as a whole; with the reason and a remedy.
            StoppedError: the run was asked to stop and scores had to be waited for. Both on every rank.
        """
        for source in self._sources:
            if source.client.info.groupwise:
                self._waiting[source.entry.name].append(source.client.submit(self._samples))
        columns: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        reasons = []
        for source in self._sources:
            name, answer = source.entry.name, self._settled(source)
            columns |= {self._names[name, metric]: values for metric, values in answer.columns.items()}
            counts[name] = int((~torch.stack(list(answer.columns.values())).isfinite()).any(0).sum())
            if answer.reason:
                reasons.append(f"{name}: {answer.reason}")
        everywhere = self._engine.gather_objects((counts, len(self._samples), reasons[:1]))
        images = sum(count for _, count, _ in everywhere)
        totals = {name: sum(own[name] for own, _, _ in everywhere) for name in counts}
        reason = next((reason for _, _, own in everywhere for reason in own), "")
        for source in self._sources:
            name = source.entry.name
            self._traffic[f"{name}/missing"].append(totals[name])
            if totals[name] == images and source.entry.trains and source.entry.required:
                raise _everywhere(f"reward {name}: none of {images} images got a score; {reason}")
        missing = {name: count / max(images, 1) for name, count in totals.items()}
        return Scores(self._total(columns), columns, missing, reason)

    def _settled(self, source: Source) -> _Answer:
        """What a reward says in the end, waited for as its entry tells; all ranks leave together."""
        entry, failed_at, told = source.entry, math.inf, -math.inf
        outcome: _Answer | Exception | None = None
        while True:
            if not isinstance(outcome, _Answer):
                outcome = self._outcome(source)
            reports = self._engine.gather_objects(_report(outcome, self._stop.requested))
            failure = next((report.failure for report in reports if report.failure), "")
            if final := next((report.failure for report in reports if report.final), ""):
                raise _everywhere(f"reward {entry.name}: {final}")
            if not failure and isinstance(outcome, _Answer) and not any(report.pending for report in reports):
                return outcome
            if failure:
                failed_at = min(failed_at, time.monotonic())  # of the first failure: asking again begins no new wait
            # The clock of the main rank decides for all.
            waited = self._engine.broadcast(time.monotonic() - failed_at)
            if failure and (entry.on_unavailable == "stop" or waited >= entry.wait_seconds):
                return self._without(source, failure)
            if any(report.stop for report in reports):
                raise _everywhere(f"asked to stop while waiting for reward {entry.name}", StoppedError)
            if failure and waited - told >= _SILENT_SECONDS:
                _log.warning("reward %s: %s; waiting for it (%.0f s so far)", entry.name, failure, waited)
                told = waited
            if isinstance(outcome, Exception):
                self._ask_again(source)

    def _outcome(self, source: Source) -> "_Answer | Exception | None":
        """What there is after a heartbeat at most; None while scores are still to come."""
        futures = self._waiting[source.entry.name]
        done, pending = wait(futures, timeout=_HEARTBEAT_SECONDS, return_when=FIRST_EXCEPTION)
        if pending and not any(future.cancelled() or future.exception() for future in done):
            return None
        try:
            batches = [future.result() for future in futures if future in done]
            answer = _answer(batches, source.client.info.metrics, len(self._samples))
        except Exception as error:  # noqa: BLE001 - raised again by _settled, on every rank at once
            return error
        for batch in batches:
            for name, value in batch.stats.items():
                self._traffic[f"{source.entry.name}/{name}"].append(value)
        return answer

    def _ask_again(self, source: Source) -> None:
        """Submit everything once more if the reward is back within a heartbeat."""
        time.sleep(_PAUSE_SECONDS)
        try:
            source.client.wait_ready(_HEARTBEAT_SECONDS)
            again = source.client.submit(self._samples)
        except Exception as error:  # noqa: BLE001 - raised again by _settled, on every rank at once
            again = Future[RewardBatch]()
            again.set_exception(error)
        self._waiting[source.entry.name] = [again]

    def _without(self, source: Source, failure: str) -> _Answer:
        """No score for any image, where a run can do without the reward; ranks that have scores drop them, too."""
        entry = source.entry
        if entry.required and entry.trains:
            remedy = "on_unavailable=wait" if entry.on_unavailable == "stop" else "wait_seconds higher"
            raise _everywhere(
                f"reward {entry.name}: {failure}. Nobody answers; see to its servers and resume, or set "
                f"reward.{entry.name}.{remedy}, or deadline_seconds higher if it is only slow"
            )
        _log.warning("reward %s: %s; going on without it", entry.name, failure)
        nothing = torch.full((len(self._samples),), torch.nan)
        return _Answer(dict.fromkeys(source.client.info.metrics, nothing), failure)


def _answer(batches: list[RewardBatch], metrics: Sequence[str], count: int) -> _Answer:
    columns = {}
    for metric in metrics:
        values = np.concatenate([batch.scores[metric] for batch in batches]) if batches else np.empty(0)
        if len(values) != count:
            raise RewardError(f"{len(values)} scores for {count} images")
        columns[metric] = torch.from_numpy(values.astype(np.float32))
    return _Answer(columns, next((reason for batch in batches for reason in batch.reasons if reason), ""))


def _report(outcome: "_Answer | Exception | None", stop: bool) -> _Report:
    if not isinstance(outcome, Exception):
        return _Report(outcome is None, "", False, stop)
    text = f"{outcome}" or type(outcome).__name__
    return _Report(False, text, not isinstance(outcome, RewardUnavailableError), stop)


def _everywhere(message: str, kind: type[AdaGRPOError] = RewardError) -> AdaGRPOError:
    error = kind(message)
    error.on_every_rank = True
    return error
