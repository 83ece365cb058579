"""One self-contained HTML page about a run, drawn from the files in its folder alone.

`python -m adagrpo_train.tracking.report RUN_DIR` draws it again.
"""

import argparse
import base64
import io
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from PIL import Image

from adagrpo_train.runtime.files import write_whole
from adagrpo_train.tracking.chart import HALF, SMALL, Line, legend, line_chart, share_chart
from adagrpo_train.tracking.images import Cell, read_cells
from adagrpo_train.tracking.records import missing_scores, read_rows

Row = dict[str, Any]

_HEALTH = {
    "policy/grad_norm": "Gradient norm",
    "policy/clip_fraction": "Clip fraction",
    "policy/ratio_max_deviation": "Largest |ratio - 1|",
    "policy/approx_kl": "Approximate KL to the sampling policy",
    "policy/kl": "KL to the reference",
    "reward/group_std_mean": "Reward spread inside groups",
    "reward/zero_variance_fraction": "Groups without spread",
    "advantage/sign_flip_fraction": "Advantages whose sign flipped",
}
_STAGES = {"candidates": "", "rollout": "", "update": "", "decode": "inside the stages", "reward": "inside the stages"}
_SHARE_COLUMNS, _PROMPT_ROWS = 24, 12
_TILE_PIXELS, _GRID_PIXELS = 320, 1400


