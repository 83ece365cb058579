"""`adagrpo-check` finds mistakes before a run is started, passes what is right, and estimates what training takes."""

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from adagrpo_train.cli import check, train
from adagrpo_train.preflight import measure
from adagrpo_train.settings import group_options
from rewards import registry
from tests.planted import Versioned
from tests.runs import rows_so_far, run
from tests.support import ASSETS, MID

pytestmark = pytest.mark.slow

TINY = ["debug=smoke", "micro_batch=6", "evaluation.images=7", "engine=single", "model.num_steps=3"]
PROCESSES = {"flow_grpo_sd35": 24, "flow_cps_sd35": 24, "dance_grpo_flux": 16, "tiny_demo": 2}  # else 8


class Planted(NamedTuple):
    """A mistake, and what the check must say about it."""

    overrides: list[str]
    says: str
    failed: str  # the check that finds it
    prepare: Callable[[Path, pytest.MonkeyPatch], list[str]] = lambda folder, patch: []


def _reward(kind: str) -> Callable[[Path, pytest.MonkeyPatch], list[str]]:
    def prepare(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
        patch.setitem(registry.SHIPPED, "planted", f"tests.planted:{kind}")
        return ["reward=custom", "reward.custom.reward=planted", "reward.custom.weights={jpeg_size: 1.0}"]

    return prepare


def _closed_port(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    return ["reward.shapes.mode=remote", f"reward.shapes.urls=[{url}]", "reward.shapes.startup_seconds=0.5"]


def _damaged_weights(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    shutil.copytree(MID, folder / "model")
    file = folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.weight"][0, 0] = torch.nan
    save_file(weights, file)
    return [f"model.path={folder / 'model'}"]


def _prompts(*lines: str) -> Callable[[Path, pytest.MonkeyPatch], list[str]]:
    def prepare(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
        (folder / "prompts.txt").write_text("\n".join(lines))
        return [f"prompts.path={folder / 'prompts.txt'}"]

    return prepare


def _full_disk(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    usage = shutil.disk_usage(folder)._replace(free=1_000_000)
    patch.setattr(shutil, "disk_usage", lambda path: usage)
    return []


def _foreign_folder(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    allowed = os.access
    patch.setattr(os, "access", lambda path, mode: Path(path) != folder / "work" and allowed(path, mode))
    return []


def _used_folder(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").touch()
    return [f"hydra.run.dir={folder / 'run'}"]


def _written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def _another_make(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    same = [*_reward("Versioned")(folder, patch), "iterations=1"]
    assert train.main([*TINY, *same, f"hydra.run.dir={folder / 'run'}"]) == 0
    resumed = [*same, "iterations=2", f"resume={folder / 'run'}"]
    before = _written(folder / "run")
    assert check.main([*TINY, *resumed]) == 0
    assert _written(folder / "run") == before
    patch.setattr(Versioned, "version", 2)
    return resumed


def _other_scores(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setitem(registry.SHIPPED, "shapes", "tests.planted:Generous")
    return []


BOUNDARY = ["adagrpo=on", "curriculum.candidates=4"]
FAULTS = {
    "a misspelt key": Planted(["group_sizes=4"], "unknown key 'group_sizes'; did you mean group_size?", ""),
    "a group of one": Planted(["group_size=1"], "group_size=1: samples of a group are compared", "parts"),
    "fewer candidates than chosen": Planted(
        ["adagrpo=on", "curriculum.candidates=4", "curriculum.chosen=8"], "need 1 <= chosen <= candidates", "parts"
    ),
    "more updates than batches": Planted(["updates_per_iteration=50"], "for 50 updates; lower micro_batch", "parts"),
    "more warm-up than training": Planted(["lr_schedule.warmup_iterations=9"], "less than iterations=2", "parts"),
    "prompts that no processes divide": Planted(
        ["--plan-only", "--processes", "3"], "curriculum.candidates=2 must be a multiple of the 3 processes", "shapes"
    ),
    "no prompts": Planted([], "the file holds no prompt; write one per line", "parts", _prompts("")),
    "fewer prompts than candidates": Planted(
        BOUNDARY, "prompts.path holds only 2 prompts", "parts", _prompts("a red circle", "a blue square")
    ),
    "the folder of another model": Planted(
        [f"model.path={ASSETS / 'tiny_flux' / 'mid'}"], "holds a FluxPipeline, this model is a StableDiff", "parts"
    ),
    "weights that are not finite": Planted(
        [], "1 of the weights proj_out.weight are not finite", "model", _damaged_weights
    ),
    "a step that drifts": Planted(
        ["algorithm.transition._target_=tests.planted.Drifting"],
        "without noise is not the noise-free step",
        "zero noise",
    ),
    "dropout left on": Planted(
        ["model._target_=tests.planted.Dropping", "trainable=full"], "Look for dropout that is left on", "ratio"
    ),
    "a density that guesses": Planted(
        ["algorithm.transition._target_=tests.planted.Guessing"], "so the ratio is not 1", "ratio"
    ),
    "a reward without spread": Planted(
        [], "in all 2 groups every sample has the same score", "reward spread", _reward("Flat")
    ),
    "a reward that fails": Planted(
        [],
        "none of 6 images got a score; custom: unsupported_item: the picture is too small",
        "reward spread",
        _reward("Blind"),
    ),
    "a server that is down": Planted([], "reward.shapes.startup_seconds=0.5", "parts", _closed_port),
    "scores of another library": Planted(
        [], "reward shapes does not score as recorded", "reward identity", _other_scores
    ),
    "a reward of another make": Planted(
        [],
        "reward custom is not the one that the checkpoint was made with: versioned@2 now",
        "reward identity",
        _another_make,
    ),
    "a tracker in no known mode": Planted(
        ["tracker=wandb", "tracker.wandb.mode=onlin"], "tracker.wandb.mode=onlin: choose auto, online", "tracker"
    ),
    "a metric that the reward lacks": Planted(
        ["reward.shapes.weights={smoth: 1.0}"], "reward.shapes.weights.smoth=1.0: the reward has the metrics", "parts"
    ),
    "a full disk": Planted([], "1.0 MB are free there, checkpoints, export and records take", "disk", _full_disk),
    "a folder that is not the user's": Planted([], "no file can be written there", "disk", _foreign_folder),
    "a setting of another command": Planted(["against=base"], "against=base: training compares with nothing", "folder"),
    "a folder with a run": Planted([], "already holds a run; continue it with resume=", "folder", _used_folder),
}


@pytest.fixture(autouse=True)
def empty_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and another for temporary files."""
    (tmp_path / "work").mkdir()
    (tmp_path / "temporary").mkdir()
    get_temp_dir()  # chosen once for the whole process; in a folder of a test, paths of sockets would be too long
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


def assert_nothing_is_left(places: Path) -> None:
    assert not list((places / "work").iterdir())
    assert not [path for path in (places / "temporary").iterdir() if not path.name.startswith("torchinductor")]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(
    name: str, empty_places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = FAULTS[name]
    prepared = fault.prepare(empty_places, monkeypatch)
    capsys.readouterr()
    assert check.main([*TINY, *prepared, *fault.overrides]) == 2
    out, error = capsys.readouterr()
    if fault.failed:
        assert [line[9:25].strip() for line in out.splitlines() if line.startswith("FAILED")] == [fault.failed]
        assert fault.says in re.sub(r"\s+", " ", out)
        assert "checks failed: " in error
    else:
        assert fault.says in error
    assert_nothing_is_left(empty_places)


def test_there_are_ten_faults_and_more() -> None:
    assert len(FAULTS) >= 10
    assert len({fault.says for fault in FAULTS.values()}) == len(FAULTS)


@pytest.mark.parametrize("name", group_options()["experiment"])
def test_the_plan_of_every_experiment_needs_no_weights(
    name: str, empty_places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = PROCESSES.get(name, 8)
    told = [f"experiment={name}", "--plan-only", "--processes", str(processes), "--tflops", "400"]
    assert check.main(told) == 0
    out = capsys.readouterr().out
    assert "FAILED" not in out
    for line in ("network", "reward calls", "checkpoint", "an update", "at 400 TFLOP/s"):
        assert line in out
    assert_nothing_is_left(empty_places)


def test_the_demo_passes(
    empty_places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "_MOST_REPEATS", 1)
    assert check.main(["experiment=tiny_demo", "engine=single"]) == 0
    out = capsys.readouterr().out
    assert "FAILED" not in out
    assert re.search(r"ratio +the first ratio is exactly 1 for 144 transitions, 48 states a call", out)
    assert re.search(r"one iteration +[0-9.]+ s", out)
    assert_nothing_is_left(empty_places)


def test_the_plan_is_what_training_then_takes(tmp_path: Path) -> None:
    """Memory within 20 %, files within 2 %, network evaluations exactly; of two processes."""
    settings = ["trainable=full", "group_size=8", "micro_batch=8", "iterations=1", "algorithm.objective.kl_weight=0.01"]
    settings += ["evaluation.images=16", f"hydra.run.dir={tmp_path / 'run'}"]
    told = run(*settings, processes=2, module="check")
    assert told.returncode == 0, told.stdout + told.stderr
    assert not (tmp_path / "run").exists()
    done = run(*settings, processes=2)
    assert done.returncode == 0, done.stderr

    (row,) = (row for row in rows_so_far(tmp_path / "run") if "policy/loss" in row)
    planned = {key: _figure(told.stdout, key) for key in ("memory", "checkpoint", "network")}
    assert planned["memory"] == pytest.approx(row["memory/peak_bytes"], rel=0.2)
    files = (tmp_path / "run" / "checkpoints" / "iteration_000001").iterdir()
    assert planned["checkpoint"] == pytest.approx(sum(file.stat().st_size for file in files), rel=0.02)
    assert planned["network"] == sum(row[f"nfe/{kind}"] for kind in ("sampling", "training", "reference"))


def _figure(out: str, name: str) -> float:
    """The first number of the line of that name in the plan, bytes where it has a unit."""
    plan = out[out.index("one iteration") :]
    match = re.search(rf"^  {name} +([0-9.,]+) (kB|MB|GB)?", plan, flags=re.MULTILINE)
    assert match, plan
    return float(match[1].replace(",", "")) * {None: 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[match[2]]
