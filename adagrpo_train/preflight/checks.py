"""The checks that need the parts of the run: its model, its sampler, its rewards."""

import math
from typing import Any

import torch
from torch import Tensor

from adagrpo_train import build
from adagrpo_train.build import Assembly
from adagrpo_train.errors import PreflightError
from adagrpo_train.functional.transitions import ode_step
from adagrpo_train.preflight.counts import Counts, agrees, drawn_states
from adagrpo_train.preflight.findings import Note
from adagrpo_train.preflight.measure import Batch
from adagrpo_train.preflight.words import number
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.noise import INITIAL, SHARED, NoiseKey, keyed_noise
from adagrpo_train.runtime.transfer import to_device
from adagrpo_train.scoring.recorded import compare_with_record
from adagrpo_train.settings import Settings
from adagrpo_train.types import Prompts, Transitions

_FORMULA_ROUNDING = 1e-5
"""Of steps, which are float32 whatever the model's type, relative to the largest value of the state."""
_RATIO_ROUNDING = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""Of log-probabilities where the update computes otherwise than the rollout; nats per latent element."""
_FEWEST_GROUPS = 2


class Checks:
    """Each method is a check: it returns what was found, or raises a PreflightError.

    Args:
        settings: of the run.
        run: its parts, nothing trained yet.
        engine: every rank makes every check.
        counts: of an iteration.
    """

    def __init__(self, settings: Settings, run: Assembly, engine: Engine, counts: Counts) -> None:
        self._values, self._run, self._engine, self._counts = settings.values, run, engine, counts
        self._parts = run.parts
        self._model_dtype = self._values["model"]["dtype"]
        self._drawn: Batch | None = None

    def draw_prompts(self) -> Prompts:
        """A handful, this rank's part: enough for a full batch of the rollout, if an iteration has as many."""
        sampler, world = self._parts.sampler, self._engine.world_size
        per_prompt = len(sampler.steps(0).trained) if sampler.branches else sampler.group_size
        full = math.ceil(sampler.micro_batch / per_prompt)
        count = min(self._counts.chosen, max(_FEWEST_GROUPS, full))
        every = self._run.prompts.next(count * world)
        return every[list(range(self._engine.rank * count, (self._engine.rank + 1) * count))]

    def model(self, prompts: Prompts) -> str:
        """Finite weights, and finite velocities at every step of the time grid."""
        network: Any = self._parts.policy.network
        for name, parameter in network.named_parameters():
            if not bool(parameter.isfinite().all()):
                count = int((~parameter.isfinite()).sum())
                raise PreflightError(
                    f"model.path={self._values['model']['path']}: {count} of the weights {name} are not finite; the "
                    "files are damaged or come from a run that diverged: download them again, or go back to an older "
                    "checkpoint"
                )
        sampler = self._parts.sampler
        for i, (_, velocity) in enumerate(self._noise_free_path(prompts)):
            if not bool(velocity.isfinite().all()):
                raise PreflightError(
                    f"the velocity is not finite at step {i} of {sampler.num_steps} in {self._model_dtype}; "
                    "model.dtype=float32 has the larger range, network.autocast=bfloat16 keeps it fast"
                )
        count = sum(self._parts.policy.trained_sizes)
        return f"{number(count)} weights are trained; velocities are finite at all {sampler.num_steps} steps"

    def zero_noise(self, prompts: Prompts) -> str:
        """With its noise switched off, the stochastic step of the rollout is the step of the evaluation."""
        sampler = self._parts.sampler
        transition = build.make(self._values["algorithm"]["transition"], "algorithm.transition").noiseless()
        name, worst = type(transition).__name__, 0.0
        for i, (x, velocity) in enumerate(self._noise_free_path(prompts)):
            if i == sampler.num_steps - 1:
                break  # never stochastic
            sigma, sigma_next = (sampler.sigma(at, x) for at in (i, i + 1))
            expected = ode_step(x, velocity, sigma, sigma_next)
            step = transition.step(x, velocity, sigma, sigma_next, sampler.sigma_max)
            apart = float((step.mean - expected).abs().max() / expected.abs().max())
            if float(step.std.abs().max()) > 0 or not apart <= _FORMULA_ROUNDING:
                raise PreflightError(
                    f"algorithm.transition: {name} without noise is not the noise-free step: at step {i} its mean is "
                    f"{apart:.1e} away relative to the state, its std {float(step.std.abs().max()):.1e} instead of 0. "
                    "Rollouts would drift from what evaluation draws; mend the drift of step(), or noiseless()"
                )
            worst = max(worst, apart)
        same = f"up to {worst:.0e} of the state" if worst else "to the last bit"
        return f"{name} without noise is the noise-free step {same}"

    def roll_out(self, prompts: Prompts) -> str:
        """A rollout at the shapes of training; the network is evaluated as often as the formula says."""
        parts, sampler = self._parts, self._parts.sampler
        conditions = parts.policy.encode(list(prompts.texts))
        before = parts.policy.evaluations.copy()
        trunks = sampler.trunks(parts.policy.velocity, conditions, prompts, 0) if sampler.branches else None
        rollout = sampler.roll_out(parts.policy.velocity, conditions, prompts, trunks, 0)
        states = drawn_states(sampler, len(prompts)) + (len(prompts) * sampler.num_steps if sampler.branches else 0)
        expected = states * self._counts.evaluations_per_state
        if not agrees(before, parts.policy.evaluations, expected):
            spent = dict(parts.policy.evaluations - before)
            raise PreflightError(f"the rollout took {spent} network evaluations, by the formula {expected} to sample")
        if not bool(rollout.x0.isfinite().all()):
            raise PreflightError(
                "the stochastic rollout ends in latents that are not finite; lower the noise of algorithm.transition"
            )
        self._drawn = Batch(prompts, conditions, trunks, rollout, parts.policy.decode(rollout.x0))
        return f"{len(rollout.x0)} images of {len(prompts)} prompts, {number(expected)} network evaluations as computed"

    def ratio(self) -> str:
        """Before any update the policy gives every transition the probability it was drawn with."""
        visits, batches = self._run.choices.visits, self.drawn.rollout.transitions
        parts = [part for batch in batches for part in batch.split(visits.states)]
        worst, counted = 0.0, 0
        for part in parts:
            deviation = float((self._log_prob(part) - part.rollout_log_prob).abs().max())
            worst, counted = max(worst, deviation if math.isfinite(deviation) else math.inf), counted + len(part.x_next)
        shape = f"{len(parts[0].x)} states a call"
        if visits.exact and worst > 0:
            raise PreflightError(
                f"before any update the log-probabilities are up to {worst:.1e} away from those of the rollout, so the "
                "ratio is not 1; nothing differs between the two but the gradient. Look for dropout that is left on in "
                "the network (eval()), for randomness in it, or in log_prob() of algorithm.transition"
            )
        rounding = _RATIO_ROUNDING["bfloat16" if self._values["network"]["autocast"] else self._model_dtype]
        if not worst <= rounding:
            raise PreflightError(
                f"before any update the log-probabilities are up to {worst:.1e} away from those of the rollout; the "
                f"rounding of other batch sizes or of a compiled network is below {rounding:g}. Look for dropout that "
                "is left on in the network, for randomness in it, or in log_prob() of algorithm.transition"
            )
        exactly = "exactly 1" if visits.exact else f"1 by definition; rounding moves log-probabilities by {worst:.0e}"
        return f"the first ratio is {exactly} for {counted} transitions, {shape}"

    def spread(self) -> str:
        """Samples of a group differ in their scores, or nothing could be learned; none is missing beyond the limit.

        Rewards that only evaluate are asked, too: whether they answer had better not be found at the first evaluation.
        """
        batch, scorer = self.drawn, self._parts.scorer
        collector = scorer.collect(evaluation=True)
        texts = [batch.prompts.texts[row] for row in batch.rollout.prompt.tolist()]
        collector.add(batch.images, texts, batch.rollout.group.tolist())
        scores = collector.scores()
        if too_many := scorer.excess(scores):
            raise PreflightError(f"{too_many}; the iteration would be skipped")
        parts = {name: scores.parts[name] for name in scorer.weights}
        spreads = self._engine.gather(torch.stack([_spread(batch.rollout.group, part) for part in parts.values()]).T)
        apart, ranges = (spreads > 0).any(1), ", ".join(f"{name} {_range(part)}" for name, part in parts.items())
        if not bool(apart.any()):
            raise PreflightError(
                f"in all {len(apart)} groups every sample has the same score ({ranges}): a group without spread "
                "teaches nothing. Choose another reward, harder or easier prompts, more noise, or a larger group_size"
            )
        missing = {name: share for name, share in scores.missing.items() if share}
        size = self._parts.sampler.group_size
        text = f"{int(apart.sum())} of {len(apart)} groups of {size} have a spread; {ranges}"
        if missing:
            shares = ", ".join(f"{share:.0%} of {name}" for name, share in missing.items())
            return Note(f"{text}; missing: {shares} ({scores.reason})")
        return text

    def identity(self) -> str:
        """What every reward is, and whether it scores as where it was recorded."""
        lines, unrecorded = [], []
        for source in self._parts.rewards.sources:
            known = compare_with_record(source)
            unrecorded += [] if known else [source.entry.name]
            lines.append(
                f"{source.entry.name}: {source.client.fingerprint}, "
                + ("scores as recorded" if known else "UNRECORDED: whether its scores are right, nothing here tells")
            )
        text = "\n".join(lines)
        return Note(text) if unrecorded else text

    @property
    def drawn(self) -> Batch:
        """What roll_out() drew."""
        if self._drawn is None:
            raise RuntimeError("roll_out() comes first")
        return self._drawn

    @torch.no_grad()
    def _noise_free_path(self, prompts: Prompts) -> list[tuple[Tensor, Tensor]]:
        """State [R, *latent] and velocity before each step of the noise-free sampler, for two prompts at most."""
        sampler, policy = self._parts.sampler, self._parts.policy
        few = prompts[list(range(min(2, len(prompts), sampler.micro_batch)))]
        conditions = policy.encode(list(few.texts))
        keys = [NoiseKey(self._values["seed"], 0, prompt_id, SHARED, INITIAL) for prompt_id in few.ids]
        x = to_device(keyed_noise(keys, sampler.latent_shape), self._engine.device).to(sampler.latent_dtype)
        path = []
        for i in range(sampler.num_steps):
            velocity = policy.velocity(x, sampler.sigma(i, x), conditions)
            path.append((x, velocity))
            x = ode_step(x, velocity, sampler.sigma(i, x), sampler.sigma(i + 1, x)).to(sampler.latent_dtype)
        return path

    def _log_prob(self, part: Transitions) -> Tensor:
        policy, sampler = self._parts.policy, self._parts.sampler
        conditions = self.drawn.conditions[to_device(part.prompt, self._engine.device)]
        with self._engine.micro_step(policy.network, last=False):
            return self._run.choices.objective.log_prob(policy, part, conditions, sampler.sigma_max)


def _spread(group: Tensor, scores: Tensor) -> Tensor:
    """Largest minus smallest score of each group, 0 of one without two scores."""
    spreads = []
    for row in range(int(group.max()) + 1):
        own = scores[group == row]
        present = own[own.isfinite()]
        spreads.append(float(present.max() - present.min()) if len(present) > 1 else 0.0)
    return torch.tensor(spreads)


def _range(scores: Tensor) -> str:
    present = scores[scores.isfinite()]
    return f"{float(present.min()):.3g} to {float(present.max()):.3g}" if len(present) else "missing"
