"""Reference curves: their band, what they hold for, and that nothing but a run inside them passes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from adagrpo_train.cli.report import main
from adagrpo_train.errors import ConfigError
from adagrpo_train.reports.reference import FOLDER, make_reference, read_reference
from adagrpo_train.reports.run_page import write_report
from adagrpo_train.reports.settings_held import differences
from adagrpo_train.settings import read_settings

CONFIG = {"seed": 0, "model": {"path": "/somewhere/adagrpo_train/assets/tiny"}, "optimizer": {"lr": 1e-4}}


def run_of(folder: Path, values: list[float], *, seed: int = 0, finished: bool = True, **changes: Any) -> Path:
    """The folder of a run with held-out rewards at iterations 0, 10, 20 and so on."""
    folder.mkdir()
    rows = [{"iteration": 10 * number, "eval/total": value} for number, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"seed": seed} | changes))
    (folder / "choices.json").write_text('{"experiment": "mine"}')
    (folder / "environment.json").write_text('{"processor": "Abacus", "commit": "0123", "torch": "9.9"}')
    if finished:
        (folder / "summary.json").write_text('{"images": 1, "heldout": {}}')
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Seeds 0, 1, 2, which have 1, 2 and 3 at iteration 10."""
    return [run_of(tmp_path / f"seed{seed}", [0.5, 1.0 + seed], seed=seed) for seed in range(3)]


@pytest.fixture
def reference(runs: list[Path], tmp_path: Path) -> Path:
    path = tmp_path / "reference.json"
    words = [str(run) for run in runs]
    assert main(["reference", *words, "--out", str(path), "--confidence", "0.9", "--rounding", "0.01"]) == 0
    return path


def test_the_band_is_a_prediction_interval_for_one_more_seed(reference: Path) -> None:
    known = json.loads(reference.read_text())
    same, spread = known["points"]
    # 90 % at two points together: 95 % at each. Tables give 4.302653 for Student's t with two degrees of freedom, and
    # 4.302653 * 1 * sqrt(4 / 3) = 4.968275.
    assert (spread["mean"], spread["low"], spread["high"]) == (2.0, 2 - 4.978275, 2 + 4.978275)
    assert (same["low"], same["high"]) == (0.49, 0.51)  # without spread among the seeds only rounding is left
    assert known["seeds"] == [0, 1, 2] and known["commit"] == "0123" and known["hardware"] == {"processor": "Abacus"}


def test_a_reference_of_several_machines_names_them_all(runs: list[Path]) -> None:
    (runs[2] / "environment.json").write_text('{"processor": "Slide rule", "commit": "0123", "torch": "9.8"}')
    made = make_reference(runs, confidence=0.9, rounding=0.0)
    assert made["hardware"] == {"processor": "Abacus, Slide rule"}
    assert (made["commit"], made["versions"]["torch"]) == ("0123", "9.9, 9.8")


@pytest.mark.parametrize(
    ("values", "status", "said"),
    [
        ([0.5, 2.0], 0, "passed: The run lies inside the band of mine (3 seeds) at all 2 points."),
        ([0.5, 7.0], 1, "failed: The run leaves the band of mine (3 seeds): above at iteration 10."),
        ([0.48, 2.0], 1, "below at iteration 0"),
        ([0.5], 2, "unfinished: Not decided: the run has no held-out reward at iteration 10 yet."),
        ([0.4], 1, "below at iteration 0"),
        ([], 2, "at iteration 0, 10 yet"),
    ],
)
def test_a_run_passes_inside_the_band_alone(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], values: list[float], status: int, said: str
) -> None:
    run = run_of(tmp_path / "run", values, seed=77)
    assert main(["compare", str(run), "--reference", str(reference)]) == status
    output = capsys.readouterr().out
    assert said in output and "2.0000    -2.9783     6.9783" in output


def test_a_run_with_other_settings_is_not_comparable_and_the_keys_are_named(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"optimizer": {"lr": 2e-4}, "extra": 1, "engine": {"kind": "fsdp2"}, "name": "x"}
    run = run_of(tmp_path / "run", [0.5, 2.0], **changes)
    assert main(["compare", str(run), "--reference", str(reference)]) == 2
    output = capsys.readouterr().out
    assert "optimizer.lr=0.0002, the reference has 0.0001" in output and "extra=1, the reference has absent" in output
    assert "2 settings" in output and "passed" not in output


