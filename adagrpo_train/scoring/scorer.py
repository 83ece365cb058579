"""Ask every reward for its scores, and let nothing through that is not a score."""

import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from adagrpo_train.errors import ConfigError, RewardError
from adagrpo_train.functional.combination import comparable, weighted_advantages, weighted_sum
from adagrpo_train.functional.moments import Moments, batch_moments, ema_moments
from adagrpo_train.interfaces import Advantage
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.scoring.entry import RewardEntry
from adagrpo_train.types import Images, Scores
from rewards.client.batch import RewardBatch, RewardClient, RewardUnavailableError
from rewards.contract import Sample

_log = logging.getLogger(__name__)
_HEARTBEAT_SECONDS = 20.0  # well below the time-out of a process group


@dataclass(frozen=True)
class Source:
    """A reward of this run and who answers for it."""

    entry: RewardEntry
    client: RewardClient


class Scorer:
    """Several rewards as one: named parts, their weighted total, and what to do about missing scores.

    A part is called after its metric, or `reward.metric` where two rewards have a metric of that name.

    Args:
        sources: at least one that trains.
        scale: "raw", or "calibrated": parts enter the total as (part - mean) / std, with the moments of the held-out
            images before training, fixed from then on.
        level: where samples are compared: "reward" compares the totals of a group, "advantage" compares each part by
            itself and weights the advantages.
        alpha: share of the past kept in the level of each part, in [0, 1).
        engine: ranks decide together, so that none waits for another that has given up.

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
    ) -> None:
        if scale not in ("raw", "calibrated"):
            raise ConfigError(f"scoring.scale={scale}: choose raw or calibrated")
        if level not in ("reward", "advantage"):
            raise ConfigError(f"scoring.level={level}: choose reward or advantage")
        if not any(source.entry.trains for source in sources):
            raise ConfigError("reward: nothing to train on; choose at least one with role=train")
        self._sources, self._engine = tuple(sources), engine
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
        """Fix the scale of every weighted part by the first evaluation; later calls change nothing.

        Raises:
            RewardError: a reward gives all images the same score.
        """
        if not self._calibrates or self._calibration is not None:
            return
        calibration = {name: batch_moments(parts[name][parts[name].isfinite()]) for name in self._weights}
        flat = sorted(name for name, moments in calibration.items() if moments.var == 0)
        if flat:
            raise RewardError(f"scoring.scale=calibrated: all held-out images have the same score in {flat}")
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

    def follow(self, parts: Mapping[str, Tensor]) -> dict[str, float]:
        """Move the level of every part by samples of all ranks; figures for the log."""
        metrics = {}
        for name, values in parts.items():
            present = values[values.isfinite()]
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

    def drain(self) -> dict[str, float]:
        """Figures about the traffic with each reward since the last call: sums of counts, greatest latencies."""
        counts = {f"reward/{key}": sum(values) for key, values in self._figures.items() if "latency" not in key}
        slowest = {
            f"time/reward_{key.replace('/', '_')}_seconds": max(values)
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
        gone = self._decide(results)
        columns: dict[str, Tensor] = {}
        counts = {}
        reasons = []
        for source in self._sources:
            name, batches = source.entry.name, results[source.entry.name]
            for metric in source.client.info.metrics:
                values = _column(batches, metric, len(self._samples)) if name not in gone else _nothing(self._samples)
                columns[self._scorer._names[name, metric]] = values
            own = torch.stack([columns[self._scorer._names[name, m]] for m in source.client.info.metrics])
            counts[name] = int((~own.isfinite()).any(0).sum())
            if isinstance(batches, list):
                reasons += [f"{name}: {reason}" for batch in batches for reason in batch.reasons if reason]
        everywhere = self._scorer._engine.gather_objects((counts, len(self._samples), reasons[:1]))
        images = sum(count for _, count, _ in everywhere)
        missing = {name: sum(own[name] for own, _, _ in everywhere) / max(images, 1) for name in counts}
        for name, fraction in missing.items():
            self._scorer._figures[f"{name}/missing"].append(fraction * images)
        reason = next((reason for _, _, own in everywhere for reason in own), "")
        for source in self._sources:
            if missing[source.entry.name] == 1 and source.entry.trains and source.entry.required:
                raise _everywhere(f"reward {source.entry.name}: none of {images} images got a score; {reason}")
        return Scores(self._total(columns), columns, missing, reason)

    def _total(self, columns: dict[str, Tensor]) -> Tensor:
        scorer = self._scorer
        if scorer._calibrates and scorer._calibration is None:
            return torch.full((len(self._samples),), torch.nan)
        return scorer.total(columns)

    def _outcome(self, source: Source) -> list[RewardBatch] | Exception:
        try:
            batches = [future.result() for future in self._waiting[source.entry.name]]
        except Exception as error:  # noqa: BLE001 - raised again by _decide, on every rank at once
            return error
        for batch in batches:
            for name, value in batch.stats.items():
                self._scorer._figures[f"{source.entry.name}/{name}"].append(value)
        return batches

    def _decide(self, results: dict[str, list[RewardBatch] | Exception]) -> set[str]:
        """Wait for, give up or do without the rewards that failed as a whole. Returns those to do without."""
        gone: set[str] = set()
        for source in self._sources:
            entry, began = source.entry, time.monotonic()
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
                    _log.warning("reward %s: %s; waiting for it (%.0f s so far)", entry.name, text, waited)
                    if failure is not None:
                        results[entry.name] = self._again(source)
                    continue
                if not entry.required or not entry.trains:
                    _log.warning("reward %s: %s; going on without it", entry.name, text)
                    gone.add(entry.name)
                    break
                raise _everywhere(
                    f"reward {entry.name}: {text}. Nobody answers; see to its servers and resume, or set "
                    f"reward.{entry.name}.on_unavailable=wait"
                )
        return gone

    def _again(self, source: Source) -> list[RewardBatch] | Exception:
        """Submit everything once more when the reward is back; after a heartbeat ranks speak to each other again."""
        try:
            source.client.wait_ready(_HEARTBEAT_SECONDS)
        except Exception as error:  # noqa: BLE001 - raised again by _decide, on every rank at once
            return error
        self._waiting[source.entry.name] = [source.client.submit(self._samples)]
        return self._outcome(source)


def _part_names(sources: Sequence[Source]) -> dict[tuple[str, str], str]:
    pairs = [(source.entry.name, metric) for source in sources for metric in source.client.info.metrics]
    metrics = [metric for _, metric in pairs]
    return {(name, m): m if metrics.count(m) == 1 else f"{name}.{m}" for name, m in pairs}


def _column(batches: list[RewardBatch] | Exception, metric: str, count: int) -> Tensor:
    assert isinstance(batches, list)
    values = np.concatenate([batch.scores[metric] for batch in batches]) if batches else np.empty(0)
    if len(values) != count:
        raise RewardError(f"{len(values)} scores for {count} images")
    return torch.from_numpy(values.astype(np.float32))


def _nothing(samples: list[Sample]) -> Tensor:
    return torch.full((len(samples),), torch.nan)


def _text(failure: BaseException | None) -> str:
    return "" if failure is None else f"{failure}" or type(failure).__name__


def _everywhere(message: str) -> RewardError:
    error = RewardError(message)
    error.on_every_rank = True
    return error
