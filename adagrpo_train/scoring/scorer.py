"""Ask every reward for its scores, and let nothing through that is not a score."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from adagrpo_train.errors import AdaGRPOError, ConfigError, RewardError, StoppedError
from adagrpo_train.functional.combination import comparable, weighted_advantages, weighted_sum
from adagrpo_train.functional.moments import Moments, batch_moments, ema_moments
from adagrpo_train.interfaces import Advantage
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
_RESERVED = ("total", "prompt", "class")
"""Columns of an evaluation that no part may be called."""


@dataclass(frozen=True)
class Source:
    """A reward of this run and who answers for it."""

    entry: RewardEntry
    client: RewardClient


class Scorer:
    """Several rewards as one: named parts, their weighted total, and what to do about missing scores.

    A part is called after its metric, or `reward.metric` where two rewards have a metric of that name. Rewards for
    evaluation never rename a part that trains: what a checkpoint says of parts holds whatever else is evaluated.

    Args:
        sources: at least one that trains.
        scale: "raw", or "calibrated": parts enter the total as (part - mean) / std, with the moments of the held-out
            images before training, fixed from then on.
        level: where samples are compared: "reward" compares the totals of a group, "advantage" compares each part by
            itself and weights the advantages.
        alpha: share of the past kept in the level of each part, in [0, 1).
        engine: ranks decide together, so that none waits for another that has given up.
        stop: whether the run was asked to stop, which ends the waiting for a reward.

    Raises:
        ConfigError: a setting out of range, a weight of a metric that a reward does not have, or nothing to train on.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        scale: Literal["raw", "calibrated"],
        level: Literal["reward", "advantage"],
        alpha: float,
        engine: Engine,
        stop: StopRequest,
    ) -> None:
        if scale not in ("raw", "calibrated"):
            raise ConfigError(f"scoring.scale={scale}: choose raw or calibrated")
        if level not in ("reward", "advantage"):
            raise ConfigError(f"scoring.level={level}: choose reward or advantage")
        if not any(source.entry.trains for source in sources):
            raise ConfigError("reward: nothing to train on; choose at least one with role=train")
        self._sources, self._engine, self._stop = tuple(sources), engine, stop
        self._calibrates, self._level, self._alpha = scale == "calibrated", level, alpha
        self._names = _part_names(sources)
        self._weights = self._checked_weights()
        self._required = {name: w for name, w in self._weights.items() if self._owner(name).entry.required}
        if not self._required:
            raise ConfigError("reward: the curriculum follows the required rewards; keep one with required=true")
        self._calibration: dict[str, Moments] | None = None
        self._levels: dict[str, Moments] = {}
        self._figures: defaultdict[str, list[float]] = defaultdict(list)

    @property
    def fingerprints(self) -> dict[str, str]:
        """What the scores of each reward depend on: reward -> fingerprint."""
        return {source.entry.name: source.client.fingerprint for source in self._sources}

    def collect(self, *, evaluation: bool = False) -> "Collector":
        """A collector of images to be scored; `evaluation` asks the rewards that never train as well."""
        return Collector(self, [source for source in self._sources if evaluation or source.entry.trains])

    def score(self, images: Images, prompts: Sequence[str], *, evaluation: bool = False) -> Scores:
        """Scores of N images [N, H, W, 3]; see Collector.scores for what is raised."""
        collector = self.collect(evaluation=evaluation)
        collector.add(images, prompts)
        return collector.scores()

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """What training maximises and the curriculum follows [N]: NaN where a required score is missing.

        Raises:
            RewardError: scores are to be calibrated and no calibration has been made.
        """
        if self._calibrates and self._calibration is None:
            raise RewardError("scoring.scale=calibrated: no calibration yet; it is made by the first evaluation")
        return weighted_sum(parts, self._required, scales=self._calibration)

    def calibrate(self, parts: Mapping[str, Tensor]) -> None:
        """Fix the scale of every part of the total by the first evaluation; later calls change nothing.

        Args:
            parts: name -> [images] of all ranks, NaN where missing.

        Raises:
            RewardError: on every rank, if a part has too little spread, or too few scores, to give it a scale.
        """
        if not self._calibrates or self._calibration is not None:
            return
        calibration: dict[str, Moments] = {}
        for name in self._required:
            present = parts[name][parts[name].isfinite()]
            if 2 * len(present) < max(4, len(parts[name])):
                raise _everywhere(
                    f"scoring.scale=calibrated: only {len(present)} of {len(parts[name])} held-out images have a score "
                    f"in {name}; raise evaluation.images, see to the reward, or set scoring.scale=raw"
                )
            calibration[name] = batch_moments(present)
            if calibration[name].flat:
                raise _everywhere(
                    f"scoring.scale=calibrated: all held-out images have the same score in {name} "
                    f"({calibration[name].mean:.4g}); choose other prompts.evaluation_path or more evaluation.images, "
                    "or set scoring.scale=raw"
                )
        self._calibration = calibration

    def comparable(self, parts: Mapping[str, Tensor], group: Tensor, group_size: int) -> Tensor:
        """Which samples of all ranks may be trained on [N]."""
        return comparable(self.total(parts), group, group_size=group_size)

    def local_advantages(
        self, parts: Mapping[str, Tensor], group: Tensor, group_size: int, advantage: Advantage
    ) -> Tensor:
        """Advantages against the group alone [N], of samples of all ranks; 0 where a sample is not comparable."""
        total = self.total(parts)
        if self._level == "advantage":
            # A sample that may not be trained on counts in no statistics of its group, whichever part it has.
            unusable = ~comparable(total, group, group_size=group_size)
            masked = {name: parts[name].masked_fill(unusable, torch.nan) for name in self._weights}
            return weighted_advantages(masked, self._weights, group, group_size=group_size, advantage=advantage.local)
        return weighted_advantages(
            {"total": total}, {"total": 1.0}, group, group_size=group_size, advantage=advantage.local
        )

    def follow(self, parts: Mapping[str, Tensor], usable: Tensor) -> dict[str, float]:
        """Move the level of every part by the usable ones [N] of the samples of all ranks; figures for the log."""
        metrics = {}
        for name, values in parts.items():
            present = values[usable & values.isfinite()]
            if len(present):
                self._levels[name] = ema_moments(self._levels.get(name), batch_moments(present), alpha=self._alpha)
            if name in self._levels:
                metrics[f"reward/{name}/level"] = self._levels[name].mean
        return metrics

    def excess(self, scores: Scores) -> str:
        """Which required rewards miss more scores than they may; "" if none does."""
        faults = []
        for source in self._sources:
            entry = source.entry
            missing = scores.missing.get(entry.name, 0.0)
            if entry.trains and entry.required and missing > entry.max_bad_fraction:
                faults.append(
                    f"{missing:.0%} of the scores of reward {entry.name} are missing "
                    f"(reward.{entry.name}.max_bad_fraction={entry.max_bad_fraction}); {scores.reason}"
                )
        return "; ".join(faults)

    def drain(self, *, evaluation: bool = False) -> dict[str, float]:
        """Figures about the traffic with each reward since the last call: sums of counts, greatest latencies.

        Called after each iteration and after each evaluation, so that neither shows what the other caused.
        """
        group, mark = ("eval/reward", "eval_") if evaluation else ("reward", "")
        counts = {f"{group}/{key}": sum(values) for key, values in self._figures.items() if "latency" not in key}
        slowest = {
            f"time/{mark}reward_{key.replace('/', '_')}_seconds": max(values)
            for key, values in self._figures.items()
            if "latency" in key
        }
        self._figures.clear()
        return counts | slowest

    def state_dict(self) -> dict[str, Any]:
        plain = {name: (moments.mean, moments.var) for name, moments in self._levels.items()}
        fixed = self._calibration and {name: (m.mean, m.var) for name, m in self._calibration.items()}
        return {"levels": plain, "calibration": fixed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._levels = {name: Moments(*pair) for name, pair in state["levels"].items()}
        fixed = state["calibration"]
        self._calibration = fixed and {name: Moments(*pair) for name, pair in fixed.items()}

    def close(self) -> None:
        """End what the rewards hold: worker threads, connections."""
        for source in self._sources:
            source.client.close()

    def _checked_weights(self) -> dict[str, float]:
        weights = {}
        for source in self._sources:
            entry, metrics = source.entry, source.client.info.metrics
            unknown = sorted(set(entry.weights) - set(metrics))
            if unknown:
                known = f"the reward has the metrics {', '.join(metrics)}"
                raise entry.error(f"weights.{unknown[0]}", known, entry.weights[unknown[0]])
            if entry.trains and not entry.required and self._level == "reward":
                raise entry.error("required", "needs scoring.level=advantage: a sum lacks a term")
            weights |= {self._names[entry.name, metric]: w for metric, w in entry.weights.items() if w}
        return weights

    def _owner(self, part: str) -> Source:
        return next(s for s in self._sources for m in s.client.info.metrics if self._names[s.entry.name, m] == part)


class Collector:
    """Images on their way to their scores: added piece by piece, scored meanwhile.

    Pieces are scored while the next ones are drawn, except by rewards that compare the images of a group.
    """

    def __init__(self, scorer: Scorer, sources: list[Source]) -> None:
        self._scorer, self._sources = scorer, sources
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
            RewardError: on every rank, if a reward of any rank failed as a whole; with the reason and a remedy.
        """
        for source in self._sources:
            if source.client.info.groupwise:
                self._waiting[source.entry.name].append(source.client.submit(self._samples))
        results = {source.entry.name: self._outcome(source) for source in self._sources}
        self._decide(results)
        columns: dict[str, Tensor] = {}
        counts = {}
        reasons = []
        for source in self._sources:
            name, answer = source.entry.name, results[source.entry.name]
            # One that is done without has no score for any image.
            own = answer.columns if isinstance(answer, _Answer) else self._nothing(source)
            columns |= {self._scorer._names[name, metric]: values for metric, values in own.items()}
            counts[name] = int((~torch.stack(list(own.values())).isfinite()).any(0).sum())
            if isinstance(answer, _Answer) and answer.reason:
                reasons.append(f"{name}: {answer.reason}")
        everywhere = self._scorer._engine.gather_objects((counts, len(self._samples), reasons[:1]))
        images = sum(count for _, count, _ in everywhere)
        totals = {name: sum(own[name] for own, _, _ in everywhere) for name in counts}
        reason = next((reason for _, _, own in everywhere for reason in own), "")
        for source in self._sources:
            name = source.entry.name
            self._scorer._figures[f"{name}/missing"].append(totals[name])
            if totals[name] == images and source.entry.trains and source.entry.required:
                raise _everywhere(f"reward {name}: none of {images} images got a score; {reason}")
        missing = {name: count / max(images, 1) for name, count in totals.items()}
        return Scores(self._total(columns), columns, missing, reason)

    def _nothing(self, source: Source) -> dict[str, Tensor]:
        return {metric: torch.full((len(self._samples),), torch.nan) for metric in source.client.info.metrics}

    def _total(self, columns: dict[str, Tensor]) -> Tensor:
        scorer = self._scorer
        if scorer._calibrates and scorer._calibration is None:
            return torch.full((len(self._samples),), torch.nan)
        return scorer.total(columns)

    def _outcome(self, source: Source) -> "_Answer | Exception":
        try:
            batches = [future.result() for future in self._waiting[source.entry.name]]
            answer = _answer(batches, source.client.info.metrics, len(self._samples))
        except Exception as error:  # noqa: BLE001 - raised again by _decide, on every rank at once
            return error
        for batch in batches:
            for name, value in batch.stats.items():
                self._scorer._figures[f"{source.entry.name}/{name}"].append(value)
        return answer

    def _decide(self, results: dict[str, "_Answer | Exception"]) -> None:
        """Wait for the rewards that failed as a whole, give up, or see that they can be done without.

        Raises:
            RewardError: a reward is given up.
            StoppedError: the run was asked to stop while it waited. Both on every rank.
        """
        for source in self._sources:
            entry, began, told = source.entry, time.monotonic(), -math.inf
            while True:
                outcome = results[entry.name]
                failure = outcome if isinstance(outcome, Exception) else None
                final = failure is not None and not isinstance(failure, RewardUnavailableError)
                faults = [f for f in self._scorer._engine.gather_objects((_text(failure), final)) if f[0]]
                if not faults:
                    break
                # The clock of the main rank decides for all.
                waited = self._scorer._engine.broadcast(time.monotonic() - began)
                text = faults[0][0]
                if any(final for _, final in faults):
                    raise _everywhere(f"reward {entry.name}: {text}")
                if entry.on_unavailable == "wait" and waited < entry.wait_seconds:
                    if waited - told >= _SILENT_SECONDS:
                        _log.warning("reward %s: %s; waiting for it (%.0f s so far)", entry.name, text, waited)
                        told = waited
                    if any(self._scorer._engine.gather_objects(self._scorer._stop.requested)):
                        raise _everywhere(f"asked to stop while waiting for reward {entry.name}", StoppedError)
                    if failure is not None:
                        results[entry.name] = self._again(source)
                    continue
                if not entry.required or not entry.trains:
                    _log.warning("reward %s: %s; going on without it", entry.name, text)
                    results[entry.name] = failure or RewardUnavailableError(text)
                    break
                raise _everywhere(
                    f"reward {entry.name}: {text}. Nobody answers; see to its servers and resume, or set "
                    f"reward.{entry.name}.on_unavailable=wait"
                )

    def _again(self, source: Source) -> "_Answer | Exception":
        """Submit everything once more when the reward is back; after a heartbeat ranks speak to each other again."""
        time.sleep(_PAUSE_SECONDS)
        try:
            source.client.wait_ready(_HEARTBEAT_SECONDS)
        except Exception as error:  # noqa: BLE001 - raised again by _decide, on every rank at once
            return error
        self._waiting[source.entry.name] = [source.client.submit(self._samples)]
        return self._outcome(source)


@dataclass(frozen=True)
class _Answer:
    """What a reward says about the samples of this rank."""

    columns: dict[str, Tensor]  # metric -> [N] float32, NaN where missing
    reason: str  # why the first missing score is missing, "" if none is


def _answer(batches: list[RewardBatch], metrics: Sequence[str], count: int) -> _Answer:
    columns = {}
    for metric in metrics:
        values = np.concatenate([batch.scores[metric] for batch in batches]) if batches else np.empty(0)
        if len(values) != count:
            raise RewardError(f"{len(values)} scores for {count} images")
        columns[metric] = torch.from_numpy(values.astype(np.float32))
    return _Answer(columns, next((reason for batch in batches for reason in batch.reasons if reason), ""))


def _part_names(sources: Sequence[Source]) -> dict[tuple[str, str], str]:
    everyone = [metric for source in sources for metric in source.client.info.metrics]
    training = [metric for source in sources if source.entry.trains for metric in source.client.info.metrics]
    names = {}
    for source in sources:
        rivals = training if source.entry.trains else everyone
        for metric in source.client.info.metrics:
            alone = rivals.count(metric) == 1 and metric not in _RESERVED
            names[source.entry.name, metric] = metric if alone else f"{source.entry.name}.{metric}"
    return names


def _text(failure: BaseException | None) -> str:
    return "" if failure is None else f"{failure}" or type(failure).__name__


def _everywhere(message: str, kind: type[AdaGRPOError] = RewardError) -> AdaGRPOError:
    error = kind(message)
    error.on_every_rank = True
    return error
