"""Ask every reward for its scores, and let nothing through that is not a score."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from adagrpo_train.errors import ConfigError, RewardError
from adagrpo_train.functional.combination import comparable, weighted_advantages, weighted_sum
from adagrpo_train.functional.moments import Moments, batch_moments, ema_moments
from adagrpo_train.interfaces import Advantage
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.stopping import StopRequest
from adagrpo_train.scoring.collector import Collector, Source
from adagrpo_train.types import Images, Scores

_RESERVED = ("total", "prompt", "class", "sample")
"""Columns of an evaluation that no part may be called."""


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

    @property
    def metrics(self) -> dict[str, tuple[str, ...]]:
        """What each reward says about an image: reward -> names, in its order."""
        return {source.entry.name: tuple(source.client.info.metrics) for source in self._sources}

    @property
    def weights(self) -> dict[str, float]:
        """Part -> weight, of the parts that the total is made of."""
        return dict(self._required)

    @property
    def heldout(self) -> tuple[str, ...]:
        """Parts of the rewards that never train."""
        sources = (source for source in self._sources if not source.entry.trains)
        return tuple(self._names[source.entry.name, m] for source in sources for m in source.client.info.metrics)

    def collect(self, *, evaluation: bool = False) -> Collector:
        """A collector of images to be scored; `evaluation` asks the rewards that never train as well."""
        return Collector(
            [source for source in self._sources if evaluation or source.entry.trains],
            names=self._names,
            total=self._total_so_far,
            traffic=self._figures,
            engine=self._engine,
            stop=self._stop,
        )

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

    def _total_so_far(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The total [N]; missing as long as the first evaluation is still to calibrate it."""
        if self._calibrates and self._calibration is None:
            return torch.full_like(next(iter(parts.values())), torch.nan)
        return self.total(parts)

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
        return dict(sorted(weights.items()))  # sums of floats depend on it, a run must not

    def _owner(self, part: str) -> Source:
        return next(s for s in self._sources for m in s.client.info.metrics if self._names[s.entry.name, m] == part)


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


def _everywhere(message: str) -> RewardError:
    error = RewardError(message)
    error.on_every_rank = True
    return error
