"""The page of a study, drawn from its results.json alone.

What that file holds:

- `study`, `question`: texts.
- `findings`: sentences, the most important first.
- `provenance`: `commit`, `date`, `machine`, `versions` {name: version}, `seconds`, `runs`.
- `panels`: curves, {`title`, `x_label`, `y_label`, `note`, `series`}, and each of the series is {`label`, `points`:
  [[x, mean, low, high], ...]}.
- `bars`: values with intervals, {`title`, `y_label`, `note`, `groups`: [{`label`, `value`, `low`, `high`}]}.
- `tables`: {`title`, `note`, `columns`: [text, ...], `rows`: [[text, number or null, ...], ...]}.
- `settings`: the YAML of the study.

`low` and `high` are null where no interval is known.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adagrpo_train.errors import ConfigError
from adagrpo_train.reports.charts.dots import Estimate, dot_chart
from adagrpo_train.reports.charts.lines import Line, line_chart
from adagrpo_train.reports.charts.standalone import standalone_svg
from adagrpo_train.reports.charts.svg import HALF, NARROW, WIDE, Chart
from adagrpo_train.reports.page import duration, render, short_commit
from adagrpo_train.reports.page_table import Table
from adagrpo_train.runtime.files import write_whole

_KEYS = ("study", "question", "provenance", "findings", "panels", "bars", "tables", "settings")


def read_results(study_dir: Path) -> dict[str, Any]:
    """What `<study_dir>/results.json` holds.

    Raises:
        ConfigError: there is no such file, or it is not one of a study.
    """
    path = study_dir / "results.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; a study writes it when it is analysed")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    missing = [key for key in _KEYS if key not in results] if isinstance(results, dict) else list(_KEYS)
    if missing:
        raise ConfigError(f"{path}: not the results of a study; it lacks {', '.join(missing)}")
    return results


def write_study_page(results: Mapping[str, Any], target: Path) -> Path:
    """Write the page of a study to `target` and return it."""
    panels, bars = results["panels"], results["bars"]
    page = render(
        "study.html.j2",
        name=results["study"],
        question=results["question"],
        findings=results["findings"],
        panels=[_shown(panel, panel_chart(panel), alone=len(panels) == 1) for panel in panels],
        bars=[_shown(bar, bar_chart(bar), alone=len(bars) == 1) for bar in bars],
        tables=[
            Table.of(table["title"], table["note"], table["columns"], table["rows"]) for table in results["tables"]
        ],
        provenance=_provenance(results["provenance"]),
        settings=results["settings"],
    )
    write_whole(target, page)
    return target


def write_study_pictures(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write every panel and bar chart as an SVG file of its own, `panel_1.svg`, `bars_1.svg` and so on."""
    charts = {f"panel_{number}": panel_chart(panel) for number, panel in enumerate(results["panels"], start=1)}
    charts |= {f"bars_{number}": bar_chart(bar) for number, bar in enumerate(results["bars"], start=1)}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, chart in charts.items():
        if chart:
            written.append(folder / f"{name}.svg")
            write_whole(written[-1], standalone_svg(chart))
    return written


def panel_chart(panel: Mapping[str, Any]) -> Chart | None:
    """Curves of a panel with their bands; None without a point."""
    lines = []
    for series in panel["series"]:
        points = [(x, mean) for x, mean, _, _ in series["points"]]
        band = [(x, low, high) for x, _, low, high in series["points"] if low is not None and high is not None]
        lines.append(Line(series["label"], points, "marked" if len(points) <= 12 else "line", band))
    return line_chart(lines, title=panel["title"], x_label=panel["x_label"], y_label=panel["y_label"], whole=False)


def bar_chart(bar: Mapping[str, Any]) -> Chart | None:
    """Values of a bar chart with their intervals; None without any."""
    estimates = [Estimate(group["label"], group["value"], group["low"], group["high"]) for group in bar["groups"]]
    return dot_chart(estimates, title=bar["title"], x_label=bar["y_label"])


def _shown(section: Mapping[str, Any], chart: Chart | None, *, alone: bool) -> dict[str, Any]:
    sizes = (WIDE if alone else HALF, NARROW)
    return {"title": section["title"], "note": section["note"], "chart": chart.inline(*sizes) if chart else ""}


def _provenance(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the numbers come from, in words; what is not known is left out."""
    facts = [("runs", values["runs"]), ("time", duration(values["seconds"]) if values["seconds"] else None)]
    facts += [("machine", values["machine"]), ("date", values["date"]), ("commit", short_commit(values["commit"]))]
    facts += list(values["versions"].items())
    return [(name, str(value)) for name, value in facts if value not in (None, "")]
