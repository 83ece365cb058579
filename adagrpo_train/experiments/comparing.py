"""Which runs of a study are compared with which, and how sure their differences are: numbers without words."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from adagrpo_train.experiments.records import Record
from adagrpo_train.experiments.study import Arm, Run, Study
from adagrpo_train.functional.statistics import Comparison, bootstrap_interval, holm, paired_comparison
from adagrpo_train.runtime.files import without_nan

ALPHA = 0.05

Matrix = Callable[[Record, str], np.ndarray]
"""(record, score) -> scores [images] of a run."""


@dataclass(frozen=True)
class Cell:
    """Arms that differ in the compared factor alone."""

    name: str
    levels: dict[str, list[Record]]  # level -> its finished runs, by seed


class Compared(NamedTuple):
    """A level beside the reference level of its cell."""

    cell: str
    level: str
    comparison: Comparison
    p: float  # after Holm's correction

    @property
    def found(self) -> bool:
        """Whether there is a difference; one seed finds none."""
        return self.comparison.seeds > 1 and self.comparison.found and self.p < ALPHA


def cells_of(study: Study, runs: Sequence[Run]) -> Iterator[Cell]:
    """The finished runs by the levels of all factors but the compared one."""
    by_cell: dict[tuple[str, ...], dict[str, list[Record]]] = {}
    for run in runs:
        arm: Arm = run.arm
        levels = by_cell.setdefault(arm.without(study.compare), {level: [] for level in study.factors[study.compare]})
        levels[arm.level(study.compare)].append(Record(run))
    for names, levels in by_cell.items():
        yield Cell(", ".join(names), levels)


def arms_of(cells: Sequence[Cell]) -> Iterator[tuple[Cell, str, list[Record]]]:
    """Each cell with each of its levels and the runs of that."""
    for cell in cells:
        for level, records in cell.levels.items():
            yield cell, level, records


def compare_levels(study: Study, cells: Sequence[Cell], score: str, matrix: Matrix) -> list[Compared]:
    """Every level against the reference, on the seeds that both have finished."""
    return _adjusted(list(_level_pairs(study, cells, score, matrix)))


def compare_at_equal(study: Study, cells: Sequence[Cell], score: str, x: str) -> list[Compared]:
    """The same where every run of a cell has spent as much of `x` as the thriftiest of them in all."""
    compared: list[tuple[str, str, Comparison]] = []
    for cell in cells:
        budget = least_spent(cell, x)
        compared += _level_pairs(study, [cell], score, lambda record, name, at=budget: record.at(name, x, at))
    return _adjusted(compared)


def least_spent(cell: Cell, x: str) -> float:
    """How much of `x` the thriftiest run of a cell has spent, NaN without runs."""
    spent = (record.spent(x, record.iterations[-1]) for records in cell.levels.values() for record in records)
    return min(spent, default=math.nan)


def compare_figures(records: Sequence[Record], first: str, second: str) -> Comparison:
    """Two figures of the training of the same runs, over their seeds."""
    before, after = (np.array([[record.mean(metric)] for record in records]) for metric in (first, second))
    return paired_comparison(before, after)


def curve_points(records: Sequence[Record], score: str, x: str) -> list[list[float | None]]:
    """[x, mean, low, high] at each evaluation that all runs have made."""
    common = sorted(set.intersection(*(set(record.iterations) for record in records)))
    points = []
    for iteration in common:
        values = np.array([mean(record.held_out(score, iteration)) for record in records])
        if not np.isfinite(values).all():
            continue  # a run without a single score there: the mean of the others is one of other seeds
        interval = bootstrap_interval(values)
        spent = float(np.mean([record.spent(x, iteration) for record in records]))
        points.append([spent, float(values.mean()), *without_nan([*interval])])
    return points


def mean(scores: np.ndarray) -> float:
    """Over what is not missing; NaN of nothing."""
    present = scores[np.isfinite(scores)]
    return float(present.mean()) if len(present) else math.nan


def _level_pairs(
    study: Study, cells: Sequence[Cell], score: str, matrix: Matrix
) -> Iterator[tuple[str, str, Comparison]]:
    for cell in cells:
        reference = {record.run.seed: record for record in cell.levels[study.against]}
        for level, records in cell.levels.items():
            pairs = [(reference[record.run.seed], record) for record in records if record.run.seed in reference]
            if level == study.against or not pairs:
                continue
            if not all(score in record.scores for pair in pairs for record in pair):
                continue  # a reward that this cell does not have
            before, after = (np.stack([matrix(pair[side], score) for pair in pairs]) for side in (0, 1))
            yield cell.name, level, paired_comparison(before, after, alpha=ALPHA)


def _adjusted(compared: Sequence[tuple[str, str, Comparison]]) -> list[Compared]:
    """With p-values for as many comparisons as there are."""
    adjusted = holm([comparison.p for _, _, comparison in compared])
    return [Compared(*entry, p) for entry, p in zip(compared, adjusted, strict=True)]
