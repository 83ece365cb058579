"""Integrate the policy from noise to latents, recording the stochastic steps it will be trained on."""

from collections.abc import Callable

import torch
from torch import Tensor

from adagrpo_train.errors import ConfigError
from adagrpo_train.functional.transitions import ode_step
from adagrpo_train.interfaces import Plan, Transition, Velocity
from adagrpo_train.runtime.noise import INITIAL, SHARED, NoiseKey, keyed_noise
from adagrpo_train.runtime.transfer import to_device
from adagrpo_train.types import Conditions, Gaussian, Prompts, Rollout, StepPlan, Transitions, Trunks


class FlowSampler:
    """Draws trunks, rollouts and evaluation samples on one time grid.

    Args:
        transition: the stochastic step.
        plan: which steps are stochastic and trained, and whether groups branch off a trunk.
        sigmas: [T + 1] float32 from 1 to 0.
        latent_shape: shape of one latent.
        latent_dtype: dtype the network sees. States are rounded to it before their log-probability is taken.
        group_size: samples per group, >= 2.
        micro_batch: most states per network call.
        seed: first part of every noise key.
        device: where the latents live.

    Raises:
        ConfigError: group_size < 2, micro_batch < 1, or the plan does not fit the grid.
    """

    def __init__(
        self,
        *,
        transition: Transition,
        plan: Plan,
        sigmas: Tensor,
        latent_shape: tuple[int, ...],
        latent_dtype: torch.dtype,
        group_size: int,
        micro_batch: int,
        seed: int,
        device: torch.device,
    ) -> None:
        if group_size < 2:
            raise ConfigError(f"group_size={group_size}: samples of a group are compared with each other; use >= 2")
        if micro_batch < 1:
            raise ConfigError(f"micro_batch={micro_batch}: must be >= 1")
        self._transition, self._plan = transition, plan
        self._grid = sigmas.to("cpu", torch.float32)  # read by the host
        self._sigmas = self._grid.to(device)  # read by the network and the steps
        self._latent_shape, self._latent_dtype, self._device = latent_shape, latent_dtype, device
        self._group_size, self._micro_batch, self._seed = group_size, micro_batch, seed
        self.steps(0)

    @property
    def num_steps(self) -> int:
        return len(self._sigmas) - 1

    @property
    def branches(self) -> bool:
        return self._plan.branches

    @property
    def group_size(self) -> int:
        return self._group_size

    @property
    def sigma_max(self) -> float:
        """Second sigma of the grid; it stands in for sigma = 1 where Flow-SDE divides by 1 - sigma."""
        return float(self._grid[1])

    @property
    def micro_batch(self) -> int:
        """Most states per network call."""
        return self._micro_batch

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self._latent_shape

    @property
    def latent_dtype(self) -> torch.dtype:
        return self._latent_dtype

    def sigma(self, i: int, like: Tensor) -> Tensor:
        """The time grid at i [R] float32, for R states."""
        return self._sigmas[i].expand(len(like))

    def steps(self, iteration: int) -> StepPlan:
        """Noisy and trained steps of an iteration, the same on every rank."""
        return self._plan.steps(iteration, self.num_steps, self._seed)

    def batch_sizes(self, prompts: int) -> list[int]:
        """States of each network batch of one rollout of `prompts` prompts: the finest split into optimizer steps."""
        trained = len(self.steps(0).trained)
        states, times = (prompts * trained, 1) if self._plan.branches else (prompts * self._group_size, trained)
        starts = range(0, states, self._micro_batch)
        return [min(self._micro_batch, states - start) for start in starts for _ in range(times)]

    @torch.no_grad()
    def trunks(self, velocity: Velocity, conditions: Conditions, prompts: Prompts, iteration: int) -> Trunks:
        """One noise-free trajectory per prompt, keeping the states that groups may branch from."""
        at = self.steps(iteration).trained if self._plan.branches else ()
        x = self._initial_noise(prompts, [SHARED] * len(prompts), iteration)
        anchors = []
        for i in range(self.num_steps):
            if i in at:
                anchors.append(x)
            x = self._ode_step(velocity, x, i, conditions)
        kept = torch.stack(anchors, dim=1) if anchors else x.new_empty((len(x), 0, *self._latent_shape))
        return Trunks(x0=x, anchors=kept)

    @torch.no_grad()
    def roll_out(
        self,
        velocity: Velocity,
        conditions: Conditions,
        prompts: Prompts,
        trunks: Trunks | None,
        iteration: int,
        finished: Callable[[Tensor, Tensor, Tensor], None] = lambda x0, prompt, group: None,
    ) -> Rollout:
        """group_size samples per group: one group per prompt, or per prompt and branch step.

        Args:
            conditions, prompts: P rows.
            trunks: P rows with the anchors to branch from; None unless the plan branches.
            finished: told of samples as soon as they are, in their order: x0 [n, *latent], prompt [n], group [n].
        """
        if not self._plan.branches:
            return self._trajectories(velocity, conditions, prompts, iteration, finished)
        if trunks is None:
            trunks = self.trunks(velocity, conditions, prompts, iteration)
        rollout = self._branch(velocity, conditions, prompts, trunks, iteration)
        # The last step runs over all samples together, so none is finished before the others.
        parts = (rows.split(self._micro_batch) for rows in (rollout.x0, rollout.prompt, rollout.group))
        for x0, prompt, group in zip(*parts, strict=True):
            finished(x0, prompt, group)
        return rollout

    @torch.no_grad()
    def render(self, velocity: Velocity, conditions: Conditions, noise: Tensor) -> Tensor:
        """Noise-free samples [N, *latent] from the given initial noise [N, *latent]."""
        x = to_device(noise, self._device).to(self._latent_dtype)
        for i in range(self.num_steps):
            x = self._ode_step(velocity, x, i, conditions)
        return x

    def _trajectories(
        self,
        velocity: Velocity,
        conditions: Conditions,
        prompts: Prompts,
        iteration: int,
        finished: Callable[[Tensor, Tensor, Tensor], None],
    ) -> Rollout:
        plan = self.steps(iteration)
        prompt = torch.arange(len(prompts)).repeat_interleave(self._group_size)
        member = torch.arange(self._group_size).repeat(len(prompts))
        done: list[Tensor] = []
        recorded: list[Transitions] = []
        for rows in torch.arange(len(prompt)).split(self._micro_batch):
            owners, members = prompt[rows].tolist(), member[rows].tolist()
            starts = [SHARED] * len(rows) if self._plan.shared_noise else members
            x = self._initial_noise(prompts[owners], starts, iteration)
            c = conditions[to_device(prompt[rows], self._device)]
            for i in range(self.num_steps):
                if i not in plan.noisy:
                    x = self._ode_step(velocity, x, i, c)
                    continue
                noise = self._noise(prompts[owners], members, iteration, i)
                step = self._draw(velocity, x, self.sigma(i, x), self.sigma(i + 1, x), c, noise, prompt[rows], rows)
                if i in plan.trained:
                    recorded.append(step)
                x = step.x_next
            done.append(x)
            finished(x, prompt[rows], prompt[rows])
        return Rollout(torch.cat(done), prompt, prompt, recorded)

    def _branch(
        self, velocity: Velocity, conditions: Conditions, prompts: Prompts, trunks: Trunks, iteration: int
    ) -> Rollout:
        at = self.steps(iteration).trained
        size = self._group_size
        # State r = (prompt, branch step), so that processes with some of the prompts hold some of the states in the
        # same order. Its group has the samples r * size .. r * size + size - 1.
        prompt = torch.arange(len(prompts)).repeat_interleave(len(at))
        start = torch.tensor(at).repeat(len(prompts))
        anchors = trunks.anchors.flatten(0, 1)
        drawn: list[Tensor] = []
        recorded: list[Transitions] = []
        for rows in torch.arange(len(prompt)).split(self._micro_batch):
            sigma, sigma_next = (to_device(self._grid[start[rows] + ahead], self._device) for ahead in (0, 1))
            sample = (rows[:, None] * size + torch.arange(size)).flatten()
            noise = torch.cat(
                [
                    self._noise(prompts[[int(prompt[r])] * size], list(range(size)), iteration, int(start[r]))
                    for r in rows
                ]
            )
            c = conditions[to_device(prompt[rows], self._device)]
            step = self._draw(
                velocity, anchors[to_device(rows, self._device)], sigma, sigma_next, c, noise, prompt[rows], sample
            )
            recorded.append(step)
            drawn.append(step.x_next)
        group = torch.arange(len(prompt)).repeat_interleave(size)
        x0 = self._finish(velocity, torch.cat(drawn), start[group] + 1, conditions, prompt[group])
        return Rollout(x0, prompt[group], group, recorded)

    def _finish(self, velocity: Velocity, x: Tensor, first: Tensor, conditions: Conditions, prompt: Tensor) -> Tensor:
        """Noise-free steps to sigma 0; sample n takes part from step first[n] on, so batches grow as steps pass."""
        x = x.clone()
        for i in range(int(first.min()), self.num_steps):
            for rows in torch.nonzero(first <= i).flatten().split(self._micro_batch):
                at, c = to_device(rows, self._device), conditions[to_device(prompt[rows], self._device)]
                x[at] = self._ode_step(velocity, x[at], i, c)
        return x

    def _draw(
        self,
        velocity: Velocity,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        conditions: Conditions,
        noise: Tensor,
        prompt: Tensor,
        sample: Tensor,
    ) -> Transitions:
        """Evaluate R states in one network call and draw len(noise) / R successors from each."""
        step = self._transition.step(x, velocity(x, sigma, conditions), sigma, sigma_next, self.sigma_max)
        state = torch.arange(len(x)).repeat_interleave(len(noise) // len(x))
        at = to_device(state, self._device)
        drawn = Gaussian(step.mean[at], step.std[at])
        # The density is that of the rounded state: the network never sees the unrounded one.
        x_next = (drawn.mean + drawn.std * noise).to(self._latent_dtype)
        log_prob = self._transition.log_prob(x_next, drawn)
        return Transitions(x, sigma, sigma_next, prompt, x_next, state, sample, log_prob, rollout_log_prob=log_prob)

    def _ode_step(self, velocity: Velocity, x: Tensor, i: int, conditions: Conditions) -> Tensor:
        parts = []
        for rows in torch.arange(len(x), device=self._device).split(self._micro_batch):
            sigma, sigma_next = self.sigma(i, rows), self.sigma(i + 1, rows)
            v = velocity(x[rows], sigma, conditions[rows])
            parts.append(ode_step(x[rows], v, sigma, sigma_next).to(self._latent_dtype))
        return torch.cat(parts)

    def _initial_noise(self, prompts: Prompts, samples: list[int], iteration: int) -> Tensor:
        return self._noise(prompts, samples, iteration, INITIAL).to(self._latent_dtype)

    def _noise(self, prompts: Prompts, samples: list[int], iteration: int, step: int) -> Tensor:
        keys = [
            NoiseKey(self._seed, iteration, prompt_id, sample, step)
            for prompt_id, sample in zip(prompts.ids, samples, strict=True)
        ]
        return to_device(keyed_noise(keys, self._latent_shape), self._device)
