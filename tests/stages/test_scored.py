"""Evaluations as records: what is averaged, what is compared with what, what is shown and written."""

import io
import math
import re
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from adagrpo_train import build
from adagrpo_train.errors import ConfigError
from adagrpo_train.functional.statistics import NOT_FOUND, NOTHING
from adagrpo_train.reports.comparison import compare, largest
from adagrpo_train.reports.evaluation import (
    Pictured,
    read_evaluation,
    rows_beside,
    save_comparison,
    save_evaluation,
)
from adagrpo_train.reports.pairs import Pair, Section, side_by_side
from adagrpo_train.reports.scored import ALL, Scored, facts_of, read_scored, unit_means
from adagrpo_train.reports.tables import changes_table, scores_table
from adagrpo_train.settings import read_settings
from tests.support import SMALL, alone

FACTS: dict[str, Any] = {"noise": {"seed": 1}, "rewards": {"shapes": "v1", "clip": "v1"}}


def _scored(scores: dict[str, list[float]], *, samples: int = 1, classes: str = "") -> Scored:
    """Prompts `p0`, `p1`, ..., so many samples of each; a letter of `classes` for each image."""
    count = len(next(iter(scores.values())))
    return Scored(
        subject="model",
        texts=tuple(f"p{row // samples}" for row in range(count)),
        classes=tuple(classes) or ("",) * count,
        samples=tuple(row % samples for row in range(count)),
        scores={name: np.array(values, dtype=np.float64) for name, values in scores.items()},
        facts=FACTS,
    )


def test_samples_of_one_prompt_are_one_observation():
    own = _scored({"total": [1.0, 3.0, 4.0, 6.0, math.nan, 2.0]}, samples=2, classes="aaaabb").summary()["total"]
    # Means of the prompts are 2, 5 and 2: sample variance 3 of three.
    assert own[ALL]["mean"] == pytest.approx(3.0)
    assert own[ALL]["standard_error"] == pytest.approx(1.0)
    assert (own[ALL]["observations"], own[ALL]["missing"]) == (3, 1)
    assert own["a"]["mean"] == pytest.approx(3.5)
    assert (own["b"]["standard_error"], own["b"]["observations"]) == (None, 1)


def test_images_of_training_some_of_whose_prompts_come_again_are_observations_each():
    own = replace(_scored({"total": [1.0, 2.0, 6.0]}), texts=("p0", "p1", "p0"), samples=(0, 1, 2))
    assert own.units.tolist() == [0, 1, 2]
    assert own.summary()["total"][ALL]["mean"] == pytest.approx(3.0)


def test_a_prompt_that_a_file_holds_twice_is_one_observation_with_all_its_images():
    own = replace(_scored({"total": [0.0] * 6}, samples=2), texts=("p0", "p0", "p1", "p1", "p0", "p0"))
    assert own.units.tolist() == [0, 0, 1, 1, 0, 0]


def test_a_unit_without_any_score_has_none():
    means = unit_means(np.array([1.0, math.nan, 5.0]), np.array([7, 3, 7]))
    np.testing.assert_array_equal(means, [math.nan, 3.0])


def test_what_is_shown_first_are_classes_in_turn_and_other_prompts_before_other_samples():
    own = _scored({"total": [0.0] * 8}, samples=2, classes="aaaaaabb")
    #           p0 of a, p3 of b, p1 and p2 of a; only then the second samples
    assert own.to_show(4) == [0, 6, 2, 4]
    assert sorted(own.to_show(99)) == list(range(8))


