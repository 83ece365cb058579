"""One self-contained HTML page about a run, drawn from the files in its folder alone.

`python -m adagrpo_train.tracking.report RUN_DIR` draws it again.
"""

import argparse
import base64
import json
import platform
import sys
from collections import Counter, defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from adagrpo_train import __version__
from adagrpo_train.tracking.chart import Line, line_chart, stacked_shares

_VERSIONS = ("torch", "diffusers", "transformers", "accelerate", "peft")


def write_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html` and return its path. What was not recorded is said to be missing."""
    metrics, prompts = _read_lines(run_dir / "metrics.jsonl"), _read_lines(run_dir / "prompts.jsonl")
    training = [row for row in metrics if row.get("reward/mean") is not None]
    evaluations = [row for row in metrics if "eval/total" in row]
    images = sorted((run_dir / "images").glob("heldout_*.png"))
    template = Environment(
        loader=PackageLoader("adagrpo_train.tracking", "."), autoescape=select_autoescape(default=True)
    ).get_template("report.html.j2")
    page = template.render(
        name=run_dir.name,
        iterations=len(training),
        summary=_read_json(run_dir / "summary.json"),
        reward_chart=Markup(_reward_chart(training, evaluations)),
        evaluation_chart=Markup(_evaluation_chart(evaluations)),
        classes=_class_table(evaluations),
        images=[{"title": _image_title(path), "data": _inline(path)} for path in _ends(images)],
        choice_chart=Markup(_choice_chart(prompts, chosen=True)),
        candidate_chart=Markup(_choice_chart(prompts, chosen=False)),
        stages=_stage_table(training),
        health_chart=Markup(_health_chart(training)),
        config=(run_dir / "config.yaml").read_text(encoding="utf-8") if (run_dir / "config.yaml").is_file() else "",
        versions={"adagrpo-train": __version__} | {name: _version(name) for name in _VERSIONS},
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
    )
    target = run_dir / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


def _reward_chart(training: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> str:
    lines = [
        Line("training reward", _points(training, "reward/mean")),
        Line("proficiency level (EMA)", _points(training, "curriculum/level")),
        Line("held-out reward", _points(evaluations, "eval/total"), marked=True),
    ]
    return line_chart(
        lines, title="Reward of training samples, proficiency level and held-out reward", x_label="iteration"
    )


def _evaluation_chart(evaluations: list[dict[str, Any]]) -> str:
    names = sorted({key for row in evaluations for key in row if key.startswith("eval/") and key.count("/") == 1})
    lines = [Line(name.removeprefix("eval/"), _points(evaluations, name), marked=True) for name in names]
    return line_chart(lines, title="Held-out scores over the run", x_label="iteration")


def _health_chart(training: list[dict[str, Any]]) -> str:
    names = {"policy/grad_norm": "gradient norm", "reward/group_std_mean": "reward spread inside groups"}
    names |= {"reward/zero_variance_fraction": "groups without spread"}
    lines = [Line(label, _points(training, name)) for name, label in names.items()]
    return line_chart(
        lines, title="Gradient norm, reward spread and share of groups without spread", x_label="iteration"
    )


def _choice_chart(prompts: list[dict[str, Any]], *, chosen: bool) -> str:
    """Shares of difficulty classes among the chosen prompts, or among all candidates, in about 40 columns."""
    rows = [row for row in prompts if row["chosen"] or not chosen]
    labels = sorted({row["group"] for row in prompts} - {""})
    if not rows or not labels:
        return ""
    width = max(1, max(row["iteration"] for row in rows) // 40)
    counts: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[(row["iteration"] - 1) // width][row["group"]] += 1
    columns = [(column * width + 1, [counts[column][label] for label in labels]) for column in sorted(counts)]
    kind = "chosen prompts" if chosen else "candidates"
    return stacked_shares(columns, labels, title=f"Difficulty classes of the {kind} over the run")


def _class_table(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Strict score (or the total) per class, before and after."""
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    part = "strict" if "eval/strict" in first else "total"
    names = [key for key in first if key.startswith("eval/") and key.count("/") == 2 and key.endswith("/" + part)]
    return [{"name": key.split("/")[1], "before": first[key], "after": last[key]} for key in names if key in last]


def _stage_table(training: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean seconds per iteration and share of the iteration; decoding and rewards lie across the other stages."""
    if not training:
        return []
    names = sorted({key for row in training for key in row if key.startswith("time/")})
    means = {name: sum(row.get(name) or 0.0 for row in training) / len(training) for name in names}
    whole = means.get("time/iteration_seconds") or 1.0
    return [
        {"name": name.removeprefix("time/").removesuffix("_seconds"), "seconds": mean, "share": min(1.0, mean / whole)}
        for name, mean in sorted(means.items(), key=lambda item: -item[1])
    ]


def _points(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["iteration"], row[name]) for row in rows if row.get(name) is not None]


def _ends(paths: list[Path]) -> list[Path]:
    return paths if len(paths) < 2 else [paths[0], paths[-1]]


def _image_title(path: Path) -> str:
    return f"Held-out prompts at iteration {int(path.stem.rsplit('_', 1)[1])}"


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


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
