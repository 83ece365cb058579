"""What the records of a study say: its analyses one after the other, each compared and put into words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from adagrpo_train.experiments import wording
from adagrpo_train.experiments.comparing import Cell, cells_of, compare_at_equal, compare_levels, least_spent
from adagrpo_train.experiments.study import Analysis, Run, Study


@dataclass
class Results:
    """Everything that is said about a study."""

    findings: list[str] = field(default_factory=list)
    panels: list[dict[str, Any]] = field(default_factory=list)
    bars: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)


def analyse(study: Study, runs: Sequence[Run]) -> Results:
    """Findings, curves and tables of the finished runs of a study."""
    results, cells = Results(), list(cells_of(study, runs))
    for analysis in study.analyses:
        _KINDS[analysis.kind](study, analysis, cells, results)
    return results


def _final(study: Study, analysis: Analysis, cells: list[Cell], results: Results) -> None:
    """Scores at the end of every run."""
    results.tables.append(wording.score_table(analysis, cells))
    for number, score in enumerate(analysis.scores):
        compared = compare_levels(study, cells, score, lambda record, name: record.last(name))
        title = f"Held-out {score} at the end, against {study.against}"
        results.tables.append(wording.difference_table(title, study, compared))
        results.bars.append(wording.difference_bars(title, study, compared))
        if number == 0:
            results.findings += wording.findings(study, score, "at the end", compared)


def _equal(study: Study, analysis: Analysis, cells: list[Cell], results: Results) -> None:
    """Scores where every run of a cell has spent as much as the thriftiest of them in all."""
    spent = ", ".join(f"{least_spent(cell, analysis.x):,.0f}" for cell in cells)
    when = f"at equal {wording.AXES[analysis.x]} ({spent})"
    for number, score in enumerate(analysis.scores):
        compared = compare_at_equal(study, cells, score, analysis.x)
        title = f"Held-out {score} {when}, against {study.against}"
        results.tables.append(wording.difference_table(title, study, compared))
        if number == 0:
            results.findings += wording.findings(study, score, when, compared)


def _curve(_study: Study, analysis: Analysis, cells: list[Cell], results: Results) -> None:
    """Scores over what was spent."""
    panels = (wording.curve_panel(analysis, cell, score) for cell in cells for score in analysis.scores)
    results.panels += [panel for panel in panels if panel]


def _training(study: Study, analysis: Analysis, cells: list[Cell], results: Results) -> None:
    """Figures of the training, and how they change within a run."""
    results.tables.append(wording.training_table(study, analysis, cells))
    if analysis.pairs:
        results.tables.append(wording.change_table(study, analysis, cells))


_KINDS: dict[str, Callable[[Study, Analysis, list[Cell], Results], None]] = {
    "final": _final,
    "equal": _equal,
    "curve": _curve,
    "training": _training,
}
