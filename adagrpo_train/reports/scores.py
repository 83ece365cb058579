"""Rewards and held-out scores of a run: before and after, over time with intervals, by class."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev

from markupsafe import Markup

from adagrpo_train.reports.charts.lines import Line, line_chart
from adagrpo_train.reports.charts.svg import SMALL
from adagrpo_train.reports.rows import Records, Row, points
from adagrpo_train.tracking.records import missing_scores

Z95 = 1.959964
"""The normal quantile of a 95 % interval."""


def before_and_after(records: Records) -> list[Row]:
    """Held-out scores at both ends; from the evaluations, without an error, where there is no summary."""
    heldout, evaluations = records.summary.get("heldout"), records.evaluations
    if not heldout and evaluations:
        first, last = evaluations[0], evaluations[-1]
        names = [name for name in parts(evaluations) if first.get(name) is not None and last.get(name) is not None]
        heldout = {name.removeprefix("eval/"): {"before": first[name], "after": last[name]} for name in names}
    alone = not records.summary.get("heldout") and len(evaluations) == 1
    order = {"total": 0, "strict": 1, "smooth": 2}
    scores = []
    for name, score in sorted((heldout or {}).items(), key=lambda item: order.get(item[0], 3)):
        if score["before"] is None:  # no image has both scores
            continue
        gain, error = score.get("gain", score["after"] - score["before"]), score.get("standard_error")
        clear = error is not None and abs(gain) > 2 * error
        tone = ("good" if gain > 0 else "bad") if clear else "soft"
        told = {"gain": gain, "standard_error": error, "tone": tone, "certain": clear, "alone": alone}
        scores.append({**score, "name": name} | told)
    return scores


def reward_chart(records: Records) -> Markup:
    """Training reward, level and held-out reward."""
    chart = line_chart(
        [
            Line("training reward", points(records.training, "reward/mean"), "faint"),
            Line("proficiency level (EMA)", points(records.training, "curriculum/level")),
            heldout_line(records, "eval/total", "held-out reward, 95 % interval over its images"),
        ],
        title="Reward over the run",
    )
    return chart.inline() if chart else Markup()


def part_charts(records: Records) -> Markup:
    """A small chart of each part of the reward: its mean over the samples, its level, and its held-out mean."""
    names = {key for row in records.training for key in row if key.startswith("reward/") and key.endswith("/mean")}
    charts = []
    for name in sorted(name.removeprefix("reward/").removesuffix("/mean") for name in names if name.count("/") == 2):
        chart = line_chart(
            [
                Line("training", points(records.training, f"reward/{name}/mean"), "faint"),
                Line("level (EMA)", points(records.training, f"reward/{name}/level")),
                heldout_line(records, f"eval/{name}", "held-out"),
            ],
            title=f"Part {name} of the reward",
        )
        charts.append(figure(name, chart.inline(SMALL) if chart else Markup()))
    return Markup("").join(charts)


def evaluation_chart(records: Records) -> Markup:
    """One chart of scores between 0 and 1; a chart for each where the scales differ."""
    lines = [heldout_line(records, name, name.removeprefix("eval/")) for name in parts(records.evaluations)]
    lines = [line for line in lines if line.points]
    if all(0 <= y <= 1 for line in lines for _, y in line.points):
        chart = line_chart(lines, title="Held-out scores")
        return chart.inline() if chart else Markup()
    charts = ((line.label, line_chart([line], title=line.label)) for line in lines)
    figures = Markup("").join(figure(label, chart.inline(SMALL)) for label, chart in charts if chart)
    return Markup('<div class="three">{}</div>').format(figures)


def heldout_line(records: Records, name: str, label: str) -> Line:
    """A score over the evaluations, with its 95 % interval over the images where they were recorded."""
    band = []
    for iteration, rows in records.images.items():
        values = [row[name.removeprefix("eval/")] for row in rows if row.get(name.removeprefix("eval/")) is not None]
        if len(values) > 1:
            half = Z95 * stdev(values) / math.sqrt(len(values))
            band.append((iteration, fmean(values) - half, fmean(values) + half))
    return Line(label, points(records.evaluations, name), "marked", band)


def class_table(evaluations: Sequence[Row]) -> list[Row]:
    """Strict score (or the total) per class, before and after, and its places on a bar from 0 to 1."""
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    part = "strict" if "eval/strict" in first else "total"
    names = [key for key in first if key.startswith("eval/") and key.count("/") == 2 and key.endswith("/" + part)]
    rows = [
        {"name": key.split("/")[1], "part": part, "before": first[key], "after": last[key]}
        for key in names
        if first[key] is not None and last.get(key) is not None
    ]
    unit = all(0 <= value <= 1 for row in rows for value in (row["before"], row["after"]))
    return [row | {"unit": unit} for row in rows]


def missing(metrics: Sequence[Row]) -> list[Row]:
    """Rewards whose scores were missing: how many, in training and in evaluations."""
    training, evaluations = Counter[str](), Counter[str]()
    for row in metrics:
        training.update(missing_scores(row))
        evaluations.update(missing_scores(row, evaluation=True))
    names = sorted(training.keys() | evaluations.keys())
    return [{"name": name, "training": training[name], "evaluations": evaluations[name]} for name in names]


def parts(evaluations: Sequence[Row]) -> list[str]:
    """Names like eval/strict, without those of classes."""
    return sorted({key for row in evaluations for key in row if key.startswith("eval/") and key.count("/") == 1})


def figure(caption: str, chart: Markup) -> Markup:
    """A chart with its name above it."""
    return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(caption, chart)
