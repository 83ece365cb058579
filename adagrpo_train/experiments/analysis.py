"""What the records of a study say: tables, curves and findings, as plain data that pages and files are made of."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from adagrpo_train.experiments.records import Record
from adagrpo_train.experiments.study import Analysis, Arm, Run, Study
from adagrpo_train.functional.statistics import Comparison, bootstrap_interval, holm, paired_comparison

ALPHA = 0.05
_AXES = {"iteration": "iterations", "evaluations": "network evaluations", "seconds": "seconds of training"}

Matrix = Callable[[Record, str], np.ndarray]
"""(record, score) -> scores [images] of a run."""


@dataclass
class Results:
    """Everything that is said about a study."""

    findings: list[str] = field(default_factory=list)
    panels: list[dict[str, Any]] = field(default_factory=list)
    bars: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Cell:
    """Arms that differ in the compared factor alone."""

    name: str
    levels: dict[str, list[Record]]  # level -> its finished runs, by seed


def analyse(study: Study, runs: Sequence[Run]) -> Results:
    """Findings, curves and tables of the finished runs of a study."""
    results, cells = Results(), list(_cells(study, runs))
    for analysis in study.analyses:
        _KINDS[analysis.kind](study, analysis, cells, results)
    return results


def _cells(study: Study, runs: Sequence[Run]) -> Iterator[_Cell]:
    by_cell: dict[tuple[str, ...], dict[str, list[Record]]] = {}
    for run in runs:
        arm: Arm = run.arm
        levels = by_cell.setdefault(arm.without(study.compare), {level: [] for level in study.factors[study.compare]})
        levels[arm.level(study.compare)].append(Record(run))
    for names, levels in by_cell.items():
        yield _Cell(", ".join(names), levels)


def _final(study: Study, analysis: Analysis, cells: list[_Cell], results: Results) -> None:
    """Scores at the end of every run."""
    results.tables.append(_score_table(analysis, cells))
    for number, score in enumerate(analysis.scores):
        compared = _compare(study, cells, score, lambda record, name: record.last(name))
        title = f"Held-out {score} at the end, against {study.against}"
        results.tables.append(_difference_table(title, study, compared))
        results.bars.append(_difference_bars(title, study, compared))
        if number == 0:
            results.findings += _findings(study, score, "at the end", compared)


def _equal(study: Study, analysis: Analysis, cells: list[_Cell], results: Results) -> None:
    """Scores where every run of a cell has spent as much as the thriftiest of them in all."""
    budgets = {
        cell.name: min(
            (record.spent(analysis.x, record.iterations[-1]) for records in cell.levels.values() for record in records),
            default=math.nan,
        )
        for cell in cells
    }
    for number, score in enumerate(analysis.scores):
        compared = [
            entry
            for cell in cells
            for entry in _compare(
                study, [cell], score, lambda record, name, at=budgets[cell.name]: record.at(name, analysis.x, at)
            )
        ]
        compared = _adjusted([(name, level, comparison) for name, level, comparison, _ in compared])
        spent = ", ".join(f"{budget:,.0f}" for budget in budgets.values())
        when = f"at equal {_AXES[analysis.x]} ({spent})"
        results.tables.append(_difference_table(f"Held-out {score} {when}, against {study.against}", study, compared))
        if number == 0:
            results.findings += _findings(study, score, when, compared)


def _curve(study: Study, analysis: Analysis, cells: list[_Cell], results: Results) -> None:
    """Scores over what was spent, with the interval of the mean over seeds."""
    for cell in cells:
        for score in analysis.scores:
            scored = {level: [own for own in records if score in own.scores] for level, records in cell.levels.items()}
            series = [
                {"label": level, "points": _points(records, score, analysis.x)}
                for level, records in scored.items()
                if records
            ]
            if not series:
                continue  # a reward that this cell does not have
            results.panels.append(
                {
                    "title": _titled(analysis.title or f"Held-out {score} over {_AXES[analysis.x]}", cell),
                    "x_label": _AXES[analysis.x],
                    "y_label": f"held-out {score}",
                    "note": "Mean over seeds; bands are 95 % bootstrap intervals of that mean over seeds.",
                    "series": series,
                }
            )


def _training(study: Study, analysis: Analysis, cells: list[_Cell], results: Results) -> None:
    """Figures of the training, each averaged over the iterations of a run."""
    rows: list[list[str]] = []
    for cell, level, records in _arms(cells):
        figures = [_mean_text([record.mean(metric) for record in records]) for metric in analysis.metrics]
        rows.append([*_names(cells, cell, level), str(len(records)), *figures])
    results.tables.append(
        {
            "title": analysis.title or "Figures of the training",
            "note": "Mean over the iterations of a run, then over seeds, with its 95 % bootstrap interval over seeds.",
            "columns": [*_headings(study, cells), "seeds", *analysis.metrics],
            "rows": rows,
        }
    )
    if analysis.pairs:
        _paired_figures(study, analysis, cells, results)


def _paired_figures(study: Study, analysis: Analysis, cells: list[_Cell], results: Results) -> None:
    """Two figures of the same runs, compared over seeds."""
    rows: list[list[str]] = []
    for first, second in analysis.pairs:
        for cell, level, records in _arms(cells):
            before, after = (np.array([[record.mean(metric)] for record in records]) for metric in (first, second))
            if not len(records):
                continue
            comparison = paired_comparison(before, after)
            if not comparison.images:
                continue  # an arm without these figures
            rows.append(
                [
                    *_names(cells, cell, level),
                    f"{first} -> {second}",
                    f"{comparison.before:.3f} -> {comparison.after:.3f}",
                    _difference_text(comparison),
                    _p_text(comparison.p_seeds),
                ]
            )
    results.tables.append(
        {
            "title": f"{analysis.title or 'Figures of the training'}: change within the same runs",
            "note": "Paired over seeds: 95 % bootstrap interval and t-test.",
            "columns": [*_headings(study, cells), "figures", "means", "change", "p"],
            "rows": rows,
        }
    )


_Compared = tuple[str, str, Comparison, float]
"""Cell, level, comparison with the reference level, and its p-value after Holm."""


def _compare(study: Study, cells: list[_Cell], score: str, matrix: Matrix) -> list[_Compared]:
    """Every level against the reference, on the seeds that both have finished."""
    compared: list[tuple[str, str, Comparison]] = []
    for cell in cells:
        reference = {record.run.seed: record for record in cell.levels[study.against]}
        for level, records in cell.levels.items():
            pairs = [(reference[record.run.seed], record) for record in records if record.run.seed in reference]
            if level == study.against or not pairs:
                continue
            if not all(score in record.scores for pair in pairs for record in pair):
                continue  # a reward that this cell does not have
            before, after = (np.stack([matrix(pair[side], score) for pair in pairs]) for side in (0, 1))
            compared.append((cell.name, level, paired_comparison(before, after, alpha=ALPHA)))
    return _adjusted(compared)


def _adjusted(compared: Sequence[tuple[str, str, Comparison]]) -> list[_Compared]:
    """With p-values for as many comparisons as there are."""
    adjusted = holm([comparison.p for _, _, comparison in compared])
    return [(*entry, p) for entry, p in zip(compared, adjusted, strict=True)]


def _found(comparison: Comparison, p: float) -> bool:
    return comparison.seeds > 1 and comparison.found and p < ALPHA


def _verdict(comparison: Comparison, p: float) -> str:
    if not comparison.images:
        return "nothing to compare"
    if comparison.seeds < 2:
        return "one seed says nothing about others"
    if not _found(comparison, p):
        return "no difference found"
    return "higher" if comparison.difference > 0 else "lower"


def _findings(study: Study, score: str, when: str, compared: list[_Compared]) -> list[str]:
    """A sentence for each comparison, and for each level how often it is ahead where there are several cells."""
    findings = []
    for level in study.factors[study.compare]:
        own = [entry for entry in compared if entry[1] == level and entry[2].images]
        if len(own) > 1:
            ahead = sum(comparison.difference > 0 for _, _, comparison, _ in own)
            p = float(stats.binomtest(ahead, len(own)).pvalue)
            found = sum(_found(comparison, p_adjusted) for _, _, comparison, p_adjusted in own)
            findings.append(
                f"{level} against {study.against}, held-out {score} {when}: ahead in {ahead} of {len(own)} cells (sign "
                f"test p = {_p_text(p)}); {found or 'none'} of these differences {'is' if found == 1 else 'are'} found "
                "by itself"
            )
    for cell, level, comparison, p in compared:
        if len(compared) > len(study.factors[study.compare]) and not _found(comparison, p):
            continue  # of many cells only what was found; the tables hold them all
        where = f" ({cell})" if cell else ""
        findings.append(
            f"{level} against {study.against}{where}, held-out {score} {when}: {_difference_text(comparison)} over "
            f"{comparison.seeds} seeds, p = {_p_text(p)}: {_verdict(comparison, p)}"
        )
    return findings


def _score_table(analysis: Analysis, cells: list[_Cell]) -> dict[str, Any]:
    rows: list[list[str]] = []
    for cell, level, records in _arms(cells):
        texts = []
        for score in analysis.scores:
            own = [record for record in records if score in record.scores]
            gains = [_mean(record.last(score)) - _mean(record.held_out(score, 0)) for record in own]
            known = [gain for gain in gains if math.isfinite(gain)]
            texts += [_mean_text([_mean(record.last(score)) for record in own])]
            texts += [f"{np.mean(known):+.3f}" if known else ""]
        rows.append([*_names(cells, cell, level), str(len(records)), *texts])
    columns = [text for score in analysis.scores for text in (score, "gain")]
    return {
        "title": analysis.title or "Held-out scores at the end",
        "note": "Mean over seeds with its 95 % bootstrap interval over seeds; gain since before training.",
        "columns": [*(["cell"] if len(cells) > 1 else []), "arm", "seeds", *columns],
        "rows": rows,
    }


def _difference_table(title: str, study: Study, compared: list[_Compared]) -> dict[str, Any]:
    several = len({cell for cell, *_ in compared}) > 1
    rows = [
        [
            *([cell] if several else []),
            level,
            str(comparison.seeds),
            str(comparison.images),
            _difference_text(comparison),
            _p_text(comparison.p_seeds),
            _p_text(comparison.p_images),
            _p_text(p),
            _verdict(comparison, p),
        ]
        for cell, level, comparison, p in compared
    ]
    return {
        "title": title,
        "note": "Paired by seed and image. Interval: 95 %, bootstrap over seeds and images. p: t-test over seeds, "
        "Wilcoxon over images (which says nothing about other seeds), the former after Holm for all rows. A difference "
        "is found where the interval leaves 0 out and the corrected p is below 0.05.",
        "columns": [
            *(["cell"] if several else []),
            study.compare,
            "seeds",
            "images",
            "difference",
            "p seeds",
            "p images",
            "p corrected",
            "verdict",
        ],
        "rows": rows,
    }


def _difference_bars(title: str, study: Study, compared: list[_Compared]) -> dict[str, Any]:
    several = len({cell for cell, *_ in compared}) > 1
    return {
        "title": title,
        "y_label": f"difference to {study.against}",
        "note": "95 % bootstrap intervals over seeds and images.",
        "groups": [
            {
                "label": f"{cell}: {level}" if several else level,
                "value": comparison.difference,
                "low": _number(comparison.low),
                "high": _number(comparison.high),
            }
            for cell, level, comparison, _ in compared
            if comparison.images
        ],
    }


def _points(records: Sequence[Record], score: str, x: str) -> list[list[float | None]]:
    """[x, mean, low, high] at each evaluation that all runs have made."""
    common = sorted(set.intersection(*(set(record.iterations) for record in records)))
    points = []
    for iteration in common:
        values = np.array([_mean(record.held_out(score, iteration)) for record in records])
        if not np.isfinite(values).all():
            continue  # a run without a single score there: the mean of the others is one of other seeds
        interval = bootstrap_interval(values)
        spent = float(np.mean([record.spent(x, iteration) for record in records]))
        points.append([spent, float(values.mean()), _number(interval.low), _number(interval.high)])
    return points


def _arms(cells: list[_Cell]) -> Iterator[tuple[_Cell, str, list[Record]]]:
    for cell in cells:
        for level, records in cell.levels.items():
            yield cell, level, records


def _headings(study: Study, cells: list[_Cell]) -> list[str]:
    return [*(["cell"] if len(cells) > 1 else []), study.compare]


def _names(cells: list[_Cell], cell: _Cell, level: str) -> list[str]:
    return [*([cell.name] if len(cells) > 1 else []), level]


def _titled(title: str, cell: _Cell) -> str:
    return f"{title}: {cell.name}" if cell.name else title


def _mean_text(values: Sequence[float]) -> str:
    present = np.array([value for value in values if math.isfinite(value)])
    if not len(present):
        return ""
    interval = bootstrap_interval(present)
    ends = f" [{interval.low:.3f}, {interval.high:.3f}]" if math.isfinite(interval.low) else ""
    return f"{present.mean():.3f}{ends}"


def _mean(scores: np.ndarray) -> float:
    """Over what is not missing; NaN of nothing."""
    present = scores[np.isfinite(scores)]
    return float(present.mean()) if len(present) else math.nan


def _difference_text(comparison: Comparison) -> str:
    if not comparison.images:
        return ""
    if math.isnan(comparison.low):
        return f"{comparison.difference:+.4f}"
    return f"{comparison.difference:+.4f} [{comparison.low:+.4f}, {comparison.high:+.4f}]"


def _p_text(p: float) -> str:
    return "" if math.isnan(p) else f"{p:.2g}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


_KINDS: dict[str, Callable[[Study, Analysis, list[_Cell], Results], None]] = {
    "final": _final,
    "equal": _equal,
    "curve": _curve,
    "training": _training,
}