def test_an_evaluation_comes_back_from_its_files_with_what_is_missing(tmp_path: Path):
    own = _scored({"total": [0.1, math.nan], "strict": [1.0, 0.0]}, classes="ab")
    own.save(tmp_path)
    back = read_scored(tmp_path, key="against")
    np.testing.assert_array_equal(back.scores["total"], own.scores["total"])
    assert (back.texts, back.classes, back.samples, back.facts) == (own.texts, own.classes, own.samples, FACTS)
    assert "NaN" not in (tmp_path / "evaluation.jsonl").read_text() + (tmp_path / "evaluation.json").read_text()
    (tmp_path / "evaluation.jsonl").write_text('{"prompt": "p0"}\n')
    with pytest.raises(ConfigError, match=r"against=.* cannot be read"):
        read_scored(tmp_path, key="against")


def test_a_comparison_counts_the_images_that_both_have_scored():
    before = _scored({"total": [0.0, 1.0, math.nan, 2.0], "only here": [0.0] * 4})
    after = _scored({"total": [1.0, math.nan, 5.0, 3.0]})
    changes = compare(before, after)
    assert list(changes) == ["total"]
    paired = changes["total"][ALL].paired
    assert (paired.images, paired.before, paired.after, paired.difference) == (2, 1.0, 2.0, 1.0)


def test_samples_are_averaged_over_the_pairs_that_are_whole():
    before = _scored({"total": [0.0, 4.0, 1.0, 1.0]}, samples=2)
    after = _scored({"total": [1.0, math.nan, 2.0, 4.0]}, samples=2)
    paired = compare(before, after)["total"][ALL].paired
    assert (paired.images, paired.before, paired.after) == (2, 0.5, 2.0)


def test_among_many_classes_one_small_p_is_corrected():
    rng = np.random.default_rng(0)
    labels = "".join(letter * 30 for letter in "abcdefgh")
    gain = rng.normal(size=240)
    gain[:30] += 0.5  # enough for the class by itself, not for the least of eight
    changes = compare(
        _scored({"total": [0.0] * 240}, classes=labels), _scored({"total": gain.tolist()}, classes=labels)
    )
    first = changes["total"]["a"]
    assert first.paired.found
    assert first.p == pytest.approx(min(1.0, 8 * first.paired.p_images))
    assert first.p > 0.05
    assert first.verdict == NOT_FOUND
    assert changes["total"][ALL].p == changes["total"][ALL].paired.p_images


def test_a_class_without_any_pair_of_scores_has_no_figures_and_no_verdict():
    before, after = (_scored({"total": [0.0, 1.0, value]}, classes="aab") for value in (math.nan, 1.0))
    changes = compare(before, after)
    assert changes["total"]["b"].verdict == NOTHING
    written = io.StringIO()
    Console(width=180, file=written).print(changes_table(before, after, changes))
    assert "nan" not in written.getvalue()


def test_a_clear_change_is_higher_one_way_and_lower_the_other():
    scores = np.random.default_rng(0).normal(size=40)
    before, after = _scored({"total": scores.tolist()}), _scored({"total": (scores + 1).tolist()})
    assert compare(before, after)["total"][ALL].verdict == "higher"
    assert compare(after, before)["total"][ALL].verdict == "lower"
    assert compare(after, before)["total"][ALL].wins == 0.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"texts": ("p0", "q")}, r"not of the same prompts and samples.*'q'.*'p1'"),
        ({"samples": (0, 1)}, "not of the same prompts and samples"),
        ({"facts": FACTS | {"noise": {"seed": 2}}}, r"noise\.seed differs \(1 and 2\)"),
        ({"facts": {"rewards": FACTS["rewards"]}}, r"noise differs \(\{'seed': 1\} and not recorded\)"),
        ({"facts": FACTS | {"rewards": {"shapes": "v2"}}}, "fingerprint of reward shapes differs"),
        ({"scores": {"other": np.zeros(2)}}, "no score in common"),
    ],
)
def test_evaluations_of_other_images_or_rewards_are_not_compared(change: dict, message: str):
    own = _scored({"total": [0.0, 1.0]})
    with pytest.raises(ConfigError, match=message):
        compare(own, replace(own, **change))


