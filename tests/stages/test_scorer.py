"""Several rewards as one scorer: parts, totals, missing scores, and what happens when nobody answers."""

import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from adagrpo_train.algorithms.advantages import Group
from adagrpo_train.errors import ConfigError, RewardError, StoppedError
from adagrpo_train.runtime.replicated import ReplicatedEngine
from adagrpo_train.runtime.stopping import StopRequest
from adagrpo_train.scoring import collector
from adagrpo_train.scoring.collector import Source, _Report
from adagrpo_train.scoring.entry import RewardEntry
from adagrpo_train.scoring.scorer import Scorer
from rewards.client.batch import RewardBatch, RewardRefusedError, RewardUnavailableError
from rewards.client.inproc import InprocClient
from rewards.contract import ItemError, RewardInfo, Sample
from tests.support import alone

NAN = math.nan
GROUP = Group(std="group", unbiased=True, eps=1e-8, limit=5.0)


class Table:
    """A reward that looks its scores up by prompt; a prompt that is not there cannot be scored."""

    api_version: ClassVar[int] = 1

    def __init__(self, name: str, scores: Mapping[str, Mapping[str, float]]) -> None:
        metrics = tuple(next(iter(scores.values())))
        self.info = RewardInfo(name, metrics, None, max_batch=8, tolerance=0.0, source="test", licence="Apache-2.0")
        self._scores = scores

    def load(self, device: str) -> None: ...

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        for sample in batch:
            if sample.prompt not in self._scores:
                raise ItemError(f"no score for {sample.prompt!r}")
        return [self._scores[sample.prompt] for sample in batch]

    def fingerprint(self) -> str:
        return self.info.name

    def close(self) -> None: ...


class Absent(InprocClient):
    """Nobody answers the first `times` requests."""

    def __init__(self, reward: Table, times: int, error: type[Exception] = RewardUnavailableError) -> None:
        super().__init__(reward, device="cpu")
        self.times, self.error, self.waits = times, error, 0

    def submit(self, samples: Sequence[Sample]) -> Future[RewardBatch]:
        self.times -= 1
        if self.times < 0:
            return super().submit(samples)
        future: Future[RewardBatch] = Future()
        future.set_exception(self.error("nobody there"))
        return future

    def wait_ready(self, seconds: float) -> None:
        self.waits += 1


def entry(name: str, weights: dict[str, float] | None = None, **settings: Any) -> RewardEntry:
    weights = {"a": 1.0} if weights is None else weights
    return RewardEntry(name=name, reward=name, settings={}, weights=weights, **settings)


def scorer(*pairs: tuple[RewardEntry, Table | InprocClient], **settings: Any) -> Scorer:
    sources = [
        Source(own, reward if isinstance(reward, InprocClient) else InprocClient(reward, device="cpu"))
        for own, reward in pairs
    ]
    defaults: dict[str, Any] = {"scale": "raw", "level": "reward", "alpha": 0.5}
    return Scorer(sources, **(defaults | settings), engine=alone(), stop=StopRequest())


def images(prompts: Sequence[str]) -> np.ndarray:
    return np.zeros((len(prompts), 16, 16, 3), np.uint8)


A = Table("first", {"x": {"a": 1.0, "b": 10.0}, "y": {"a": 2.0, "b": 30.0}})
C = Table("second", {"x": {"c": 5.0}, "y": {"c": 3.0}})


def test_the_total_is_the_weighted_sum_of_all_rewards_and_parts_are_kept() -> None:
    both = scorer((entry("first", {"a": 1.0, "b": 0.1}), A), (entry("second", {"c": 2.0}), C))
    scores = both.score(images("xy"), ["x", "y"])
    assert scores.total.tolist() == pytest.approx([1 + 1 + 10, 2 + 3 + 6])
    assert {name: values.tolist() for name, values in scores.parts.items()} == {
        "a": [1.0, 2.0],
        "b": [10.0, 30.0],
        "c": [5.0, 3.0],
    }
    assert scores.missing == {"first": 0.0, "second": 0.0}


