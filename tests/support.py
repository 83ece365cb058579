"""Building blocks of tests that run the real tiny model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from adagrpo_train import build
from adagrpo_train.models.sd3 import SD3Model
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.scoring.scorer import Source
from adagrpo_train.settings import read_settings
from adagrpo_train.trainer import Trainer
from adagrpo_train.types import Prompts, SelectedPrompt
from rewards.client.inproc import InprocClient
from rewards.contract import Reward

ASSETS = Path(build.__file__).parent / "assets"
MID = ASSETS / "tiny_sd3" / "mid"
PROMPTS = Prompts((4, 1, 9), ("a red circle", "two blue squares", "a small green triangle"), ("one", "count", "size"))

SMALL = ["debug=smoke", "group_size=2", "evaluation.images=7", "curriculum.chosen=2"]
"""Overrides that make one iteration of the tiny model take a second."""


def tiny_model(**changes: Any) -> SD3Model:
    settings: dict[str, Any] = {
        "path": str(MID),
        "dtype": "float32",
        "device": torch.device("cpu"),
        "resolution": 32,
        "num_steps": 4,
        "schedule": "uniform",
        "guidance_scale": 1.0,
        "guidance_gradient": True,
        "text_encoder_3": False,
        "max_sequence_length": 0,
        "decode_batch": 64,
    }
    return SD3Model(**(settings | changes))


def make_trainer(*overrides: str, run_dir: Path) -> tuple[Trainer, build.Parts, Engine]:
    settings = read_settings([*SMALL, *overrides])
    engine = build.make_engine(settings)
    trainer, parts = build.make_trainer(settings, engine, run_dir, None)
    return trainer, parts, engine


def use_reward(trainer: Trainer, reward: Reward) -> None:
    """Let another reward answer in place of the configured one."""
    scorer = trainer._scorer
    (source,) = scorer._sources
    scorer._sources = (Source(source.entry, InprocClient(reward, device="cpu")),)


class Memory:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.prompts: list[list[SelectedPrompt]] = []

    def start(self, run: Any) -> None: ...

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        self.rows.append({"iteration": iteration, **metrics})

    def log_images(self, name: str, images: np.ndarray, captions: list[str], iteration: int) -> None: ...

    def log_prompts(self, rows: list[SelectedPrompt], iteration: int) -> None:
        self.prompts.append(rows)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def finish(self, status: str) -> None: ...

    @property
    def training(self) -> list[dict[str, float]]:
        return [row for row in self.rows if "policy/loss" in row]
