"""Weights & Biases; offline when there is no login, and never a prompt."""

import math
import netrc
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from adagrpo_train.errors import ConfigError
from adagrpo_train.types import RunInfo, SelectedPrompt


class WandbTracker:
    """Logs metrics, image grids and the selected prompts.

    Args:
        project, entity: where the run belongs; entity null is the default of the login.
        mode: "online", "offline", or "auto": WANDB_MODE where it is set, else online with a login (WANDB_API_KEY
            or a netrc entry) and offline without one.
    """

    def __init__(self, *, project: str, entity: str | None, mode: Literal["auto", "online", "offline"]) -> None:
        if mode not in ("auto", "online", "offline"):
            raise ConfigError(f"tracker.wandb.mode={mode}: choose auto, online or offline")
        self._project, self._entity, self._mode = project, entity, mode

    def start(self, run: RunInfo) -> None:
        import wandb

        mode = _auto_mode() if self._mode == "auto" else self._mode
        self._run = wandb.init(
            project=self._project,
            entity=self._entity,
            name=run.name,
            config=run.config,
            dir=str(run.run_dir),
            id=run.tracker_state.get("wandb_run_id"),
            resume="allow" if run.tracker_state else None,
            mode=mode,  # pyright: ignore[reportArgumentType]
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        self._run.log({"iteration": iteration} | {k: v for k, v in metrics.items() if math.isfinite(v)})

    def log_images(self, name: str, images: np.ndarray, captions: list[str], iteration: int) -> None:
        import wandb

        pictures = [wandb.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
        self._run.log({"iteration": iteration, f"images/{name}": pictures})

    def log_prompts(self, rows: list[SelectedPrompt], iteration: int) -> None:
        import wandb

        table = wandb.Table(columns=["prompt", "class", "score", "level"])
        for row in rows:
            if row.chosen:
                table.add_data(row.text, row.group, row.score, row.level)
        self._run.log({"iteration": iteration, "curriculum/selected_prompts": table})

    def state_dict(self) -> dict[str, Any]:
        return {"wandb_run_id": self._run.id}

    def finish(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=1 if status == "failed" else 0)


def _auto_mode() -> Literal["online", "offline"]:
    chosen = os.environ.get("WANDB_MODE")
    if chosen in ("online", "offline"):
        return "online" if chosen == "online" else "offline"
    return "online" if os.environ.get("WANDB_API_KEY") or _netrc_login() else "offline"


def _netrc_login() -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if not path.is_file():
        return False
    try:
        return netrc.netrc(path).authenticators("api.wandb.ai") is not None
    except netrc.NetrcParseError:
        return False
