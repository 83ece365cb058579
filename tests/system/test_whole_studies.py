"""Whole studies: killed half way they give the tables that they would have given."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adagrpo_train.errors import ConfigError
from adagrpo_train.experiments.results import write_results
from adagrpo_train.experiments.runner import locked
from adagrpo_train.experiments.study import read_study, runs
from tests.runs import ROOT, environment, succeed, wait_for

STUDY = """
question: Does it go on?
seeds: 1
overrides: [debug=smoke, adagrpo=on, iterations=10, micro_batch=6, optimizer.lr=1e-3, evaluation.every=5]
factors:
  curriculum:
    easiest: [curriculum=easiest, curriculum.candidates=4, curriculum.chosen=2]
    boundary: [curriculum=boundary, curriculum.candidates=4, curriculum.chosen=2]
compare: curriculum
against: easiest
analyses:
  - {kind: final, scores: [total, strict]}
  - {kind: equal, scores: [total], x: evaluations}
  - {kind: curve, scores: [total]}
  - {kind: training, metrics: [reward/mean, advantage/local_false_positive_rate]}
"""
PROGRAM = "import sys; from adagrpo_train.cli.experiment import main; sys.exit(main())"


def _begin(path: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path), "--out", str(out), "--cores", "1"],
        env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_study_that_is_killed_half_way_goes_on_and_gives_the_same_tables(tmp_path: Path) -> None:
    path, out, whole = tmp_path / "own.yaml", tmp_path / "out", tmp_path / "whole"
    path.write_text(STUDY)
    study = read_study(str(path), overrides=[], seeds=None)
    (out / "pilot").mkdir(parents=True)
    (out / "pilot" / "pace_1_0_1.json").write_text('{"start": 5.0, "iteration": 0.2, "evaluation": 0.1}')
    begun = _begin(path, out)
    first, second = (run.folder for run in runs(study, out))
    wait_for(lambda: begun.poll() is not None or any((second / "checkpoints").glob("iteration_*")))
    begun.kill()
    said = begun.communicate()[0]
    assert "2 runs: about 15 s, at most 19 s" in said
    assert begun.returncode == -signal.SIGKILL
    assert (first / "summary.json").is_file()
    assert not (first / "checkpoints").exists()  # weights of a finished run are not kept
    # The kernel has told the run that was going on to save and end; until it has, the study is its own.
    wait_for(lambda: _free(out))
    assert not (second / "summary.json").exists(), "the kill came too late to show anything"
    before = (first / "metrics.jsonl").read_bytes()
    done = _begin(path, out)
    said = done.communicate(timeout=300)[0]
    assert done.returncode == 0, said
    assert "1 of 2 runs are finished" in said
    assert "continued after iteration" in (second / "output.log").read_text()
    assert (first / "metrics.jsonl").read_bytes() == before

    for run in runs(study, whole):
        succeed(*run.overrides, f"hydra.run.dir={run.folder}")
    expected = write_results(whole, study, runs(study, whole))
    found = json.loads((out / "results.json").read_text())
    for key in ("findings", "panels", "bars", "tables"):
        assert found[key] == expected[key], key


def _free(folder: Path) -> bool:
    try:
        with locked(folder):
            return True
    except ConfigError:
        return False