def test_the_order_in_which_rewards_are_named_changes_no_bit_of_the_total() -> None:
    """A run may be resumed with another one."""
    parts = {name: torch.rand(100, generator=torch.Generator().manual_seed(n)) for n, name in enumerate("abc")}
    pairs = [(entry("first", {"a": 0.3, "b": 0.7}), A), (entry("second", {"c": 1.1}), C)]
    turned = [(entry("second", {"c": 1.1}), C), (entry("first", {"b": 0.7, "a": 0.3}), A)]
    assert torch.equal(scorer(*pairs).total(parts), scorer(*turned).total(parts))


def test_scores_keep_their_order_over_pieces() -> None:
    one = scorer((entry("first"), A))
    collector = one.collect()
    for piece in (["y"], ["x", "y", "x"], ["y"]):
        collector.add(images(piece), piece)
    assert collector.scores().total.tolist() == [2.0, 1.0, 2.0, 1.0, 2.0]


def test_metrics_of_one_name_are_told_apart_by_their_rewards() -> None:
    twins = scorer((entry("first"), A), (entry("other"), Table("other", {"x": {"a": 7.0}})))
    scores = twins.score(images("x"), ["x"])
    assert {"first.a", "b", "other.a"} == set(scores.parts)
    assert scores.total.tolist() == [8.0]


def test_a_reward_for_evaluation_renames_no_part_that_trains() -> None:
    """A checkpoint knows levels and calibration by these names."""
    held_out = entry("other", {}, role="evaluation")
    more = scorer((held_out, Table("other", {"x": {"a": 7.0, "d": 1.0}})), (entry("first"), A))
    scores = more.score(images("x"), ["x"], evaluation=True)
    assert {name: float(values) for name, values in scores.parts.items()} == {"a": 1, "b": 10, "other.a": 7, "d": 1}
    assert scores.total.tolist() == [1.0]


def test_a_metric_called_like_the_total_does_not_take_its_place() -> None:
    one = scorer((entry("first", {"a": 2.0}), Table("first", {"x": {"a": 1.0, "total": 50.0, "prompt": 3.0}})))
    assert set(one.score(images("x"), ["x"]).parts) == {"a", "first.total", "first.prompt"}


def test_what_an_evaluation_cost_is_not_mixed_into_the_iteration_after_it() -> None:
    one = scorer((entry("first", max_bad_fraction=0.5), A))
    one.score(images("xz"), ["x", "z"], evaluation=True)
    held_out = one.drain(evaluation=True)
    assert held_out["eval/reward/first/missing"] == 1
    assert held_out["time/eval_reward_first_latency_seconds"] >= 0
    one.score(images("x"), ["x"])
    training = one.drain()
    assert training["reward/first/missing"] == 0
    assert {name for name in training if "eval" in name} == set()


def test_a_score_that_is_missing_is_nan_with_its_reason_and_never_zero() -> None:
    one = scorer((entry("first", max_bad_fraction=0.5), A))
    scores = one.score(images("xzy"), ["x", "z", "y"])
    assert scores.total[[0, 2]].tolist() == [1.0, 2.0]
    assert math.isnan(scores.total[1])
    assert scores.missing == {"first": pytest.approx(1 / 3)}
    assert "no score for 'z'" in scores.reason
    assert one.excess(scores) == ""


def test_an_image_that_lacks_one_metric_of_a_reward_lacks_them_all() -> None:
    partly = Table("first", {"x": {"a": 1.0, "b": NAN}, "y": {"a": 2.0, "b": 30.0}})
    scores = scorer((entry("first"), partly)).score(images("xy"), ["x", "y"])
    assert scores.missing == {"first": 0.5}
    assert scores.parts["a"].isnan().tolist() == [True, False]


def test_more_missing_scores_than_allowed_are_told() -> None:
    one = scorer((entry("first", max_bad_fraction=0.3), A))
    assert "33% of the scores of reward first are missing" in one.excess(one.score(images("xzy"), ["x", "z", "y"]))


