"""Trackers at their limits: kills, damaged and foreign files, missing figures, failing trackers, no network."""

import json
import socket
import threading
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from adagrpo_train.errors import CheckpointError, ConfigError
from adagrpo_train.reports.charts.lines import Line, line_chart
from adagrpo_train.reports.charts.svg import SMALL
from adagrpo_train.reports.run_page import write_report
from adagrpo_train.tracking import wandb as wandb_tracker
from adagrpo_train.tracking.composite import CompositeTracker
from adagrpo_train.tracking.console import ConsoleTracker
from adagrpo_train.tracking.images import image_grid, read_cells, save_grid
from adagrpo_train.tracking.jsonl import JsonlTracker
from adagrpo_train.types import RunInfo, SelectedPrompt

TINY = np.random.default_rng(1).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
CAPTIONS = [f"caption {number}" for number in range(9)]


def run_info(run_dir: Path, **changes: Any) -> RunInfo:
    settings = {
        "run_dir": run_dir,
        "name": "a run",
        "config": {},
        "choices": {},
        "total_iterations": 40,
        "first_iteration": 0,
    }
    return RunInfo(**(settings | {"tracker_state": {}} | changes))


class Broken(CompositeTracker):
    """A tracker whose disk is full."""

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        raise OSError("no space left")

    def finish(self, status: str) -> None:
        raise OSError("no space left")


class Listening(CompositeTracker):
    """A tracker that remembers how the run ended."""

    ended = ""

    def finish(self, status: str) -> None:
        self.ended = status


def test_an_error_of_a_tracker_ends_the_run_and_names_the_tracker() -> None:
    with pytest.raises(OSError, match="no space left") as caught:
        CompositeTracker([Listening([]), Broken([])]).log({}, 1)
    assert caught.value.__notes__ == ["raised in Broken"]


def test_every_tracker_is_finished_even_when_another_one_fails() -> None:
    first, last = Listening([]), Listening([])
    with pytest.raises(OSError, match="no space left") as caught:
        CompositeTracker([first, Broken([]), last]).finish("failed")
    assert first.ended == last.ended == "failed"
    assert caught.value.__notes__ == ["raised in Broken"]


