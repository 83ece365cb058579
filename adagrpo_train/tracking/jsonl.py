"""The local record of a run: metrics, prompts and warnings as JSON lines, image grids as PNG. Needs no account."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from adagrpo_train.runtime.environment import environment
from adagrpo_train.runtime.files import without_nan
from adagrpo_train.tracking.images import save_grid
from adagrpo_train.tracking.records import keep_until
from adagrpo_train.types import JudgedSamples, RunInfo, SelectedPrompt

_LABELLED_PIXELS = 256  # captions under wider images would be long lines of tiny print
_MAPS, _MAP_SAMPLES = 8, 384


class JsonlTracker:
    """Writes metrics, prompts, advantages and alerts (.jsonl), images/ and what the run is into the run folder.

    The last is config.yaml, choices.json (config group -> chosen option) and environment.json.

    A resumed run drops what was recorded after its checkpoint, a half-written last line included, so that its
    files are those of an uninterrupted run.
    """

    def start(self, run: RunInfo) -> None:
        self._dir = run.run_dir
        (self._dir / "images").mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "prompts.jsonl", "advantages.jsonl", "alerts.jsonl"):
            keep_until(self._dir / name, run.first_iteration)
        for path in (*self._dir.glob("images/*_*.png"), *self._dir.glob("evaluations/*.jsonl")):
            numbered = re.fullmatch(r"(?:.*_)?(\d{6,})", path.stem)
            if numbered and int(numbered[1]) > run.first_iteration:
                path.unlink()
        _write_config(self._dir / "config.yaml", run.config)
        (self._dir / "environment.json").write_text(json.dumps(environment(), indent=1), encoding="utf-8")
        (self._dir / "choices.json").write_text(json.dumps(run.choices, indent=1), encoding="utf-8")
        self._map_every, self._last = max(1, run.total_iterations // _MAPS), run.total_iterations

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        self._append("metrics.jsonl", [{"iteration": iteration} | metrics])

    def alert(self, title: str, text: str, iteration: int) -> None:
        self._append("alerts.jsonl", [{"iteration": iteration, "title": title, "text": text}])

    def log_images(self, name: str, images: np.ndarray, captions: list[str], iteration: int) -> None:
        path = self._dir / "images" / f"{name}_{iteration:06d}.png"
        save_grid(path, images, captions, labels=images.shape[2] <= _LABELLED_PIXELS)

    def log_prompts(self, rows: list[SelectedPrompt], iteration: int) -> None:
        self._append("prompts.jsonl", [{"iteration": iteration} | dataclasses.asdict(row) for row in rows])

    def log_advantages(self, samples: JudgedSamples, iteration: int) -> None:
        """A few hundred samples of the first, the last and about eight iterations in between: enough for a picture."""
        if iteration % self._map_every and iteration not in (1, self._last):
            return
        columns = {
            name: [round(value, 5) for value in getattr(samples, name)[:_MAP_SAMPLES].tolist()]
            for name in ("reward", "group", "local", "fused")
        }
        level = samples.level.mean if samples.level else None
        self._append("advantages.jsonl", [{"iteration": iteration, "level": level} | columns])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def finish(self, status: str) -> None:
        """Nothing is buffered."""

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with (self._dir / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(without_nan(row), allow_nan=False) + "\n" for row in rows)


def _write_config(path: Path, config: dict[str, Any]) -> None:
    from omegaconf import OmegaConf

    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config)), encoding="utf-8")