def test_a_reward_that_scores_nothing_at_all_stops_the_run() -> None:
    with pytest.raises(RewardError, match=r"none of 2 images got a score; first: .*no score for 'z'"):
        scorer((entry("first"), A)).score(images("zz"), ["z", "z"])


def test_rewards_for_evaluation_are_asked_for_evaluations_only() -> None:
    pair = scorer((entry("first"), A), (entry("second", {"c": 9.0}, role="evaluation"), C))
    assert set(pair.score(images("x"), ["x"]).parts) == {"a", "b"}
    scores = pair.score(images("x"), ["x"], evaluation=True)
    assert scores.parts["c"].tolist() == [5.0]
    assert scores.total.tolist() == [1.0]


def test_calibrated_scores_count_in_deviations_of_the_first_evaluation() -> None:
    both = scorer((entry("first", {"a": 1.0}), A), (entry("second", {"c": 0.5}), C), scale="calibrated")
    parts = both.score(images("xy"), ["x", "y"], evaluation=True).parts
    with pytest.raises(RewardError, match="no calibration yet"):
        both.total(parts)
    both.calibrate(parts)
    # a: 1, 2 are -1, +1 deviations; c: 5, 3 are +1, -1.
    assert both.total(parts).tolist() == pytest.approx([-1 + 0.5, 1 - 0.5])
    both.calibrate({name: values * 100 for name, values in parts.items()})
    assert both.total(parts).tolist() == pytest.approx([-0.5, 0.5])
    again = scorer((entry("first", {"a": 1.0}), A), (entry("second", {"c": 0.5}), C), scale="calibrated")
    again.load_state_dict(both.state_dict())
    assert again.total(parts).tolist() == pytest.approx([-0.5, 0.5])


def test_a_part_that_the_total_can_do_without_needs_no_calibration() -> None:
    pairs = [(entry("first"), A), (entry("second", {"c": 1.0}, required=False), C)]
    optional = scorer(*pairs, scale="calibrated", level="advantage")
    parts = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2), "c": torch.full((2,), NAN)}
    optional.calibrate(parts)
    assert optional.total(parts).tolist() == pytest.approx([-1.0, 1.0])


def test_too_few_scores_cannot_be_calibrated() -> None:
    one = scorer((entry("first"), A), scale="calibrated")
    with pytest.raises(RewardError, match=r"only 2 of 5 held-out images have a score in a; .*scale=raw") as caught:
        one.calibrate({"a": torch.tensor([1.0, 2.0, NAN, NAN, NAN]), "b": torch.zeros(5)})
    assert caught.value.on_every_rank


@pytest.mark.parametrize("spread", [0.0, 1e-6])  # what the floor of a standard deviation would hide
def test_a_spread_within_rounding_is_none(spread: float) -> None:
    one = scorer((entry("first"), A), scale="calibrated")
    with pytest.raises(RewardError, match=r"same score in a \(0\.3\).*evaluation\.images.*scale=raw"):
        one.calibrate({"a": torch.tensor([0.3, 0.3, 0.3 + spread]), "b": torch.zeros(3)})


def test_a_reward_without_spread_cannot_be_calibrated() -> None:
    one = scorer((entry("first"), A), scale="calibrated")
    with pytest.raises(RewardError, match=r"same score in a .*scoring\.scale=raw"):
        one.calibrate({"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([1.0, 2.0])})


def test_advantages_of_each_reward_or_of_their_sum() -> None:
    group = torch.tensor([0, 0])
    parts = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2), "c": torch.tensor([5.0, 3.0])}
    pairs = [(entry("first", {"a": 1.0}), A), (entry("second", {"c": 0.25}), C)]
    root = 1 / math.sqrt(2)  # of two samples, each lies this many unbiased deviations from the mean
    summed = scorer(*pairs).local_advantages(parts, group, 2, GROUP)
    assert summed.tolist() == pytest.approx([-root, root])  # 2.25, 2.75
    apart = scorer(*pairs, level="advantage").local_advantages(parts, group, 2, GROUP)
    assert apart.tolist() == pytest.approx([-root + root / 4, root - root / 4])


