"""The local record of a run: metrics and prompts as JSON lines, image grids as PNG. Needs no account."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adagrpo_train.tracking.images import image_grid
from adagrpo_train.types import RunInfo, SelectedPrompt


class JsonlTracker:
    """Writes metrics.jsonl, prompts.jsonl, images/ and config.yaml into the run folder.

    A resumed run drops what was recorded after its checkpoint, a half-written last line included, so that its
    files are those of an uninterrupted run.
    """

    def start(self, run: RunInfo) -> None:
        self._dir = run.run_dir
        (self._dir / "images").mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "prompts.jsonl"):
            _keep_until(self._dir / name, run.first_iteration)
        for path in (*self._dir.glob("images/*_*.png"), *self._dir.glob("evaluations/*.jsonl")):
            if int(path.stem.rsplit("_", 1)[-1]) > run.first_iteration:
                path.unlink()
        _write_config(self._dir / "config.yaml", run.config)

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        self._append("metrics.jsonl", {"iteration": iteration} | metrics)

    def log_images(self, name: str, images: np.ndarray, captions: list[str], iteration: int) -> None:
        grid = Image.fromarray(image_grid(images, captions))
        grid.save(self._dir / "images" / f"{name}_{iteration:06d}.png", optimize=True)

    def log_prompts(self, rows: list[SelectedPrompt], iteration: int) -> None:
        for row in rows:
            self._append("prompts.jsonl", {"iteration": iteration} | dataclasses.asdict(row))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def finish(self, status: str) -> None:
        """Nothing is buffered."""

    def _append(self, name: str, row: dict[str, Any]) -> None:
        # JSON has no nan: a figure that does not exist is null.
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        with (self._dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")


def _keep_until(path: Path, iteration: int) -> None:
    """Drop rows of later iterations, and a line that a kill cut short. A new run (iteration 0) starts empty."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if iteration > 0 and json.loads(line)["iteration"] <= iteration]
    draft = path.with_suffix(".draft")
    draft.write_text("".join(kept), encoding="utf-8")
    os.replace(draft, path)


def _write_config(path: Path, config: dict[str, Any]) -> None:
    from omegaconf import OmegaConf

    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config)), encoding="utf-8")
