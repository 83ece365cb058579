"""Alarms, the best evaluation and the figures of a run's health, on sequences whose truth is known."""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from adagrpo_train.errors import ConfigError
from adagrpo_train.health.best import Best, heldout_gain
from adagrpo_train.health.change import paired, unpaired
from adagrpo_train.health.diversity import Diversity, group_distance
from adagrpo_train.health.figures import level_gap
from adagrpo_train.health.monitor import Alert, Health, Verdict
from adagrpo_train.runtime import checkpoint
from tests.support import Memory, make_trainer

IMAGES = 100
RANDOM = np.random.default_rng(0)


def make_health(**changes: Any) -> Health:
    return Health(**({"patience": 3, "tolerance": 3.0, "stop": False, "heldout": ("clip",)} | changes))


def scores(mean: float, noise: float = 0.1, random: np.random.Generator = RANDOM) -> list[float]:
    """Of images whose own scores differ much more (by 1) than what a step of training changes in each (by `noise`)."""
    own = np.random.default_rng(7).normal(size=IMAGES)
    return (mean + own + noise * random.normal(size=IMAGES)).tolist()


def judged(health: Health, heldout: list[float], trained: list[float], **named: Any) -> list[Verdict]:
    """Evaluations with these means, one after each iteration."""
    return [
        health.evaluated(i, {"total": scores(up, **named), "clip": scores(down, **named)})
        for i, (down, up) in enumerate(zip(heldout, trained, strict=True))
    ]


def alarmed(verdicts: list[Verdict]) -> list[int]:
    return [i for i, verdict in enumerate(verdicts) if verdict.alerts]


def test_changes_have_the_statistics_of_their_t_tests() -> None:
    first, second = RANDOM.normal(size=(2, 30))
    expected = stats.ttest_rel(second, first).statistic
    assert paired(first.tolist(), second.tolist()).standard_errors == pytest.approx(expected)
    expected = stats.ttest_ind(second[:9], first, equal_var=False).statistic
    assert unpaired(first.tolist(), second[:9].tolist()).standard_errors == pytest.approx(expected)
    with_gaps = [*first.tolist(), math.nan, 5.0], [*second.tolist(), 5.0, math.nan]
    assert paired(*with_gaps) == paired(first.tolist(), second.tolist())
    assert math.isnan(paired([1.0], [2.0]).standard_errors)
    assert paired([1.0, 2.0], [2.0, 3.0]).standard_errors == math.inf


def test_a_heldout_score_that_falls_while_the_trained_one_rises_raises_the_alarm_once() -> None:
    verdicts = judged(make_health(), [0, 0.1, 0, -0.1, -0.2, -0.3], [0, 1, 2, 3, 4, 5])
    assert alarmed(verdicts) == [4]  # the third below the best one, of iteration 1
    (alert,) = verdicts[4].alerts
    assert alert.title == "reward hacking: held-out clip falls"
    assert "(iteration 1)" in alert.text and "3 evaluations in a row" in alert.text
    assert [v.metrics["health/hacking"] for v in verdicts] == [0, 0, 0, 0, 1, 1]
    assert [v.metrics["health/hacking_streak"] for v in verdicts] == [0, 0, 1, 2, 3, 4]


def test_a_fall_too_slow_to_be_seen_between_two_evaluations_raises_the_alarm() -> None:
    """Steps of half a standard error of the difference of two evaluations."""
    falls = np.arange(20) * -0.5 * 0.1 * math.sqrt(2 / IMAGES)
    found = [
        len(alarmed(judged(make_health(), falls.tolist(), list(range(20)), random=np.random.default_rng(seed)))) > 0
        for seed in range(20)
    ]
    assert sum(found) >= 18


