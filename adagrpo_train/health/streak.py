"""The pattern of an alarm: one score falls while another rises, evaluation after evaluation. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from adagrpo_train.health.change import Change, paired

Compare = Callable[[Sequence[float], Sequence[float]], Change]


@dataclass(frozen=True)
class Streak:
    """How often in a row a score lay below its best while a trained one lay above what it was then.

    Comparing with the best, not with the evaluation before, sees a slow fall whose single steps drown in noise.

    Attributes:
        since: iteration of the best evaluation so far.
        best: scores of its images, NaN where missing.
        trained: trained rewards at that time.
        previous: scores of the last evaluation.
        count: evaluations in a row.
        alarmed: whether this streak has raised its alarm.
    """

    since: int
    best: list[float]
    trained: list[float]
    previous: list[float]
    count: int = 0
    alarmed: bool = False


def follow(
    streak: Streak | None,
    iteration: int,
    scores: list[float],
    trained: list[float],
    *,
    compare: Compare,
    tolerance: float,
) -> Streak:
    """The streak after one more evaluation.

    An evaluation counts if the score lies more than `tolerance` standard errors below its best and the trained reward
    as much above what it was then, unless the score is on its way back: as much above the evaluation before. One that
    does not count ends the streak; one without scores to compare leaves it as it is.

    Args:
        scores: [images] in their fixed order, NaN where missing.
        trained: trained rewards now.
        compare: of trained rewards then and now.
        tolerance: in standard errors, >= 0.
    """
    if streak is None or sum(map(math.isfinite, streak.best)) < 2:
        return Streak(iteration, scores, trained, scores)
    if not streak.trained:  # before the first iteration nothing was trained on: what came first stands for it
        streak = replace(streak, trained=trained)
    fall, step = paired(streak.best, scores), paired(streak.previous, scores)
    if fall.gain > 0:
        return Streak(iteration, scores, trained, scores)
    rise = compare(streak.trained, trained)
    if not (fall.standard_error >= 0 and rise.standard_error >= 0):
        return streak
    counts = fall.standard_errors < -tolerance and rise.standard_errors > tolerance
    if not counts or step.standard_errors > tolerance:
        return replace(streak, previous=scores, count=0, alarmed=False)
    return replace(streak, previous=scores, count=streak.count + 1)
