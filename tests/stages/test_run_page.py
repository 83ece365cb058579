"""The page of a run: what the curriculum chose, how samples were judged, images over time, alarms, machine."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adagrpo_train.cli.report import main
from adagrpo_train.reports.charts.scale import padded, ticks
from adagrpo_train.reports.run_page import write_report
from adagrpo_train.tracking.jsonl import JsonlTracker
from adagrpo_train.types import JudgedSamples, Level, RunInfo, SelectedPrompt

IMAGES = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
CAPTIONS = ["a red circle", "two blue squares"]
LOCAL = torch.tensor([1.0, -1.0, 0.5, -0.5])


def started(run_dir: Path, **choices: str) -> JsonlTracker:
    tracker = JsonlTracker()
    tracker.start(RunInfo(run_dir, "a run", {"seed": 0}, choices, 4, 0, {}))
    return tracker


def judged(fused: list[float]) -> JudgedSamples:
    return JudgedSamples(LOCAL, torch.tensor([0, 0, 1, 1]), LOCAL, torch.tensor(fused), Level(0.5, 0.1))


def candidate(score: float, *, chosen: bool) -> SelectedPrompt:
    return SelectedPrompt(1, "a red circle", "one", score, 0.5, chosen)


def page_of(run_dir: Path) -> str:
    return write_report(run_dir).read_text()


def test_the_strip_of_candidates_says_how_far_from_the_level_the_choice_was(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    for iteration in (1, 2):
        tracker.log_prompts([candidate(0.6, chosen=True), candidate(0.1, chosen=False)], iteration)
    page = page_of(tmp_path)
    assert "Of 4 candidates 2 were chosen. Chosen candidates are 0.100 away from the level on average; other" in page
    assert "other candidates are 0.400 away" in page
    dots = re.findall(r'<path class="dots (\w+)" d="([^"]+)"', page)
    assert [(kind, drawn.count("M")) for kind, drawn in dots] == [("haze", 2), ("cloud", 2)] * 2  # in two sizes


def test_nothing_that_a_run_recorded_is_taken_for_html(tmp_path: Path) -> None:
    evil = "\"><script>x</script><img src=x onerror='x'>"
    tracker = started(tmp_path, model=evil)
    tracker.log_prompts([SelectedPrompt(1, evil, evil, 0.6, 0.5, chosen=True)], 1)
    tracker.log_images("heldout", IMAGES, [evil, evil], 0)
    tracker.log({f"eval/{evil}/total": 0.5, "eval/total": 0.5, f"eval/{evil}": 0.5}, 0)
    tracker.log({"reward/mean": 0.5, f"reward/{evil}/mean": 0.5, f"health/{evil}": 1.0}, 1)
    tracker.alert(evil, evil, 1)
    page = page_of(tmp_path)
    assert "<script" not in page and "onerror='x'" not in page
    assert page.count("&lt;script&gt;") > 10


def test_a_map_colours_the_samples_whose_sign_changed(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    tracker.log_advantages(judged([1.5, -1.5, -0.25, 0.25]), 1)
    tracker.log_advantages(judged([1.5, 0.5, 0.25, -0.25]), 2)
    page = page_of(tmp_path)
    assert "iteration 1: 2 of 4 changed" in page and "iteration 2: 1 of 4 changed" in page
    assert "Of 8 recorded samples 3 changed their sign: 1 that beat their group are held back, 2 that fell" in page
    dots = re.findall(r'<path class="dots \w+" d="([^"]+)" stroke="var\(--s(\d)\)"', page)
    assert [(colour, drawn.count("M")) for drawn, colour in dots] == [("1", 2), ("5", 2), ("1", 3), ("5", 1)]


def test_a_run_that_compares_inside_groups_alone_has_no_map_and_says_why(tmp_path: Path) -> None:
    started(tmp_path).log_advantages(judged(LOCAL.tolist()), 1)
    assert "there is no advantage against the policy&#39;s past" in page_of(tmp_path)


def test_every_evaluation_has_a_column_in_the_strip_of_a_prompt(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    (tmp_path / "evaluations").mkdir()
    for iteration, total in ((0, 0.25), (2, 0.5), (4, 0.75)):
        tracker.log({"eval/total": total}, iteration)
        tracker.log_images("heldout", IMAGES, CAPTIONS, iteration)
        rows = [{"prompt": text, "class": "", "total": total + k / 10} for k, text in enumerate(CAPTIONS)]
        path = tmp_path / "evaluations" / f"{iteration:06d}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(tmp_path)
    alts = re.findall(r'alt="([^"]+)"', page)
    assert alts[:3] == [
        f"a red circle, {when}" for when in ("before training", "after 2 iterations", "after 4 iterations")
    ]
    assert len(alts) == 6
    assert "0.25&nbsp;&rarr;&nbsp;0.75" in page and "0.35&nbsp;&rarr;&nbsp;0.85" in page


def test_a_single_evaluation_is_not_compared_with_itself(tmp_path: Path) -> None:
    started(tmp_path).log({"eval/total": 0.625}, 0)
    page = page_of(tmp_path)
    assert "the only evaluation so far" in page and "&rarr;" not in page


def test_the_interval_of_a_held_out_score_is_that_of_its_images(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    (tmp_path / "evaluations").mkdir()
    for iteration in (0, 4):
        tracker.log({"eval/total": 0.5}, iteration)
        rows = [{"prompt": "", "class": "", "total": value} for value in [0.0, 1.0] * 50]
        (tmp_path / "evaluations" / f"{iteration:06d}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    # The standard error of 100 coin flips with the unbiased variance 25/99: 0.0502519; times 1.959964 it is 0.0984919.
    assert "0.5 (0.4015 to 0.5985) at iteration 0" in page_of(tmp_path)


def test_alarms_come_first_and_figures_of_health_are_shown_by_what_is_recorded(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    rates = {"advantage/local_false_positive_rate": 0.5, "advantage/fused_false_positive_rate": 0.25}
    for iteration in (1, 2, 3, 4):
        hacking = {"health/hacking": float(iteration > 2), "health/hacking_streak": float(iteration)}
        tracker.log({"reward/mean": 0.5, "rollout/diversity": 0.125, "policy/kl": 0.0} | rates | hacking, iteration)
    page = page_of(tmp_path)
    assert "<b>Alarm</b>: hacking" in page and "Given at iteration 3, 4" in page
    assert page.index("<b>Alarm</b>") < page.index('id="reward"')
    assert "False positives against the level. group alone: 0.5 at iteration 1" in page
    assert "after fusion: 0.25 at iteration 1" in page
    assert "Diversity inside groups: 0.125 at iteration 1" in page and "hacking streak: 1 at iteration 1" in page
    assert "0 in every iteration: KL to the reference" in page


def test_recorded_warnings_are_shown_with_what_they_say(tmp_path: Path) -> None:
    rows = [{"iteration": i, "title": "hacking", "text": f"held-out clip falls by 0.{i}"} for i in (2, 4)]
    (tmp_path / "alerts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(tmp_path)
    assert page.count("<b>Alarm</b>") == 1
    assert "Given at iteration 2, 4. held-out clip falls by 0.4 Look at" in page


def test_without_an_alarm_there_is_none(tmp_path: Path) -> None:
    tracker = started(tmp_path)
    tracker.log({"reward/mean": 0.5, "health/hacking": 0.0, "health/hacking_streak": 1.0}, 1)
    assert "Alarm" not in page_of(tmp_path)


def test_machine_commit_and_choices_are_those_of_the_run(tmp_path: Path) -> None:
    started(tmp_path, experiment="mine", debug="None", model="small")
    environment = {"processor": "Abacus", "cores": "12", "memory": "unknown", "commit": "0123456789abcdef with changes"}
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    page = page_of(tmp_path)
    assert "Abacus" in page and "0123456789ab with changes" in page and "unknown" not in page
    assert page.index(">experiment</span> mine") < page.index(">model</span> small") and "debug" not in page
    assert "No reference recorded for experiment=mine." in page


def test_every_link_of_the_page_leads_somewhere(tmp_path: Path) -> None:
    links = re.findall(r'href="#([^"]+)"', page_of(tmp_path))
    page = page_of(tmp_path)
    assert len(links) == 12
    assert all(f'id="{link}"' in page for link in links)


def test_the_command_draws_with_and_without_its_word_and_names_a_missing_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started(tmp_path)
    assert main([str(tmp_path)]) == main(["draw", str(tmp_path)]) == 0
    assert capsys.readouterr().out == 2 * f"{tmp_path / 'report.html'}\n"
    assert main([str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("draw", "compare", "reference", "study"))


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.0, 100.0, ["0", "20", "40", "60", "80", "100"]),
        (0.64, 0.86, ["0.65", "0.70", "0.75", "0.80", "0.85"]),
        (0.0, 4.8e6, ["0", "1M", "2M", "3M", "4M"]),
        (-0.0004, 0.0006, ["-4e-4", "-2e-4", "0", "2e-4", "4e-4", "6e-4"]),
        (5.0, 5.0, ["5.0", "5.2", "5.4", "5.6", "5.8", "6.0"]),
    ],
)
def test_ticks_are_round_numbers_with_equally_many_decimals(low: float, high: float, texts: list[str]) -> None:
    assert [text for _, text in ticks(low, high, 5)] == texts


def test_the_room_around_values_does_not_cross_zero() -> None:
    values: Any = padded([0.0, 1.0])
    assert values == (0.0, 1.06)
    assert padded([-1.0, 0.0]) == (-1.06, 0.0)
