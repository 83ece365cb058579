"""Which runs may go on from a checkpoint: rewards may move to other places, but not become other rewards."""

import logging
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adagrpo_train import continuation
from adagrpo_train.errors import CheckpointError, RewardError
from adagrpo_train.runtime.checkpoint import Snapshot
from adagrpo_train.runtime.figures import Figures
from adagrpo_train.runtime.replicated import ReplicatedEngine
from adagrpo_train.scoring.connect import Rewards
from adagrpo_train.scoring.entry import RewardEntry
from adagrpo_train.settings import Settings, read_settings
from tests.support import alone

SEVERAL = ["reward=[shapes,jpeg_size]", "reward.jpeg_size.weights.jpeg_size=0.1"]


def snapshot_of(settings: Settings, rewards: dict[str, str] | None = None) -> Snapshot:
    state = {"inputs": continuation.inputs_of(settings), "rewards": rewards or {}}
    return Snapshot(iteration=1, tensors={}, optimizer={}, state=state, per_rank=[{}], config=settings.values)


@cache
def saved() -> Snapshot:
    return snapshot_of(read_settings(SEVERAL))


def continued(present: list[str]) -> None:
    continuation.check_continuation(read_settings(present), alone(), saved())


@pytest.mark.parametrize(
    "moved",
    [
        ["reward.jpeg_size.mode=remote", "reward.jpeg_size.urls=[http://h:1]", "reward.jpeg_size.token_file=t"],
        ["reward.jpeg_size.mode=local", "reward.jpeg_size.devices=[cpu]", "reward.jpeg_size.python=/usr/bin/python3"],
        ["reward.jpeg_size.deadline_seconds=9", "reward.jpeg_size.startup_seconds=9", "reward.shapes.device=cpu"],
        ["reward.jpeg_size.on_unavailable=wait", "reward.jpeg_size.wait_seconds=9", "reward.jpeg_size.hedge_seconds=1"],
        ["reward.jpeg_size.settings={quality: 90}"],  # another quality has another fingerprint
        ["scoring.accept_changed_rewards=true", "scoring.max_skipped=99"],
        ["health.patience=9", "health.tolerance=0.5", "health.stop=true"],
    ],
)
def test_rewards_may_be_asked_elsewhere_and_otherwise(moved: list[str]) -> None:
    continued([*SEVERAL, *moved])


@pytest.mark.parametrize(
    ("present", "key"),
    [
        ([*SEVERAL, "reward.jpeg_size.weights.jpeg_size=0.2"], r"reward\.jpeg_size\.weights\.jpeg_size: 0\.1 -> 0\.2"),
        ([*SEVERAL, "reward.jpeg_size.max_bad_fraction=0.2"], r"reward\.jpeg_size\.max_bad_fraction"),
        ([*SEVERAL, "reward.jpeg_size.role=evaluation"], r"reward\.jpeg_size\.role"),
        ([*SEVERAL, "scoring.level=advantage"], r"scoring\.level"),
        (["reward=[shapes]"], r"reward=\[jpeg_size,shapes\], this run has \[shapes\]"),
        (["reward=[shapes,jpeg_size,tiny_clip]"], r"this run has \[jpeg_size,shapes,tiny_clip\]"),
    ],
)
def test_what_changes_the_reward_is_refused(present: list[str], key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        continued(present)


def test_an_evaluation_takes_further_rewards_that_never_train_and_no_others() -> None:
    snapshot = saved()
    more = ["reward=[shapes,jpeg_size,tiny_clip]", SEVERAL[1]]
    continuation.check_same_model(read_settings([*more, "reward.tiny_clip.role=evaluation"]), snapshot)
    with pytest.raises(CheckpointError, match=r"reward\.tiny_clip\."):
        continuation.check_same_model(read_settings(more), snapshot)
    with pytest.raises(CheckpointError, match=r"reward\.jpeg_size\."):
        continuation.check_same_model(read_settings([*SEVERAL, "reward.jpeg_size.role=evaluation"]), snapshot)
    with pytest.raises(CheckpointError, match=r"scoring\.scale: raw -> calibrated"):
        continuation.check_same_model(read_settings([*SEVERAL, "scoring.scale=calibrated"]), snapshot)
    held_out = snapshot_of(read_settings([*more, "reward.tiny_clip.role=evaluation"]))
    continuation.check_same_model(read_settings(SEVERAL), held_out)


def test_a_changed_reward_is_refused_or_accepted_with_a_warning_that_names_both(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer: Any = SimpleNamespace(fingerprints={"shapes": "new", "tiny_clip": "only evaluated"})
    snapshot = snapshot_of(read_settings([]), {"shapes": "old"})
    with pytest.raises(CheckpointError, match=r"reward shapes .*new now, old then.*accept_changed_rewards=true"):
        continuation.check_same_rewards(read_settings([]), scorer, snapshot)
    # The root logger of a command line run earlier in this process may have taken the logs for itself.
    monkeypatch.setattr(logging.getLogger("adagrpo_train"), "propagate", True)
    continuation.check_same_rewards(read_settings(["scoring.accept_changed_rewards=true"]), scorer, snapshot)
    assert "new now, old then" in caplog.text
    continuation.check_same_rewards(read_settings([]), scorer, snapshot_of(read_settings([]), scorer.fingerprints))


class Ranks(ReplicatedEngine):
    """This process as rank 0 of two; `other` says what rank 1 says instead."""

    def __init__(self, other: Any) -> None:
        super().__init__(kind="single", device="cpu", timeout_seconds=60)
        self._other = other

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, self._other(value)]


def test_processes_that_reach_different_rewards_are_told_both() -> None:
    def elsewhere(value: Any) -> Any:
        return {"shapes": "another"} if isinstance(value, dict) and "shapes" in value else value

    entry = RewardEntry(name="shapes", reward="shapes", settings={}, weights={"smooth": 1.0})
    with pytest.raises(
        RewardError, match=r"reward shapes is shapes@\S+.* for process 0 and another for process 1"
    ) as e:
        Rewards([entry], engine=Ranks(elsewhere), log_dir=Path())
    assert e.value.on_every_rank
    Rewards([entry], engine=Ranks(lambda value: value), log_dir=Path()).close()


def test_figures_are_weighted_means_and_maxima_of_all_ranks() -> None:
    other = Figures()
    other.add({"loss": 10.0, "kl": 4.0, "ratio_max": 0.3}, 1)
    own = Figures()
    own.add({"loss": 1.0, "ratio_max": 0.1}, 3)
    own.add({"loss": 2.0, "ratio_max": 0.2}, 4)
    assert own.reduced(Ranks(lambda _: (other._sums, other._maxima))) == pytest.approx(
        {"loss": (3 * 1 + 4 * 2 + 10) / 8, "kl": 4.0, "ratio": 0.3}
    )
    assert Figures().reduced(alone()) == {}
