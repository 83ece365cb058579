"""`adagrpo-experiment`."""

import argparse
import os
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adagrpo_train.cli.command import quieten
from adagrpo_train.errors import AdaGRPOError, ConfigError

if TYPE_CHECKING:
    from adagrpo_train.experiments.runner import Budget, Outcome
    from adagrpo_train.experiments.study import Arm, Run, Study

_DESCRIPTION = """\
Run a study, many trainings that differ in a few settings, and say what came out of it.

  adagrpo-experiment selection                 which prompts to train on: five ways, five seeds
  adagrpo-experiment plugin --plan             only say what would be run, and how long it takes
  adagrpo-experiment fusion --seeds 8          more seeds; finished runs of the same study are kept
  adagrpo-experiment my_study.yaml iterations=50 model=sd35_medium --gpus 8 --processes 4
"""
_EPILOG = """\
The same command goes on with a study that was interrupted: finished runs are kept, begun ones continue from their
checkpoint. Results: OUT/results.json, OUT/results.md, OUT/report.html, figures in OUT/figures/.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a study. Returns 0 when all runs are finished, 2 after an error the user can mend, 130 when interrupted."""
    options = _options(arguments)
    quieten()
    try:
        return _study(options)
    except AdaGRPOError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on\n")
        return 130


def _options(arguments: list[str] | None) -> argparse.Namespace:
    from adagrpo_train.experiments.study import built_in

    parser = argparse.ArgumentParser(
        prog="adagrpo-experiment",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", help=f"one of {', '.join(built_in())}, or a YAML file like those in configs/study")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, as of adagrpo-train")
    parser.add_argument("--out", type=Path, help="folder of the study (default: studies/NAME)")
    parser.add_argument("--seeds", type=int, help="runs of each arm (default: the study's)")
    parser.add_argument("--cores", type=int, default=_cores(), help="of the CPU, for all runs at once (default: all)")
    parser.add_argument("--gpus", type=int, default=0, help="for all runs at once (default: 0, train on the CPU)")
    parser.add_argument("--processes", type=int, default=1, help="of each run (default: 1)")
    parser.add_argument("--keep-weights", action="store_true", help="keep checkpoints and exports of finished runs")
    parser.add_argument("--plan", action="store_true", help="say what would be run and how long it takes, and stop")
    parser.add_argument("--tables", action="store_true", help="draw tables and figures of the finished runs again")
    # Settings may stand before and after options.
    options = parser.parse_intermixed_args(sys.argv[1:] if arguments is None else arguments)
    options.out = options.out or Path("studies") / Path(options.study).stem
    return options


def _study(options: argparse.Namespace) -> int:
    # Imported here: it takes seconds, and --help does not need it.
    from adagrpo_train.experiments import ledger, runner
    from adagrpo_train.experiments.pairing import check_pairs
    from adagrpo_train.experiments.study import read_study, runs
    from adagrpo_train.settings import read_settings

    study = read_study(options.study, overrides=options.overrides, seeds=options.seeds)
    budget = runner.Budget(options.cores, options.gpus, options.processes)
    runner.check_gpus(budget)
    folder: Path = options.out.resolve()
    everything = runs(study, folder)
    values: dict[Arm, dict[str, Any]] = {}
    for arm in dict.fromkeys(run.arm for run in everything):
        try:
            values[arm] = read_settings(list(arm.overrides)).values
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name}: {error}") from error
    check_pairs(study, values)
    with runner.locked(folder):
        # Tables are made of what is there, whatever has become of the files since.
        ledger.open_study(folder, study, {} if options.tables else ledger.contents(values.values()))
        if options.tables:
            return _tell(folder, study, everything)
        todo = [run for run in everything if not runner.finished(run.folder)]
        if todo or options.plan:
            _announce(study, everything, todo, budget, folder)
        if options.plan:
            return 0
        if todo:
            ledger.note_origin(folder)
        outcomes = runner.run_all(
            todo, budget, folder=folder, done=_Progress(len(everything), len(todo)), keep_weights=options.keep_weights
        )
        failed = [outcome.run for outcome in outcomes if not outcome.succeeded]
        for run in failed:
            sys.stderr.write(f"\n{run.name} failed; all it said is in {run.folder}:\n{runner.last_words(run)}\n")
        return _tell(folder, study, everything) or (2 if failed else 0)


def _announce(study: "Study", everything: list["Run"], todo: list["Run"], budget: "Budget", folder: Path) -> None:
    """Say what will be run and how long it will take."""
    from adagrpo_train.experiments import estimate
    from adagrpo_train.reports.page import duration

    arms = list(dict.fromkeys(run.arm for run in everything))
    sys.stdout.write(f"{study.question}\n{len(arms)} arms x {study.seeds} seeds, {budget.jobs} at once -> {folder}\n")
    if not todo:
        _say(f"all {len(everything)} runs are finished: nothing is left to run")
        return
    if len(todo) < len(everything):
        sys.stdout.write(f"{len(everything) - len(todo)} of {len(everything)} runs are finished\n")
    pace = estimate.measure(arms, budget, len(everything), folder / "pilot", said=_say)
    seconds = estimate.study_seconds(todo, pace, budget)
    most = seconds * estimate.MARGIN
    _say(
        f"{len(todo)} runs: about {duration(seconds)}, at most {duration(most)} on this machine as busy as it is now, "
        f"until {until(datetime.now(), most)}"
    )


def until(start: datetime, seconds: float) -> str:
    """When something ends: the hour, and the day where it is another one."""
    end = start + timedelta(seconds=seconds)
    return f"{end:%H:%M}" if end.date() == start.date() else f"{end:%Y-%m-%d %H:%M}"


def _tell(folder: Path, study: "Study", everything: list["Run"]) -> int:
    from adagrpo_train.experiments.results import write_results

    results = write_results(folder, study, everything)
    for finding in results["findings"]:
        _say(f"- {finding}")
    _say(f"report: {folder / 'report.html'}")
    return 0


class _Progress:
    """A line for each run that has ended."""

    def __init__(self, total: int, todo: int) -> None:
        self._total, self._todo, self._ended = total, todo, 0
        self._started = datetime.now()

    def __call__(self, outcome: "Outcome") -> None:
        self._ended += 1
        left = (datetime.now() - self._started) / self._ended * (self._todo - self._ended)
        _say(
            f"{self._total - self._todo + self._ended:>4}/{self._total}  {outcome.run.name}  "
            f"{'done' if outcome.succeeded else 'FAILED'} in {outcome.seconds:.0f} s"
            + (f"  left {timedelta(seconds=round(left.total_seconds()))}" if left else "")
        )


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
