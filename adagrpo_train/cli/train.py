"""`adagrpo-train`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adagrpo_train.cli.command import run_command
from adagrpo_train.settings import Settings, group_options

if TYPE_CHECKING:
    from adagrpo_train.health.best import Best
    from adagrpo_train.runtime.engine import Engine

_HELP = """\
usage: adagrpo-train [key=value ...]
       accelerate launch --config_file configs/accelerate/ENGINE.yaml --num_processes N \
           -m adagrpo_train engine=ENGINE [key=value ...]
       torchrun --nproc_per_node N -m adagrpo_train engine=ENGINE [key=value ...]

Train a flow-matching text-to-image model with RL. Without arguments: the embedded tiny model, on any machine.

  adagrpo-train adagrpo=on                             AdaGRPO over Flow-GRPO
  adagrpo-train algorithm=dance_grpo adagrpo=on        the same over DanceGRPO
  adagrpo-train trainable=full optimizer.lr=1e-4       every weight instead of adapters
  adagrpo-train debug=smoke                            two iterations, seconds
  adagrpo-train resume=outputs/2026-01-01/10-00-00     continue a run

Config groups (group=option):
{groups}

Options:
  --cfg      print the composed configuration and stop
  --help     this text
"""


def main(arguments: list[str] | None = None) -> int:
    """Train. Returns the exit status: 0 when done or stopped on request, 2 after an error the user can mend."""
    groups = "\n".join(f"  {name:<11} {', '.join(options)}" for name, options in group_options().items())
    return run_command(arguments, _HELP.format(groups=groups), _train)


def _train(settings: Settings, engine: "Engine") -> None:
    from adagrpo_train import build, continuation
    from adagrpo_train.reports.run_page import write_report
    from adagrpo_train.runtime.files import whole_folder

    continuation.check_trains(settings)
    snapshot = continuation.open_snapshot(settings, engine)
    if snapshot:
        continuation.check_continuation(settings, engine, snapshot)
    run_dir = continuation.choose_run_dir(settings, engine, snapshot)
    tracker = None
    trainer, parts = build.make_trainer(settings, engine, run_dir, snapshot)
    status = "failed"
    try:
        if engine.is_main:
            tracker = build.make_tracker(settings, run_dir, snapshot)
            (run_dir / "summary.json").unlink(missing_ok=True)  # of a shorter run that this one goes on from
        outcome = trainer.train(tracker)
        if outcome == "completed":
            with parts.policy.average.applied():
                weights = parts.policy.exported()
                if engine.is_main:
                    with whole_folder(run_dir / "export") as draft:
                        parts.policy.export(draft, weights)
                    _summarise(run_dir, trainer.best, settings.values["iterations"])
        status = outcome
    finally:
        parts.rewards.close()
        if tracker:
            try:
                tracker.finish(status)
            finally:
                sys.stdout.write(f"report: {write_report(run_dir)}\n")


def _summarise(run_dir: Path, best: "Best | None", last: int) -> None:
    """Write and print the held-out scores before and after, the paired gain with its standard error, and the best.

    The export holds the last weights, whichever were the best.
    """
    from adagrpo_train.evaluator import paired_gain, read_scores
    from adagrpo_train.runtime.files import without_nan, write_whole

    files = sorted((run_dir / "evaluations").glob("*.jsonl"))
    before, after = read_scores(files[0]), read_scores(files[-1])
    summary: dict[str, Any] = {"images": len(next(iter(before.values()))), "heldout": {}}
    for name in (name for name in before if name in after):  # a reward that was let change may name other metrics
        change = paired_gain(before[name], after[name])
        summary["heldout"][name] = without_nan(change._asdict())
        sys.stdout.write(
            f"held-out {name:<7} {change.before:.3f} -> {change.after:.3f}   gain {change.gain:+.3f} +- "
            f"{change.standard_error:.3f} (paired over {summary['images']} fixed images)\n"
        )
    if best:
        summary["best"] = best._asdict()
        sys.stdout.write(_best_in_words(best, last))
    write_whole(run_dir / "summary.json", json.dumps(summary, indent=1))


def _best_in_words(best: "Best", last: int) -> str:
    where = "the exported ones" if best.iteration == last else f"in checkpoints/best; exported are those of {last}"
    return (
        f"best held-out weights: of iteration {best.iteration}, {where}; {best.gain:+.3f} standard deviations against "
        "the model before training\n"
    )
