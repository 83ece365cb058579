"""Two models on the same prompts and the same noise: what changed, how surely, and on which images most."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from adagrpo_train.errors import ConfigError
from adagrpo_train.functional.statistics import Comparison, Interval, holm, paired_comparison, win_rate
from adagrpo_train.reports.scored import ALL, Row, Scored, unit_means
from adagrpo_train.runtime.files import without_nan


@dataclass(frozen=True)
class Change:
    """One score, of all prompts or of one class.

    Attributes:
        paired: means, difference, interval and p-values over the prompts that have both scores.
        wins: share of them on which the second model scores higher; ties count half.
        wins_interval: its 95 % interval.
        p: the p-value of the images' test; among the classes of a score after Holm's correction.
    """

    paired: Comparison
    wins: float
    wins_interval: Interval
    p: float

    @property
    def verdict(self) -> str:
        """higher, lower, that no difference was found, or that nothing has both scores."""
        return self.paired.verdict(self.p)

    def row(self) -> Row:
        """As JSON; null where there is too little to tell."""
        paired = self.paired
        figures = {
            "observations": paired.images,
            "before": paired.before,
            "after": paired.after,
            "difference": paired.difference,
            "low": paired.low,
            "high": paired.high,
            "p": self.p,
            "wins": self.wins,
            "wins_low": self.wins_interval.low,
            "wins_high": self.wins_interval.high,
        }
        return without_nan(figures) | {"verdict": self.verdict}


Changes = dict[str, dict[str, Change]]
"""Score -> class -> change; the first class is ALL."""


def compare(before: Scored, after: Scored) -> Changes:
    """Every score that both have, over all prompts and by class.

    An image counts only where both models have the score. See Scored.units for what an observation is.

    Raises:
        ConfigError: as of check_pairs().
    """
    check_pairs(before, after)
    return {name: _of_score(before, after, name) for name in after.scores if name in before.scores}


def check_pairs(before: Scored, after: Scored) -> None:
    """Refuse what compare() cannot compare.

    Raises:
        ConfigError: the two were not scored on the same prompts and noise by the same rewards.
    """
    remedy = "evaluate both with the same settings: adagrpo-eval resume=... against=..."
    ours, theirs = (list(zip(s.texts, s.classes, s.samples, strict=True)) for s in (after, before))
    if ours != theirs:
        different = [pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]]
        where = f"the first that differ are {different[0][0]} and {different[0][1]}" if different else "one goes on"
        raise ConfigError(
            f"against: {len(after)} images of {after.subject}, {len(before)} of {before.subject}, and not of the same "
            f"prompts and samples: {where}; {remedy}"
        )
    for name in sorted(before.facts.keys() | after.facts.keys()):
        fault = _differing(name, before.facts.get(name), after.facts.get(name))
        if fault:
            raise ConfigError(f"against: {fault} between {before.subject} and {after.subject}; {remedy}")
    if not before.scores.keys() & after.scores.keys():
        raise ConfigError(f"against: {before.subject} and {after.subject} have no score in common; {remedy}")


def as_json(before: Scored, after: Scored, changes: Changes) -> Row:
    """What comparison.json holds."""
    scores = {name: {label: change.row() for label, change in rows.items()} for name, rows in changes.items()}
    return {"before": before.subject, "after": after.subject, "images": len(after), "scores": scores}


def largest(before: Scored, after: Scored, score: str, count: int) -> tuple[list[int], list[int]]:
    """Rows of the images that gained most, the greatest first, and of those that lost most; at most so many each."""
    gain = after.scores[score] - before.scores[score]
    gain = np.where(np.isfinite(gain), gain, 0.0)
    order = np.argsort(-gain, kind="stable")
    gained = [int(row) for row in order[:count] if gain[row] > 0]
    lost = [int(row) for row in order[::-1][:count] if gain[row] < 0]
    return gained, lost


def _of_score(before: Scored, after: Scored, name: str) -> dict[str, Change]:
    first, second, units = before.scores[name], after.scores[name], after.units
    both = np.isfinite(first) & np.isfinite(second)
    pairs = [np.where(both, values, math.nan) for values in (first, second)]
    found = {label: _paired(*(unit_means(values[rows], units[rows]) for values in pairs)) for label, rows in
             after.by_class()}  # fmt: skip
    classes = [label for label in found if label != ALL]
    adjusted = dict(zip(classes, holm([found[label][0].p for label in classes]), strict=True))
    return {
        label: Change(paired, *wins, adjusted.get(label, paired.p)) for label, (paired, wins) in found.items()
    }  # fmt: skip


def _paired(first: np.ndarray, second: np.ndarray) -> tuple[Comparison, tuple[float, Interval]]:
    return paired_comparison(first[None], second[None]), win_rate(first, second)


def _differing(name: str, first: Any, second: Any) -> str:
    """What differs in a fact, "" if nothing does; of rewards only those that both have are compared."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return f"{name} differs ({first or 'not recorded'} and {second or 'not recorded'})" if first != second else ""
    if name == "rewards":
        changed = [reward for reward in first.keys() & second.keys() if first[reward] != second[reward]]
        return f"the fingerprint of reward {changed[0]} differs" if changed else ""
    changed = [key for key in sorted(first.keys() | second.keys()) if first.get(key) != second.get(key)]
    return f"{name}.{changed[0]} differs ({first.get(changed[0])} and {second.get(changed[0])})" if changed else ""