def test_a_sample_that_lacks_a_required_score_has_no_advantage_though_other_parts_have_one() -> None:
    both = scorer((entry("first"), A), (entry("second", {"c": 1.0}), C), level="advantage")
    parts = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.zeros(4), "c": torch.tensor([NAN, 1.0, 2.0, 4.0])}
    got = both.local_advantages(parts, torch.zeros(4, dtype=torch.int64), 4, GROUP)
    rest = {"a": torch.tensor([2.0, 3.0, 4.0]), "c": torch.tensor([1.0, 2.0, 4.0])}
    expected = sum(GROUP.local(values, torch.zeros(3, dtype=torch.int64)) for values in rest.values())
    assert got[0] == 0
    assert torch.allclose(got[1:], expected)


class TwoRanks(ReplicatedEngine):
    """This process and another one of which is known what it says."""

    def __init__(self, other: list[Any]) -> None:
        super().__init__(kind="single", device="cpu", timeout_seconds=60)
        self._other = iter(other)

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, next(self._other)]


FINE = _Report(pending=False, failure="", final=False, stop=False)


def test_the_share_of_missing_scores_is_that_of_all_ranks() -> None:
    """The other rank has six images and misses one score; here one of two is missing."""
    engine = TwoRanks([FINE, ({"first": 1}, 6, ["first: elsewhere"])])
    both = Scorer(
        [Source(entry("first"), InprocClient(A, device="cpu"))],
        scale="raw",
        level="reward",
        alpha=0.5,
        engine=engine,
        stop=StopRequest(),
    )
    scores = both.score(images("xz"), ["x", "z"])
    assert scores.missing == {"first": 2 / 8}
    assert "no score for 'z'" in scores.reason


def test_a_server_that_comes_back_refused_stops_the_run_with_its_words() -> None:
    class Changed(Absent):
        def wait_ready(self, seconds: float) -> None:
            raise RewardRefusedError("it scores with other weights now")

    source = Source(entry("first", on_unavailable="wait"), Changed(A, times=1))
    one = Scorer([source], scale="raw", level="reward", alpha=0.5, engine=alone(), stop=StopRequest())
    with pytest.raises(RewardError, match="other weights now") as caught:
        one.score(images("x"), ["x"])
    assert caught.value.on_every_rank


def test_what_waiting_cannot_mend_on_another_rank_stops_this_one_too() -> None:
    source = Source(entry("first", on_unavailable="wait"), InprocClient(A, device="cpu"))
    engine = TwoRanks([FINE._replace(failure="a bug of the reward", final=True)])
    one = Scorer([source], scale="raw", level="reward", alpha=0.5, engine=engine, stop=StopRequest())
    with pytest.raises(RewardError, match="a bug of the reward") as caught:
        one.score(images("x"), ["x"])
    assert caught.value.on_every_rank


@pytest.mark.parametrize("other", [False, True])
def test_a_stop_ends_the_waiting_for_a_reward_on_all_ranks(other: bool) -> None:
    """Whichever of them was asked: here this one, or another one that has its scores and only follows."""
    stop = StopRequest()
    stop.requested = not other
    engine = TwoRanks([FINE._replace(stop=other)])
    source = Source(entry("first", on_unavailable="wait"), Absent(A, times=10**9))
    one = Scorer([source], scale="raw", level="reward", alpha=0.5, engine=engine, stop=stop)
    with pytest.raises(StoppedError, match="waiting for reward first") as caught:
        one.score(images("x"), ["x"])
    assert caught.value.on_every_rank


