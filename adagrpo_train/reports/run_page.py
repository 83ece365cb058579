"""One self-contained HTML page about a run, drawn from the files in its folder alone."""

from pathlib import Path

from markupsafe import Markup

from adagrpo_train.reports.advantages import advantage_values
from adagrpo_train.reports.charts.lines import Line, line_chart
from adagrpo_train.reports.costs import costs, machine, stage_table, versions
from adagrpo_train.reports.curriculum import curriculum_values
from adagrpo_train.reports.gallery import gallery
from adagrpo_train.reports.health import health_values
from adagrpo_train.reports.page import duration, render
from adagrpo_train.reports.page_table import Table
from adagrpo_train.reports.reference import Verdict, judge
from adagrpo_train.reports.rows import Records, Row, points, read_records
from adagrpo_train.reports.scores import (
    before_and_after,
    class_table,
    evaluation_chart,
    missing,
    part_charts,
    reward_chart,
)
from adagrpo_train.runtime.files import write_whole

_TONES = {"passed": "good", "failed": "bad", "unfinished": "warn", "incomparable": "warn", "no reference": "none"}


def write_report(run_dir: Path, reference: Path | None = None) -> Path:
    """Write `<run_dir>/report.html` and return its path. What was not recorded is said to be missing.

    Args:
        reference: what the run is compared with; None is the one shipped for its experiment.

    Raises:
        CheckpointError: a line of the records is damaged.
        ConfigError: `reference` is no reference.
    """
    records = read_records(run_dir)
    seconds = sum(row.get("time/iteration_seconds") or 0.0 for row in records.training)
    page = render(
        "run.html.j2",
        name=run_dir.resolve().name,
        choices=_choices(records),
        iterations=len(records.training),
        skipped=[row["iteration"] for row in records.metrics if row.get("reward/skipped")],
        duration=duration(seconds) if seconds else "",
        finished=bool(records.summary),
        image_count=records.summary.get("images"),
        scores=before_and_after(records),
        reward_chart=reward_chart(records),
        part_charts=part_charts(records),
        missing=missing(records.metrics),
        gallery=gallery(run_dir, records.images),
        evaluation_chart=evaluation_chart(records),
        classes=class_table(records.evaluations),
        **curriculum_values(records),
        **advantage_values(records),
        **health_values(records),
        **_verdict_values(records, judge(records, reference)),
        stages=stage_table(records.training),
        costs=costs(records.training),
        config=records.config,
        machine=machine(records.environment),
        versions=versions(records.environment),
    )
    target = run_dir / "report.html"
    write_whole(target, page)
    return target


def _choices(records: Records) -> list[tuple[str, str]]:
    """What was chosen of each group, the experiment first; groups without a choice are left out."""
    chosen = {group: option for group, option in records.choices.items() if option != "None"}
    return sorted(chosen.items(), key=lambda item: (item[0] != "experiment", item[0]))


def _verdict_values(records: Records, verdict: Verdict) -> Row:
    """The comparison with the reference, by the names that the template has for it."""
    rows = [
        [str(point.iteration), point.value, point.mean, point.low, point.high, point.side] for point in verdict.points
    ]
    columns = ["iteration", "this run", "reference", "lowest", "highest", "verdict"]
    return {
        "verdict": verdict,
        "verdict_tone": _TONES[verdict.outcome],
        "verdict_table": Table.of("Held-out reward against the reference", "", columns, rows) if rows else None,
        "verdict_chart": _verdict_chart(records, verdict) if rows else Markup(),
    }


def _verdict_chart(records: Records, verdict: Verdict) -> Markup:
    band = [(point.iteration, point.low, point.high) for point in verdict.points]
    lines = [
        Line("reference, band for one more seed", [(p.iteration, p.mean) for p in verdict.points], "line", band),
        Line("this run", points(records.evaluations, verdict.reference["metric"]), "marked"),
    ]
    chart = line_chart(lines, title="Held-out reward against the reference")
    return chart.inline() if chart else Markup()
