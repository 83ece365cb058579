"""What a run leaves behind: files that survive kills and resumes, a real offline W&B run, a self-contained report."""

import json
import re
import struct
import time
import zlib
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from adagrpo_train.reports.run_page import write_report
from adagrpo_train.tracking.console import ConsoleTracker
from adagrpo_train.tracking.images import image_grid
from adagrpo_train.tracking.jsonl import JsonlTracker
from adagrpo_train.tracking.wandb import WandbTracker
from adagrpo_train.types import JudgedSamples, Level, RunInfo, SelectedPrompt

IMAGES = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
CAPTIONS = ["a red circle", "two blue squares", "a small green triangle left of a large yellow square"]
METRICS = {
    "reward/mean": 0.5, "curriculum/level": 0.4, "policy/ratio_mean": 1.0, "policy/clip_fraction": 0.0,
    "policy/grad_norm": 0.1, "time/candidates_seconds": 1.0, "time/rollout_seconds": 1.0, "time/update_seconds": 1.0,
    "time/iteration_seconds": 3.0,
}  # fmt: skip


def run_info(run_dir: Path, first: int = 0, **changes: Any) -> RunInfo:
    return RunInfo(**({"run_dir": run_dir, "name": "a run", "config": {"seed": 0}, "choices": {}, "total_iterations": 5,
                       "first_iteration": first, "tracker_state": {}} | changes))  # fmt: skip


def prompt(text: str = "a red circle", label: str = "one", chosen: bool = True) -> SelectedPrompt:
    return SelectedPrompt(3, text, label, 0.5, 0.4, chosen)


def recorded(run_dir: Path, iterations: int = 5, text: str = "a red circle") -> JsonlTracker:
    tracker = JsonlTracker()
    tracker.start(run_info(run_dir))
    evaluation = {"eval/total": 0.5, "eval/strict": 0.4, "eval/one/strict": 0.4}
    tracker.log(evaluation, 0)
    tracker.log_images("heldout", IMAGES, CAPTIONS, 0)
    for iteration in range(1, iterations + 1):
        tracker.log(METRICS | {"reward/mean": iteration / 10, "curriculum/level": float("nan")}, iteration)
        tracker.log_prompts([prompt(text), prompt("two blue squares", "count", chosen=False)], iteration)
    tracker.log(evaluation | {"eval/one/strict": 0.9}, iterations)
    tracker.log_images("heldout", IMAGES, CAPTIONS, iterations)
    return tracker


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_figures_that_do_not_exist_are_null_and_not_nan(tmp_path: Path) -> None:
    recorded(tmp_path)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert lines(tmp_path / "metrics.jsonl")[1]["curriculum/level"] is None


