"""Records that move between the stages of one training iteration. No behaviour beyond row selection, no I/O.

Dimension letters used in every docstring of this package:
    B candidate prompts    P chosen prompts     G samples per group      N samples (images)
    R states of one network batch               M transitions out of those states
    T sampling steps       *latent dims, e.g. 16, 64, 64

sigma runs from 1 (noise) to 0 (image): x_sigma = (1 - sigma) x_0 + sigma eps, velocity = eps - x_0.
A step goes from sigma to sigma_next < sigma. "step" is a sampling step, "iteration" a training iteration.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """Distribution of the next state given the present one; the step length is already inside std."""

    mean: Tensor  # [R, *latent] float32, latent units
    std: Tensor  # [R, 1...] float32, latent units; 0 for a deterministic step


@dataclass(frozen=True)
class Prompts:
    """Texts with an identity that is stable across runs, ranks and resumes."""

    ids: tuple[int, ...]  # line number in the prompt file: the only identity of a prompt
    texts: tuple[str, ...]
    classes: tuple[str, ...]  # difficulty class, "" when the file names none

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: list[int]) -> "Prompts":
        return Prompts(*(tuple(getattr(self, f.name)[row] for row in rows) for f in fields(self)))


@dataclass(frozen=True)
class Conditions:
    """Encoded prompts, one row each; the negative rows are present when guidance is used."""

    prompt_embeds: Tensor  # [P, L, C]
    pooled_prompt_embeds: Tensor  # [P, C']
    negative_prompt_embeds: Tensor | None = None  # [P, L, C]
    negative_pooled_prompt_embeds: Tensor | None = None  # [P, C']

    def __getitem__(self, rows: Tensor) -> "Conditions":
        negative, pooled = self.negative_prompt_embeds, self.negative_pooled_prompt_embeds
        return Conditions(
            self.prompt_embeds[rows],
            self.pooled_prompt_embeds[rows],
            None if negative is None else negative[rows],
            None if pooled is None else pooled[rows],
        )


@dataclass(frozen=True)
class StepPlan:
    """Which sampling steps of one iteration draw noise, and which of those are trained."""

    noisy: tuple[int, ...]  # ascending indices into the T steps
    trained: tuple[int, ...]  # a subset of noisy


@dataclass(frozen=True)
class Trunks:
    """Noise-free trajectories: candidates of the curriculum and anchors of the branches."""

    x0: Tensor  # [B, *latent]
    anchors: Tensor  # [B, S, *latent] state before each of the S branch steps; S = 0 without branching

    def __getitem__(self, rows: list[int]) -> "Trunks":
        return Trunks(self.x0[rows], self.anchors[rows])


@dataclass(frozen=True)
class Transitions:
    """One network batch: R states and the M stochastic transitions drawn from them.

    Where training evaluates the network on exactly this batch, as the rollout did, the first ratio is bitwise 1 by
    itself. A branch has one state and G transitions, so its anchor is evaluated once for its whole group.
    """

    x: Tensor  # [R, *latent]
    sigma: Tensor  # [R] float32
    sigma_next: Tensor  # [R] float32
    prompt: Tensor  # [R] int64 on the host, row of the chosen prompts
    x_next: Tensor  # [M, *latent], rounded to the dtype of the network
    state: Tensor  # [M] int64 on the host, ascending: row of x that the transition starts from
    sample: Tensor  # [M] int64 on the host, row of Rollout.x0 whose reward the transition earned
    log_prob: Tensor | None  # [M] float32 under the policy that drew x_next; None: the present policy is that one
    rollout_log_prob: Tensor  # [M] float32, the same as the rollout computed it

    def split(self, states: int) -> "list[Transitions]":
        """Batches of at most so many states, in order; the transitions go with their states."""
        if len(self.x) <= states:
            return [self]
        return [self._part(first, first + states) for first in range(0, len(self.x), states)]

    def _part(self, first: int, end: int) -> "Transitions":
        states = slice(first, end)
        kept = slice(*torch.searchsorted(self.state, torch.tensor([first, end])).tolist())
        return Transitions(
            self.x[states],
            self.sigma[states],
            self.sigma_next[states],
            self.prompt[states],
            self.x_next[kept],
            self.state[kept] - first,
            self.sample[kept],
            None if self.log_prob is None else self.log_prob[kept],
            self.rollout_log_prob[kept],
        )

    def of(self, samples: Tensor) -> "Transitions":
        """The transitions of the samples marked in `samples` [N] bool; the states, and so the network call, stay.

        The host waits for the device only if some are left out.
        """
        kept = samples[self.sample]
        if bool(kept.all()):
            return self
        at = kept.to(self.x_next.device)
        return replace(
            self,
            x_next=self.x_next[at],
            state=self.state[kept],
            sample=self.sample[kept],
            log_prob=None if self.log_prob is None else self.log_prob[at],
            rollout_log_prob=self.rollout_log_prob[at],
        )


@dataclass(frozen=True)
class Rollout:
    """Everything one sampling phase produced on this rank."""

    x0: Tensor  # [N, *latent]
    prompt: Tensor  # [N] int64, row of the chosen prompts
    group: Tensor  # [N] int64; samples of one group are compared with each other
    transitions: list[Transitions]


@dataclass(frozen=True)
class Scores:
    """Rewards of N images. A missing score is NaN, and so is a total that lacks a required one."""

    total: Tensor  # [N] float32, what training maximises
    parts: dict[str, Tensor]  # each [N] float32: the components
    missing: dict[str, float]  # reward -> share of missing scores, over all ranks
    reason: str  # why the first missing score is missing, "" if none is


@dataclass(frozen=True)
class Level:
    """The policy's running proficiency: moments of the reward of its own samples, in reward units."""

    mean: float
    std: float


