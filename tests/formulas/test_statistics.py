"""Intervals and paired tests against closed forms, scipy and simulated coverage."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from adagrpo_train.functional import statistics
from adagrpo_train.functional.statistics import (
    NOT_FOUND,
    NOTHING,
    bootstrap_interval,
    expansion,
    holm,
    paired_comparison,
    win_rate,
)


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_of_many_values_the_interval_is_that_of_scipy():
    values = np.random.default_rng(1).exponential(size=400)
    ours = bootstrap_interval(values)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(2)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_the_interval_moves_and_scales_with_the_values():
    values = _normal(30)
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(3 * values + 7) == pytest.approx((3 * low + 7, 3 * high + 7), rel=1e-12)


def test_values_that_are_missing_are_left_out():
    values = _normal(20)
    assert bootstrap_interval(np.insert(values, 3, math.nan)) == bootstrap_interval(values)


def test_of_one_value_there_is_no_interval():
    assert all(math.isnan(end) for end in bootstrap_interval(np.array([1.0])))
    assert all(math.isnan(end) for end in bootstrap_interval(np.array([math.nan, math.nan])))


@pytest.mark.parametrize("confidence, resamples", [(0.0, 10), (1.0, 10), (95.0, 10), (0.95, 0)])
def test_an_impossible_interval_is_refused(confidence: float, resamples: int):
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval(_normal(5), confidence=confidence, resamples=resamples)


@pytest.mark.parametrize("count", [3, 5, 30])
def test_intervals_hold_the_true_mean_as_often_as_they_promise(count: int):
    held = [
        low <= 0 <= high
        for seed in range(400)
        for low, high in [bootstrap_interval(_normal(count, seed=seed), resamples=500, seed=seed)]
    ]
    assert np.mean(held) == pytest.approx(0.95, abs=0.035)  # 3 standard errors of 400 trials


def test_the_expansion_turns_the_spread_of_resampled_means_into_that_of_student():
    # Of two values resampled means have variance d^2 / 8, d their distance; Student's interval is 12.7 d / 2.
    assert expansion(2, confidence=0.95) * 1.959964 * math.sqrt(1 / 8) == pytest.approx(12.7062 / 2, rel=1e-5)
    assert expansion(448, confidence=0.95) == pytest.approx(1, abs=0.005)


def _runs(seeds: int, images: int, *, of_seed: float, of_image: float, noise: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    by_seed, by_image = rng.normal(size=(seeds, 1)) * of_seed, rng.normal(size=(1, images)) * of_image
    return by_seed + by_image + rng.normal(size=(seeds, images)) * noise


@pytest.mark.parametrize(
    "of_seed, of_image, noise", [(1.0, 0.0, 0.1), (0.1, 1.0, 0.1), (0.3, 1.0, 1.0)], ids=["seeds", "images", "both"]
)
def test_the_crossed_interval_covers_whichever_of_seeds_and_images_spreads(
    of_seed: float, of_image: float, noise: float
):
    held = []
    for seed in range(300):
        difference = _runs(5, 40, of_seed=of_seed, of_image=of_image, noise=noise, seed=seed)
        found = paired_comparison(np.zeros_like(difference), difference, resamples=400, seed=seed)
        held.append(found.low <= 0 <= found.high)
    assert np.mean(held) >= 0.91  # 3 standard errors of 300 trials below 0.95; drawing both ways may be too wide


def test_seeds_that_disagree_are_no_difference_however_many_images_there_are():
    # One lucky seed of three moves every image; a test over the images alone would be sure of it.
    difference = np.array([[0.3], [-0.02], [0.01]]) + 0.01 * _normal(3, 500)
    result = paired_comparison(np.zeros_like(difference), difference)
    assert result.p_images < 1e-6
    assert not result.found
    assert result.verdict(result.p) == NOT_FOUND
    assert result.seeds == 3


def test_the_p_values_are_those_of_scipy_on_the_means():
    before, after = _normal(4, 30, seed=1), _normal(4, 30, seed=2) + 0.2
    result = paired_comparison(before, after)
    assert result.p_seeds == pytest.approx(stats.ttest_rel(after.mean(1), before.mean(1)).pvalue, rel=1e-12)
    assert result.p_images == pytest.approx(stats.wilcoxon(after.mean(0) - before.mean(0))[1], rel=1e-12)
    assert result.p == result.p_seeds
    assert result.difference == pytest.approx((after - before).mean(), rel=1e-12)
    assert (result.before, result.after) == pytest.approx((before.mean(), after.mean()), rel=1e-12)
    assert (result.seeds, result.images) == (4, 30)


def test_one_seed_is_a_comparison_of_two_checkpoints_over_their_images():
    before = _normal(1, 200)
    result = paired_comparison(before, before + 0.1 + 0.3 * _normal(1, 200, seed=3))
    assert math.isnan(result.p_seeds)
    assert result.p == result.p_images < 0.05
    assert result.found
    assert result.verdict(result.p) == "higher"
    assert result.verdict(0.05) == NOT_FOUND  # after a correction
    # Rows are one, so only images are drawn: the interval is that of the differences.
    differences = 0.1 + 0.3 * _normal(200, seed=3)
    assert (result.low, result.high) == pytest.approx(bootstrap_interval(differences), abs=0.004)


def test_a_model_does_not_differ_from_itself():
    scores = _normal(3, 20)
    result = paired_comparison(scores, scores)
    assert (result.difference, result.low, result.high) == (0, 0, 0)
    assert (result.p_seeds, result.p_images, result.found) == (1, 1, False)


def test_without_an_effect_a_difference_is_found_no_more_often_than_alpha():
    found = 0
    for seed in range(200):
        before, after = (_runs(4, 30, of_seed=0.3, of_image=1, noise=1, seed=2 * seed + side) for side in (0, 1))
        found += paired_comparison(before, after, resamples=200).found
    assert found / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_an_image_that_one_run_lacks_is_left_out_of_all():
    before, after = _normal(3, 10, seed=1), _normal(3, 10, seed=2)
    holed = after.copy()
    holed[1, 4] = math.nan
    kept = [column for column in range(10) if column != 4]
    assert paired_comparison(before, holed) == paired_comparison(before[:, kept], after[:, kept])


def test_a_seed_without_any_score_does_not_take_the_others_with_it():
    before, after = _normal(3, 10, seed=1), _normal(3, 10, seed=2)
    lost = before.copy()
    lost[2] = math.nan
    assert paired_comparison(lost, after) == paired_comparison(before[:2], after[:2])


def test_nothing_to_compare_is_said():
    result = paired_comparison(np.full((2, 3), math.nan), np.zeros((2, 3)))
    assert (result.images, result.found) == (0, False)
    assert math.isnan(result.difference)
    assert result.verdict(result.p) == NOTHING


def test_runs_of_different_images_are_not_paired():
    with pytest.raises(ValueError, match="same seeds and images"):
        paired_comparison(np.zeros((2, 3)), np.zeros((2, 4)))


def test_chunks_of_resamples_do_not_change_what_is_covered(monkeypatch: pytest.MonkeyPatch):
    values = _normal(50)
    whole = bootstrap_interval(values)
    monkeypatch.setattr(statistics, "_CELLS", 1000)  # 20 sets at a time
    assert bootstrap_interval(values) == pytest.approx(whole, abs=0.02)


def test_a_win_counts_one_and_a_tie_half():
    rate, interval = win_rate(np.array([0.0, 1.0, 2.0, 3.0, math.nan]), np.array([1.0, 2.0, 2.0, 0.0, 5.0]))
    assert rate == 2.5 / 4
    assert 0 <= interval.low <= rate <= interval.high <= 1


def test_the_interval_of_a_win_rate_is_the_binomial_one():
    rng = np.random.default_rng(0)
    after = np.where(rng.random(400) < 0.6, 1.0, -1.0)
    rate, (low, high) = win_rate(np.zeros(400), after)
    half = 1.96 * math.sqrt(rate * (1 - rate) / 400)
    assert (low, high) == pytest.approx((rate - half, rate + half), abs=0.005)


def test_holm_multiplies_by_the_tests_that_are_left():
    # 0.01 x 4, 0.02 x 3, 0.03 x 2 raised to the one before, 0.5 x 1.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06], rel=1e-12)
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_holm_does_not_count_tests_that_could_not_be_made():
    adjusted = holm([0.02, math.nan, 0.04])
    assert adjusted[0] == pytest.approx(0.04)
    assert math.isnan(adjusted[1])
    assert adjusted[2] == pytest.approx(0.04)
    assert holm([]) == []


@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_p_value_and_bonferroni(p_values: list[float]):
    for raw, adjusted in zip(p_values, holm(p_values), strict=True):
        assert raw <= adjusted <= min(1.0, raw * len(p_values)) + 1e-15