def test_a_damaged_line_in_the_middle_is_an_error_that_says_where(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\nrubbish\n{"iteration": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 2"):
        JsonlTracker().start(run_info(tmp_path, first_iteration=2))
    with pytest.raises(CheckpointError, match="line 2"):
        write_report(tmp_path)


def test_a_resume_leaves_foreign_pictures_alone(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("my_notes.png", "heldout_000009.png"):
        Image.fromarray(TINY[0]).save(tmp_path / "images" / name)
    JsonlTracker().start(run_info(tmp_path, first_iteration=3))
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["my_notes.png"]


def test_a_saved_grid_gives_every_image_back_with_its_caption(tmp_path: Path) -> None:
    save_grid(tmp_path / "grid.png", TINY, CAPTIONS, labels=True)
    cells = read_cells(tmp_path / "grid.png")
    assert [cell.caption for cell in cells] == CAPTIONS
    np.testing.assert_array_equal(np.stack([np.asarray(cell.image) for cell in cells]), TINY)
    with Image.open(tmp_path / "grid.png") as grid:
        np.testing.assert_array_equal(np.asarray(grid), image_grid(TINY, CAPTIONS))


def test_large_images_are_shrunk_without_labels_but_keep_their_captions(tmp_path: Path) -> None:
    large = np.full((2, 512, 1024, 3), (200, 30, 90), dtype=np.uint8)
    tracker = JsonlTracker()
    tracker.start(run_info(tmp_path))
    tracker.log_images("heldout", large, ["left", "right"], 0)
    path = tmp_path / "images" / "heldout_000000.png"
    with Image.open(path) as grid:
        assert grid.size == (2 * 512 + 3 * 8, 256 + 2 * 8)
        assert {colour for _, colour in grid.getcolors() or []} == {(200, 30, 90), (250, 250, 250)}
    cells = read_cells(path)
    assert [(*cell.image.size, cell.caption) for cell in cells] == [(512, 256, "left"), (512, 256, "right")]
    assert write_report(tmp_path).read_text().count("data:image/jpeg;base64,") == 2


def test_pictures_of_another_origin_are_shown_whole(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for iteration in (0, 5):
        Image.fromarray(TINY[0]).save(tmp_path / "images" / f"heldout_{iteration:06d}.png")
    assert write_report(tmp_path).read_text().count('alt="Grid of generated images') == 2


def test_a_report_of_a_killed_run_leaves_out_the_half_line_and_compares_without_an_error_bar(tmp_path: Path) -> None:
    rows = [{"iteration": 0, "eval/strict": 0.25}, {"iteration": 4, "eval/strict": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 5, "ev')
    page = write_report(tmp_path).read_text()
    assert "0.250 <span>&rarr;</span> 0.500" in page
    assert "no paired comparison recorded" in page and "No summary" in page


@pytest.mark.parametrize(
    ("gain", "tone"), [(0.5, "gain good"), (-0.5, "gain bad"), (0.03, "gain soft"), (-0.03, "gain soft")]
)
def test_a_gain_within_two_standard_errors_is_not_coloured(tmp_path: Path, gain: float, tone: str) -> None:
    score = {"before": 0.4, "after": 0.4 + gain, "gain": gain, "standard_error": 0.02}
    (tmp_path / "summary.json").write_text(json.dumps({"images": 7, "heldout": {"strict": score}}))
    page = write_report(tmp_path).read_text()
    assert f'class="{tone}"' in page
    assert ("within two standard errors of no change" in page) == (tone == "gain soft")


def test_a_held_out_reward_that_never_answered_is_left_out_of_the_report(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("before", "after", "gain", "standard_error"))
    score = {"before": 0.25, "after": 0.5, "gain": 0.25, "standard_error": None}
    (tmp_path / "summary.json").write_text(json.dumps({"images": 7, "heldout": {"a": nothing, "b": score}}))
    page = write_report(tmp_path).read_text()
    assert "Held-out b" in page and "Held-out a" not in page


def test_versions_are_those_of_the_run_and_not_of_the_machine_that_draws(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"torch": "1.2.3-of-the-run"}')
    assert "1.2.3-of-the-run" in write_report(tmp_path).read_text()


def test_hostile_texts_do_not_become_markup_anywhere(tmp_path: Path) -> None:
    evil = "\"><script>alert(1)</script><img src=x onerror='x'>"
    tracker = JsonlTracker()
    tracker.start(run_info(tmp_path, config={"name": evil}))
    part = evil.replace("/", "")
    tracker.log({f"eval/{part}": 0.5, "eval/strict": 0.1, f"eval/{part}/strict": 0.1}, 0)
    tracker.log_images("heldout", TINY[:1], [evil], 0)
    tracker.log_prompts([SelectedPrompt(1, evil, evil, float("nan"), float("nan"), True)], 1)
    page = write_report(tmp_path).read_text()
    assert "<script" not in page and "<img src=x" not in page
    assert page.count("&lt;script&gt;") >= 5


def test_a_long_run_makes_a_small_chart_through_the_same_ends() -> None:
    points = [(float(i), float(i % 2)) for i in range(1, 100_001)]
    chart = line_chart([Line("x", points)], title="t")
    assert chart is not None
    drawn = chart.inline(SMALL)
    assert len(drawn) < 20_000
    assert "1 at iteration 1, 0 at iteration 100000" in drawn


def test_names_that_look_like_markup_reach_the_console_as_they_are() -> None:
    output = StringIO()
    tracker = ConsoleTracker(console=Console(file=output, width=120))
    tracker.start(run_info(Path("runs/x"), name="run [/bold] [red]"))
    tracker.finish("interrupted")
    assert "run [/bold] [red]  ->  runs/x" in output.getvalue()


def test_the_console_is_content_with_the_figures_there_are_and_writes_every_nth() -> None:
    output = StringIO()
    tracker = ConsoleTracker(console=Console(file=output, width=120), plain_every=10)
    tracker.start(run_info(Path("runs/x"), first_iteration=15))
    for iteration in range(16, 41):
        tracker.log({"reward/mean": 0.5}, iteration)
    shown = [line for line in output.getvalue().splitlines() if "reward 0.500" in line]
    assert [int(line.split("/")[0]) for line in shown] == [16, 20, 30, 40]


def test_the_console_shows_skipped_iterations_and_missing_scores() -> None:
    output = StringIO()
    tracker = ConsoleTracker(console=Console(file=output, width=120), plain_every=10)
    tracker.start(run_info(Path("runs/x")))
    tracker.log({"eval/total": 0.25, "eval/reward/clip/missing": 2.0, "time/eval_reward_clip_latency_seconds": 0.1}, 0)
    tracker.log({"reward/mean": 0.5, "reward/clip/missing": 3.0, "reward/shapes/missing": 0.0}, 1)
    tracker.log({"reward/skipped": 1.0, "reward/clip/missing": 8.0}, 7)
    shown = output.getvalue().splitlines()[1:]
    assert [line.partition("  left")[0].strip() for line in shown] == [
        "held-out at    0: total 0.250  missing 2 of clip",
        "1/40  reward 0.500  missing 3 of clip",
        "7/40  skipped  missing 8 of clip",
    ]


def test_a_report_shows_every_part_and_what_is_missing(tmp_path: Path) -> None:
    tracker = JsonlTracker()
    tracker.start(run_info(tmp_path))
    tracker.log({"eval/total": 0.1, "eval/x.a": 0.4, "eval/reward/x/missing": 2.0}, 0)
    for iteration in (1, 2):
        part = {"reward/x.a/mean": iteration / 4, "reward/x.a/level": 0.125}
        tracker.log({"reward/mean": 0.5, "reward/x/missing": 1.0, **part}, iteration)
    tracker.log({"reward/skipped": 1.0, "reward/x/missing": 5.0}, 3)
    page = write_report(tmp_path).read_text()
    assert "Part x.a of the reward. training: 0.25 at iteration 1, 0.5 at iteration 2; level (EMA): 0.125" in page
    assert "held-out: 0.4 at iteration 0" in page
    assert "2 training iterations" in page and "1 skipped for want of scores (3)" in page
    assert "Missing scores of x: 7 in training, 2 in evaluations." in page


def test_a_terminal_shows_a_bar_and_the_figures_within_80_columns() -> None:
    output = StringIO()
    tracker = ConsoleTracker(console=Console(file=output, width=80, force_terminal=True, color_system=None))
    tracker.start(run_info(Path("runs/x")))
    tracker.log({"reward/mean": 0.5, "policy/ratio_mean": 1.0}, 7)
    tracker.finish("completed")
    text = output.getvalue()
    assert " 7/40 " in text and "reward 0.500  ratio 1.0000" in text


@pytest.fixture
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Something that accepts connections, known as the W&B server."""
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
    with listener:
        yield listener


def test_without_a_login_wandb_is_offline(no_login: Path, server: socket.socket) -> None:
    assert wandb_tracker._auto_mode() == "offline"


def test_with_a_key_or_a_netrc_entry_of_the_server_wandb_is_online(
    no_login: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = f"127.0.0.1:{server.getsockname()[1]}"
    no_login.write_text("machine api.wandb.ai login user password none-of-this-server\n")
    assert wandb_tracker._auto_mode() == "offline"
    no_login.write_text(f"machine {host} login user password of-this-server\n")
    assert wandb_tracker._auto_mode() == "online"
    no_login.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_tracker._auto_mode() == "online"


def test_with_a_login_but_no_network_wandb_is_offline(
    no_login: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    server.close()
    assert wandb_tracker._auto_mode() == "offline"


def test_a_name_that_is_never_looked_up_does_not_hold_the_run(no_login: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def looks_up(*_: Any, **__: Any) -> None:
        released.wait(60)
        raise OSError("unknown name")

    monkeypatch.setattr(socket, "create_connection", looks_up)
    monkeypatch.setattr(wandb_tracker, "_REACH_SECONDS", 0.05)
    assert not wandb_tracker._answers("https://example.invalid")
    released.set()


def test_a_proxy_is_asked_instead_of_the_server(no_login: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{proxy.getsockname()[1]}")
        assert wandb_tracker._answers("https://example.invalid")


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_wandb_mode_of_the_environment_is_followed(no_login: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert wandb_tracker._auto_mode() == mode


def test_online_without_a_login_is_an_error_and_not_a_prompt(no_login: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wandb login"):
        wandb_tracker.WandbTracker(project="p", entity=None, mode="online").start(run_info(tmp_path))