@pytest.mark.parametrize(
    "key, value",
    [
        ("model.num_steps", 5),
        ("model.guidance_scale", 2.0),
        ("model.schedule", "sd3"),
        ("model.dtype", "bfloat16"),
        ("model.resolution", 64),
        ("network.autocast", "bfloat16"),
        ("evaluation.seed", 9),
    ],
)
def test_stored_evaluations_that_were_drawn_differently_are_not_compared(tmp_path: Path, key: str, value: Any):
    values = _defaults()
    section, name = key.split(".")
    other = values | {section: values[section] | {name: value}}
    for folder, drawn in (("one", values), ("two", other)):
        facts = facts_of(drawn, rewards={}, calibration={})
        replace(_scored({"total": [0.0, 1.0]}), facts=facts).save(tmp_path / folder)
    one, two = (read_scored(tmp_path / folder, key="against") for folder in ("one", "two"))
    with pytest.raises(ConfigError, match=rf"{re.escape(key)} differs \({values[section][name]} and {value}\)"):
        compare(one, two)


def test_another_model_that_needs_less_memory_draws_the_same_images():
    values = _defaults()
    other = values | {"model": values["model"] | {"path": "elsewhere", "decode_batch": 1}}
    one, two = (facts_of(drawn, rewards={}, calibration={}) for drawn in (values, other))
    assert one == two


@cache
def _defaults() -> dict[str, Any]:
    return read_settings([]).values  # takes a third of a second


def test_a_reward_that_one_side_lacks_is_no_obstacle():
    own = _scored({"total": [0.0, 1.0]})
    assert compare(own, replace(own, facts=FACTS | {"rewards": {"shapes": "v1"}}))["total"][ALL].paired.difference == 0


def test_the_largest_changes_are_found_in_both_directions():
    before = _scored({"total": [0.0, 0.0, 0.0, 0.0, math.nan]})
    after = _scored({"total": [0.2, -0.5, 0.9, 0.0, 9.0]})
    assert largest(before, after, "total", 2) == ([2, 0], [1])


def _flat(value: int, side: int = 32) -> np.ndarray:
    return np.full((side, side, 3), (value, 0, 200), dtype=np.uint8)


def _share(picture: Image.Image, value: int) -> float:
    return float((np.asarray(picture) == (value, 0, 200)).all(-1).sum())


def test_left_is_before_right_is_after():
    sections = [Section("first", [Pair(_flat(10), _flat(90), "a prompt", (0.0, 1.0))]), Section("none", [])]
    picture = side_by_side(sections, before="old", after="new", score="total")
    pixels = np.asarray(picture)
    left, right = (np.argwhere((pixels == (value, 0, 200)).all(-1)) for value in (10, 90))
    assert len(left) == len(right) == 128 * 128  # enlarged from 32 x 32
    assert left[:, 1].max() < right[:, 1].min()
    assert left[:, 0].min() == right[:, 0].min()


def test_large_images_are_shrunk_and_long_prompts_cut():
    section = Section("first", [Pair(_flat(10, 600), _flat(90, 600), "word " * 200, (0.0, 1.0))] * 4)
    picture = side_by_side([section], before="old " * 200, after="new", score="total")
    assert picture.width < 1700
    assert _share(picture, 10) == pytest.approx(4 * 256 * 256, rel=0.01)