def test_noise_raises_hardly_any_alarm() -> None:
    """A trained reward that rises clearly beside a held-out one that only fluctuates, over 20 evaluations."""
    still, rising = [0.0] * 20, list(range(20))

    def raised(tolerance: float) -> int:
        healths = [make_health(tolerance=tolerance) for _ in range(50)]
        return sum(
            bool(alarmed(judged(health, still, rising, random=np.random.default_rng(seed))))
            for seed, health in enumerate(healths)
        )

    assert raised(3.0) <= 1
    assert raised(0.5) >= 25  # it is the tolerance that does it


@pytest.mark.parametrize(
    ("heldout", "trained"),
    [
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),  # both rise
        ([0, -1, -2, -3, -4, -5], [0, -1, -2, -3, -4, -5]),  # both fall: no hacking, training fails
        ([0, -1, -2, 0.1, -1, -2], [0, 1, 2, 3, 4, 5]),  # a new best in between
        ([0, -3, -2, -1.5, -1, -0.5], [0, 1, 2, 3, 4, 5]),  # on its way back
    ],
)
def test_other_patterns_raise_none(heldout: list[float], trained: list[float]) -> None:
    assert alarmed(judged(make_health(), heldout, trained)) == []


def test_a_second_episode_warns_again() -> None:
    fall = [0, -1, -2, -3, -4]
    verdicts = judged(make_health(), [*fall, 1, 0, -1, -2, -3], list(range(10)))
    assert alarmed(verdicts) == [3, 8]
    assert verdicts[5].metrics["health/hacking"] == 0
    back_halfway = judged(make_health(), [0, -1, -2, -3, -0.5, -1.5, -2, -3], list(range(8)))
    assert alarmed(back_halfway) == [3, 7]


def test_missing_scores_neither_count_nor_end_a_streak() -> None:
    health = make_health()
    for i, mean in enumerate([0, -1, -2]):
        health.evaluated(i, {"total": scores(i), "clip": scores(mean)})
    nothing = health.evaluated(3, {"total": scores(3), "clip": [math.nan] * IMAGES})
    assert nothing.metrics["health/hacking_streak"] == 2
    assert math.isnan(nothing.metrics["health/heldout_gain"]) and not nothing.improved
    assert health.evaluated(4, {"total": scores(4), "clip": [*scores(-3)[:-1], math.nan]}).alerts


def test_the_trained_reward_falling_on_other_prompts_than_the_trained_ones_is_overfitting() -> None:
    health = make_health(heldout=())
    found = []
    for evaluation in range(6):
        for iteration in range(5):
            health.trained({"reward/mean": evaluation + 0.1 * iteration})
        health.trained({"reward/skipped": 1.0})
        found.append(health.evaluated(5 * (evaluation + 1), {"total": scores(-evaluation)}))
    assert alarmed(found) == [3]
    assert found[3].alerts[0].title.startswith("overfitting")
    assert "health/hacking" not in found[3].metrics
    assert "role=evaluation" in health.blind and not make_health().blind


def test_what_falls_from_before_training_on_is_overfitting_too() -> None:
    """Nothing was trained on then: the rewards of the first iterations stand for it."""
    health = make_health(heldout=())
    health.evaluated(0, {"total": scores(0)})
    found = []
    for evaluation in range(1, 6):
        for iteration in range(5):
            health.trained({"reward/mean": evaluation + 0.1 * iteration})
        found.append(health.evaluated(5 * evaluation, {"total": scores(-evaluation)}))
    assert alarmed(found) == [3]


def test_health_goes_on_from_its_state_as_if_it_had_never_stopped() -> None:
    rng = np.random.default_rng(3)
    evaluations = [{"total": scores(i, random=rng), "clip": scores(-0.02 * i, random=rng)} for i in range(12)]
    evaluations[2]["clip"][5] = math.nan
    straight, resumed = make_health(), make_health()
    for i, evaluation in enumerate(evaluations):
        for health in (straight, resumed):
            health.trained({"reward/mean": 0.1 * i})
        state = json.loads(json.dumps(resumed.state_dict(), allow_nan=False))
        resumed = make_health()
        resumed.load_state_dict(state)
        assert resumed.evaluated(i, evaluation) == straight.evaluated(i, evaluation)
    assert resumed.state_dict() == straight.state_dict()
    assert resumed.best == straight.best and resumed.last == 11


