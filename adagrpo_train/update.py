"""The policy update: the transitions of one iteration -> optimizer steps."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from adagrpo_train.algorithms.visits import Visits
from adagrpo_train.errors import ConfigError, TrainingError
from adagrpo_train.interfaces import Objective
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.figures import Figures
from adagrpo_train.runtime.policy import Policy
from adagrpo_train.runtime.transfer import to_device
from adagrpo_train.types import Conditions, Loss, Transitions

Watch = Callable[[int, Transitions, Loss, float], None]


def check_batches(sizes: list[int], visits: Visits, processes: int) -> None:
    """Refuse rollouts whose batches cannot be shared among the optimizer steps of an inner epoch.

    Args:
        sizes: states of each network batch of one rollout on each process.
        visits: which batches each optimizer step visits.

    Raises:
        ConfigError: too few batches, or processes would differ in what they compute.
    """
    batches, per_epoch = len(sizes), visits.updates // visits.inner_epochs
    if batches < per_epoch:
        raise ConfigError(
            f"updates_per_iteration={visits.updates}: an inner epoch has only {batches} "
            f"batches on each process for {per_epoch} updates; lower micro_batch or updates_per_iteration"
        )
    if processes > 1 and batches % per_epoch:
        raise ConfigError(
            f"updates_per_iteration={visits.updates}: with {processes} processes the {batches} "
            f"batches of each must be a multiple of the {per_epoch} updates of an inner epoch, or processes would "
            "differ in how much they compute; change micro_batch or updates_per_iteration"
        )
    # Which batch goes to which update is drawn for each process: with other numbers of parts they would wait for
    # each other's gradients, or weights, for ever.
    if processes > 1 and per_epoch > 1 and len({visits.parts(size) for size in sizes}) > 1:
        raise ConfigError(
            f"update_micro_batch={visits.states}: with {processes} processes and {per_epoch} updates in an inner "
            f"epoch, batches of {sizes[0]} and of {sizes[-1]} states must fall into equally many parts; set "
            f"update_micro_batch={visits.rollout_states}, or a micro_batch that divides the states of each"
        )


class PolicyUpdate:
    """Moves the weights by the transitions of one iteration, and keeps what that has as state.

    Args:
        policy: whose weights move.
        objective: the loss of one network batch.
        optimizer: of those weights.
        rates: the learning rate over optimizer steps.
        visits: which batches each optimizer step visits.
        engine: ranks make every step together.
        sigma_max: second sigma of the sampler's grid.
        max_grad_norm: gradients are scaled down to this norm.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        objective: Objective,
        optimizer: Optimizer,
        rates: LambdaLR,
        visits: Visits,
        engine: Engine,
        sigma_max: float,
        max_grad_norm: float,
    ) -> None:
        self._policy, self._objective, self._optimizer = policy, objective, optimizer
        self._rates, self._visits, self._engine = rates, visits, engine
        self._sigma_max, self._max_grad_norm = sigma_max, max_grad_norm
        self._updates = 0

    def make(
        self,
        batches: list[Transitions],
        conditions: Conditions,
        advantages: Tensor,
        usable: Tensor,
        iteration: int,
        watch: Watch = lambda update, batch, loss, weight: None,
    ) -> dict[str, float]:
        """Visit the transitions of usable samples once per inner epoch, in the configured number of optimizer steps.

        Args:
            batches: of this rank.
            conditions: P rows, those of the chosen prompts of this rank.
            advantages: [N] of this rank's samples.
            usable: [N] bool; the transitions of other samples count nowhere.
            iteration: decides the order of the visits.
            watch: told of each batch that counts, in the midst of the step: (number of the step, from 0, the batch with
                the transitions that count, its loss, the weight of that loss).

        Returns:
            Figures for the log, over all ranks.

        Raises:
            TrainingError: the gradient is not finite.
        """
        figures, before = Figures(), self._engine.optimizer_steps
        first = self._engine.rank * len(batches)
        steps = self._visits.of(batches, iteration, first, lambda batch: self._log_prob(batch, conditions))
        for number, visited in enumerate(steps):
            self._step(visited, conditions, advantages, usable, figures, partial(watch, number))
        return figures.reduced(self._engine) | {"policy/updates": float(self._engine.optimizer_steps - before)}

    def check_batches(self, sizes: list[int]) -> None:
        """Refuse rollouts with batches of these sizes: see check_batches()."""
        check_batches(sizes, self._visits, self._engine.world_size)

    def optimizer_state(self) -> dict[str, Any]:
        """State of whole parameters; what is divided among processes is put together by all of them."""
        return self._engine.optimizer_state(self._optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer steps so far and the learning rate, as JSON; the optimizer's own state is apart."""
        return {"updates": self._updates, "rates": self._rates.state_dict()}

    def load_state_dict(self, state: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """Undo state_dict() and optimizer_state()."""
        self._engine.load_optimizer_state(self._optimizer, optimizer)
        self._rates.load_state_dict(state["rates"])
        self._updates = state["updates"]

    def _log_prob(self, batch: Transitions, conditions: Conditions) -> Tensor:
        rows = to_device(batch.prompt, self._engine.device)
        with self._engine.micro_step(self._policy.network, last=False):
            return self._objective.log_prob(self._policy, batch, conditions[rows], self._sigma_max)

    def _step(
        self,
        batches: list[Transitions],
        conditions: Conditions,
        advantages: Tensor,
        usable: Tensor,
        figures: Figures,
        watch: Callable[[Transitions, Loss, float], None],
    ) -> None:
        """One optimizer step with the mean loss over the transitions of usable samples, of all ranks.

        Without any, it is left out on every rank: nothing moves, neither by weight decay nor by the optimizer's past.
        """
        # Ranks average their gradients, so each divides by its share of the transitions of all.
        here = sum(int(usable[batch.sample].sum()) for batch in batches)
        total = sum(self._engine.gather_objects(here)) / self._engine.world_size
        if not total:
            return
        first, losses = "policy/grad_norm" not in figures, list[Tensor]()
        for number, batch in enumerate(batches):
            kept = batch.of(usable)
            # Nothing usable: the batch still takes part, with weight 0, since other ranks wait for its gradients.
            weight = len(kept.sample) / total
            kept = kept if weight else batch
            rows, own = (to_device(each, self._engine.device) for each in (batch.prompt, advantages[kept.sample]))
            with self._engine.micro_step(self._policy.network, last=number == len(batches) - 1):
                loss = self._objective.loss(self._policy, kept, conditions[rows], own, self._sigma_max)
                self._engine.backward(loss.value * weight)
            if weight:
                losses.append(loss.value.detach())
                figures.add(loss.metrics, len(kept.sample))
                watch(kept, loss, weight)
            if weight and first:
                deviation = loss.metrics["policy/ratio_max_deviation_max"]
                figures.add({"policy/first_ratio_deviation_max": deviation}, 1.0)
                figures.add({"policy/rollout_deviation_max": loss.rollout_deviation}, 1.0)
        norm = self._engine.step(self._optimizer, self._policy.parameters, max_grad_norm=self._max_grad_norm)
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient norm is {norm} (losses {[float(loss) for loss in losses]}); the weights were left as "
                "they were. Lower optimizer.lr, or look at the rewards of the last iteration"
            )
        figures.add({"policy/lr": self._optimizer.param_groups[0]["lr"], "policy/grad_norm": norm}, 1.0)
        self._rates.step()
        self._policy.average.update(self._updates)
        self._updates += 1