def write_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html` and return its path. What was not recorded is said to be missing.

    Raises:
        CheckpointError: a line of metrics.jsonl or prompts.jsonl is damaged.
    """
    metrics, prompts = read_rows(run_dir / "metrics.jsonl"), read_rows(run_dir / "prompts.jsonl")
    training = [row for row in metrics if row.get("reward/mean") is not None]
    evaluations = [row for row in metrics if any(key.startswith("eval/") for key in row)]
    summary = _read_json(run_dir / "summary.json")
    environment = Environment(
        loader=PackageLoader("adagrpo_train.tracking", "."), autoescape=select_autoescape(default=True)
    )
    page = environment.get_template("report.html.j2").render(
        name=run_dir.name,
        iterations=len(training),
        skipped=[row["iteration"] for row in metrics if row.get("reward/skipped")],
        seconds=sum(row.get("time/iteration_seconds") or 0.0 for row in training),
        finished=bool(summary),
        images=summary.get("images"),
        scores=_scores(summary, evaluations),
        reward_chart=Markup(_reward_chart(training, evaluations)),
        part_charts=Markup(_part_charts(training, evaluations)),
        missing=_missing(metrics),
        gallery=_gallery(sorted((run_dir / "images").glob("heldout_*.png"))),
        evaluation_chart=Markup(_evaluation_chart(evaluations)),
        classes=_class_table(evaluations),
        **_curriculum(training, prompts),
        **_health(training),
        stages=_stage_table(training),
        costs=_costs(training),
        config=_read_text(run_dir / "config.yaml"),
        versions=_read_json(run_dir / "environment.json"),
    )
    target = run_dir / "report.html"
    write_whole(target, page)
    return target


def _scores(summary: Row, evaluations: list[Row]) -> list[Row]:
    """Held-out scores before and after; from the evaluations, without an error, where there is no summary."""
    heldout = summary.get("heldout")
    if not heldout and evaluations:
        first, last = evaluations[0], evaluations[-1]
        names = [name for name in _parts(evaluations) if first.get(name) is not None and last.get(name) is not None]
        heldout = {name.removeprefix("eval/"): {"before": first[name], "after": last[name]} for name in names}
    order = {"strict": 0, "smooth": 1}
    scores = []
    for name, score in sorted((heldout or {}).items(), key=lambda item: order.get(item[0], 2)):
        if score["before"] is None:  # no image has both scores
            continue
        gain, error = score.get("gain", score["after"] - score["before"]), score.get("standard_error")
        clear = error is not None and abs(gain) > 2 * error
        tone = ("good" if gain > 0 else "bad") if clear else "soft"
        scores.append({**score, "name": name, "gain": gain, "standard_error": error, "tone": tone, "clear": clear})
    return scores


def _reward_chart(training: list[Row], evaluations: list[Row]) -> str:
    lines = [
        Line("training reward", _points(training, "reward/mean"), "faint"),
        Line("proficiency level (EMA)", _points(training, "curriculum/level")),
        Line("held-out reward", _points(evaluations, "eval/total"), "marked"),
    ]
    return line_chart(lines, title="Reward over the run")


def _part_charts(training: list[Row], evaluations: list[Row]) -> str:
    """A small chart of each part of the reward: its mean over the samples, its level, and its held-out mean."""
    names = {key for row in training for key in row if key.startswith("reward/") and key.endswith("/mean")}
    charts = []
    for name in sorted(name.removeprefix("reward/").removesuffix("/mean") for name in names if name.count("/") == 2):
        lines = [
            Line("training", _points(training, f"reward/{name}/mean"), "faint"),
            Line("level (EMA)", _points(training, f"reward/{name}/level")),
            Line("held-out", _points(evaluations, f"eval/{name}"), "marked"),
        ]
        charts.append(_figure(name, line_chart(lines, title=f"Part {name} of the reward", sizes=[SMALL])))
    return "".join(charts)


def _missing(metrics: list[Row]) -> list[Row]:
    """Rewards whose scores were missing: how many, in training and in evaluations."""
    training, evaluations = Counter[str](), Counter[str]()
    for row in metrics:
        training.update(missing_scores(row))
        evaluations.update(missing_scores(row, evaluation=True))
    names = sorted(training.keys() | evaluations.keys())
    return [{"name": name, "training": training[name], "evaluations": evaluations[name]} for name in names]


def _evaluation_chart(evaluations: list[Row]) -> str:
    """One chart of scores between 0 and 1; a chart for each where the scales differ."""
    lines = [Line(name.removeprefix("eval/"), _points(evaluations, name), "marked") for name in _parts(evaluations)]
    if all(0 <= y <= 1 for line in lines for _, y in line.points):
        return line_chart(lines, title="Held-out scores")
    charts = (_figure(line.label, line_chart([line], title=line.label, sizes=[SMALL])) for line in lines)
    return f'<div class="three">{"".join(charts)}</div>'


def _class_table(evaluations: list[Row]) -> list[Row]:
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


def _curriculum(training: list[Row], prompts: list[Row]) -> Row:
    """Charts and a table of what was chosen among which candidates."""
    lines = [
        Line("all candidates", _points(training, "curriculum/candidate_mean"), "faint"),
        Line("chosen", _points(training, "curriculum/chosen_mean")),
        Line("proficiency level", _points(training, "curriculum/level")),
    ]
    scored = bool(lines[0].points)
    labels = sorted({row["group"] for row in prompts} - {""})
    last = [row for row in prompts if row["iteration"] == prompts[-1]["iteration"]]
    latest = sorted(last, key=lambda row: (not row["chosen"], _distance(row) or 0.0))
    return {
        "boundary_chart": Markup(line_chart(lines, title="Reward of candidates and chosen prompts") if scored else ""),
        "class_legend": Markup(legend(labels)),
        "choice_chart": Markup(_share_chart(prompts, labels, chosen=True)),
        "candidate_chart": Markup(_share_chart(prompts, labels, chosen=False)),
        "latest": [row | {"distance": _distance(row)} for row in latest[:_PROMPT_ROWS]],
        "latest_hidden": max(0, len(latest) - _PROMPT_ROWS),
    }


def _share_chart(prompts: list[Row], labels: Sequence[str], *, chosen: bool) -> str:
    """Shares of difficulty classes among the chosen prompts, or among all candidates."""
    rows = [row for row in prompts if row["group"] and (row["chosen"] or not chosen)]
    if not rows:
        return ""
    width = -(-max(row["iteration"] for row in rows) // _SHARE_COLUMNS)
    counts: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[(row["iteration"] - 1) // width][row["group"]] += 1
    columns = [(column * width + 1, [counts[column][label] for label in labels]) for column in sorted(counts)]
    kind = "chosen prompts" if chosen else "candidates"
    return share_chart(columns, labels, title=f"Difficulty classes of the {kind}", sizes=[HALF])


def _distance(row: Row) -> float | None:
    """How far a candidate's reward is from the level, None where the curriculum does not score."""
    return None if row["score"] is None or row["level"] is None else abs(row["score"] - row["level"])


def _health(training: list[Row]) -> Row:
    """A small chart per figure, the names of those that stayed 0, and the check that must be 0."""
    charts, zeros = [], []
    for name, label in _HEALTH.items():
        points = _points(training, name)
        if points and not any(y for _, y in points):
            zeros.append(label.lower())
        elif points:
            charts.append(_figure(label, line_chart([Line(label, points)], title=label, sizes=[SMALL])))
    first = [y for _, y in _points(training, "policy/first_ratio_deviation")]
    return {"health_charts": Markup("".join(charts)), "zeros": zeros, "first_ratio": max(first) if first else None}


def _stage_table(training: list[Row]) -> list[Row]:
    """Mean seconds per iteration and share of the iteration."""
    whole = _mean(training, "time/iteration_seconds")
    rows = []
    for name, note in _STAGES.items():
        seconds = _mean(training, f"time/{name}_seconds")
        if seconds is not None:
            share = min(1.0, seconds / whole) if whole else 0.0
            rows.append({"name": name, "note": note, "seconds": seconds, "share": share})
    return [*rows, {"name": "iteration", "note": "", "seconds": whole, "share": 1.0}] if whole else rows


def _costs(training: list[Row]) -> list[tuple[str, str]]:
    """What an iteration costs besides time, in words."""
    costs = []
    for name in ("sampling", "training", "reference"):
        count = _mean(training, f"nfe/{name}")
        if count:
            costs.append((f"network rows, {name}", f"{count:,.0f}"))
    memory = [y for _, y in _points(training, "memory/peak_bytes")]
    return [*costs, ("peak memory", f"{max(memory) / 2**30:.2f} GiB")] if memory else costs


def _gallery(paths: list[Path]) -> Row:
    """The first and the last grid: pairs of images where both can be cut apart, whole pictures otherwise."""
    ends = paths if len(paths) < 2 else [paths[0], paths[-1]]
    iterations = [int(path.stem.rsplit("_", 1)[1]) for path in ends]
    cells = [read_cells(path) for path in ends]
    pairs = []
    if cells and all(cells) and len({tuple(cell.caption for cell in column) for column in cells}) == 1:
        for row in zip(*cells, strict=True):
            pairs.append({"caption": row[0].caption, "sources": [_tile(cell) for cell in row]})
    grids = [] if pairs else [_grid(path) for path in ends]
    return {"iterations": iterations, "pairs": pairs, "grids": grids}


def _tile(cell: Cell) -> str:
    small = cell.image.width <= 64
    image = cell.image.convert("RGB")
    image.thumbnail((_TILE_PIXELS, _TILE_PIXELS))
    return _data_url(image, "png" if small else "jpeg")


def _grid(path: Path) -> str:
    with Image.open(path) as image:
        picture = image.convert("RGB")
    if picture.width <= _GRID_PIXELS:
        return _data_url(picture, "png")
    picture.thumbnail((_GRID_PIXELS, 4 * _GRID_PIXELS))
    return _data_url(picture, "jpeg")


def _data_url(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"quality": 85} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(caption: str, chart: str) -> str:
    return f"<figure><figcaption>{Markup.escape(caption)}</figcaption>{chart}</figure>"


def _parts(evaluations: list[Row]) -> list[str]:
    """Names like eval/strict, without those of classes."""
    return sorted({key for row in evaluations for key in row if key.startswith("eval/") and key.count("/") == 1})


def _points(rows: list[Row], name: str) -> list[tuple[float, float]]:
    return [(row["iteration"], row[name]) for row in rows if row.get(name) is not None]


def _mean(rows: list[Row], name: str) -> float | None:
    values = [y for _, y in _points(rows, name)]
    return sum(values) / len(values) if values else None


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _read_json(path: Path) -> Row:
    return json.loads(_read_text(path) or "{}")


def main() -> int:
    """Command line: draw the report of a run folder again."""
    parser = argparse.ArgumentParser(description="Draw the HTML report of a run folder again.")
    parser.add_argument("run_dir", type=Path)
    run_dir: Path = parser.parse_args().run_dir
    if not run_dir.is_dir():
        parser.error(f"{run_dir}: no such folder")
    sys.stdout.write(f"{write_report(run_dir)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