def test_with_stop_the_alarm_ends_the_run_and_is_known_when_it_goes_on() -> None:
    health = make_health(stop=True)
    verdicts = judged(health, [0, -1, -2, -3, -4], [0, 1, 2, 3, 4])
    assert [v.stop for v in verdicts] == [False, False, False, True, False]
    assert "clip" in health.stopped
    going_on = make_health(stop=False)
    going_on.load_state_dict(health.state_dict())
    assert going_on.stopped == ""


@pytest.mark.parametrize(("key", "value"), [("patience", 0), ("tolerance", -1.0), ("tolerance", math.nan)])
def test_settings_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"health\.{key}={value}"):
        make_health(**{key: value})


def test_the_best_evaluation_has_the_largest_sum_of_z_scores_after_training_began() -> None:
    first = {"a": [0.0, 2.0], "b": [0.0, 200.0]}
    assert heldout_gain(first, first) == 0
    assert heldout_gain(first, {"a": [1.0, 3.0], "b": [50.0, 250.0]}) == pytest.approx(1 / 1 + 50 / 100)
    assert math.isnan(heldout_gain({"a": [0.0] * 5}, {"a": [1.0, 1.0, *[math.nan] * 3]}))
    assert heldout_gain({"a": [0.0, 0.0]}, {"a": [0.0, 0.5]}) == 0.25  # nothing to standardise by
    health = make_health()
    verdicts = judged(health, [5, 0, 2, 1, 3, 2], [0] * 6)
    assert [v.improved for v in verdicts] == [False, True, True, False, True, False]
    assert health.best is not None and health.best.iteration == 4 and -2.5 < health.best.gain < -1.5
    assert Best.of(json.loads(json.dumps(health.best))) == health.best


def test_a_first_evaluation_without_scores_is_not_compared_with() -> None:
    health = make_health()
    assert not health.evaluated(1, {"total": scores(0), "clip": [math.nan] * IMAGES}).improved
    found = [health.evaluated(i, {"total": scores(i), "clip": scores(-i)}) for i in range(2, 6)]
    assert [verdict.improved for verdict in found] == [True, False, False, False]
    assert found[0].metrics["health/heldout_gain"] == 0
    assert alarmed(found) == [3]


def test_without_a_heldout_reward_the_best_is_that_of_the_trained_one() -> None:
    health = make_health(heldout=())
    assert [v.improved for v in judged(health, [0] * 4, [0, 1, 3, 2])] == [False, True, True, False]


def test_diversity_is_the_root_mean_square_difference_over_the_pairs_of_a_group() -> None:
    images = RANDOM.integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
    squares = [np.mean((one / 255 - other / 255) ** 2) for one, other in combinations(images.astype(float), 2)]
    assert group_distance(images) == pytest.approx(math.sqrt(np.mean(squares)))
    assert group_distance(np.repeat(images[:1], 4, axis=0)) == 0
    assert group_distance(np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)])) == 1


def test_diversity_is_kept_apart_by_group_however_samples_arrive() -> None:
    images, group = RANDOM.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8), [0, 1, 0, 1, 1, 0]
    one, other = Diversity(), Diversity()
    one.add(images, group)
    for i, image in enumerate(images):
        other.add(image[None], group[i : i + 1])
    assert torch.equal(one.by_group(), other.by_group())
    assert one.by_group().tolist() == pytest.approx(
        [group_distance(images[[0, 2, 5]]), group_distance(images[[1, 3, 4]])]
    )


