"""`adagrpo-eval`."""

import gc
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from adagrpo_train.cli.command import run_command
from adagrpo_train.settings import Settings

if TYPE_CHECKING:
    from adagrpo_train.build import Scoring
    from adagrpo_train.cli.subjects import Subject
    from adagrpo_train.reports.evaluation import Pictured
    from adagrpo_train.runtime.engine import Engine

_FILE_WIDTH = 180
"""Columns of what is no terminal."""

_HELP = """\
usage: adagrpo-eval [resume=WHAT] [against=WHAT] [key=value ...]

Draw every held-out prompt without noise in the sampling, from fixed initial noise, and score the images.

  adagrpo-eval resume=RUN                              a run, or one of its checkpoints
  adagrpo-eval model.path=FOLDER                       a diffusers pipeline, such as RUN/export with trainable=full
  adagrpo-eval resume=RUN against=base                 a run compared with the model it started from
  adagrpo-eval resume=RUN against=OTHER_RUN            two runs, with adapters or with every weight
  adagrpo-eval resume=EVALUATION against=EVALUATION    two evaluations made before; draws nothing

  prompts.evaluation_path=FILE evaluation.samples=4    four images of every prompt of a file
  'reward=[shapes,tiny_clip]' reward.tiny_clip.role=evaluation        rewards that the run was not trained on
  evaluation.samples=0                                 the images of training, to the digit

Takes the same keys as adagrpo-train. Writes evaluation.jsonl (a line per image), evaluation.json (means by class) and
evaluation.png into hydra.run.dir; with `against` also comparison.json and comparison.png, and the other's
evaluation into `against/`.

Options:
  --cfg      print the composed configuration and stop
  --help     this text
"""


def main(arguments: list[str] | None = None) -> int:
    """Evaluate. Exit status as of training, and 130 when interrupted."""
    return run_command(arguments, _HELP, _evaluate)


def _evaluate(settings: Settings, engine: "Engine") -> None:
    from adagrpo_train.cli.subjects import find_subject
    from adagrpo_train.errors import ConfigError
    from adagrpo_train.reports.comparison import check_pairs
    from adagrpo_train.reports.evaluation import rows_beside

    subjects = [find_subject(settings, engine, "resume")]
    if settings.values["against"] is not None:
        subjects.insert(0, find_subject(settings, engine, "against"))  # first: it sets the scale if none is set yet
    elif subjects[0].scores is not None:
        raise ConfigError(f"resume={settings.values['resume']}: has been evaluated; name another with against=")
    results = _results(settings, engine, subjects)
    if len(results) == 2:
        before, after = results
        engine.together(lambda: check_pairs(before.scored, after.scored))
        results = [own.gathered(rows_beside(before, after), engine) for own in results]
    engine.together(lambda: _report(settings.run_dir, results) if engine.is_main else None)


def _results(settings: Settings, engine: "Engine", subjects: "list[Subject]") -> "list[Pictured]":
    """Scores of each subject, drawn or read, the same on every rank, and its images; what is drawn is also written."""
    from adagrpo_train import build, continuation
    from adagrpo_train.reports.evaluation import read_evaluation, save_evaluation

    results = {s.key: read_evaluation(s.scores, key=s.key) for s in subjects if s.scores is not None}
    missing = [subject for subject in subjects if subject.key not in results]
    if missing:
        scoring = build.make_scoring(settings, engine, settings.run_dir)
        with closing(scoring.rewards):
            snapshot = subjects[-1].snapshot
            if snapshot:
                continuation.check_same_rewards(settings, scoring.scorer, snapshot)
                scoring.scorer.load_state_dict(snapshot.state["scoring"])
            for subject in missing:
                gc.collect()  # the network of the subject before, parts of which refer to each other
                results[subject.key] = own = _drawn(subject, engine, scoring, settings.run_dir)
                first = own.scored.to_show(settings.values["evaluation"]["grid_images"])
                shown = own.gathered(first, engine)
                if engine.is_main:
                    folder = settings.run_dir / "against" if subject.key == "against" else settings.run_dir
                    save_evaluation(folder, shown, grid_images=len(first))
    return [results[subject.key] for subject in subjects]


def _drawn(subject: "Subject", engine: "Engine", scoring: "Scoring", run_dir: Path) -> "Pictured":
    """Draw and score; the network is freed afterwards. Each rank has the images that it has drawn."""
    from adagrpo_train import build
    from adagrpo_train.reports.evaluation import Pictured
    from adagrpo_train.reports.scored import facts_of, scored
    from adagrpo_train.tracking.console import counted
    from adagrpo_train.tracking.records import missing_scores

    parts = build.make_parts(subject.settings, engine, run_dir, training=False, scoring=scoring)
    if subject.snapshot:
        parts.policy.load_state_dict(subject.snapshot.tensors)
    parts.encoder.prepare(parts.evaluator.texts)
    with counted(subject.label, parts.evaluator.share) if engine.is_main else nullcontext(lambda _: None) as drawn:
        evaluation = parts.evaluator.evaluate(parts.policy, drawn)
    for name, count in missing_scores(scoring.scorer.drain(evaluation=True), evaluation=True).items():
        if engine.is_main:
            sys.stdout.write(f"{subject.label}: {count} scores of reward {name} are missing\n")
    scorer = scoring.scorer
    facts = facts_of(
        subject.settings.values, rewards=scorer.fingerprints, calibration=scorer.state_dict()["calibration"]
    )
    record = scored(evaluation, parts.evaluator.samples, subject=subject.label, facts=facts)
    images = dict(zip(evaluation.rows, evaluation.grid, strict=True))
    return Pictured(record, images, frozenset(range(len(record))))


def _report(run_dir: Path, results: "list[Pictured]") -> None:
    """Print a table; of two also write the comparison."""
    from rich.console import Console

    from adagrpo_train.reports.comparison import compare
    from adagrpo_train.reports.evaluation import save_comparison
    from adagrpo_train.reports.tables import changes_table, scores_table

    # Prompt classes are not to be taken for markup.
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    if len(results) == 1:
        console.print(scores_table(results[0].scored))
    else:
        before, after = results
        changes = compare(before.scored, after.scored)
        save_comparison(run_dir, before, after, changes)
        console.print(changes_table(before.scored, after.scored, changes))
    drawn = results[-1].scored
    sys.stdout.write(f"{len(drawn)} images of {len(set(drawn.texts))} prompts; written to {run_dir}\n")
