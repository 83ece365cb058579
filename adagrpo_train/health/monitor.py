"""Watches a run: is the trained reward bought with something else, and which checkpoint is the best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from adagrpo_train.errors import ConfigError
from adagrpo_train.health.best import Best, heldout_gain
from adagrpo_train.health.change import paired, unpaired
from adagrpo_train.health.streak import Compare, Streak, follow
from adagrpo_train.runtime.files import without_nan

_TOTAL = "total"


@dataclass(frozen=True)
class _Alarm:
    """What one kind of alarm looks at and says."""

    title: str
    compare: Compare  # of trained rewards then and now
    trained_on: str
    remedy: str


_ALARMS = {
    "hacking": _Alarm(
        title="reward hacking",
        compare=paired,
        trained_on="the same images",
        remedy="Look at images/heldout_*.png; train on this reward as well, hold the policy nearer to its start "
        "(algorithm.objective.kl_weight, a lower optimizer.lr), or take checkpoints/best",
    ),
    "overfitting": _Alarm(
        title="overfitting to the training prompts",
        compare=unpaired,
        trained_on="the training samples",
        remedy="Train on more prompts, or take checkpoints/best",
    ),
}


@dataclass(frozen=True)
class Alert:
    """A warning for whoever watches the run."""

    title: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """What an evaluation means for the run."""

    metrics: dict[str, float] = field(default_factory=dict)
    alerts: tuple[Alert, ...] = ()
    improved: bool = False  # the best evaluation after training began: its checkpoint is to be kept
    stop: bool = False  # the run is to end here


class Health:
    """Follows the evaluations of a run; equal on every rank, as they are.

    Two alarms. Reward hacking: a held-out score falls while the trained reward of the same images rises. Overfitting:
    the trained reward falls on the held-out prompts while it rises on the prompts of the training.

    Args:
        patience: evaluations in a row that raise an alarm.
        tolerance: what counts as a change, in standard errors: of the mean difference over the same images, and of
            the means over iterations for the rewards of training samples. An evaluation needs two iterations before it.
        stop: end the run with the alarm, as if asked to stop.
        heldout: scores that no training touches. Without any, reward hacking cannot be seen.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(self, *, patience: int, tolerance: float, stop: bool, heldout: Sequence[str]) -> None:
        if patience < 1:
            raise ConfigError(f"health.patience={patience}: must be >= 1")
        if not 0 <= tolerance < math.inf:
            raise ConfigError(f"health.tolerance={tolerance}: must be >= 0 and finite")
        self._patience, self._tolerance, self._stop = patience, tolerance, stop
        self._heldout = tuple(heldout)
        self._last = -1
        self._first: dict[str, list[float]] = {}
        self._streaks: dict[str, Streak] = {}
        self._trained: list[float] = []
        self._best: Best | None = None

    @property
    def last(self) -> int:
        """Iteration of the last evaluation, -1 before any."""
        return self._last

    @property
    def best(self) -> Best | None:
        """The best evaluation after training began."""
        return self._best

    @property
    def stopped(self) -> str:
        """Why the run does not go on, "" if it does."""
        watched = [name for name in (*self._heldout, _TOTAL) if name in self._streaks]
        alarmed = [name for name in watched if self._streaks[name].alarmed]
        return f"held-out {' and '.join(alarmed)} fell while the trained reward rose" if self._stop and alarmed else ""

    @property
    def blind(self) -> str:
        """What cannot be seen for want of a held-out reward, "" if everything can."""
        if self._heldout:
            return ""
        return (
            "no reward has role=evaluation: that the trained reward rises at the expense of what it should stand for "
            "cannot be seen; to see it, choose one more, reward=[...,NAME] reward.NAME.role=evaluation"
        )

    def forget_best(self) -> None:
        """Count the best anew: the checkpoint of the one so far is not there."""
        self._best = None

    def trained(self, metrics: Mapping[str, float]) -> None:
        """Take in the figures of an iteration; a skipped one trained on nothing."""
        if "reward/mean" in metrics:
            self._trained.append(metrics["reward/mean"])

    def evaluated(self, iteration: int, scores: Mapping[str, list[float]]) -> Verdict:
        """Take in an evaluation.

        Args:
            scores: "total" and every part -> [images] in their fixed order, NaN where missing.
        """
        metrics = {"health/heldout_gain": self._compare_with_first(scores)}
        improved = self._keep_best(iteration, metrics["health/heldout_gain"])
        alerts = []
        for kind, names, trained in (
            ("hacking", self._heldout, scores[_TOTAL]),
            ("overfitting", (_TOTAL,), self._trained),
        ):
            for name in names:
                alerts += self._watch(_ALARMS[kind], name, iteration, scores[name], trained)
            streaks = [self._streaks[name] for name in names]
            if streaks:
                metrics[f"health/{kind}"] = float(any(streak.alarmed for streak in streaks))
                metrics[f"health/{kind}_streak"] = float(max(streak.count for streak in streaks))
        self._trained, self._last = [], iteration
        return Verdict(metrics, tuple(alerts), improved, stop=self._stop and bool(alerts))

    def state_dict(self) -> dict[str, Any]:
        return {
            "last": self._last,
            "first": without_nan(self._first),
            "streaks": {name: without_nan(asdict(streak)) for name, streak in self._streaks.items()},
            "trained": list(self._trained),
            "best": self._best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last, self._trained, self._best = state["last"], list(state["trained"]), Best.of(state["best"])
        self._first = {name: _nans(values) for name, values in state["first"].items()}
        self._streaks = {name: _streak(values) for name, values in state["streaks"].items()}

    def _compare_with_first(self, scores: Mapping[str, list[float]]) -> float:
        names = self._heldout or (_TOTAL,)
        for name in names:
            if name not in self._first and 2 * sum(map(math.isfinite, scores[name])) >= len(scores[name]):
                self._first[name] = scores[name]
        if any(name not in self._first for name in names):
            return math.nan  # it has never had enough scores to be compared with
        return heldout_gain(self._first, {name: scores[name] for name in names})

    def _keep_best(self, iteration: int, gain: float) -> bool:
        """Whether this is the best evaluation; the one before training has no checkpoint, it is the plain model."""
        better = math.isfinite(gain) and (self._best is None or gain > self._best.gain)
        if iteration == 0 or not better:
            return False
        self._best = Best(iteration, gain)
        return True

    def _watch(
        self, alarm: _Alarm, name: str, iteration: int, scores: list[float], trained: list[float]
    ) -> list[Alert]:
        """Follow one score; the alert if this evaluation raises its alarm."""
        before = self._streaks.get(name)
        streak = follow(before, iteration, scores, trained, compare=alarm.compare, tolerance=self._tolerance)
        raised = streak.count >= self._patience and not streak.alarmed
        self._streaks[name] = replace(streak, alarmed=streak.alarmed or raised)
        return [_alert(alarm, name, streak, scores, trained)] if raised else []


def _alert(alarm: _Alarm, name: str, streak: Streak, scores: list[float], trained: list[float]) -> Alert:
    fall, rise = paired(streak.best, scores), alarm.compare(streak.trained, trained)
    return Alert(
        f"{alarm.title}: held-out {name} falls",
        f"held-out {name} fell from {fall.before:.4g} (iteration {streak.since}) to {fall.after:.4g}, by "
        f"{-fall.standard_errors:.1f} standard errors, while the trained reward of {alarm.trained_on} rose from "
        f"{rise.before:.4g} to {rise.after:.4g}, by {rise.standard_errors:.1f}: {streak.count} evaluations in a row. "
        f"{alarm.remedy}.",
    )


def _streak(values: dict[str, Any]) -> Streak:
    whole: dict[str, Any] = {name: _nans(value) if isinstance(value, list) else value for name, value in values.items()}
    return Streak(**whole)


def _nans(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
