"""A reward in the process of its caller: the same answers as behind a socket."""

import math
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rewards.client.batch import RewardUnavailableError, pack, units
from rewards.client.inproc import InprocClient
from rewards.contract import ItemError, RewardInfo, Sample
from rewards.judge.chat import JudgeRefusedError
from tests.serving.conftest import ROOT
from tests.serving.ordered import Greedy, Ordered

INFO = replace(Ordered.info, max_batch=4)


class Plain(Ordered):
    """Notes its batches and the threads that use it."""

    info = INFO

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self.closed = False

    def load(self, device: str) -> None:
        self.threads.add(threading.get_ident())
        super().load(device)

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        self.threads.add(threading.get_ident())
        self.batches.append([sample.id for sample in batch])
        return super().score(batch)

    def close(self) -> None:
        self.closed = True


def samples(count: int, prompts: dict[int, str] | None = None, groups: Sequence[str] = ()) -> list[Sample]:
    return [
        Sample(str(n), (prompts or {}).get(n, ""), np.full((16, 16, 3), n, np.uint8), (*groups, *"." * count)[n])
        for n in range(count)
    ]


def test_scores_come_in_order_from_one_thread_while_the_caller_goes_on() -> None:
    reward = Plain(seconds=0.2)
    client = InprocClient(reward, device="cpu")
    started = time.monotonic()
    futures = [client.submit(samples(10)), client.submit(samples(3))]
    assert time.monotonic() - started < 0.2
    batches = [future.result() for future in futures]
    assert [batch.scores["ordered"].tolist() for batch in batches] == [[*range(10)], [*range(3)]]
    assert batches[0].scores["ordered"].dtype == np.float32
    assert batches[0].reasons == [None] * 10
    assert batches[0].fingerprint == client.fingerprint == "ordered@1"
    assert [len(batch) for batch in reward.batches] == [4, 4, 2, 3]
    assert len(reward.threads) == 1
    assert threading.get_ident() not in reward.threads
    client.close()
    client.close()
    assert reward.closed
    with pytest.raises(RuntimeError, match="closed"):
        client.submit(samples(1))


def test_what_the_reward_refuses_is_missing_alone() -> None:
    reward = Plain()
    client = InprocClient(reward, device="cpu")
    batch = client.submit(samples(8, {2: "refuse", 5: "nan"})).result()
    expected = np.arange(8, dtype=np.float32)
    expected[[2, 5]] = np.nan
    np.testing.assert_array_equal(batch.scores["ordered"], expected)
    assert batch.reasons[2] == "unsupported_item: this prompt cannot be scored"
    assert batch.reasons[5] == "non_finite: the score is not a finite number"
    assert [reason for n, reason in enumerate(batch.reasons) if n not in (2, 5)] == [None] * 6
    assert reward.batches == [["0", "1", "2", "3"], ["0"], ["1"], ["2"], ["3"], ["4", "5", "6", "7"]]
    client.close()


def test_what_float32_cannot_hold_is_missing() -> None:
    class Huge(Plain):
        def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
            return [{"ordered": value} for value in (1e300, -1e39, math.inf, 3e38)][: len(batch)]

    client = InprocClient(Huge(), device="cpu")
    batch = client.submit(samples(4)).result()
    assert np.isnan(batch.scores["ordered"]).tolist() == [True, True, True, False]
    client.close()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda batch: 1 / 0, "scorer_error: ZeroDivisionError: division by zero"),
        (
            lambda batch: float("CUDA error"),
            "scorer_error: ValueError: could not convert string to float: 'CUDA error'",
        ),
        (lambda batch: [], "scorer_error: RuntimeError: reward ordered gave 0 scores for 1 images"),
        (lambda batch: [{"other": 1.0}] * len(batch), "scorer_error: KeyError: 'ordered'"),
    ],
)
def test_an_image_that_the_reward_fails_on_is_missing_alone(wrong: Any, reason: str) -> None:
    class Wrong(Plain):
        def score(self, batch: Sequence[Sample]) -> Any:
            scores = super().score(batch)
            return wrong(batch) if "bad" in [sample.prompt for sample in batch] else scores

    client = InprocClient(Wrong(), device="cpu")
    batch = client.submit(samples(6, {1: "bad"})).result()
    np.testing.assert_array_equal(batch.scores["ordered"], np.array([0, np.nan, 2, 3, 4, 5], np.float32))
    assert batch.reasons == [None, reason, None, None, None, None]
    client.close()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        JudgeRefusedError("the server answered 401"),
        RewardUnavailableError("nobody answers"),
    ],
)
def test_what_concerns_more_than_an_image_is_raised(error: Exception) -> None:
    class Lost(Plain):
        def score(self, batch: Sequence[Sample]) -> Any:
            raise error

    client = InprocClient(Lost(), device="cpu")
    with pytest.raises(type(error), match=str(error)):
        client.submit(samples(3)).result()
    client.close()


