"""How long a study will take: a few of its arms are run for a moment, side by side as the study will."""

import heapq
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path

from adagrpo_train.errors import TrainingError
from adagrpo_train.experiments.runner import Budget, Outcome, last_words, run_all
from adagrpo_train.experiments.study import Arm, Run
from adagrpo_train.runtime.files import write_whole
from adagrpo_train.settings import Settings, read_settings
from adagrpo_train.tracking.records import read_rows

_ARMS = 4
_ITERATIONS = 3
_SHORT = (
    f"iterations={_ITERATIONS}",
    "evaluation.every=1",
    "checkpoint.every=0",
    "lr_schedule.warmup_iterations=0",
    "lr_schedule.anneal_iterations=0",
    "tracker=local",
)
MARGIN = 1.3
"""By how much a study may take longer than the pilots say before the estimate counts as wrong."""


@dataclass(frozen=True)
class Pace:
    """Mean seconds of the parts of a run, measured beside as many others as the budget allows."""

    start: float  # everything but iterations and evaluations
    iteration: float
    evaluation: float

    def of(self, settings: Settings) -> float:
        """Seconds of a run with these settings."""
        iterations, every = settings.values["iterations"], settings.values["evaluation"]["every"]
        between = (iterations - 1) // every if every else 0
        return self.start + iterations * self.iteration + (2 + between) * self.evaluation


def measure(arms: list[Arm], budget: Budget, runs: int, folder: Path, *, said: Callable[[str], None]) -> Pace:
    """Run a few arms for some iterations.

    Args:
        runs: of the whole study; not more of them are beside each other.
        folder: inside that of the study; what was measured is kept there for the next time with the same budget.

    Raises:
        TrainingError: one of them fails, and so would the study.
    """
    path = folder / f"pace_{budget.cores}_{budget.gpus}_{budget.processes}.json"
    if path.is_file():
        return Pace(**json.loads(path.read_text(encoding="utf-8")))
    step = max(1, len(arms) // _ARMS)
    tried = arms[::step][:_ARMS]
    at_once = min(budget.jobs, runs)
    tried = list(islice(cycle(tried), len(tried) + -len(tried) % at_once))  # all have something to do, as in the study
    pilots = [
        Run(Arm(arm.levels, (*arm.overrides, *_SHORT)), number, folder / f"{number}-{arm.name}")
        for number, arm in enumerate(tried)
    ]
    for pilot in pilots:  # of a measurement that was interrupted: continued, it would count the pause
        shutil.rmtree(pilot.folder, ignore_errors=True)
    said(f"measuring the time of {len(pilots)} short runs")
    outcomes = run_all(pilots, budget, folder=folder.parent, done=lambda _: None, keep_weights=False)
    failed = [outcome.run for outcome in outcomes if not outcome.succeeded]
    if failed:
        raise TrainingError(f"a short run of {failed[0].arm.name} failed:\n{last_words(failed[0])}")
    paces = [_pace(outcome) for outcome in outcomes]
    pace = Pace(
        *(sum(getattr(own, name) for own in paces) / len(paces) for name in ("start", "iteration", "evaluation"))
    )
    write_whole(path, json.dumps(asdict(pace)))
    return pace


def _pace(outcome: Outcome) -> Pace:
    rows = read_rows(outcome.run.folder / "metrics.jsonl")
    seconds = [row["time/iteration_seconds"] for row in rows if "time/iteration_seconds" in row]
    written = [path.stat().st_mtime for path in sorted((outcome.run.folder / "evaluations").glob("*.jsonl"))]
    # Between two evaluations lie an iteration and the second of them.
    gaps = [later - earlier for earlier, later in pairwise(written)]
    evaluation = sum(max(0.0, gap - own) for gap, own in zip(gaps, seconds, strict=True)) / len(gaps)
    start = max(0.0, outcome.seconds - sum(seconds) - len(written) * evaluation)
    return Pace(start, sum(seconds[1:]) / len(seconds[1:]), evaluation)


def study_seconds(runs: list[Run], pace: Pace, budget: Budget) -> float:
    """Seconds until all runs have ended, each of which begins as soon as there is room for it."""
    per_arm = {arm: pace.of(read_settings([*arm.overrides])) for arm in {run.arm for run in runs}}
    ends = [0.0] * budget.jobs
    for run in runs:
        heapq.heapreplace(ends, ends[0] + per_arm[run.arm])
    return max(ends)