def test_large_images_are_compared_by_their_composition() -> None:
    """Blocks of 8 pixels fall onto single pixels of the reduced copies; what is finer than a block is averaged out."""
    coarse = RANDOM.integers(0, 256, (3, 16, 32, 3), dtype=np.uint8)
    large = coarse.repeat(8, axis=1).repeat(8, axis=2)
    diversity = Diversity()
    diversity.add(large, [0, 0, 0])
    assert diversity.by_group().item() == pytest.approx(group_distance(coarse))
    checkered = np.zeros((2, 256, 256, 3), np.uint8)
    checkered[0, ::2], checkered[1, 1::2] = 255, 255
    diversity = Diversity()
    diversity.add(checkered, [0, 0])
    assert diversity.by_group().item() == 0


def test_the_gap_to_the_level_is_in_units_of_the_reward_and_of_its_deviation() -> None:
    metrics = {"reward/mean": 0.4, "curriculum/level": 0.5, "curriculum/level_std": 0.2}
    expected = {"curriculum/level_gap": -0.1, "curriculum/level_gap_stds": -0.5}
    assert level_gap(metrics) == pytest.approx(expected)
    assert level_gap({"reward/mean": 0.4}) == {}


def test_a_resumed_run_takes_in_an_evaluation_that_was_recorded_after_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["iterations=1", "reward=[shapes,jpeg_size]", "reward.jpeg_size.role=evaluation"]
    trainer, _, _ = make_trainer(*settings, run_dir=tmp_path)
    before: list[dict[str, Any]] = []

    class Recording(Memory):
        def log(self, metrics: dict[str, float], iteration: int) -> None:
            super().log(metrics, iteration)
            if "policy/loss" in metrics:
                before.append(json.loads(json.dumps(trainer._health.state_dict())))

    memory = Recording()
    trainer.train(memory)
    assert {"rollout/diversity", "policy/ratio_deviation", "curriculum/level_gap"} <= memory.training[0].keys()
    assert memory.training[0]["policy/ratio_deviation"] == 0  # one update, whose policy drew the samples
    saved = checkpoint.load(checkpoint.find(tmp_path))
    killed = replace(saved, state=saved.state | {"health": before[0]})
    assert saved.state["health"]["last"] == 1 and killed.state["health"]["last"] == 0
    resumed, parts, _ = make_trainer(*settings, run_dir=tmp_path)
    resumed.restore(killed)
    parts.evaluator.evaluate = None  # type: ignore[assignment, method-assign] - nothing is rendered again
    assert resumed.train(Memory()) == "completed"
    assert json.loads(json.dumps(resumed._health.state_dict())) == saved.state["health"]
    assert resumed.best == Best.of(saved.state["health"]["best"])

    # Its warnings were given when it was recorded.
    told, warned = Memory(), Verdict(alerts=(Alert("falls", "why"),))
    monkeypatch.setattr(resumed._health, "evaluated", lambda iteration, scores: warned)
    monkeypatch.setattr(resumed, "_tracker", told)
    assert resumed._judge_recorded(1) == warned and not told.alerts

    # Nor does a run go on that an alarm has stopped.
    saved.state["health"]["streaks"]["jpeg_size"]["alarmed"] = True
    resumed.restore(saved)  # nothing is left to do but the export
    resumed._health._stop = True
    resumed.restore(saved)
    with pytest.raises(ConfigError, match=r"health\.stop=true: held-out jpeg_size fell .*health\.stop=false to go on"):
        resumed.restore(replace(saved, iteration=0))


def test_a_best_checkpoint_that_is_gone_is_not_held_against_later_ones(tmp_path: Path) -> None:
    trainer, _, _ = make_trainer("iterations=1", run_dir=tmp_path)
    best = tmp_path / "checkpoints" / "best"
    best.parent.mkdir()
    best.write_text("iteration_000009\n")
    trainer._health._best = Best(4, 1.0)
    trainer._settle_best()
    assert trainer.best is None and not best.exists()


def test_an_alarm_that_could_never_stop_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"health\.stop=true.*evaluation\.every"):
        make_trainer("health.stop=true", "evaluation.every=0", run_dir=tmp_path)
