"""`adagrpo-eval` on whole runs: checkpoints, pipelines, prompt files, comparisons."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from tests.runs import begin, rows, run, succeed
from tests.support import MID

pytestmark = pytest.mark.slow

AS_TRAINED = "evaluation.samples=0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs, `lora` and `full`; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    # Large rates: two iterations are to change the images.
    started = [
        begin("optimizer.lr=1e-2", f"hydra.run.dir={folder / 'lora'}"),
        begin("trainable=full", "optimizer.lr=3e-4", f"hydra.run.dir={folder / 'full'}"),
    ]
    for forks in started:
        assert forks.wait() == [0], forks.said()
    return folder


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _means(run_dir: Path, name: str) -> tuple[float, float]:
    """Held-out mean of a score before and after a run, as training recorded it."""
    values = [row[f"eval/{name}"] for row in rows(run_dir) if f"eval/{name}" in row]
    return values[0], values[-1]


def test_a_run_against_its_base_is_the_evaluation_of_training_before_and_after(runs: Path, tmp_path: Path) -> None:
    rewards = ["reward=[shapes,jpeg_size]", "reward.jpeg_size.role=evaluation"]
    out = tmp_path / "eval"
    said = succeed(
        *rewards, AS_TRAINED, f"resume={runs / 'lora'}", "against=base", f"hydra.run.dir={out}", module="evaluate"
    )
    before, after = _means(runs / "lora", "smooth")
    assert abs(after - before) > 1e-4
    assert _json(out / "evaluation.json")["scores"]["smooth"]["all"]["mean"] == pytest.approx(after, abs=1e-6)
    assert _json(out / "against/evaluation.json")["scores"]["smooth"]["all"]["mean"] == pytest.approx(before, abs=1e-6)
    compared = _json(out / "comparison.json")["scores"]
    assert compared["smooth"]["all"]["difference"] == pytest.approx(after - before, abs=1e-6)
    assert list(compared["smooth"]) == ["all", "one", "count", "size", "pair", "relation", "mixed", "three"]
    assert compared["jpeg_size"]["all"]["after"] < 0  # held out, and not of the run
    assert "no difference found" in said
    assert "relation" in said
    with Image.open(out / "comparison.png") as picture:
        assert picture.width > 1000
    # Once more without a model, from the files alone.
    again = tmp_path / "again"
    succeed(f"resume={out}", f"against={out / 'against'}", f"hydra.run.dir={again}", module="evaluate")
    assert (again / "comparison.json").read_bytes() == (out / "comparison.json").read_bytes()
    assert (again / "comparison.png").is_file()


def test_an_export_and_a_stock_pipeline_are_evaluated_as_the_checkpoints_they_equal(runs: Path, tmp_path: Path) -> None:
    stock, out = tmp_path / "stock", tmp_path / "eval"
    without_t5: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None, "dtype": torch.float32}
    StableDiffusion3Pipeline.from_pretrained(MID, **without_t5).save_pretrained(stock)
    export = f"model.path={runs / 'full/export'}"
    succeed(AS_TRAINED, export, f"against={stock}", f"hydra.run.dir={out}", module="evaluate")
    compared, (before, after) = _json(out / "comparison.json"), _means(runs / "full", "smooth")
    assert compared["scores"]["smooth"]["all"]["before"] == pytest.approx(before, abs=1e-6)
    assert compared["scores"]["smooth"]["all"]["after"] == pytest.approx(after, abs=1e-4)
    assert abs(after - before) > 1e-3


def test_every_prompt_of_a_file_has_noise_of_its_own_whatever_is_compared_and_how(runs: Path, tmp_path: Path) -> None:
    """Two runs, every weight against adapters, on two processes; then one by itself: other batches, more prompts."""
    texts = ["a red circle", "two blue squares", "a green triangle left of a cyan circle"]
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("\n".join(texts))
    long.write_text("\n".join([*texts, "a purple circle"]))
    both, alone = tmp_path / "both", tmp_path / "alone"
    full = ["trainable=full", f"resume={runs / 'full'}"]
    succeed(
        *full, f"against={runs / 'lora'}", f"prompts.evaluation_path={short}", "evaluation.samples=2",
        f"hydra.run.dir={both}", module="evaluate", processes=2,
    )  # fmt: skip
    assert [(row["prompt"], row["sample"]) for row in _lines(both / "evaluation.jsonl")] == [
        (text, number) for text in texts for number in (0, 1)
    ]
    assert _json(both / "comparison.json")["scores"]["total"]["all"]["observations"] == 3  # prompts, not images
    with Image.open(both / "comparison.png") as left, Image.open(both / "evaluation.png") as right:
        assert left.width > 1000  # of images that either process has drawn
        assert right.width > 6 * 128
    said = succeed(
        *full, f"prompts.evaluation_path={long}", "micro_batch=4", f"hydra.run.dir={alone}", module="evaluate"
    )
    assert f"{runs.name}/full after 2 iterations" in said
    here = {row["prompt"]: row["smooth"] for row in _lines(alone / "evaluation.jsonl")}
    there = {row["prompt"]: row["smooth"] for row in _lines(both / "evaluation.jsonl") if row["sample"] == 0}
    assert list(here) == [*texts, "a purple circle"]
    for text in texts:
        assert here[text] == pytest.approx(there[text], abs=1e-3), text
    # Evaluations of other images are not compared.
    done = run(f"resume={both}", f"against={alone}", f"hydra.run.dir={tmp_path / 'no'}", module="evaluate")
    assert done.returncode == 2
    assert "not of the same prompts and samples" in done.stderr


def test_training_does_not_take_a_setting_of_the_evaluation(tmp_path: Path) -> None:
    done = run("against=base", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "against=base: training compares with nothing" in done.stderr
    assert not (tmp_path / "run").exists()
