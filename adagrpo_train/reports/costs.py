"""What a run took: time by stage, network evaluations, memory; and what it was made with and on."""

from collections.abc import Mapping, Sequence

from adagrpo_train.reports.page import short_commit
from adagrpo_train.reports.rows import Row, mean, points

_STAGES = {"candidates": "", "rollout": "", "update": "", "decode": "inside the stages", "reward": "inside the stages"}
_MACHINE = ("processor", "cores", "memory", "gpus", "processes", "system")
_UNSAID = ("unknown", "none")


def stage_table(training: Sequence[Row]) -> list[Row]:
    """Mean seconds per iteration and share of the iteration."""
    whole = mean(training, "time/iteration_seconds")
    rows = []
    for name, note in _STAGES.items():
        seconds = mean(training, f"time/{name}_seconds")
        if seconds is not None:
            share = min(1.0, seconds / whole) if whole else 0.0
            rows.append({"name": name, "note": note, "seconds": seconds, "share": share})
    return [*rows, {"name": "iteration", "note": "", "seconds": whole, "share": 1.0}] if whole else rows


def costs(training: Sequence[Row]) -> list[tuple[str, str]]:
    """What an iteration costs besides time, in words."""
    rows = []
    for name in ("sampling", "training", "reference"):
        count = mean(training, f"nfe/{name}")
        if count:
            rows.append((f"network rows, {name}", f"{count:,.0f}"))
    memory = [y for _, y in points(training, "memory/peak_bytes")]
    return [*rows, ("peak memory", f"{max(memory) / 2**30:.2f} GiB")] if memory else rows


def machine(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """The hardware, as far as it is known."""
    return [(name, environment[name]) for name in _MACHINE if environment.get(name, "unknown") not in _UNSAID]


def versions(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Everything else: commit and versions."""
    rest = {name: value for name, value in environment.items() if name not in _MACHINE and value != "unknown"}
    return [(name, short_commit(value) if name == "commit" else value) for name, value in rest.items()]
