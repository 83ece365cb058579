"""`adagrpo-train` and `adagrpo-eval`."""

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adagrpo_train.errors import AdaGRPOError, ConfigError
from adagrpo_train.settings import Settings, group_options, read_settings

if TYPE_CHECKING:
    from adagrpo_train.runtime.engine import Engine

_LATER_SECONDS = 2.0
"""How much longer than the main process the others live after an error."""

_TRAIN_HELP = """\
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

_EVAL_HELP = """\
usage: adagrpo-eval [resume=RUN_OR_CHECKPOINT] [key=value ...]

Score the held-out prompts with the noise-free sampler: of a checkpoint, or of the plain model without `resume`.
Takes the same keys as adagrpo-train, and further rewards with role=evaluation; writes evaluation.jsonl and
evaluation.png into hydra.run.dir.

Options:
  --cfg      print the composed configuration and stop
  --help     this text
"""


def main(arguments: list[str] | None = None) -> int:
    """Train. Returns the exit status: 0 when done or stopped on request, 2 after an error the user can mend."""
    groups = "\n".join(f"  {name:<11} {', '.join(options)}" for name, options in group_options().items())
    return _run(arguments, _TRAIN_HELP.format(groups=groups), _train)


def evaluate_main(arguments: list[str] | None = None) -> int:
    """Evaluate. Exit status as main()."""
    return _run(arguments, _EVAL_HELP, _evaluate)


def _run(arguments: list[str] | None, usage: str, command: "Callable[[Settings, Engine], None]") -> int:
    overrides = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(overrides):
        sys.stdout.write(usage)
        return 0
    _quieten()
    settings = None
    try:
        show = "--cfg" in overrides
        options = [o for o in overrides if o.startswith("-") and o != "--cfg"]
        if options:
            raise ConfigError(f"unknown option {options[0]}; settings are written key=value, see --help")
        settings = read_settings([o for o in overrides if o != "--cfg"])
        if show:
            from omegaconf import OmegaConf

            sys.stdout.write(OmegaConf.to_yaml(OmegaConf.create(settings.values)))
            return 0
        _on_each_rank(settings, command)
    except AdaGRPOError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            sys.stderr.write(f"error: {error}\n")
        elif settings is not None and not error.on_every_rank:  # unreadable settings are so on every rank
            sys.stderr.write(f"error on rank {rank}: {error}\n")
        if rank != "0":
            # The launcher ends all processes as soon as one is gone, the one that has the report to write among them.
            time.sleep(_LATER_SECONDS)
        return 2
    return 0


def _on_each_rank(settings: Settings, command: "Callable[[Settings, Engine], None]") -> None:
    """Join the other processes and run a command; if one of them fails, all end."""
    # Imported here: it takes seconds, and neither --help nor a misspelt key needs it.
    from adagrpo_train import build
    from adagrpo_train.runtime.failing import FailingTogether

    engine = build.make_engine(settings)
    with FailingTogether(rank=engine.rank, world_size=engine.world_size):
        command(settings, engine)
    engine.close()


def _train(settings: Settings, engine: "Engine") -> None:
    from adagrpo_train import build, continuation
    from adagrpo_train.runtime.files import whole_folder
    from adagrpo_train.tracking.report import write_report

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
                    _summarise(run_dir)
        status = outcome
    finally:
        parts.rewards.close()
        if tracker:
            try:
                tracker.finish(status)
            finally:
                sys.stdout.write(f"report: {write_report(run_dir)}\n")


def _summarise(run_dir: Path) -> None:
    """Write and print the held-out scores before and after, and the paired gain with its standard error."""
    from adagrpo_train.evaluator import paired_gain, read_scores
    from adagrpo_train.runtime.files import write_whole

    files = sorted((run_dir / "evaluations").glob("*.jsonl"))
    before, after = read_scores(files[0]), read_scores(files[-1])
    summary: dict[str, Any] = {"images": len(next(iter(before.values()))), "heldout": {}}
    for name in (name for name in before if name in after):  # a reward that was let change may name other metrics
        change = paired_gain(before[name], after[name])
        summary["heldout"][name] = {key: None if math.isnan(v) else v for key, v in change._asdict().items()}
        sys.stdout.write(
            f"held-out {name:<7} {change.before:.3f} -> {change.after:.3f}   gain {change.gain:+.3f} +- "
            f"{change.standard_error:.3f} (paired over {summary['images']} fixed images)\n"
        )
    write_whole(run_dir / "summary.json", json.dumps(summary, indent=1))


def _evaluate(settings: Settings, engine: "Engine") -> None:
    from PIL import Image

    from adagrpo_train import build, continuation
    from adagrpo_train.tracking.images import image_grid
    from adagrpo_train.tracking.records import missing_scores

    snapshot = continuation.open_snapshot(settings, engine)
    if snapshot:
        continuation.check_same_model(settings, snapshot)
    parts = build.make_parts(settings, engine, settings.run_dir, training=False)
    with closing(parts.rewards):
        if snapshot:
            continuation.check_same_rewards(settings, parts.scorer, snapshot)
            parts.policy.load_state_dict(snapshot.tensors)
            parts.scorer.load_state_dict(snapshot.state["scoring"])
        parts.encoder.prepare(parts.evaluator.texts)
        evaluation = parts.evaluator.evaluate(parts.policy)
        traffic = parts.scorer.drain(evaluation=True)
    if engine.is_main:
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        evaluation.save(settings.run_dir / "evaluation.jsonl")
        captions = list(evaluation.prompts.texts[: len(evaluation.grid)])
        Image.fromarray(image_grid(evaluation.grid, captions)).save(settings.run_dir / "evaluation.png")
        for name, value in evaluation.metrics().items():
            sys.stdout.write(f"{name:<28} {value:.4f}\n")
        for name, count in missing_scores(traffic, evaluation=True).items():
            sys.stdout.write(f"{count} scores of reward {name} are missing\n")
        sys.stdout.write(f"{len(evaluation.prompts)} images; written to {settings.run_dir}\n")


def _quieten() -> None:
    """Our own messages and warnings stay; chatter of libraries about their defaults goes."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("adagrpo_train").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module="torch.distributed.*")
