"""Which batches each optimizer step of an iteration visits, and which log-probabilities it compares with."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from adagrpo_train.errors import ConfigError
from adagrpo_train.functional.visiting import visits
from adagrpo_train.types import Transitions


@dataclass(frozen=True, kw_only=True)
class Visits:
    """One shuffled pass over the batches of a rollout per inner epoch, in equally many optimizer steps.

    The ratio needs the log-probabilities that the policy had before the first step, as the update computes them: a
    batch of another size, or another compiled program, gives other last bits, and published clip ranges lie below them
    in bfloat16. Where the update runs what the rollout ran, they are those of the rollout. Elsewhere the first step
    compares with itself, so that its ratios are 1 by definition, and what later steps visit is evaluated once more
    before it.

    Args:
        inner_epochs: passes over the batches.
        updates: optimizer steps per iteration, a multiple of inner_epochs.
        states: most states per network call of the update.
        rollout_states: most states per network call of the rollout.
        same_program: whether the update runs the same program of the network as the rollout.
        seed: of the order.

    Raises:
        ConfigError: states is not in 1 .. rollout_states.
    """

    inner_epochs: int
    updates: int
    states: int
    rollout_states: int
    same_program: bool
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.states <= self.rollout_states:
            raise ConfigError(
                f"update_micro_batch={self.states}: must be from 1 to micro_batch={self.rollout_states}; the update "
                "works on the batches of the rollout, whole or in parts"
            )

    @property
    def exact(self) -> bool:
        """Whether the log-probabilities of the rollout are those of the update bit for bit."""
        return self.same_program and self.states == self.rollout_states

    def parts(self, states: int) -> int:
        """Network calls for a batch of so many states."""
        return -(-states // self.states)

    def of(
        self, batches: list[Transitions], iteration: int, number: int, log_prob: Callable[[Transitions], Tensor]
    ) -> list[list[Transitions]]:
        """The batches of every optimizer step, in order, at most `states` states each.

        The split decides nothing else: a step has the same transitions whatever it is.

        Args:
            batches: of this process.
            number: of the first of them among those of all processes.
            log_prob: log-probabilities [M] of a batch under the present policy, as the update computes them.
        """
        epochs = range(self.inner_epochs)
        first, *others = [rows for epoch in epochs for rows in self._steps(len(batches), number, iteration, epoch)]
        parts = {row: batch.split(self.states) for row, batch in enumerate(batches)}
        if self.exact:
            return [_visited(parts, rows) for rows in (first, *others)]
        present = {row: [replace(part, log_prob=None) for part in parts[row]] for row in first}
        before = {
            row: [replace(part, log_prob=log_prob(part)) for part in parts[row]]
            for row in sorted({row for rows in others for row in rows})
        }
        return [_visited(present, first), *(_visited(before, rows) for rows in others)]

    def visited_later(self, count: int) -> list[int]:
        """Of so many batches those that an optimizer step after the first visits in the first iteration."""
        steps = [rows for epoch in range(self.inner_epochs) for rows in self._steps(count, 0, 0, epoch)]
        return sorted({row for rows in steps[1:] for row in rows})

    def _steps(self, count: int, number: int, iteration: int, epoch: int) -> list[list[int]]:
        seed = (self.seed * 1_000_003 + iteration) * 1_009 + epoch
        return visits(count=count, first=number, updates=self.updates // self.inner_epochs, seed=seed)


def _visited(parts: dict[int, list[Transitions]], rows: list[int]) -> list[Transitions]:
    return [part for row in rows for part in parts[row]]
