"""Weights & Biases; offline when there is no login or no network, and never a prompt."""

import logging
import math
import netrc
import os
import socket
import threading
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np

from adagrpo_train.errors import ConfigError
from adagrpo_train.types import JudgedSamples, RunInfo, SelectedPrompt

_logger = logging.getLogger(__name__)
_Mode = Literal["online", "offline", "disabled"]
_REACH_SECONDS = 5.0


class WandbTracker:
    """Logs metrics, image grids, the selected prompts and warnings, which W&B sends to whoever asked for alerts.

    Args:
        project, entity: where the run belongs; entity null is the default of the login.
        mode: "online", "offline", or "auto": WANDB_MODE where it is set, else online with a login (WANDB_API_KEY
            or a netrc entry) and a server that answers, else offline.

    Raises:
        ConfigError: the mode is unknown, or start() finds no login although "online" is asked for.
    """

    def __init__(self, *, project: str, entity: str | None, mode: Literal["auto", "online", "offline"]) -> None:
        if mode not in ("auto", "online", "offline"):
            raise ConfigError(f"tracker.wandb.mode={mode}: choose auto, online or offline")
        self._project, self._entity = project, entity
        self._mode: Literal["auto", "online", "offline"] = mode

    def start(self, run: RunInfo) -> None:
        import wandb

        mode: _Mode = _auto_mode() if self._mode == "auto" else self._mode
        if mode == "online" and not _has_login():
            # wandb would ask for a key here, and a job in a queue has nobody to answer.
            raise ConfigError("W&B is to be online but has no login: run `wandb login`, or tracker.wandb.mode=offline")
        continued = None if run.beside else run.tracker_state.get("wandb_run_id")
        self._run = wandb.init(
            project=self._project,
            entity=self._entity,
            name=run.name,
            config=run.config,
            dir=str(run.run_dir),
            id=continued,
            resume="allow" if continued else None,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", init_timeout=30, **_finish_settings()),
        )
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        self._write({name: value for name, value in metrics.items() if math.isfinite(value)}, iteration)

    def alert(self, title: str, text: str, iteration: int) -> None:
        self._run.alert(title=title, text=f"at iteration {iteration}: {text}", level="WARN")

    def log_images(self, name: str, images: np.ndarray, captions: list[str], iteration: int) -> None:
        import wandb

        pictures = [wandb.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
        self._write({f"images/{name}": pictures}, iteration)

    def log_prompts(self, rows: list[SelectedPrompt], iteration: int) -> None:
        import wandb

        table = wandb.Table(columns=["prompt", "class", "score", "level"])
        for row in rows:
            if row.chosen:
                table.add_data(row.text, row.group, row.score, row.level)
        self._write({"curriculum/selected_prompts": table}, iteration)

    def log_advantages(self, samples: JudgedSamples, iteration: int) -> None:
        """Single samples are for the local record."""

    def state_dict(self) -> dict[str, Any]:
        return {"wandb_run_id": self._run.id}

    def finish(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=1 if status == "failed" else 0)

    def _write(self, values: dict[str, Any], iteration: int) -> None:
        # An offline run that is continued counts its own steps from 0 again; the iteration is a step that does not.
        self._run.log({"iteration": iteration} | values, step=iteration)


def _finish_settings() -> dict[str, Any]:
    """A network that is lost at the end does not hold the job for ever; what is left can be synced from disk."""
    import wandb

    return {"finish_timeout": 600.0} if "finish_timeout" in wandb.Settings.model_fields else {}


def _auto_mode() -> _Mode:
    chosen = os.environ.get("WANDB_MODE")
    if chosen == "online" or chosen == "offline" or chosen == "disabled":
        return chosen
    if chosen:
        raise ConfigError(f"WANDB_MODE={chosen}: choose online, offline or disabled")
    if not _has_login():
        return "offline"
    if not _answers(_server()):
        _logger.warning("W&B: %s does not answer; the run is recorded offline, `wandb sync` uploads it", _server())
        return "offline"
    return "online"


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _has_login() -> bool:
    return bool(os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")) or _netrc_login()


def _netrc_login() -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if not path.is_file():
        return False
    try:
        return netrc.netrc(path).authenticators(urlsplit(_server()).netloc) is not None
    except (netrc.NetrcParseError, OSError):
        return False


def _answers(url: str) -> bool:
    """Whether the server, or the proxy in front of it, accepts a connection within a few seconds."""
    host = urlsplit(url).hostname or ""
    proxy = "" if proxy_bypass(host) else getproxies().get(urlsplit(url).scheme, "")
    if proxy and "://" not in proxy:
        proxy = f"http://{proxy}"
    target = urlsplit(proxy or url)
    port = target.port or (443 if target.scheme == "https" else 80)
    reached = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((target.hostname or "", port), timeout=_REACH_SECONDS).close()
        except OSError:
            return
        reached.set()

    # In a thread, because looking up a name has no timeout of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_REACH_SECONDS)
    return reached.is_set()
