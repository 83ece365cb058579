"""Studies: what they consist of, what is made of their records, and what is refused."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adagrpo_train.cli.experiment import main, until
from adagrpo_train.errors import ConfigError
from adagrpo_train.experiments import estimate, ledger
from adagrpo_train.experiments.analysis import analyse
from adagrpo_train.experiments.estimate import Pace, measure, study_seconds
from adagrpo_train.experiments.pairing import check_pairs
from adagrpo_train.experiments.results import write_results
from adagrpo_train.experiments.runner import Budget, Outcome, check_gpus, locked
from adagrpo_train.experiments.study import Analysis, Run, Study, arms, built_in, read_study, runs
from adagrpo_train.settings import read_settings

IMAGES = 60


def _study(**changes: Any) -> Study:
    values: dict[str, Any] = {
        "question": "Which is better?",
        "overrides": ["debug=smoke"],
        "factors": {
            "algorithm": {"flow": ["algorithm=flow_grpo"], "cps": ["algorithm=flow_cps"]},
            "curriculum": {"random": ["curriculum=uniform"], "boundary": ["curriculum=boundary"]},
        },
        "compare": "curriculum",
        "against": "random",
        "seeds": 5,
        "analyses": [Analysis(kind="final", scores=["total"])],
    }
    return Study(**(values | changes))


def _record(run: Run, gain: float, *, seconds: float = 1.0, candidates: int = 0) -> None:
    """What a run would leave: held-out scores before, after two and after four iterations, and rows of metrics."""
    rng = np.random.default_rng([run.seed, *run.arm.name.encode()])
    shared = np.random.default_rng(7).normal(size=IMAGES)
    (run.folder / "evaluations").mkdir(parents=True)
    for iteration in (0, 2, 4):
        values = shared + gain * iteration / 4 + 0.01 * rng.normal(size=IMAGES) * (iteration > 0)
        rows = [{"prompt": str(i), "class": "and", "total": value} for i, value in enumerate(values)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run.folder / "evaluations" / f"{iteration:06d}.jsonl").write_text(text)
    figures = {"nfe/sampling": 100.0 + candidates, "nfe/training": 50.0, "time/iteration_seconds": seconds}
    rows = [{"iteration": i + 1, "reward/mean": 0.1 * i + gain, **figures} for i in range(4)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.folder / "summary.json").write_text("{}")


@pytest.mark.parametrize("name", ["selection", "plugin", "fusion", "efficiency"])
def test_every_level_of_a_shipped_study_composes_and_a_study_fits_a_screen(name: str) -> None:
    study = read_study(name, overrides=[], seeds=None)
    assert study.seeds >= {"selection": 5, "plugin": 3}.get(name, 1)
    first = dict(arms(study)[0].levels)
    for arm in arms(study):
        if sum(level != first[factor] for factor, level in arm.levels) <= 1:
            read_settings([*arm.overrides, "seed=1"])
    path = Path(__file__).parents[2] / "configs/study" / f"{name}.yaml"
    assert len(path.read_text().splitlines()) <= 50


def test_the_studies_of_the_issue_are_there() -> None:
    assert built_in() == ["efficiency", "fusion", "plugin", "selection"]
    selection, plugin = (read_study(name, overrides=[], seeds=None) for name in ("selection", "plugin"))
    assert list(selection.factors["selection"]) == ["random", "easiest", "hardest", "median", "boundary"]
    assert [len(levels) for levels in plugin.factors.values()] == [3, 3, 4]


def test_runs_are_arms_times_seeds_with_the_settings_of_the_command_between_study_and_levels() -> None:
    study = _study(overrides=["debug=smoke", "group_size=4"])
    everything = runs(study, Path("there"))
    assert len(everything) == 4 * 5
    assert everything[0].folder == Path("there/runs/flow-random/seed0")
    assert {run.seed for run in everything[:4]} == {0}  # whole seeds come first
    assert everything[5].overrides == [
        *("debug=smoke", "group_size=4", "algorithm=flow_grpo", "curriculum=boundary", "seed=1")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sseeds: 3", "Key 'sseeds' not in 'Study'"),
        ("compare: model", "compare=model is no factor"),
        ("against: hardest", "against=hardest is no level"),
        ("seeds: 0", "must be >= 1"),
        ("factors: {curriculum: {random: [], ../x: []}}", "level '../x' of curriculum names a folder"),
        (
            "factors: {curriculum: {random: [], random-b: []}, other: {c: [], b-c: []}}",
            "two arms are called random-b-c",
        ),
        ("analyses: [{kind: last}]", "choose final, curve, equal or training"),
        ("analyses: [{kind: equal, x: time}]", "choose iteration, evaluations or seconds"),
        ("analyses: [{kind: training, pairs: [[a]]}]", "two names"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    lines = {
        "question": "question: What?",
        "overrides": "overrides: []",
        "factors": "factors: {curriculum: {random: [curriculum=uniform], boundary: [curriculum=boundary]}}",
        "compare": "compare: curriculum",
        "against": "against: random",
        "seeds": "seeds: 2",
        "analyses": "analyses: []",
    } | {text.split(":")[0]: text}
    path = tmp_path / "own.yaml"
    path.write_text("\n".join(lines.values()))
    with pytest.raises(ConfigError, match=message):
        read_study(str(path), overrides=[], seeds=None)


def test_arms_are_compared_on_the_same_images_and_by_the_same_total() -> None:
    def check(level: list[str], *, score: str = "total") -> None:
        levels = {"random": [], "other": level}
        study = _study(factors={"x": levels}, compare="x", analyses=[Analysis(kind="final", scores=[score])])
        check_pairs(study, {arm: read_settings(list(arm.overrides)).values for arm in arms(study)})

    check(["group_size=4"])
    check(["reward.shapes.weights={strict: 1.0}"], score="strict")
    with pytest.raises(ConfigError, match=r"arms random and other have other rewards.* leave total out"):
        check(["reward.shapes.weights={strict: 1.0}"])
    with pytest.raises(ConfigError, match=r"differ in evaluation\.seed.* cannot be paired"):
        check(["evaluation.seed=9"], score="strict")


def test_a_misspelt_study_is_told_its_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean selection"):
        read_study("selektion", overrides=[], seeds=None)


def test_a_planted_difference_is_found_where_it_is_and_only_there(tmp_path: Path) -> None:
    study = _study()
    for run in runs(study, tmp_path):
        better = run.arm.name == "cps-boundary"
        _record(run, 0.3 + 0.2 * better + 0.02 * run.seed)
    results = analyse(study, runs(study, tmp_path))
    table = next(table for table in results.tables if "against" in table["title"])
    rows = {row[0]: row for row in table["rows"]}
    assert rows["cps"][-1] == "higher"
    assert float(rows["cps"][4].split()[0]) == pytest.approx(0.2, abs=0.003)
    assert rows["flow"][-1] == "no difference found"
    assert any("boundary against random (cps)" in finding and "higher" in finding for finding in results.findings)
    assert any("ahead in" in finding and "of 2 cells" in finding for finding in results.findings)


def test_a_single_seed_claims_nothing(tmp_path: Path) -> None:
    study = _study(seeds=1)
    for run in runs(study, tmp_path):
        _record(run, 1.0 * run.arm.name.endswith("boundary"))
    table = analyse(study, runs(study, tmp_path)).tables[1]
    assert [row[-1] for row in table["rows"]] == ["one seed says nothing about others"] * 2


def test_a_score_that_one_run_lacks_altogether_is_no_number_anywhere(tmp_path: Path) -> None:
    kinds = [Analysis(kind="final", scores=["total"]), Analysis(kind="curve", scores=["total", "absent"])]
    study = _study(seeds=2, analyses=[*kinds, Analysis(kind="training", pairs=[["absent", "reward/mean"]])])
    for run in runs(study, tmp_path):
        _record(run, 0.5)
        if run.arm.name == "cps-boundary":
            path = run.folder / "evaluations" / "000004.jsonl"
            path.write_text(re.sub(r'"total": [^}]+', '"total": null', path.read_text()))
    results = write_results(tmp_path, study, runs(study, tmp_path))
    scores, differences, _, change = results["tables"]
    assert scores["rows"][3] == ["cps", "boundary", "2", "", ""]
    assert differences["rows"][1][3:] == ["0", "", "", "", "", "nothing to compare"]
    assert [bar["label"] for bar in results["bars"][0]["groups"]] == ["flow: boundary"]
    assert len(results["panels"]) == 2  # of total alone
    assert [point[0] for point in results["panels"][1]["series"][1]["points"]] == [0.0, 2.0]
    assert not change["rows"]


def test_equal_compute_takes_away_what_was_only_bought(tmp_path: Path) -> None:
    # boundary gains a fifth more and spends a fifth more on candidates: per iteration it is ahead, per evaluation not.
    factors = {"curriculum": _study().factors["curriculum"]}
    analyses = [Analysis(kind="equal", scores=["total"], x=x) for x in ("iteration", "evaluations", "seconds")]
    study = _study(factors=factors, analyses=analyses)
    for run in runs(study, tmp_path):
        bought = run.arm.name == "boundary"
        _record(run, 1.2 if bought else 1.0, candidates=30 * bought, seconds=2.0 if bought else 1.0)
    iteration, evaluations, seconds = (table["rows"][0] for table in analyse(study, runs(study, tmp_path)).tables)
    assert iteration[-1] == "higher"
    assert evaluations[-1] == "no difference found"
    assert seconds[-1] == "lower"  # twice as dear for a fifth more
    path = runs(study, tmp_path)[0].folder / "evaluations" / "000002.jsonl"
    path.write_text(re.sub(r'"total": [^}]+', '"total": null', path.read_text(), count=1))
    # Where all of a run's budget is spent its last evaluation counts alone, and that lacks nothing.
    assert [table["rows"][0][2] for table in analyse(study, runs(study, tmp_path)).tables] == ["60"] * 3


def test_figures_of_training_are_compared_within_their_runs(tmp_path: Path) -> None:
    pairs = [["reward/mean", "nfe/training"]]
    study = _study(analyses=[Analysis(kind="training", metrics=["reward/mean"], pairs=pairs)])
    for run in runs(study, tmp_path):
        _record(run, 0.0)
    figures, change = analyse(study, runs(study, tmp_path)).tables
    assert figures["rows"][0] == ["flow", "random", "5", "0.150 [0.150, 0.150]"]
    assert change["rows"][0][3] == "0.150 -> 50.000"


def test_results_of_a_part_say_so_and_are_the_same_when_drawn_again(tmp_path: Path) -> None:
    study = _study(analyses=[Analysis(kind="final", scores=["total"]), Analysis(kind="curve", scores=["total"])])
    ledger.open_study(tmp_path, study, {})
    ledger.note_origin(tmp_path)
    everything = runs(study, tmp_path)
    for run in everything[:-1]:
        _record(run, 0.1 * run.seed)
    (everything[3].folder / "environment.json").write_text('{"commit": "another"}')  # changed while the study went on
    first = write_results(tmp_path, study, everything)
    assert first["findings"][0] == "1 of 20 runs are not finished"
    assert first["provenance"]["runs"] == 19
    assert first["provenance"]["commit"].endswith(", another")
    assert write_results(tmp_path, study, everything) == first
    assert json.loads((tmp_path / "results.json").read_text()) == first
    curve = first["panels"][0]["series"][0]["points"]
    assert [point[0] for point in curve] == [0.0, 2.0, 4.0]
    assert all(low <= mean <= high for _, mean, low, high in curve)
    page = (tmp_path / "results.md").read_text()
    assert "| flow | boundary | 5 | 60 |" in page
    assert first["provenance"]["commit"] in page


def test_another_study_in_the_same_folder_is_refused_and_more_seeds_are_not(tmp_path: Path) -> None:
    ledger.open_study(tmp_path, _study(), {})
    ledger.open_study(tmp_path, _study(seeds=9, analyses=[]), {})
    with pytest.raises(ConfigError, match="other overrides"):
        ledger.open_study(tmp_path, _study(overrides=["debug=smoke", "iterations=9"]), {})
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        ledger.open_study(tmp_path, _study(), {})


def test_a_study_whose_prompts_have_changed_since_its_first_runs_is_refused(tmp_path: Path) -> None:
    prompts = tmp_path / "train.txt"
    prompts.write_text("a red circle")
    values = read_settings([f"prompts.path={prompts}"]).values
    (tmp_path / "out").mkdir()
    ledger.open_study(tmp_path / "out", _study(), ledger.contents([values, values]))
    ledger.note_origin(tmp_path / "out")
    ledger.open_study(tmp_path / "out", _study(seeds=9), ledger.contents([values]))
    prompts.write_text("a blue circle")
    with pytest.raises(ConfigError, match=r"prompts\.path=.*train\.txt: its content is not what the runs"):
        ledger.open_study(tmp_path / "out", _study(), ledger.contents([values]))


def test_a_study_is_worked_on_by_one_process_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ConfigError, match="another process works on this study"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_budget_is_divided_among_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Budget(8, 0, 2).jobs == 4
    assert Budget(8, 0, 1).variables(0)["OMP_NUM_THREADS"] == "1"
    assert Budget(16, 0, 2).variables(3) == {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    gpus = Budget(16, 4, 2)
    assert gpus.jobs == 2
    assert [gpus.variables(job)["CUDA_VISIBLE_DEVICES"] for job in range(2)] == ["4,5", "6,7"]
    assert gpus.variables(0)["OMP_NUM_THREADS"] == "4"
    with pytest.raises(ConfigError, match="raise --gpus"):
        Budget(16, 1, 2)
    with pytest.raises(ConfigError, match="must be >= 1"):
        Budget(0, 0, 1)


def test_the_time_of_a_study_is_that_of_its_runs_beside_each_other(tmp_path: Path) -> None:
    study = _study(overrides=["debug=smoke", "iterations=10", "evaluation.every=4"], seeds=2)
    pace = Pace(start=5.0, iteration=2.0, evaluation=1.0)
    # 10 iterations, evaluations before, after 4 and 8, and at the end.
    everything = runs(study, tmp_path)
    assert study_seconds(everything, pace, Budget(2, 0, 1)) == 8 * (5 + 20 + 4) / 2
    assert study_seconds(everything, pace, Budget(7, 0, 1)) == 2 * (5 + 20 + 4)  # the eighth begins when one has ended
    assert study_seconds(everything, pace, Budget(64, 0, 1)) == 5 + 20 + 4


def test_the_time_is_measured_anew_for_another_budget_with_as_many_runs_at_once_as_the_study_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def run_all(todo: list[Run], *_: Any, **__: Any) -> list[Outcome]:
        assert not [run for run in todo if run.folder.exists()], "a pilot that was interrupted would be continued"
        measured.append(len(todo))
        for run in todo:
            _record(run, 0.0)
            (run.folder / "evaluations" / "000003.jsonl").write_text("")
            rows = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
            (run.folder / "metrics.jsonl").write_text("".join(rows[:3]))
        return [Outcome(run, succeeded=True, seconds=9.0) for run in todo]

    monkeypatch.setattr(estimate, "run_all", run_all)
    everyone = arms(_study())
    for cores in (1, 6, 64, 6):
        measure(everyone, Budget(cores, 0, 1), 20, tmp_path / "pilot", said=print)
    assert measured == [4, 6, 20]


def test_gpus_that_are_not_there_are_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_gpus(Budget(8, 2, 1))
    with pytest.raises(ConfigError, match="only 2 can be seen"):
        check_gpus(Budget(8, 4, 1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["selektion"], "did you mean selection"),
        (["selection", "iteratons=5"], "arm random: unknown key 'iteratons'; did you mean iterations?"),
        (["selection", "--processes", "3", "--cores", "2"], "raise --cores"),
        (["selection", "--seeds", "0"], "seeds=0 must be >= 1"),
    ],
)
def test_the_command_names_what_is_wrong_before_anything_runs(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_plan_of_a_finished_study_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = read_study("efficiency", overrides=[], seeds=1)
    for run in runs(study, tmp_path):
        run.folder.mkdir(parents=True)
        (run.folder / "summary.json").write_text("{}")
    assert main(["efficiency", "--seeds", "1", "--out", str(tmp_path), "--plan"]) == 0
    assert "all 2 runs are finished: nothing is left to run" in capsys.readouterr().out
    assert not (tmp_path / "results.json").exists()


def test_an_end_on_another_day_is_told_with_the_day() -> None:
    start = datetime(2026, 3, 30, 22, 5)
    assert until(start, 600) == "22:15"
    assert until(start, 7200) == "2026-03-31 00:05"
    assert until(start, 3 * 86400) == "2026-04-02 22:05"


def test_the_study_that_the_page_shows_can_be_run(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "adagrpo_train/experiments/README.md").read_text()
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    path = tmp_path / "own.yaml"
    path.write_text(text)
    study = read_study(str(path), overrides=[], seeds=None)
    assert {analysis.kind for analysis in study.analyses} == {"final", "curve", "equal", "training"}
    for arm in arms(study):
        read_settings(list(arm.overrides))
