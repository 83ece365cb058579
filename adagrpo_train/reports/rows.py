"""Rows of a run's records, as the parts of its page look at them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adagrpo_train.errors import CheckpointError
from adagrpo_train.tracking.records import read_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """What lies in the folder of a run.

    Attributes:
        metrics: every row; training and evaluations are parts of it.
        images: iteration -> rows of that evaluation, one for each held-out image.
        config: the text of the settings, "" where there is none.
    """

    run_dir: Path
    metrics: list[Row]
    training: list[Row]
    evaluations: list[Row]
    images: dict[int, list[Row]]
    prompts: list[Row]
    advantages: list[Row]
    alerts: list[Row]
    summary: Row
    environment: Row
    choices: Row
    config: str


def read_records(run_dir: Path) -> Records:
    """Read all that was recorded. What was not is empty.

    Raises:
        CheckpointError: a file is damaged.
    """
    metrics = read_rows(run_dir / "metrics.jsonl")
    return Records(
        run_dir=run_dir,
        metrics=metrics,
        training=[row for row in metrics if row.get("reward/mean") is not None],
        evaluations=[row for row in metrics if any(key.startswith("eval/") for key in row)],
        images={int(path.stem): read_rows(path) for path in sorted((run_dir / "evaluations").glob("*.jsonl"))},
        prompts=read_rows(run_dir / "prompts.jsonl"),
        advantages=read_rows(run_dir / "advantages.jsonl"),
        alerts=read_rows(run_dir / "alerts.jsonl"),
        summary=read_json(run_dir / "summary.json"),
        environment=read_json(run_dir / "environment.json"),
        choices=read_json(run_dir / "choices.json"),
        config=_read_text(run_dir / "config.yaml"),
    )


def points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """(iteration, value) of the rows that have one."""
    return [(row["iteration"], row[name]) for row in rows if row.get(name) is not None]


def mean(rows: Sequence[Row], name: str) -> float | None:
    """Over the rows that have a value; None of nothing."""
    values = [y for _, y in points(rows, name)]
    return sum(values) / len(values) if values else None


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def read_json(path: Path) -> Row:
    """A JSON file; {} without one.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return json.loads(_read_text(path) or "{}")
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
