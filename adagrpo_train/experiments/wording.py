"""Words for what a study has found: findings, tables, bars and panels, as plain data for pages and files."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from adagrpo_train.experiments.comparing import Cell, Compared, arms_of, compare_figures, curve_points, mean
from adagrpo_train.experiments.study import Analysis, Study
from adagrpo_train.functional.statistics import Comparison, bootstrap_interval
from adagrpo_train.runtime.files import without_nan

AXES = {"iteration": "iterations", "evaluations": "network evaluations", "seconds": "seconds of training"}


def findings(study: Study, score: str, when: str, compared: Sequence[Compared]) -> list[str]:
    """A sentence for each comparison, and for each level how often it is ahead where there are several cells."""
    said = []
    for level in study.factors[study.compare]:
        own = [entry for entry in compared if entry.level == level and entry.comparison.images]
        if len(own) > 1:
            ahead = sum(entry.comparison.difference > 0 for entry in own)
            p = float(stats.binomtest(ahead, len(own)).pvalue)
            found = sum(entry.found for entry in own)
            said.append(
                f"{level} against {study.against}, held-out {score} {when}: ahead in {ahead} of {len(own)} cells (sign "
                f"test p = {_p_text(p)}); {found or 'none'} of these differences {'is' if found == 1 else 'are'} found "
                "by itself"
            )
    for entry in compared:
        if len(compared) > len(study.factors[study.compare]) and not entry.found:
            continue  # of many cells only what was found; the tables hold them all
        where = f" ({entry.cell})" if entry.cell else ""
        said.append(
            f"{entry.level} against {study.against}{where}, held-out {score} {when}: "
            f"{_difference_text(entry.comparison)} over {entry.comparison.seeds} seeds, p = {_p_text(entry.p)}: "
            f"{_verdict(entry)}"
        )
    return said


def score_table(analysis: Analysis, cells: Sequence[Cell]) -> dict[str, Any]:
    """Scores at the end of every run, and what they gained."""
    rows: list[list[str]] = []
    for cell, level, records in arms_of(cells):
        texts = []
        for score in analysis.scores:
            own = [record for record in records if score in record.scores]
            gains = [mean(record.last(score)) - mean(record.held_out(score, 0)) for record in own]
            known = [gain for gain in gains if math.isfinite(gain)]
            texts += [_mean_text([mean(record.last(score)) for record in own])]
            texts += [f"{np.mean(known):+.3f}" if known else ""]
        rows.append([*_names(cells, cell, level), str(len(records)), *texts])
    columns = [text for score in analysis.scores for text in (score, "gain")]
    return {
        "title": analysis.title or "Held-out scores at the end",
        "note": "Mean over seeds with its 95 % bootstrap interval over seeds; gain since before training.",
        "columns": [*(["cell"] if len(cells) > 1 else []), "arm", "seeds", *columns],
        "rows": rows,
    }


def difference_table(title: str, study: Study, compared: Sequence[Compared]) -> dict[str, Any]:
    """A row for each comparison."""
    several = len({entry.cell for entry in compared}) > 1
    rows = [
        [
            *([entry.cell] if several else []),
            entry.level,
            str(entry.comparison.seeds),
            str(entry.comparison.images),
            _difference_text(entry.comparison),
            _p_text(entry.comparison.p_seeds),
            _p_text(entry.comparison.p_images),
            _p_text(entry.p),
            _verdict(entry),
        ]
        for entry in compared
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


def difference_bars(title: str, study: Study, compared: Sequence[Compared]) -> dict[str, Any]:
    """A bar for each comparison."""
    several = len({entry.cell for entry in compared}) > 1
    return {
        "title": title,
        "y_label": f"difference to {study.against}",
        "note": "95 % bootstrap intervals over seeds and images.",
        "groups": [
            {
                "label": f"{cell}: {level}" if several else level,
                "value": comparison.difference,
                "low": without_nan(comparison.low),
                "high": without_nan(comparison.high),
            }
            for cell, level, comparison, _ in compared
            if comparison.images
        ],
    }


def curve_panel(analysis: Analysis, cell: Cell, score: str) -> dict[str, Any] | None:
    """A score over what was spent, with the interval of the mean over seeds; None where no run has it."""
    scored = {level: [own for own in records if score in own.scores] for level, records in cell.levels.items()}
    series = [
        {"label": level, "points": curve_points(records, score, analysis.x)}
        for level, records in scored.items()
        if records
    ]
    if not series:
        return None  # a reward that this cell does not have
    title = analysis.title or f"Held-out {score} over {AXES[analysis.x]}"
    return {
        "title": f"{title}: {cell.name}" if cell.name else title,
        "x_label": AXES[analysis.x],
        "y_label": f"held-out {score}",
        "note": "Mean over seeds; bands are 95 % bootstrap intervals of that mean over seeds.",
        "series": series,
    }


def training_table(study: Study, analysis: Analysis, cells: Sequence[Cell]) -> dict[str, Any]:
    """Figures of the training, each averaged over the iterations of a run."""
    rows: list[list[str]] = []
    for cell, level, records in arms_of(cells):
        figures = [_mean_text([record.mean(metric) for record in records]) for metric in analysis.metrics]
        rows.append([*_names(cells, cell, level), str(len(records)), *figures])
    return {
        "title": analysis.title or "Figures of the training",
        "note": "Mean over the iterations of a run, then over seeds, with its 95 % bootstrap interval over seeds.",
        "columns": [*_headings(study, cells), "seeds", *analysis.metrics],
        "rows": rows,
    }


def change_table(study: Study, analysis: Analysis, cells: Sequence[Cell]) -> dict[str, Any]:
    """Two figures of the same runs, compared over seeds."""
    rows: list[list[str]] = []
    for first, second in analysis.pairs:
        for cell, level, records in arms_of(cells):
            if not records:
                continue
            comparison = compare_figures(records, first, second)
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
    return {
        "title": f"{analysis.title or 'Figures of the training'}: change within the same runs",
        "note": "Paired over seeds: 95 % bootstrap interval and t-test.",
        "columns": [*_headings(study, cells), "figures", "means", "change", "p"],
        "rows": rows,
    }


def _verdict(entry: Compared) -> str:
    if entry.comparison.images and entry.comparison.seeds < 2:
        return "one seed says nothing about others"
    return entry.comparison.verdict(entry.p)


def _headings(study: Study, cells: Sequence[Cell]) -> list[str]:
    return [*(["cell"] if len(cells) > 1 else []), study.compare]


def _names(cells: Sequence[Cell], cell: Cell, level: str) -> list[str]:
    return [*([cell.name] if len(cells) > 1 else []), level]


def _mean_text(values: Sequence[float]) -> str:
    present = np.array([value for value in values if math.isfinite(value)])
    if not len(present):
        return ""
    interval = bootstrap_interval(present)
    ends = f" [{interval.low:.3f}, {interval.high:.3f}]" if math.isfinite(interval.low) else ""
    return f"{present.mean():.3f}{ends}"


def _difference_text(comparison: Comparison) -> str:
    if not comparison.images:
        return ""
    if math.isnan(comparison.low):
        return f"{comparison.difference:+.4f}"
    return f"{comparison.difference:+.4f} [{comparison.low:+.4f}, {comparison.high:+.4f}]"


def _p_text(p: float) -> str:
    return "" if math.isnan(p) else f"{p:.2g}"
