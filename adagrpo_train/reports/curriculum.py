"""What the curriculum chose among which candidates."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from markupsafe import Markup

from adagrpo_train.reports.charts.clouds import Cloud, Path, cloud_chart
from adagrpo_train.reports.charts.lines import Line, line_chart
from adagrpo_train.reports.charts.shares import class_keys, share_chart
from adagrpo_train.reports.charts.svg import HALF, NARROW, legend_of
from adagrpo_train.reports.rows import Records, Row, points, spread

_SHARE_COLUMNS, _PROMPT_ROWS, _STRIP_ITERATIONS = 24, 12, 120


def curriculum_values(records: Records) -> Row:
    """Charts and a table, by the names that the template has for them."""
    prompts = records.prompts
    labels = sorted({row["group"] for row in prompts} - {""})
    last = [row for row in prompts if row["iteration"] == prompts[-1]["iteration"]]
    latest = sorted(last, key=lambda row: (not row["chosen"], _distance(row) or 0.0))
    return {
        "strip_chart": _strip(prompts),
        "boundary_chart": _boundary(records),
        "class_legend": legend_of(class_keys(labels)),
        "choice_chart": _shares(prompts, labels, chosen=True),
        "candidate_chart": _shares(prompts, labels, chosen=False),
        "latest": [row | {"distance": _distance(row)} for row in latest[:_PROMPT_ROWS]],
        "latest_hidden": max(0, len(latest) - _PROMPT_ROWS),
    }


def _strip(prompts: Sequence[Row]) -> Markup:
    """Every candidate at its iteration and reward: which were chosen, and where the level was."""
    scored = [row for row in prompts if row["score"] is not None]
    if not scored:
        return Markup()
    shown = set(spread(sorted({row["iteration"] for row in scored}), _STRIP_ITERATIONS))
    rows = [row for row in scored if row["iteration"] in shown]
    left, chosen = (
        [(row["iteration"], row["score"]) for row in rows if row["chosen"] == kind] for kind in (False, True)
    )
    levels = {row["iteration"]: row["level"] for row in rows if row["level"] is not None}
    chart = cloud_chart(
        [Cloud("not chosen", left, "var(--soft)", "haze"), Cloud("chosen", chosen, "var(--s1)")],
        [Path("proficiency level (EMA)", sorted(levels.items()), "var(--s2)")] if levels else [],
        title="Candidates over the run by their reward",
        text=f"Of {len(scored)} candidates {sum(row['chosen'] for row in scored)} were chosen. {_means(scored)}",
        x_label="iteration",
        y_label="reward (low: hard, high: easy)",
        whole=True,
    )
    return chart.inline() if chart else Markup()


def _means(scored: Sequence[Row]) -> str:
    """How far chosen and other candidates lie from the level, in words."""
    texts = []
    for kind, name in ((True, "chosen"), (False, "other")):
        distances = [d for row in scored if row["chosen"] == kind and (d := _distance(row)) is not None]
        if distances:
            texts.append(f"{name} candidates are {sum(distances) / len(distances):.3f} away from the level on average")
    return f"{'; '.join(texts).capitalize()}." if texts else ""


def _boundary(records: Records) -> Markup:
    training = records.training
    lines = [
        Line("all candidates", points(training, "curriculum/candidate_mean"), "faint"),
        Line("chosen", points(training, "curriculum/chosen_mean")),
        Line("proficiency level", points(training, "curriculum/level")),
    ]
    chart = line_chart(lines, title="Mean reward of candidates and chosen prompts") if lines[0].points else None
    return chart.inline() if chart else Markup()


def _shares(prompts: Sequence[Row], labels: Sequence[str], *, chosen: bool) -> Markup:
    """Shares of difficulty classes among the chosen prompts, or among all candidates."""
    rows = [row for row in prompts if row["group"] and (row["chosen"] or not chosen)]
    if not rows:
        return Markup()
    width = -(-max(row["iteration"] for row in rows) // _SHARE_COLUMNS)
    counts: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[(row["iteration"] - 1) // width][row["group"]] += 1
    columns = [(column * width + 1, [counts[column][label] for label in labels]) for column in sorted(counts)]
    kind = "chosen prompts" if chosen else "candidates"
    chart = share_chart(columns, labels, title=f"Difficulty classes of the {kind}")
    return chart.inline(HALF, NARROW, legend=False) if chart else Markup()


def _distance(row: Row) -> float | None:
    """How far a candidate's reward is from the level, None where the curriculum does not score."""
    return None if row["score"] is None or row["level"] is None else abs(row["score"] - row["level"])
