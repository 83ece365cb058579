"""The local record of a run: metrics, prompts and warnings as JSON lines, image grids as PNG. Needs no account."""

import dataclasses
import json
import math
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from adagrpo_train import __version__
from adagrpo_train.tracking.images import save_grid
from adagrpo_train.tracking.records import keep_until
from adagrpo_train.types import RunInfo, SelectedPrompt

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
_LABELLED_PIXELS = 256  # captions under wider images would be long lines of tiny print


class JsonlTracker:
    """Writes metrics.jsonl, prompts.jsonl, alerts.jsonl, images/, config.yaml and environment.json into the run folder.

    A resumed run drops what was recorded after its checkpoint, a half-written last line included, so that its
    files are those of an uninterrupted run.
    """

    def start(self, run: RunInfo) -> None:
        self._dir = run.run_dir
        (self._dir / "images").mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "prompts.jsonl", "alerts.jsonl"):
            keep_until(self._dir / name, run.first_iteration)
        for path in (*self._dir.glob("images/*_*.png"), *self._dir.glob("evaluations/*.jsonl")):
            numbered = re.fullmatch(r"(?:.*_)?(\d{6,})", path.stem)
            if numbered and int(numbered[1]) > run.first_iteration:
                path.unlink()
        _write_config(self._dir / "config.yaml", run.config)
        (self._dir / "environment.json").write_text(json.dumps(_environment(), indent=1), encoding="utf-8")

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        self._append("metrics.jsonl", [{"iteration": iteration} | metrics])

    def alert(self, title: str, text: str, iteration: int) -> None:
        self._append("alerts.jsonl", [{"iteration": iteration, "title": title, "text": text}])

    def log_images(self, name: str, images: np.ndarray, captions: list[str], iteration: int) -> None:
        path = self._dir / "images" / f"{name}_{iteration:06d}.png"
        save_grid(path, images, captions, labels=images.shape[2] <= _LABELLED_PIXELS)

    def log_prompts(self, rows: list[SelectedPrompt], iteration: int) -> None:
        self._append("prompts.jsonl", [{"iteration": iteration} | dataclasses.asdict(row) for row in rows])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def finish(self, status: str) -> None:
        """Nothing is buffered."""

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with (self._dir / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan: a figure that does not exist is null."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _write_config(path: Path, config: dict[str, Any]) -> None:
    from omegaconf import OmegaConf

    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config)), encoding="utf-8")


def _environment() -> dict[str, str]:
    """What the run was made with; the report may be drawn elsewhere, later."""
    packages = {"adagrpo-train": __version__} | {name: _version(name) for name in _PACKAGES}
    return {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()} | packages


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
