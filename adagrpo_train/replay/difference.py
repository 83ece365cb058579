"""What is different between a recorded iteration and its replay, as plain numbers."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adagrpo_train.functional.advantages import misjudged
from adagrpo_train.recording.record import Record
from adagrpo_train.replay.again import Outcome


def difference(record: Record, before: Outcome, after: Outcome) -> dict[str, Any]:
    """Everything that a table or another program may want to know, ready for JSON.

    Args:
        before: what the run did.
        after: what it would have done.
    """
    both = before.usable & after.usable
    flipped = (before.fused * after.fused < 0)[both]
    return {
        "iteration": record.iteration,
        "selection": _selection(record, before, after),
        "level": {"recorded": _levels(before), "replayed": _levels(after)},
        "advantage": {
            "usable": _pair(int(before.usable.sum()), int(after.usable.sum())),
            "abs_mean": _pair(_mean(before.fused.abs(), before), _mean(after.fused.abs(), after)),
            "sign_changes": _number(flipped.float().mean()) if len(flipped) else None,
            "largest_change": _number((before.fused - after.fused)[both].abs().max()) if len(flipped) else None,
            "misjudged": {"recorded": _misjudged(before), "replayed": _misjudged(after)},
        },
        "updates": _updates(record, before, after),
        "samples_without_log_prob": after.unknown,
    }


def reproduced(before: Outcome, after: Outcome) -> dict[str, Any]:
    """How far a replay under the record's own configuration is from what was recorded.

    Returns:
        "choice": whether prompts, levels and the samples that count are the same; "exact": whether all else is, too;
        and the largest distances of advantages and losses, of those that both have.
    """
    names = ("total", "local", "across", "fused", "losses", "clipped")
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in names}
    same = (before.rows, before.levels) == (after.rows, after.levels) and torch.equal(before.usable, after.usable)
    same &= all(torch.equal(ours.isnan(), theirs.isnan()) for ours, theirs in pairs.values())
    exact = same and all(torch.equal(ours.nan_to_num(), theirs.nan_to_num()) for ours, theirs in pairs.values())
    apart = {name: _number((ours - theirs).nan_to_num().abs().max()) for name, (ours, theirs) in pairs.items()}
    return {"exact": exact, "choice": same, **apart}


def _selection(record: Record, before: Outcome, after: Outcome) -> dict[str, Any]:
    total = record.tensors.get("candidate.total")

    def prompts(rows: set[int]) -> list[dict[str, Any]]:
        known = record.prompts
        return [
            {
                "prompt_id": known.ids[row],
                "text": known.texts[row],
                "class": known.classes[row],
                "score": None if total is None else _number(total[row]),
            }
            for row in sorted(rows)
        ]

    ours, theirs = set(before.rows or ()), set(after.rows or ())
    ids = [
        [record.prompts.ids[row] for row in rows] if rows is not None else None for rows in (before.rows, after.rows)
    ]
    return _pair(*ids) | {"only_recorded": prompts(ours - theirs), "only_replayed": prompts(theirs - ours)}


def _misjudged(outcome: Outcome) -> dict[str, float | None]:
    """Rates of the usable samples as the log of a run has them, before (local) and after the fusion.

    See functional.advantages.misjudged(). None without a level, or without samples on that side of it.
    """
    names = ("local_false_positive", "local_false_negative", "fused_false_positive", "fused_false_negative")
    if None in outcome.levels or not bool(outcome.usable.any()):
        return dict.fromkeys(names)
    means = torch.tensor([level.mean for level in outcome.levels if level is not None], dtype=torch.float64)
    distance = (outcome.total - means.repeat_interleave(len(outcome.total) // len(means)))[outcome.usable]
    rates = [misjudged(own[outcome.usable], distance, 0.0) for own in (outcome.local, outcome.fused)]
    return dict(zip(names, chain(*rates), strict=True))


def _updates(record: Record, before: Outcome, after: Outcome) -> list[dict[str, Any]]:
    """Every optimizer step of all processes: means over its transitions."""
    update = record.tensors["batch.update"]
    found = []
    for number in update.unique().tolist():
        own = update == number
        found.append(
            {
                "update": number,
                "loss": _pair(_weighted(before.losses, before, own), _weighted(after.losses, after, own)),
                "clip_fraction": _pair(_weighted(before.clipped, before, own), _weighted(after.clipped, after, own)),
                "transitions": _pair(int(before.counts[own].sum()), int(after.counts[own].sum())),
            }
        )
    return found


def _weighted(values: Tensor, outcome: Outcome, own: Tensor) -> float | None:
    counts = outcome.counts[own].double()
    return _number((values[own].double().nan_to_num() * counts).sum() / counts.sum()) if counts.sum() else None


def _levels(outcome: Outcome) -> list[dict[str, float] | None]:
    return [None if level is None else {"mean": level.mean, "std": level.std} for level in outcome.levels]


def _mean(values: Tensor, outcome: Outcome) -> float | None:
    return _number(values[outcome.usable].mean()) if bool(outcome.usable.any()) else None


def _pair(recorded: Any, replayed: Any) -> dict[str, Any]:
    return {"recorded": recorded, "replayed": replayed}


def _number(value: Tensor) -> float | None:
    """JSON has no nan."""
    return float(value) if bool(value.isfinite()) else None
