"""Reading and trimming the JSON lines of a run folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adagrpo_train.errors import CheckpointError


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON lines file, [] without the file. A last line that a kill cut short is left out.

    Raises:
        CheckpointError: another line is damaged.
    """
    return [row for _, row in _parsed(path)]


def keep_until(path: Path, iteration: int) -> None:
    """Drop rows of later iterations, and a line that a kill cut short. A new run (iteration 0) starts empty.

    Raises:
        CheckpointError: another line is damaged.
    """
    if not path.is_file():
        return
    kept = [line for line, row in _parsed(path) if row["iteration"] <= iteration] if iteration > 0 else []
    draft = path.with_suffix(".draft")
    draft.write_bytes(b"".join(kept))
    os.replace(draft, path)


def missing_scores(row: Mapping[str, Any], *, evaluation: bool = False) -> dict[str, int]:
    """How many scores each reward failed to give in an iteration, or in an evaluation; without those that gave all."""
    before, after = ("eval/reward/" if evaluation else "reward/"), "/missing"
    return {
        name.removeprefix(before).removesuffix(after): round(value)
        for name, value in row.items()
        if name.startswith(before) and name.endswith(after) and value
    }


def _parsed(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append((line, json.loads(line)))
        except ValueError as error:
            raise CheckpointError(f"{path}: line {number} is damaged; delete it to continue without it") from error
    return parsed
