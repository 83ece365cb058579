"""Whole runs from the shell: folders, resume, signals, several processes, stock diffusers."""

import os
import shutil
import signal
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from adagrpo_train.runtime import checkpoint
from adagrpo_train.runtime.noise import INITIAL, NoiseKey, keyed_noise
from tests.runs import (
    ROOT,
    Strike,
    begin,
    command,
    end_oneself,
    environment,
    rows,
    rows_so_far,
    run,
    succeed,
    wait_for,
    weights,
)
from tests.support import ASSETS, MID, tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was started from the shell and is over; not to be changed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    succeed(f"hydra.run.dir={run_dir}", shell=True)
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to go on with."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_leaves_the_promised_folder(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"metrics.jsonl", "report.html", "checkpoints", "export", "images", "config.yaml", "summary.json"} <= names
    assert [row["iteration"] for row in rows(finished) if "policy/loss" in row] == [1, 2]


def test_a_new_run_does_not_write_over_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    done = run(f"hydra.run.dir={tmp_path}")
    assert done.returncode == 2
    assert "already holds a run" in done.stderr


@pytest.mark.parametrize("plan", ["every_step", "branch"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(plan: str, tmp_path: Path) -> None:
    settings = ["iterations=4", "checkpoint.every=2", "evaluation.every=2", f"plan={plan}"]
    settings += ["lr_schedule.warmup_iterations=1", "lr_schedule.anneal_iterations=2"]
    succeed(*settings, f"hydra.run.dir={tmp_path / 'straight'}")
    in_the_fourth = Strike("_advantages", 4, end_oneself)
    killed = begin(*settings, f"hydra.run.dir={tmp_path / 'killed'}", strike=in_the_fourth)
    assert killed.wait() == [-signal.SIGKILL], killed.said()
    assert max(row["iteration"] for row in rows(tmp_path / "killed")) == 3
    assert checkpoint.find(tmp_path / "killed").name == "iteration_000002"
    succeed(*settings, f"resume={tmp_path / 'killed'}")
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert straight.keys() == resumed.keys() == {"trainable", "average"}
    for name, tensors in straight.items():
        assert all(torch.equal(value, resumed[name][key]) for key, value in tensors.items())
    assert rows(tmp_path / "straight") == rows(tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_exits_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    forks = begin("iterations=500", "checkpoint.every=0", f"hydra.run.dir={run_dir}")
    try:
        wait_for(lambda: len(rows_so_far(run_dir)) > 2)
        os.kill(forks.pids[0], number)
        assert forks.wait(240) == [0]
    finally:
        forks.kill()
    last = max(row["iteration"] for row in rows(run_dir))
    assert checkpoint.load(checkpoint.find(run_dir)).iteration == last < 500


def test_two_processes_stop_cleanly_and_resume_bit_for_bit(tmp_path: Path) -> None:
    settings = ["iterations=400", "checkpoint.every=0", "evaluation.every=0"]
    settings += ["update_micro_batch=2", "updates_per_iteration=5"]  # parts of batches, later ones evaluated before
    stopped = tmp_path / "stopped"
    launcher = subprocess.Popen(
        command(*settings, f"hydra.run.dir={stopped}", processes=2), env=environment(), cwd=ROOT
    )
    try:
        wait_for(lambda: any(row["iteration"] == 2 for row in rows_so_far(stopped)))
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(timeout=240)
    finally:
        launcher.kill()
    reached = checkpoint.load(checkpoint.find(stopped)).iteration
    assert 2 <= reached < 398
    settings[0] = f"iterations={reached + 2}"
    succeed(*settings, f"resume={stopped}", processes=2)
    succeed(*settings, f"hydra.run.dir={tmp_path / 'straight'}", processes=2)
    assert rows(stopped) == rows(tmp_path / "straight")
    for name, tensors in weights(tmp_path / "straight").items():
        assert all(torch.equal(value, weights(stopped)[name][key]) for key, value in tensors.items())


def test_a_killed_rank_ends_the_whole_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launcher = subprocess.Popen(
        command("iterations=5000", f"hydra.run.dir={run_dir}", processes=2), env=environment(), cwd=ROOT
    )
    try:
        wait_for(lambda: len(rows_so_far(run_dir)) > 2)
        ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        assert len(ranks) == 2
        os.kill(int(ranks[1]), signal.SIGKILL)
        assert launcher.wait(timeout=240) != 0
    finally:
        launcher.kill()
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_a_run_killed_before_its_export_is_finished_by_resume(run_dir: Path) -> None:
    summary, exported = (run_dir / "summary.json").read_text(), _exported(run_dir)
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "export")
    (run_dir / ".draft_export").mkdir()
    (run_dir / ".draft_export" / "half_written").write_text("")
    succeed(f"resume={run_dir}")
    assert ((run_dir / "summary.json").read_text(), _exported(run_dir)) == (summary, exported)
    done = run(f"resume={run_dir}")
    assert done.returncode == 2
    assert "is finished at iteration 2" in done.stderr


def test_going_on_from_an_older_checkpoint_does_not_write_over_the_later_ones(run_dir: Path, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    older = run_dir / "checkpoints" / "iteration_000001"
    done = run("checkpoint.every=1", f"resume={older}")
    assert done.returncode == 2
    assert "goes on to iteration_000002" in done.stderr
    succeed("checkpoint.every=1", f"resume={older}", f"hydra.run.dir={beside}")
    assert rows(beside) == rows(run_dir)
    done = run("checkpoint.every=1", f"resume={older}", f"hydra.run.dir={beside}")
    assert done.returncode == 2
    assert "already holds a run" in done.stderr
    assert _exported(beside) == _exported(run_dir)


def test_a_run_continues_where_its_files_were_moved_to_but_not_with_others(tmp_path: Path) -> None:
    inputs, moved = tmp_path / "inputs", tmp_path / "moved"
    shutil.copytree(MID, inputs / "model")
    for name in ("train", "heldout"):
        shutil.copy(ASSETS / "prompts" / f"shapes_{name}.jsonl", inputs / f"{name}.jsonl")

    def settings(folder: Path) -> list[str]:
        prompts = [f"prompts.path={folder / 'train.jsonl'}", f"prompts.evaluation_path={folder / 'heldout.jsonl'}"]
        return [f"model.path={folder / 'model'}", *prompts]

    succeed("iterations=1", *settings(inputs), f"hydra.run.dir={tmp_path / 'run'}")
    inputs.rename(moved)
    succeed("iterations=2", *settings(moved), f"resume={tmp_path / 'run'}")
    lines = (moved / "train.jsonl").read_text().splitlines(keepends=True)
    (moved / "train.jsonl").write_text("".join(reversed(lines)))
    done = run("iterations=3", *settings(moved), f"resume={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "its content is not what the checkpoint was made with" in done.stderr
    assert "prompts.path" in done.stderr


def test_a_changed_configuration_is_not_continued(run_dir: Path) -> None:
    done = run("iterations=3", "seed=7", "group_size=4", f"resume={run_dir}")
    assert done.returncode == 2
    assert "group_size: 3 -> 4" in done.stderr
    assert "seed: 0 -> 7" in done.stderr


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_stock_diffusers_loads_the_export_and_draws_the_same_image(
    trainable: str, finished: Path, tmp_path: Path
) -> None:
    run_dir = finished if trainable == "lora" else tmp_path / "run"
    if trainable == "full":  # a larger rate would make a network that magnifies rounding
        succeed("trainable=full", "optimizer.lr=1e-4", f"hydra.run.dir={run_dir}")
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None, "dtype": torch.float32}
    pipe = StableDiffusion3Pipeline.from_pretrained(run_dir / "export" if trainable == "full" else MID, **without_t5)
    if trainable == "lora":
        pipe.load_lora_weights(run_dir / "export")
    pipe.set_progress_bar_config(disable=True)

    model = tiny_model(num_steps=6)
    _load_weights(model, trainable, weights(run_dir)["average"])
    texts = ["a red circle", "two blue squares"]
    noise = keyed_noise([NoiseKey(0, 0, n, 0, INITIAL) for n in range(2)], model.latent_shape)
    sigmas = np.linspace(1, 1 / 6, 6).tolist()
    stock = pipe(
        texts, latents=noise, sigmas=sigmas, num_inference_steps=6, guidance_scale=1.0,
        max_sequence_length=0, height=32, width=32, output_type="latent",
    ).images  # fmt: skip
    untrained = tiny_model(num_steps=6)
    ours, base = (_render(m, texts, noise) for m in (model, untrained))
    torch.testing.assert_close(stock, ours, rtol=0, atol=1e-5)
    assert (stock - base).abs().max() > 1e-4  # the trained weights do take part
    pictures = pipe(
        texts, latents=noise, sigmas=sigmas, num_inference_steps=6, guidance_scale=1.0,
        max_sequence_length=0, height=32, width=32,
    ).images  # fmt: skip
    difference = np.stack([np.asarray(picture) for picture in pictures]).astype(int) - model.decode(ours)
    # Latents are equal to rounding only, and so a value between two levels may fall to either side.
    assert np.abs(difference).max() <= 1
    assert np.count_nonzero(difference) < 0.01 * difference.size


def _exported(run_dir: Path) -> dict[str, bytes]:
    """Weights of the export as bytes, by file and name; the files themselves hold their metadata in random order."""
    files = sorted((run_dir / "export").rglob("*.safetensors"))
    assert files
    return {f"{f.name} {key}": value.numpy().tobytes() for f in files for key, value in load_file(f).items()}


def _load_weights(model: Any, trainable: str, values: dict[str, torch.Tensor]) -> None:
    from adagrpo_train.runtime.trainable import Full, LoRA

    made = LoRA(rank=16, alpha=32, targets="all") if trainable == "lora" else Full()
    made.attach(model, seed=0, reference=False)
    parameters = [p for p in model.transformer.parameters() if p.requires_grad]
    for i, parameter in enumerate(parameters):
        parameter.data.copy_(values[str(i)])


@torch.no_grad()
def _render(model: Any, texts: list[str], x: torch.Tensor) -> torch.Tensor:
    conditions, sigmas = model.encode(texts), model.sigmas
    for sigma, sigma_next in pairwise(sigmas):
        velocity = model.velocity(model.transformer, x, sigma.expand(len(x)), conditions)
        x = x + (sigma_next - sigma) * velocity
    return x
