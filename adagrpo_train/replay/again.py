"""Do again what a recorded iteration did with its scores and log-probabilities."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adagrpo_train.build import make_choices, make_entries
from adagrpo_train.errors import ConfigError
from adagrpo_train.interfaces import Curriculum
from adagrpo_train.recording.record import Record
from adagrpo_train.runtime.replicated import ReplicatedEngine
from adagrpo_train.runtime.stopping import StopRequest
from adagrpo_train.scoring.answered import answered
from adagrpo_train.scoring.comparison import Comparison, compare
from adagrpo_train.scoring.scorer import Scorer
from adagrpo_train.types import Level, Terms


@dataclass(frozen=True)
class Outcome:
    """What an iteration made of its scores, as recorded or as replayed."""

    rows: tuple[int, ...] | None  # chosen candidates, best first; None: too few had a score
    levels: tuple[Level | None, ...]  # one, or one for each process where each has its own
    total: Tensor  # [N]
    usable: Tensor  # [N] bool
    local: Tensor  # [N] advantages against the group
    across: Tensor  # [N] against the policy's past
    fused: Tensor  # [N] their sum
    losses: Tensor  # [C] float32 of each network batch of the update; NaN where no transition counts
    clipped: Tensor  # [C] share of its ratios outside the range
    counts: Tensor  # [C] int64: transitions that count in it
    unknown: int = 0  # samples that count now and have no log-probabilities, since they did not then


def recorded(record: Record) -> Outcome:
    """What the run did."""
    head, tensors = record.head, record.tensors
    levels = tuple(None if level is None else Level(**level) for level in head["levels"])
    own = levels if head["config"]["curriculum"]["per_rank"] else levels[:1]
    return Outcome(
        rows=tuple(head["selection"]["rows"]),
        levels=own,
        total=tensors["sample.total"],
        usable=tensors["sample.usable"],
        local=tensors["sample.local"],
        across=tensors["sample.across"],
        fused=tensors["sample.fused"],
        losses=tensors["batch.loss"],
        clipped=tensors["batch.figure.policy/clip_fraction"],
        counts=torch.bincount(tensors["visit.batch"], minlength=len(tensors["batch.loss"])),
    )


class Replay:
    """Goes through the records of a run, in order; the level follows from one to the next.

    Where an iteration between two records is missing, the level goes on from what the run had; `notes` says so.

    Args:
        config: a configuration like the one the records were made with.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config, self._choices = config, make_choices(config)
        self._engine = ReplicatedEngine(kind="single", device="cpu", timeout_seconds=60)
        self._curricula: list[Curriculum] = []
        self._last: Record | None = None
        self.notes: list[str] = []

    def of(self, record: Record) -> Outcome:
        """One iteration again.

        Raises:
            ConfigError: the configuration asks for something that was not recorded.
        """
        scorer = self._scorer(record)
        self._go_on_from(record)
        self._last = record
        rows = self._select(record, scorer)
        parts = record.parts("sample")
        total = scorer.total(parts)
        if rows is None:
            nothing, none = torch.zeros_like(total), torch.zeros(len(total), dtype=torch.bool)
            return self._outcome(record, None, total, [Comparison(none, nothing, nothing, nothing, None)])
        found = [self._compared(record, scorer, total, parts, rank) for rank in range(len(self._curricula))]
        return self._outcome(record, rows, total, found)

    def _outcome(self, record: Record, rows: tuple[int, ...] | None, total: Tensor, found: list[Comparison]) -> Outcome:
        usable, local = found[0].usable, found[0].local
        across, fused = (torch.cat([getattr(each, name) for each in found]) for name in ("across", "fused"))
        known = usable & record.tensors["sample.usable"]
        losses, clipped, counts = self._losses(record, fused, known)
        return Outcome(
            rows=rows,
            levels=tuple(each.level for each in found),
            total=total,
            usable=usable,
            local=local,
            across=across,
            fused=fused,
            losses=losses,
            clipped=clipped,
            counts=counts,
            unknown=int((usable & ~known).sum()),
        )

    def _scorer(self, record: Record) -> Scorer:
        scoring = self._config["scoring"]
        scorer = Scorer(
            answered(make_entries(self._config), record.head["rewards"]),
            scale=scoring["scale"],
            level=scoring["level"],
            alpha=self._config["curriculum"]["alpha"],
            engine=self._engine,
            stop=StopRequest(),
        )
        state = dict(record.head["scoring"]["before"])
        if scoring["scale"] == "raw":
            state["calibration"] = None
        elif not set(scorer.weights) <= set(state["calibration"] or {}):
            raise ConfigError(
                f"scoring.scale=calibrated: cannot be replayed with the weighted metrics {', '.join(scorer.weights)}: "
                f"those that the run calibrated are {', '.join(state['calibration'] or {}) or 'none'}"
            )
        scorer.load_state_dict(state)
        return scorer

    def _go_on_from(self, record: Record) -> None:
        """Fresh curricula with the recorded state, unless this record follows the last one without a gap."""
        states, last = record.head["curriculum"]["before"], self._last
        if last and last.iteration + 1 == record.iteration and last.head["curriculum"]["after"] == states:
            return
        if last:
            self.notes.append(
                f"iteration {record.iteration}: the record before it is of iteration {last.iteration}, so the level "
                "goes on from what the run had"
            )
        own = states if self._config["curriculum"]["per_rank"] else states[:1]
        self._curricula = [make_choices(self._config).curriculum for _ in own]
        for curriculum, state in zip(self._curricula, own, strict=True):
            curriculum.load_state_dict(state)

    def _select(self, record: Record, scorer: Scorer) -> tuple[int, ...] | None:
        """Rows of the candidates, which the level follows; None where a run would have skipped the iteration."""
        first = self._curricula[0]
        if not first.scores_candidates:
            return first.select(None, first.chosen).rows
        total, ranks = scorer.total(record.parts("candidate")), len(self._curricula)
        if first.chosen % ranks:
            raise ConfigError(f"curriculum.chosen={first.chosen} must be a multiple of the {ranks} recorded processes")
        size, count = len(total) // ranks, first.chosen // ranks
        pieces = total.split(size)
        if any(int(piece.isfinite().sum()) < count for piece in pieces):
            self.notes.append(f"iteration {record.iteration}: too few candidates have a score; a run would skip it")
            return None
        own = zip(self._curricula, pieces, strict=True)
        chosen = [curriculum.select(piece, count).rows for curriculum, piece in own]
        return tuple(row + rank * size for rank, rows in enumerate(chosen) for row in rows)

    def _compared(
        self, record: Record, scorer: Scorer, total: Tensor, parts: dict[str, Tensor], rank: int
    ) -> Comparison:
        """The samples that are compared with one level: of one process, or of all of them."""
        size = len(total) // len(self._curricula)
        return compare(
            total,
            parts,
            record.tensors["sample.group"],
            slice(rank * size, (rank + 1) * size),
            group_size=self._config["group_size"],
            scorer=scorer,
            curriculum=self._curricula[rank],
            advantage=self._choices.advantage,
        )

    def _losses(self, record: Record, fused: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, clipped share and count [C] of every network batch, with the log-probabilities of the run."""
        tensors, kl = record.tensors, record.tensors.get("visit.kl")
        batches = len(tensors["batch.loss"])
        losses, clipped = torch.full((batches,), torch.nan), torch.full((batches,), torch.nan)
        counts = torch.zeros(batches, dtype=torch.int64)
        sample = tensors["transition.sample"][tensors["visit.transition"]]
        rollout = tensors["transition.rollout_log_prob"][tensors["visit.transition"]]
        for batch in range(batches):
            own = (tensors["visit.batch"] == batch) & known[sample]
            counts[batch] = own.sum()
            if counts[batch]:
                columns = (tensors["visit.log_prob"][own], tensors["visit.old_log_prob"][own], rollout[own])
                terms = Terms(*columns, kl=None if kl is None else kl[own])
                loss = self._choices.objective.surrogate(terms, fused[sample[own]])
                losses[batch], clipped[batch] = loss.value, loss.metrics["policy/clip_fraction"]
        return losses, clipped, counts