def test_a_resumed_record_drops_what_came_after_the_checkpoint_and_a_half_line(tmp_path: Path) -> None:
    recorded(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 6, "rew')
    JsonlTracker().start(run_info(tmp_path, first=3))
    assert [row["iteration"] for row in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [row["iteration"] for row in lines(tmp_path / "prompts.jsonl")] == [1, 1, 2, 2, 3, 3]


def test_a_resumed_record_drops_later_images_and_evaluations(tmp_path: Path) -> None:
    recorded(tmp_path)
    (tmp_path / "evaluations").mkdir()
    for iteration in (0, 5):
        (tmp_path / "evaluations" / f"{iteration:06d}.jsonl").write_text("")
    JsonlTracker().start(run_info(tmp_path, first=3))
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["heldout_000000.png"]
    assert [path.name for path in (tmp_path / "evaluations").iterdir()] == ["000000.jsonl"]


def test_warnings_are_recorded_up_to_the_checkpoint(tmp_path: Path) -> None:
    tracker = recorded(tmp_path)
    for iteration in (3, 5):
        tracker.alert("reward hacking", "held-out [clip] falls", iteration)
    JsonlTracker().start(run_info(tmp_path, first=3))
    expected = {"iteration": 3, "title": "reward hacking", "text": "held-out [clip] falls"}
    assert lines(tmp_path / "alerts.jsonl") == [expected]


def test_a_new_run_in_an_old_folder_starts_empty(tmp_path: Path) -> None:
    recorded(tmp_path)
    JsonlTracker().start(run_info(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_samples_of_a_few_iterations_are_kept_with_both_of_their_advantages(tmp_path: Path) -> None:
    tracker = JsonlTracker()
    tracker.start(run_info(tmp_path, total_iterations=100, choices={"experiment": "x"}))
    numbers = torch.tensor([0.25, -0.5])
    for iteration in range(1, 101):
        tracker.log_advantages(
            JudgedSamples(numbers, torch.tensor([0, 1]), 2 * numbers, -numbers, Level(0.75, 0.5)), iteration
        )
    kept = lines(tmp_path / "advantages.jsonl")
    assert [row["iteration"] for row in kept] == [1, 12, 24, 36, 48, 60, 72, 84, 96, 100]
    columns = {"reward": [0.25, -0.5], "group": [0, 1], "local": [0.5, -1.0], "fused": [-0.25, 0.5]}
    assert kept[0] == {"iteration": 1, "level": 0.75} | columns
    JsonlTracker().start(run_info(tmp_path, first=40, total_iterations=100))
    assert lines(tmp_path / "advantages.jsonl")[-1]["iteration"] == 36


def test_a_record_says_what_the_run_was_made_with_and_on(tmp_path: Path) -> None:
    JsonlTracker().start(run_info(tmp_path, choices={"experiment": "x"}))
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert {"system", "processor", "cores", "memory", "gpus", "processes", "commit", "python", "torch"} <= set(
        environment
    )
    assert all(isinstance(value, str) and value for value in environment.values())
    assert json.loads((tmp_path / "choices.json").read_text()) == {"experiment": "x"}


def test_grids_show_every_image_in_its_place() -> None:
    grid = image_grid(IMAGES, CAPTIONS, columns=2)
    enlarged = IMAGES[1].repeat(4, axis=0).repeat(4, axis=1)
    assert (grid[8 : 8 + 128, 8 + 128 + 8 : 8 + 2 * 128 + 8] == enlarged).all()


def test_the_console_shows_progress_where_there_is_no_terminal() -> None:
    output = StringIO()
    tracker = ConsoleTracker(console=Console(file=output, width=200))
    tracker.start(run_info(Path("runs/x")))
    tracker.log({"eval/strict": 0.25}, 0)
    tracker.log(METRICS, 1)
    tracker.log({"eval/strict": 0.5}, 5)
    tracker.alert("reward hacking", "held-out [clip] falls", 5)
    tracker.finish("completed")
    text = output.getvalue()
    assert "WARNING at 5: reward hacking\n  held-out [clip] falls\n" in text
    assert "reward 0.500  level 0.400  ratio 1.0000" in text
    assert "strict 0.500 (+0.250)" in text
    assert "run completed" in text


def test_a_report_is_self_contained_and_shows_the_run(tmp_path: Path) -> None:
    recorded(tmp_path)
    score = {"before": 0.4, "after": 0.9, "gain": 0.5, "standard_error": 0.02}
    (tmp_path / "summary.json").write_text(json.dumps({"images": 7, "heldout": {"strict": score}}))
    page = write_report(tmp_path).read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|\#)""", page)
    assert "@import" not in page and "url(" not in page and "<script" not in page and "://" not in page
    assert page.count("data:image/png;base64,") == 2 * len(IMAGES)
    assert "+0.500" in page and "&plusmn; 0.020" in page
    assert 'alt="a red circle, before training"' in page and 'alt="a red circle, after 5 iterations"' in page
    assert page.count("<img ") == page.count(" alt=")
    assert len(re.findall(r"<svg [^>]*role=\"img\" aria-label=", page)) == page.count("<svg") > 0
    assert "training reward: 0.1 at iteration 1, 0.5 at iteration 5" in page


def test_hostile_prompts_and_names_do_not_become_markup(tmp_path: Path) -> None:
    recorded(tmp_path, text="<script>alert(1)</script>")
    tracker = JsonlTracker()
    tracker.start(run_info(tmp_path, first=5))
    tracker.log_prompts([prompt(label="<script>alert(2)</script>")], 5)
    page = write_report(tmp_path).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(2)" in page


def test_a_run_without_any_row_still_has_a_report_that_says_so(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text()
    assert "No training iteration was recorded" in page
    assert "No summary" in page


@pytest.fixture
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_login")
def test_without_a_login_a_real_offline_run_is_written_and_continued_under_its_id(tmp_path: Path) -> None:
    tracker = WandbTracker(project="test", entity=None, mode="auto")
    tracker.start(run_info(tmp_path))
    tracker.log(METRICS | {"reward/std": float("nan")}, 1)
    tracker.log_images("heldout", IMAGES, CAPTIONS, 1)
    tracker.log_prompts([prompt()], 1)
    tracker.alert("reward hacking", "held-out clip falls", 1)
    state = tracker.state_dict()
    tracker.finish("completed")
    logged = finished_history(tmp_path)
    keys = {key for row in logged for key in row}
    assert {"reward/mean", "iteration", "images/heldout", "curriculum/selected_prompts"} <= keys
    assert [json.loads(row["reward/mean"]) for row in logged if "reward/mean" in row] == [0.5]
    (alert,) = [record.alert for record in records(log_of(tmp_path)) if record.HasField("alert")]
    assert (alert.title, alert.text, alert.level) == ("reward hacking", "at iteration 1: held-out clip falls", "WARN")

    resumed_dir = tmp_path / "resumed"
    resumed_dir.mkdir()
    resumed = WandbTracker(project="test", entity=None, mode="auto")
    resumed.start(run_info(resumed_dir, first=7, tracker_state=state))
    assert resumed.state_dict() == state
    resumed.log(METRICS, 8)
    resumed.log({"eval/strict": 0.4}, 8)
    resumed.finish("completed")
    (row,) = finished_history(resumed_dir)
    assert row["_step"] == row["iteration"] == "8"
    assert {"reward/mean", "eval/strict"} <= row.keys()


def finished_history(run_dir: Path) -> list[dict[str, str]]:
    """Rows of the only offline run in a folder. W&B closes the log a moment after finish() returns."""
    path = log_of(run_dir)
    give_up = time.monotonic() + 30
    while not any(record.HasField("exit") for record in records(path)):
        assert time.monotonic() < give_up, "the log has no end"
        time.sleep(0.05)
    return [
        {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        for record in records(path)
        if record.HasField("history")
    ]


def log_of(run_dir: Path) -> Path:
    (path,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    return path


def records(path: Path) -> Iterator[Any]:
    """Records of an offline W&B log: a LevelDB log of protobufs, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    block, header = 32768, 7
    data, position, body = path.read_bytes(), header, b""
    while position < len(data):
        left = block - position % block
        if left < header:
            position += left
            continue
        checksum, length, kind = struct.unpack("<LHB", data[position : position + header])
        chunk = data[position + header : position + header + length]
        if len(chunk) < length:  # still being written
            return
        if kind == 0 and length == 0:
            position += left
            continue
        assert zlib.crc32(chunk, zlib.crc32(bytes([kind]))) & 0xFFFFFFFF == checksum
        body = chunk if kind in (1, 2) else body + chunk
        position += header + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(body)
            yield record