class Hanging(Plain):
    """Hangs on the prompt "hang" until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Event()

    def score(self, batch: Sequence[Sample]) -> Any:
        if "hang" in [sample.prompt for sample in batch]:
            assert self.let.wait(60)
            return [{"ordered": 99.0}] * len(batch)
        return super().score(batch)


def test_a_reward_that_hangs_is_given_up_and_waited_for() -> None:
    """What it scored before counts; what it says later does not; until then it is unavailable."""
    reward = Hanging()
    client = InprocClient(reward, device="cpu", deadline_seconds=0.3)
    client.wait_ready(10)
    began = time.monotonic()
    hangs, waits = client.submit(samples(10, {5: "hang"})), client.submit(samples(2))
    batch = hangs.result(10)
    np.testing.assert_array_equal(batch.scores["ordered"], np.array([0, 1, 2, 3, *[np.nan] * 6], np.float32))
    assert batch.reasons[4] == "deadline: reward ordered gave no score within reward.ordered.deadline_seconds=0.3"
    with pytest.raises(
        RewardUnavailableError, match=r"ordered is still at work.*reward\.ordered\.deadline_seconds=0\.3"
    ):
        waits.result(10)
    with pytest.raises(RewardUnavailableError, match="still at work"):
        client.wait_ready(0.1)
    assert 0.3 <= time.monotonic() - began < 8
    reward.let.set()
    client.wait_ready(10)
    assert client.submit(samples(2)).result(10).scores["ordered"].tolist() == [0, 1]
    assert np.isnan(batch.scores["ordered"][4:]).all()
    assert reward.batches == [["0", "1", "2", "3"], ["0", "1"]]  # nothing more of what was given up
    client.close()
    assert reward.closed


def test_waiting_for_its_turn_is_no_hanging() -> None:
    client = InprocClient(Plain(seconds=0.2), device="cpu", deadline_seconds=0.6)
    futures = [client.submit(samples(4)) for _ in range(6)]
    assert all(future.result(20).reasons == [None] * 4 for future in futures)
    client.close()


def test_a_reward_that_hangs_does_not_keep_its_client_from_closing() -> None:
    client = InprocClient(reward := Hanging(), device="cpu", deadline_seconds=0.2)
    hangs = client.submit(samples(1, {0: "hang"}))
    assert hangs.result(10).reasons[0]
    waits = client.submit(samples(1))
    began = time.monotonic()
    client.close()
    assert time.monotonic() - began < 5
    assert waits.cancelled()
    assert not reward.closed
    reward.let.set()


def test_a_process_with_a_hanging_reward_ends() -> None:
    code = (
        "import numpy as np; from rewards.client.inproc import InprocClient; from rewards.contract import Sample;"
        "from tests.serving.ordered import Ordered; c = InprocClient(Ordered(), device='cpu', deadline_seconds=0.2);"
        "print(c.submit([Sample('a', 'hang', np.zeros((16, 16, 3), np.uint8))]).result().reasons); c.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=40, check=False
    )
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0)
    assert "reward.ordered.deadline_seconds=0.2" in done.stdout


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_a_deadline_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="deadline_seconds"):
        InprocClient(Plain(), device="cpu", deadline_seconds=seconds)


def test_a_reward_that_cannot_be_loaded_says_so_everywhere() -> None:
    client = InprocClient(Plain(broken=True), device="cpu")
    for ask in (
        lambda: client.wait_ready(5),
        lambda: client.fingerprint,
        lambda: client.submit(samples(1)).result(),
    ):
        with pytest.raises(RuntimeError, match="the weights are damaged"):
            ask()
    client.close()


def test_waiting_for_a_load_ends() -> None:
    client = InprocClient(Plain(load_seconds=0.6), device="cpu")
    with pytest.raises(RewardUnavailableError, match="not loaded"):
        client.wait_ready(0.1)
    client.wait_ready(5)
    client.close()


def test_closing_cancels_what_was_not_begun() -> None:
    client = InprocClient(Plain(seconds=0.3), device="cpu")
    first, second = client.submit(samples(1)), client.submit(samples(1))
    time.sleep(0.1)
    client.close()
    assert first.result().reasons == [None]
    assert second.cancelled()


def test_groups_stay_whole_where_scores_compare_their_images() -> None:
    """A group that the reward refuses is missing as a whole, and the other groups are not."""

    class Comparing(Plain):
        info = replace(INFO, groupwise=True)

        def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
            self.batches.append([sample.id for sample in batch])
            if any(sample.prompt == "refuse" for sample in batch):
                raise ItemError("no")
            return [{"ordered": float(sum(other.group == sample.group for other in batch))} for sample in batch]

    reward = Comparing()
    client = InprocClient(reward, device="cpu")
    batch = client.submit(samples(8, {4: "refuse"}, groups="aabbbaba")).result()
    # a: 0 1 5 7, b: 2 3 4 6
    assert reward.batches == [["0", "1", "5", "7"], ["2", "3", "4", "6"]]
    assert [n for n, reason in enumerate(batch.reasons) if reason] == [2, 3, 4, 6]
    assert batch.scores["ordered"][[0, 1, 5, 7]].tolist() == [4, 4, 4, 4]
    client.close()


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, [4, 4, 1]),
        ({"groupwise": True}, [5, 4]),  # a group larger than a batch is a batch
        ({"same_size": True}, [2, 4, 3]),
    ],
)
def test_batches_are_cut_as_the_reward_wants_them(changes: dict[str, Any], sizes: list[int]) -> None:
    info: RewardInfo = replace(INFO, **changes)
    batch = [
        Sample(str(n), "", np.zeros((16 if n < 2 else 32, 16, 3), np.uint8), "first" if n < 5 else "second")
        for n in range(9)
    ]
    packed = pack(batch, info, most=4)
    assert [len(part) for part in packed] == sizes
    assert [sample for part in packed for sample in part] == batch
    assert [sample for unit in units(batch, info) for sample in unit] == batch


def test_batches_are_halved_where_memory_is_short() -> None:
    client = InprocClient(Greedy(), device="cpu")
    assert client.submit(samples(16)).result().scores["ordered"].tolist() == [*range(16)]
    client.close()


def test_an_image_too_large_for_the_memory_fails_alone() -> None:
    client = InprocClient(Ordered(memory=0), device="cpu")
    batch = client.submit(samples(3)).result()
    assert np.isnan(batch.scores["ordered"]).all()
    assert batch.reasons == ["out_of_memory: CUDA error: out of memory"] * 3
    client.close()
