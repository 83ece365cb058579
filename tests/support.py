"""Building blocks of tests that run the real tiny model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from adagrpo_train import build
from adagrpo_train.algorithms.plans import EveryStep
from adagrpo_train.interfaces import Transition, Velocity
from adagrpo_train.models.sd3 import SD3Model
from adagrpo_train.rollout.sampler import FlowSampler
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.replicated import ReplicatedEngine
from adagrpo_train.scoring.collector import Source
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


def alone() -> ReplicatedEngine:
    """This process by itself, on the CPU."""
    return ReplicatedEngine(kind="single", device="cpu", timeout_seconds=60)


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


def own_velocity(model: Any) -> Velocity:
    """The velocity of a model's own transformer."""
    return lambda x, sigma, conditions: model.velocity(model.transformer, x, sigma, conditions)


def make_sampler(model: Any, transition: Transition, **changes: Any) -> FlowSampler:
    settings: dict[str, Any] = {
        "transition": transition,
        "plan": EveryStep(shared_noise=False),
        "sigmas": model.sigmas,
        "latent_shape": model.latent_shape,
        "latent_dtype": model.dtype,
        "group_size": 2,
        "micro_batch": 64,
        "seed": 3,
        "device": model.device,
    }
    return FlowSampler(**(settings | changes))


def assert_training_repeats_the_rollout(model: Any, transition: Transition) -> None:
    """With gradients the network gives the log-probabilities of the rollout bit for bit."""
    sampler, velocity = make_sampler(model, transition, micro_batch=4), own_velocity(model)
    conditions = model.encode(list(PROMPTS.texts))
    rollout = sampler.roll_out(velocity, conditions, PROMPTS, None, iteration=1)
    model.transformer.requires_grad_(True)
    for batch in rollout.transitions:
        v = velocity(batch.x, batch.sigma, conditions[batch.prompt])
        assert v.requires_grad
        assert v.dtype == model.dtype
        step = transition.step(batch.x, v, batch.sigma, batch.sigma_next, sampler.sigma_max)
        assert batch.log_prob is not None
        assert torch.equal(transition.log_prob(batch.x_next, step), batch.log_prob)


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
        self.alerts: list[tuple[str, str, int]] = []

    def start(self, run: Any) -> None: ...

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        self.rows.append({"iteration": iteration, **metrics})

    def alert(self, title: str, text: str, iteration: int) -> None:
        self.alerts.append((title, text, iteration))

    def log_images(self, name: str, images: np.ndarray, captions: list[str], iteration: int) -> None: ...

    def log_prompts(self, rows: list[SelectedPrompt], iteration: int) -> None:
        self.prompts.append(rows)

    def log_advantages(self, samples: Any, iteration: int) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def finish(self, status: str) -> None: ...

    @property
    def training(self) -> list[dict[str, float]]:
        return [row for row in self.rows if "policy/loss" in row]
