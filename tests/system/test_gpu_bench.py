"""The GPU benchmark, on a CPU with tiny models; and what it counts at the real sizes."""

import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from adagrpo_train.settings import read_settings
from adagrpo_train.types import Conditions
from tests import real_sizes

pytestmark = pytest.mark.slow
BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCH)
    # What the compiler tells its own log, thousands of lines, is not for pytest.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    yield importlib.import_module("gpu")


def rows_of(gpu: Any, out: Path, *arguments: str) -> list[dict[str, Any]]:
    assert gpu.main(["--tiny", "--out", str(out), *arguments]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler means to hide it
def test_every_case_gives_its_figures(gpu: Any, tmp_path: Path) -> None:
    # The cases of compiled blocks are the same; all of them would take four times as long.
    rows = rows_of(gpu, tmp_path / "rows.jsonl", "--only", "eager|flux_dev lora compiled iteration")
    (peak,) = [row["tflops"] for row in rows if row["case"] == "peak"]
    measured = [row for row in rows if row["case"] not in ("peak", "build")]
    assert len(measured) == 3 * (1 + 2 + 2 + 2) + 1
    assert len({(row["model"], row["trainable"], row["mode"], row["case"], row["batch"]) for row in measured}) == 22
    for row in measured:
        if row["case"] != "drift":
            assert row["seconds"] > 0
            assert row["mfu"] == pytest.approx(row["tflops"] / peak)
        if row["case"] in ("iteration", "update"):
            assert row["ratio_deviation"] == 0
    for row in (row for row in measured if row["case"] == "iteration"):
        # 2 candidates of 3 steps, 2 anchors, and 2 samples from each of steps 1 and 2 on.
        assert row["nfe"] == {"sampling": 2 * 3 + 2 + 2 * (2 + 1), "training": 2}
        assert sum(row["stages"].values()) == pytest.approx(row["seconds"])
        assert min(row["stages"].values()) >= 0
        assert (row["compiled_programs"] > 0) == (row["mode"] == "compiled")


def test_nothing_begins_after_the_budget_but_everything_is_named(gpu: Any, tmp_path: Path) -> None:
    rows = rows_of(gpu, tmp_path / "rows.jsonl", "--budget-seconds", "-1", "--only", "flux_dev lora eager forward")
    assert [(row["case"], row["note"]) for row in rows] == [("build", "left out: the budget is spent")]


@pytest.mark.parametrize(
    ("name", "tokens", "pooled", "tera"), [("sd35_medium", 205, 2048, 2.224), ("flux_dev", 256, 768, 17.69)]
)
def test_the_real_models_are_the_published_ones_and_their_work_is_counted(
    gpu: Any, name: str, tokens: int, pooled: int, tera: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = importlib.import_module("drawn")
    size = drawn.SIZES[name]
    assert size.transformer == real_sizes.TRANSFORMERS[name]
    network = drawn.transformer(size, torch.bfloat16, torch.device("meta"))
    assert sum(parameter.numel() for parameter in network.parameters()) == size.parameters
    real_sizes.serve(monkeypatch)
    values = read_settings([f"model={name}", *(["model.guidance_scale=1.0"] if name == "sd35_medium" else [])]).values
    model = instantiate(values["model"], device=torch.device("meta"))
    conditions = Conditions(
        torch.empty(1, tokens, 4096, dtype=torch.bfloat16), torch.empty(1, pooled, dtype=torch.bfloat16)
    )
    assert gpu.flops_of_a_row(model, network, conditions) == pytest.approx(tera * 1e12, rel=1e-3)
