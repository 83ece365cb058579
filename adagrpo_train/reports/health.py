"""Figures that show whether a run is well, and the alarms that it gave. What was not recorded is not shown."""

from collections.abc import Sequence

from markupsafe import Markup

from adagrpo_train.reports.charts.lines import Line, line_chart
from adagrpo_train.reports.charts.svg import SMALL
from adagrpo_train.reports.rows import Records, Row, points
from adagrpo_train.reports.scores import figure

_GROUPS: dict[str, dict[str, str]] = {
    "Gradient norm": {"policy/grad_norm": ""},
    "Clip fraction": {"policy/clip_fraction": ""},
    "Distance of the ratio from 1": {"policy/ratio_max_deviation": "largest", "policy/ratio_deviation": "mean"},
    "Approximate KL to the sampling policy": {"policy/approx_kl": ""},
    "KL to the reference": {"policy/kl": ""},
    "Reward spread inside groups": {"reward/group_std_mean": ""},
    "Groups without spread": {"reward/zero_variance_fraction": ""},
    "Diversity inside groups": {"rollout/diversity": ""},
    "Level against training groups": {"curriculum/level_gap": ""},
    "Advantages whose sign flipped": {"advantage/sign_flip_fraction": ""},
    "False positives against the level": {
        "advantage/local_false_positive_rate": "group alone",
        "advantage/fused_false_positive_rate": "after fusion",
    },
    "False negatives against the level": {
        "advantage/local_false_negative_rate": "group alone",
        "advantage/fused_false_negative_rate": "after fusion",
    },
}
_PREFIX, _STREAK = "health/", "_streak"


def health_values(records: Records) -> Row:
    """Charts, the names of figures that stayed 0, the check that must be 0, and alarms."""
    charts, zeros = [], []
    known = {name for names in _GROUPS.values() for name in names}
    for title, names in (_GROUPS | _others(records.metrics, known)).items():
        lines = [Line(label or title, points(records.metrics, name)) for name, label in names.items()]
        lines = [line for line in lines if line.points]
        if lines and not any(y for line in lines for _, y in line.points):
            zeros.append(title)
        elif chart := line_chart(lines, title=title):
            charts.append(figure(title, chart.inline(SMALL)))
    first = [y for _, y in points(records.training, "policy/first_ratio_deviation")]
    return {
        "health_charts": Markup("").join(charts),
        "zeros": zeros,
        "first_ratio": max(first) if first else None,
        "alarms": _alarms(records),
    }


def _others(metrics: Sequence[Row], known: set[str]) -> dict[str, dict[str, str]]:
    """Further figures of the health of a run, under their own names."""
    names = sorted({key for row in metrics for key in row if key.startswith(_PREFIX)} - known)
    return {_words(name): {name: ""} for name in names}


def _alarms(records: Records) -> list[Row]:
    """Warnings that were recorded, with what they said last; else figures 0 or 1 that count a streak besides."""
    if records.alerts:
        titles = dict.fromkeys(row["title"] for row in records.alerts)
        rows = {title: [row for row in records.alerts if row["title"] == title] for title in titles}
        return [
            {"name": title, "iterations": [row["iteration"] for row in own], "text": own[-1]["text"]}
            for title, own in rows.items()
        ]
    metrics = records.metrics
    kinds = {key.removesuffix(_STREAK) for row in metrics for key in row if key.endswith(_STREAK)}
    given = {kind: [int(x) for x, y in points(metrics, kind) if y] for kind in sorted(kinds)}
    return [{"name": _words(kind), "iterations": when, "text": ""} for kind, when in given.items() if when]


def _words(name: str) -> str:
    return name.removeprefix(_PREFIX).replace("_", " ")
