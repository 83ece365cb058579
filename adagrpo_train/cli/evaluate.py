"""`adagrpo-eval`."""

import sys
from contextlib import closing
from typing import TYPE_CHECKING

from adagrpo_train.cli.command import run_command
from adagrpo_train.settings import Settings

if TYPE_CHECKING:
    from adagrpo_train.runtime.engine import Engine

_HELP = """\
usage: adagrpo-eval [resume=RUN_OR_CHECKPOINT] [key=value ...]

Score the held-out prompts with the noise-free sampler: of a checkpoint, or of the plain model without `resume`.
Takes the same keys as adagrpo-train, and further rewards with role=evaluation; writes evaluation.jsonl and
evaluation.png into hydra.run.dir.

Options:
  --cfg      print the composed configuration and stop
  --help     this text
"""


def main(arguments: list[str] | None = None) -> int:
    """Evaluate. Exit status as of training."""
    return run_command(arguments, _HELP, _evaluate)


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