@dataclass(frozen=True)
class Selection:
    """What the curriculum chose among the candidates."""

    rows: tuple[int, ...]  # rows of the candidates, best first
    level: Level | None  # None when the curriculum has not scored anything yet


@dataclass(frozen=True)
class Terms:
    """What the network says about the M transitions of one batch: all that a loss needs beside the advantages."""

    log_prob: Tensor  # [M] float32, under the present policy
    old_log_prob: Tensor  # [M] float32, what the ratio compares with
    rollout_log_prob: Tensor  # [M] float32, as the rollout computed it
    kl: Tensor | None  # [M] float32, to the frozen reference; None without one

    def detach(self) -> "Terms":
        """The same numbers without the graph they came from."""
        kl = None if self.kl is None else self.kl.detach()
        return Terms(self.log_prob.detach(), self.old_log_prob, self.rollout_log_prob, kl)


@dataclass(frozen=True)
class Loss:
    """A differentiable value and detached figures about it."""

    value: Tensor  # [] differentiable
    rollout_deviation: Tensor  # [] largest distance of a log-probability from that of the rollout
    metrics: dict[str, Tensor]  # each []; of names in "_max" the maximum counts, else the mean over transitions
    terms: Terms  # detached: what the value was computed from


@dataclass(frozen=True)
class SelectedPrompt:
    """One candidate prompt of one iteration, for logs."""

    prompt_id: int
    text: str
    group: str  # difficulty class, "" when unknown
    score: float  # reward of the candidate's noise-free sample; nan when the curriculum does not score
    level: float  # proficiency level the score was compared with; nan when there is none
    chosen: bool


@dataclass(frozen=True)
class JudgedSamples:
    """The samples of one iteration that are trained on, as they were judged, for logs."""

    reward: Tensor  # [n] reward units
    group: Tensor  # [n] int64
    local: Tensor  # [n] advantage against the group alone
    fused: Tensor  # [n] advantage as it enters the loss
    level: Level | None  # what the global part compared with; None without one


@dataclass(frozen=True)
class RunInfo:
    """What a tracker needs to know about a run."""

    run_dir: Path
    name: str
    config: dict[str, Any]  # resolved, plain containers
    choices: dict[str, str]  # config group -> chosen option
    total_iterations: int
    first_iteration: int  # 0, or the iteration a resumed run continues from
    tracker_state: dict[str, Any]  # what state_dict() gave at the checkpoint; {} for a new run
    beside: bool = False  # continues the run of another folder, which stays as it is


Images = np.ndarray
"""uint8 [N, H, W, 3]."""
