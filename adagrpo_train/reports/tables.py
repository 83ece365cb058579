"""Tables of evaluations and comparisons for the console."""

import math

from rich.table import Table

from adagrpo_train.functional.statistics import NOT_FOUND, NOTHING, Interval
from adagrpo_train.reports.comparison import Changes
from adagrpo_train.reports.scored import ALL, Row, Scored


def scores_table(scored: Scored) -> Table:
    """Mean and standard error of every score, by class of prompt."""
    table = Table(title=f"{scored.subject}: mean +- standard error", title_justify="left", title_style="bold")
    table.add_column("class")
    table.add_column("n", justify="right")
    summary = scored.summary()
    for name in summary:
        table.add_column(name, justify="right", no_wrap=True)
    labels = [label for label, _ in scored.by_class()]
    for label in [*labels[1:], ALL]:
        cells = [rows[label] for rows in summary.values()]
        if label == ALL and len(labels) > 1:
            table.add_section()
        counts = {cell["observations"] for cell in cells}
        common = str(*counts) if len(counts) == 1 else ""  # else each says its own
        table.add_row(
            label, common, *(_mean(cell) if common else f"{_mean(cell)} (n {cell['observations']})" for cell in cells)
        )
    return table


def changes_table(before: Scored, after: Scored, changes: Changes) -> Table:
    """Every score of all prompts and of each class: means, difference with interval, p-value, wins, verdict."""
    table = Table(title=f"{before.subject}  ->  {after.subject}", title_justify="left", title_style="bold")
    for name in ("score", "class"):
        table.add_column(name)
    for name in ("n", "before", "after", "difference [95 %]", "p", "wins [95 %]"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for score, rows in changes.items():
        for label, change in rows.items():
            paired, verdict = change.paired, change.verdict
            if verdict == NOTHING:
                table.add_row(score if label == ALL else "", label, "0", *[""] * 5, verdict, style="dim")
                continue
            table.add_row(
                score if label == ALL else "",
                label,
                str(paired.images),
                f"{paired.before:.4f}",
                f"{paired.after:.4f}",
                f"{paired.difference:+.4f} {_ends(Interval(paired.low, paired.high), '+.4f')}",
                f"{change.p:.2g}",
                f"{change.wins:.0%} {_ends(change.wins_interval, '.0%')}",
                verdict,
                style="dim" if verdict == NOT_FOUND else None,
            )
        table.add_section()
    return table


def _mean(figures: Row) -> str:
    mean, error = figures["mean"], figures["standard_error"]
    if mean is None:
        return "none"
    return f"{mean:.4f}" if error is None else f"{mean:.4f} +- {error:.4f}"


def _ends(interval: Interval, form: str) -> str:
    """An interval; of one observation there is none."""
    low, high = ("-" if math.isnan(end) else f"{end:{form}}" for end in interval)
    return f"[{low}, {high}]"
