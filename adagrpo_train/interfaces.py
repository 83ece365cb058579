"""The seams of the framework: one Protocol per swappable part, in the order data flows."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from adagrpo_train.types import (
    Conditions,
    Gaussian,
    JudgedSamples,
    Level,
    Loss,
    Prompts,
    RunInfo,
    SelectedPrompt,
    Selection,
    StepPlan,
    Terms,
    Transitions,
)

Velocity = Callable[[Tensor, Tensor, Conditions], Tensor]
"""(x [R, *latent], sigma [R], conditions with R rows) -> velocity [R, *latent]."""


class PromptSource(Protocol):
    """An endless, resumable stream of prompts, the same on every rank."""

    def next(self, count: int) -> Prompts: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Curriculum(Protocol):
    """Chooses the prompts to train on and tracks how good the policy already is."""

    candidates: int
    """Prompts drawn per iteration, over all ranks."""
    chosen: int
    """Prompts trained on per iteration, over all ranks."""
    scores_candidates: bool
    """Whether select() needs one reward per candidate."""
    per_rank: bool
    """True: every rank selects among its own candidates against its own level."""

    def select(self, rewards: Tensor | None, count: int) -> Selection: ...
    def observe(self, rewards: Tensor) -> Level | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Transition(Protocol):
    """One stochastic sampling step, as a distribution and as a density."""

    def step(self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: float) -> Gaussian: ...
    def log_prob(self, x_next: Tensor, step: Gaussian) -> Tensor: ...
    def noiseless(self) -> "Transition":
        """The same step with its noise switched off, which must be the ODE's; it has no density."""
        ...


class Plan(Protocol):
    """Which sampling steps are stochastic, and how the samples of a group relate."""

    branches: bool
    """True: each trained step opens its own group from a shared noise-free trunk."""
    shared_noise: bool
    """True: all samples of a group start from the same initial noise."""

    def steps(self, iteration: int, num_steps: int, seed: int) -> StepPlan: ...


class Advantage(Protocol):
    """Rewards [N] and groups [N] of all ranks, all of them present -> advantages [N].

    local() is the part against the own group, across() the part against the policy's past; training uses their sum.
    """

    def local(self, rewards: Tensor, group: Tensor) -> Tensor: ...
    def across(self, rewards: Tensor, group: Tensor, level: Level) -> Tensor: ...


class Policy(Protocol):
    """The network that is trained, as a velocity field."""

    def velocity(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor: ...
    def reference_velocity(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor: ...


class Objective(Protocol):
    """The loss of one network batch of transitions.

    loss() is surrogate() of what the network says, so that a loss can be computed again from recorded terms.
    """

    def loss(
        self, policy: Policy, batch: Transitions, conditions: Conditions, advantages: Tensor, sigma_max: float
    ) -> Loss: ...
    def surrogate(self, terms: Terms, advantages: Tensor) -> Loss: ...
    def log_prob(self, policy: Policy, batch: Transitions, conditions: Conditions, sigma_max: float) -> Tensor: ...


class Tracker(Protocol):
    """Writes what happened; computes nothing. Only the main rank has one."""

    def start(self, run: RunInfo) -> None: ...
    def log(self, metrics: dict[str, float], iteration: int) -> None: ...
    def alert(self, title: str, text: str, iteration: int) -> None: ...
    def log_images(self, name: str, images: np.ndarray, captions: list[str], iteration: int) -> None: ...
    def log_prompts(self, rows: list[SelectedPrompt], iteration: int) -> None: ...
    def log_advantages(self, samples: JudgedSamples, iteration: int) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def finish(self, status: str) -> None: ...