def _pictured(scores: list[float], shade: int) -> Pictured:
    own = _scored({"total": scores}, classes="ab" * (len(scores) // 2))
    return Pictured(own, {row: _flat(shade + row) for row in range(len(scores))}, frozenset(range(len(scores))))


def test_pictures_of_an_evaluation_are_read_again_and_shown_beside_others(tmp_path: Path):
    before, after = _pictured([0.0, 1.0, 0.0, 1.0], 10), _pictured([1.0, 0.0, 0.0, 1.0], 90)
    save_evaluation(tmp_path, before, grid_images=3)
    back = read_evaluation(tmp_path, key="against")
    # Classes in turn: rows 0 and 1, then 2.
    assert sorted(back.images) == [0, 1, 2]
    for row, image in back.images.items():
        np.testing.assert_array_equal(image, before.images[row])
    save_comparison(tmp_path / "out", back, after, compare(back.scored, after.scored))
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert [_share(picture, 90 + row) for row in range(4)] == [128 * 128] * 3 + [0]


def test_beside_each_other_are_shown_the_rows_that_a_rank_is_told_to_have(tmp_path: Path):
    gains = np.random.default_rng(0).normal(size=60)
    before, after = _pictured([0.0] * 60, 10), _pictured(gains.tolist(), 90)
    rows = rows_beside(before, after)
    assert rows[:12] == list(range(12))
    assert rows[12:24] == np.argsort(-gains)[:12].tolist()
    assert rows[24:] == np.argsort(gains)[:12].tolist()
    changes = compare(before.scored, after.scored)
    before, after = (side.gathered(rows, alone()) for side in (before, after))
    assert before.images.keys() == after.images.keys() == set(rows)
    save_comparison(tmp_path, before, after, changes)
    with Image.open(tmp_path / "comparison.png") as picture:
        for row in (rows[0], rows[12], rows[-1]):
            assert _share(picture, 90 + row) == rows.count(row) * 128 * 128


def test_an_evaluation_keeps_small_images_on_the_rank_that_drew_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("adagrpo_train.tracking.images._LARGEST", 16)
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares")
    settings = read_settings([*SMALL, f"prompts.evaluation_path={tmp_path / 'prompts.txt'}", "evaluation.samples=2"])
    engine, gathered = build.make_engine(settings), list[tuple[int, ...]]()
    gather = engine.gather
    monkeypatch.setattr(engine, "gather", lambda values: gathered.append(values.shape) or gather(values))
    parts = build.make_parts(settings, engine, tmp_path, training=False)
    parts.encoder.prepare(parts.evaluator.texts)
    with closing(parts.rewards):
        evaluation = parts.evaluator.evaluate(parts.policy)
    assert set(gathered) == {(4,)}  # scores alone
    assert evaluation.rows == (0, 1, 2, 3)
    assert evaluation.grid.shape == (4, 16, 16, 3)


def test_a_table_says_of_how_many_each_mean_is_and_shows_no_interval_of_one():
    before = _scored({"total": [0.0, 1.0, 3.0], "other": [1.0, math.nan, 2.0]}, classes="aab")
    after = replace(before, scores={name: values + 0.5 for name, values in before.scores.items()})
    written = io.StringIO()
    console = Console(width=180, highlight=False, file=written)
    console.print(scores_table(before))
    console.print(changes_table(before, after, compare(before, after)))
    cells = [[text.strip() for text in re.split("[│┃]", line)[1:-1]] for line in written.getvalue().splitlines()]
    rows = [row for row in cells if row[1:]]
    assert ["a", "", "0.5000 +- 0.5000 (n 2)", "1.0000 (n 1)"] in rows
    assert ["b", "1", "3.0000", "2.0000"] in rows
    assert ["+0.5000 [-, -]", "1", "100% [-, -]"] in [row[5:8] for row in rows]
    assert "nan" not in written.getvalue()


def test_tables_name_every_class_and_score_and_take_no_class_for_markup():
    before = _scored({"total": [0.0, 1.0, 0.0, 1.0]}, classes="ab" * 2)
    after = replace(before, classes=("[red]", "b") * 2, subject="new [bold]")
    before = replace(before, classes=after.classes)
    written = io.StringIO()
    console = Console(width=180, highlight=False, markup=False, file=written)
    console.print(scores_table(after))
    console.print(changes_table(before, after, compare(before, after)))
    said = written.getvalue()
    assert said.count("[red]") == 2
    assert "new [bold]" in said
    assert NOT_FOUND in said
    assert "0.5000 +- 0.2887" in said
