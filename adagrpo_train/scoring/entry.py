"""What a run says about one of its rewards."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from adagrpo_train.errors import ConfigError

SERVING = (
    "mode",
    "device",
    "devices",
    "python",
    "urls",
    "token_file",
    "on_unavailable",
    "wait_seconds",
    "deadline_seconds",
    "startup_seconds",
    "hedge_seconds",
)
"""Keys of a reward that say where and how it is asked, not what it answers."""


@dataclass(frozen=True, kw_only=True)
class RewardEntry:
    """One reward of a run: what it is, where it runs, what it weighs and what happens when it fails.

    Args:
        name: its key in the configuration.
        reward: name of the plug-in, shipped or announced by an installed package.
        settings: of the plug-in.
        weights: metric -> weight in what training maximises; metrics without a weight are logged only.
        role: "train", or "evaluation" for one that scores evaluations and never trains, whatever its weights.
        required: False lets a sample without this score be judged by the other rewards.
        max_bad_fraction: share of missing scores, in [0, 1), above which an iteration is skipped.
        on_unavailable: "stop" ends the run with a checkpoint when nobody answers, "wait" waits for the reward.
        wait_seconds: longest wait.
        deadline_seconds: longest time for the scores of one batch of images, from when it has its turn, with retries.
        mode: "inproc", "local" (servers that the run starts and ends) or "remote".
        device: of inproc: "cpu", "cuda:N"; None is that of the process.
        devices: of local: one server per device and node.
        python: of local: interpreter of another environment; None is this one.
        startup_seconds: longest wait for a loaded model.
        urls: of remote.
        token_file: of remote: file with the token of the servers.
        hedge_seconds: of local and remote: a second replica is asked after this long; 0 never asks.

    Raises:
        ConfigError: settings that contradict each other, named by their keys.
    """

    name: str
    reward: str
    settings: dict[str, Any]
    weights: dict[str, float]
    role: Literal["train", "evaluation"] = "train"
    required: bool = True
    max_bad_fraction: float = 0.05
    on_unavailable: Literal["stop", "wait"] = "stop"
    wait_seconds: float = 1800.0
    deadline_seconds: float = 120.0
    mode: Literal["inproc", "local", "remote"] = "inproc"
    device: str | None = None
    devices: list[str] = field(default_factory=list)
    python: str | None = None
    startup_seconds: float = 900.0
    urls: list[str] = field(default_factory=list)
    token_file: str | None = None
    hedge_seconds: float = 0.0

    def __post_init__(self) -> None:
        for key, choices in (
            ("role", ("train", "evaluation")),
            ("on_unavailable", ("stop", "wait")),
            ("mode", ("inproc", "local", "remote")),
        ):
            if getattr(self, key) not in choices:
                raise self.error(key, f"choose one of {', '.join(choices)}")
        if not self.reward:
            raise self.error("reward", "name the plug-in")
        self._check_weights()
        if not self.trains:
            object.__setattr__(self, "weights", {})
        self._check_bounds()
        self._check_mode()

    @property
    def trains(self) -> bool:
        return self.role == "train"

    def error(self, key: str, remedy: str, value: Any = None) -> ConfigError:
        """What to raise about a key of this reward. Who is logged in by an address is not repeated."""
        shown = re.sub(r"//[^/]*@", "//***@", str(getattr(self, key, None) if value is None else value))
        return ConfigError(f"reward.{self.name}.{key}={shown}: {remedy}")

    def _check_weights(self) -> None:
        for metric, weight in self.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise self.error(f"weights.{metric}", "expected a finite number", weight)
        if self.trains and not any(self.weights.values()):
            raise self.error("weights", "give a metric a weight other than 0, or set role=evaluation")

    def _check_bounds(self) -> None:
        if not 0 <= self.max_bad_fraction < 1:
            raise self.error("max_bad_fraction", "must be in [0, 1)")
        for key in ("wait_seconds", "deadline_seconds", "startup_seconds"):
            if not 0 < getattr(self, key) < math.inf:
                raise self.error(key, "must be > 0 and finite")
        if not 0 <= self.hedge_seconds < math.inf:
            raise self.error("hedge_seconds", "must be >= 0 and finite; 0 never asks a second server")

    def _check_mode(self) -> None:
        for key, mode in (("device", "inproc"), ("devices", "local"), ("python", "local"), ("token_file", "remote")):
            if getattr(self, key) and self.mode != mode:
                raise self.error(key, f"belongs to reward.{self.name}.mode={mode}, not to {self.mode}")
        if self.hedge_seconds and self.mode == "inproc":
            raise self.error("hedge_seconds", f"there is no second server with reward.{self.name}.mode=inproc")
        if self.mode == "remote" and not self.urls:
            raise self.error("urls", "mode=remote needs the addresses of its servers, [http://host:port]")
        if self.mode != "remote" and self.urls:
            raise self.error("urls", f"belongs to reward.{self.name}.mode=remote, not to {self.mode}")