def test_files_of_the_package_count_by_name_wherever_it_lies(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (path, status) in enumerate([("/x/adagrpo_train/assets/tiny", 0), ("/x/adagrpo_train/assets/big", 2)]):
        run = run_of(tmp_path / f"run{number}", [0.5, 2.0], model={"path": path})
        assert main(["compare", str(run), "--reference", str(reference)]) == status


def test_without_a_recorded_reference_nothing_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", [0.5, 2.0])
    assert main(["compare", str(run)]) == 2
    assert capsys.readouterr().out == "no reference: No reference recorded for experiment=mine.\n"
    (run / "choices.json").unlink()
    assert main(["compare", str(run)]) == 2
    assert "a run without a shipped experiment" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"), [(None, "no such file"), ("{", "not JSON"), ('{"metric": "x"}', "not a reference; it lacks")]
)
def test_a_bad_reference_file_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    run = run_of(tmp_path / "run", [0.5, 2.0])
    if content is not None:
        (tmp_path / "bad.json").write_text(content)
    assert main(["compare", str(run), "--reference", str(tmp_path / "bad.json")]) == 2
    assert said in capsys.readouterr().err


def test_a_reference_without_points_that_every_run_would_pass_is_neither_made_nor_taken(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blank = [run_of(tmp_path / f"blank{seed}", [], seed=seed) for seed in range(3)]
    with pytest.raises(ConfigError, match="nothing to make a band of"):
        make_reference(blank, confidence=0.95, rounding=0.0)
    reference.write_text(json.dumps(json.loads(reference.read_text()) | {"points": []}))
    assert main(["compare", str(blank[0]), "--reference", str(reference)]) == 2
    assert "every run would pass" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (
            [{"iteration": 0, "mean": 0.5, "low": 0.4, "high": 0.6}, {"iteration": 10, "mean": 2.0}],
            "2 has no number as low, high",
        ),
        ([{"iteration": 0, "mean": "0.5", "low": 0.4, "high": 0.6}], "1 has no number as mean"),
        (["a"], "1 has no number as iteration, mean, low, high"),
        ({"0": 1.0}, "its points are no list"),
    ],
)
def test_a_malformed_point_of_a_reference_is_named(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], points: Any, said: str
) -> None:
    run = run_of(tmp_path / "run", [0.5, 2.0])
    reference.write_text(json.dumps(json.loads(reference.read_text()) | {"points": points}))
    assert main(["compare", str(run), "--reference", str(reference)]) == 2
    assert said in capsys.readouterr().err


def test_options_may_stand_before_the_run(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", [0.5, 7.0], seed=5)
    assert main(["--reference", str(reference), str(run)]) == 0
    assert "above at iteration 10" in (run / "report.html").read_text()
    assert main(["compare", "--reference", str(reference), str(run)]) == 1
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "hold a run against a reference curve" in capsys.readouterr().out


def test_the_page_of_a_run_shows_the_verdict(reference: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [0.5, 7.0], seed=5)
    page = write_report(run, reference).read_text()
    assert 'class="verdict bad"' in page and "above at iteration 10" in page
    assert "reference, band for one more seed: 0.5 (0.49 to 0.51) at iteration 0" in page
    assert "Abacus" in page and "Student" in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 0}, "each must be another one"),
        ({"finished": False}, "has not come to its end"),
        ({"optimizer": {"lr": 1.0}}, "differs from the first run: optimizer.lr=1.0"),
        ({"values": [0.5]}, "at different iterations"),
    ],
)
def test_runs_that_are_not_seeds_of_one_experiment_make_no_reference(
    runs: list[Path], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    odd = run_of(tmp_path / "odd", **({"values": [0.5, 2.0], "seed": 9} | changes))
    with pytest.raises(ConfigError, match=said):
        make_reference([*runs, odd], confidence=0.95, rounding=0.0)
    with pytest.raises(ConfigError, match="3 seeds at least"):
        make_reference(runs[:2], confidence=0.95, rounding=0.0)


def test_shipped_references_hold_for_the_shipped_experiments_as_they_are() -> None:
    known = {path.stem: read_reference(path) for path in FOLDER.glob("*.json")}
    assert set(known) == {"tiny_demo"}
    for name, reference in known.items():
        assert reference["experiment"] == name and len(reference["seeds"]) >= 5
        settings = read_settings([f"experiment={name}", "tracker=local", "seed=123"])
        # A new key that changes nothing belongs into _FREE of settings_held.py; anything else takes new runs.
        assert differences(reference["settings"], settings.values) == []
        assert differences(reference["settings"], read_settings([f"experiment={name}", "group_size=4"]).values)