def test_a_stop_is_heeded_while_scores_are_still_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hangs is noticed at its deadline only, which may lie beyond what a launcher leaves for stopping."""
    monkeypatch.setattr(collector, "_HEARTBEAT_SECONDS", 0.02)

    class Hanging(InprocClient):
        def submit(self, samples: Sequence[Sample]) -> Future[RewardBatch]:
            return Future()

    engine = TwoRanks([FINE, FINE, FINE._replace(stop=True)])
    source = Source(entry("first"), Hanging(A, device="cpu"))
    one = Scorer([source], scale="raw", level="reward", alpha=0.5, engine=engine, stop=StopRequest())
    with pytest.raises(StoppedError, match="waiting for reward first") as caught:
        one.score(images("x"), ["x"])
    assert caught.value.on_every_rank


def test_a_rank_that_has_its_scores_waits_for_the_others_and_counts_its_traffic_once() -> None:
    pending = FINE._replace(pending=True)
    engine = TwoRanks([pending, pending, FINE, ({"first": 0}, 1, [])])
    source = Source(entry("first"), InprocClient(A, device="cpu"))
    one = Scorer([source], scale="raw", level="reward", alpha=0.5, engine=engine, stop=StopRequest())
    assert one.score(images("x"), ["x"]).total.tolist() == [1.0]
    assert len(one._figures["first/latency"]) == 1


def test_an_optional_reward_that_another_rank_lost_is_done_without_on_this_one_too() -> None:
    engine = TwoRanks([FINE, FINE._replace(failure="nobody there"), ({"first": 0, "second": 2}, 2, [])])
    sources = [
        Source(entry("first"), InprocClient(A, device="cpu")),
        Source(entry("second", {"c": 1.0}, required=False), InprocClient(C, device="cpu")),
    ]
    both = Scorer(sources, scale="raw", level="advantage", alpha=0.5, engine=engine, stop=StopRequest())
    scores = both.score(images("xy"), ["x", "y"])
    assert scores.parts["c"].isnan().all()
    assert scores.missing == {"first": 0.0, "second": 1.0}


def test_an_optional_reward_that_is_missing_leaves_the_judgement_to_the_others() -> None:
    group = torch.tensor([0, 0, 0, 0])
    pairs = [(entry("first", {"a": 1.0}), A), (entry("second", {"c": 1.0}, required=False), C)]
    parts = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.zeros(4), "c": torch.tensor([NAN, NAN, NAN, 3.0])}
    optional = scorer(*pairs, level="advantage")
    assert optional.total(parts).tolist() == [1.0, 2.0, 3.0, 4.0]
    expected = 2 * GROUP.local(parts["a"], group)
    assert torch.allclose(optional.local_advantages(parts, group, 4, GROUP), expected)


def test_levels_follow_each_part_over_the_usable_scores_that_are_there() -> None:
    one = scorer((entry("first"), A))
    usable = torch.tensor([True, True, True, False])  # the last one lacks another reward
    first = one.follow({"a": torch.tensor([1.0, NAN, 3.0, 99.0]), "b": torch.tensor([NAN, NAN, NAN, 7.0])}, usable)
    assert first == {"reward/a/level": 2.0}
    single = torch.tensor([True])
    assert one.follow({"a": torch.tensor([4.0])}, single)["reward/a/level"] == 3.0
    again = scorer((entry("first"), A))
    again.load_state_dict(one.state_dict())
    assert again.follow({"a": torch.tensor([5.0])}, single)["reward/a/level"] == 4.0


def test_a_run_stops_when_nobody_answers() -> None:
    client = Absent(A, times=1)
    with pytest.raises(RewardError, match=r"nobody there.*reward\.first\.on_unavailable=wait"):
        scorer((entry("first"), client)).score(images("x"), ["x"])
    assert client.waits == 0


def test_a_run_waits_for_a_reward_if_told_to() -> None:
    client = Absent(A, times=3)
    waiting = scorer((entry("first", on_unavailable="wait"), client))
    collector = waiting.collect()
    for piece in ("x", "y"):
        collector.add(images(piece), [piece])
    assert collector.scores().total.tolist() == [1.0, 2.0]
    assert client.waits == 2  # both pieces failed, then the whole once more


def test_a_run_waits_no_longer_than_told() -> None:
    client = Absent(A, times=10**9)
    with pytest.raises(RewardError, match=r"nobody there.*reward\.first\.wait_seconds higher"):
        scorer((entry("first", on_unavailable="wait", wait_seconds=0.2), client)).score(images("x"), ["x"])


def test_a_reward_that_says_it_is_ready_and_never_answers_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collector, "_HEARTBEAT_SECONDS", 0.01)

    class Late(Absent):
        def submit(self, samples: Sequence[Sample]) -> Future[RewardBatch]:
            assert self.waits < 20, "asked again and again"
            future: Future[RewardBatch] = Future()
            threading.Timer(0.05, future.set_exception, (self.error("no score in time"),)).start()
            return future

    client = Late(A, times=0)
    with pytest.raises(RewardError, match=r"no score in time.*reward\.first\.wait_seconds higher"):
        scorer((entry("first", on_unavailable="wait", wait_seconds=0.3), client)).score(images("x"), ["x"])
    assert client.waits > 0


@pytest.mark.parametrize("error", [RewardRefusedError, ZeroDivisionError])
def test_what_waiting_cannot_mend_stops_the_run_at_once(error: type[Exception]) -> None:
    client = Absent(A, times=1, error=error)
    with pytest.raises(RewardError, match=r"reward first: .*nobody there"):
        scorer((entry("first", on_unavailable="wait"), client)).score(images("x"), ["x"])


def test_a_run_goes_on_without_an_optional_reward() -> None:
    pair = scorer(
        (entry("first"), A), (entry("second", {"c": 1.0}, required=False), Absent(C, times=1)), level="advantage"
    )
    scores = pair.score(images("xy"), ["x", "y"])
    assert scores.total.tolist() == [1.0, 2.0]
    assert scores.parts["c"].isnan().all()
    assert scores.missing["second"] == 1.0
    assert pair.score(images("xy"), ["x", "y"]).parts["c"].tolist() == [5.0, 3.0]


@pytest.mark.parametrize(
    ("entries", "settings", "message"),
    [
        ([entry("first", {"a": 1.0, "z": 1.0})], {}, r"reward\.first\.weights\.z=.*metrics a, b"),
        ([entry("first", {}, role="evaluation")], {}, "nothing to train on"),
        ([entry("first", required=False)], {}, r"reward\.first\.required=False: needs scoring\.level=advantage"),
        ([entry("first", required=False)], {"level": "advantage"}, "keep one with required=true"),
        ([entry("first")], {"scale": "z"}, r"scoring\.scale=z"),
        ([entry("first")], {"level": "z"}, r"scoring\.level=z"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    entries: list[RewardEntry], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        scorer(*[(own, A) for own in entries], **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {}}, "weights"),
        ({"weights": {"a": 0.0}}, "weights"),
        ({"weights": {"a": NAN}}, r"weights\.a=nan"),
        ({"weights": {"a": True}}, r"weights\.a"),
        ({"role": "both"}, "train, evaluation"),
        ({"mode": "cloud"}, "inproc, local, remote"),
        ({"mode": "remote"}, r"urls=\[\]"),
        ({"urls": ["http://h:1"]}, r"belongs to reward\.r\.mode=remote"),
        ({"python": "/usr/bin/python3"}, r"belongs to reward\.r\.mode=local"),
        ({"devices": ["cpu"]}, r"belongs to reward\.r\.mode=local"),
        ({"device": "cpu", "mode": "local"}, r"belongs to reward\.r\.mode=inproc"),
        ({"max_bad_fraction": 1.0}, "max_bad_fraction=1.0"),
        ({"deadline_seconds": 0.0}, "deadline_seconds=0.0"),
        ({"deadline_seconds": math.inf}, "deadline_seconds=inf"),
        ({"hedge_seconds": 1.0}, r"hedge_seconds=1\.0: .*mode=inproc"),
        ({"hedge_seconds": math.nan}, "hedge_seconds=nan"),
        ({"hedge_seconds": -1.0}, "hedge_seconds=-1.0"),
    ],
)
def test_entries_that_contradict_themselves_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardEntry(**({"name": "r", "reward": "r", "settings": {}, "weights": {"a": 1.0}} | settings))
