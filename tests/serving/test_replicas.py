"""Choice among replicas, on a clock of the test."""

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest

from rewards.client import replicas as module
from rewards.client.replicas import Replica, Replicas


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    yield clock


def choose(pool: Replicas, tried: Counter[Replica] | None = None, without: tuple[Replica, ...] = ()) -> Replica | None:
    """The replica taken; None if one would have to wait."""

    pool._changed = asyncio.Event()  # each call has an event loop of its own

    async def take() -> Replica | None:
        try:
            return await asyncio.wait_for(pool.take(tried or Counter(), without=without), 0.01)
        except TimeoutError:
            return None

    return asyncio.run(take())


def make(count: int) -> tuple[Replicas, tuple[Replica, ...]]:
    pool = Replicas([f"http://{n}" for n in range(count)], in_flight=2, faults=2, cool_seconds=1.0)
    return pool, pool.all


def test_the_least_busy_is_asked_and_none_above_its_room(clock: Clock) -> None:
    pool, (a, b) = make(2)
    with pool.occupied(a):
        assert choose(pool) is b
        with pool.occupied(b), pool.occupied(b):
            assert choose(pool) is a
            with pool.occupied(a):
                assert choose(pool) is None
    assert (a.outstanding, b.outstanding) == (0, 0)


def test_one_that_was_not_asked_about_the_chunk_comes_first(clock: Clock) -> None:
    pool, (a, b) = make(2)
    with pool.occupied(b):
        assert choose(pool, Counter({a: 1})) is b
    assert choose(pool, without=(a,)) is b
    with pool.occupied(b), pool.occupied(b):
        assert choose(pool, without=(a,)) is None  # b works: wait for it
    b.open_at = clock.now + 1
    assert choose(pool, without=(a,)) is a  # b does not


def test_faults_in_a_row_put_a_replica_aside_for_ever_longer_times(clock: Clock) -> None:
    pool, (a,) = make(1)
    pool.failed(a, clock.now)
    pool.answered(a)
    pool.failed(a, clock.now)
    assert choose(pool) is a  # not two in a row
    pool.failed(a, clock.now)
    for seconds in (1, 2, 4, 8, 16, 30, 30):
        assert choose(pool) is None
        clock.now += seconds - 0.1
        assert choose(pool) is None
        clock.now += 0.2
        assert choose(pool) is a
        with pool.occupied(a):
            assert choose(pool) is None  # the first request after that is alone
        pool.failed(a, clock.now)
    assert pool.ejections == 8
    clock.now += 31
    pool.answered(a)
    with pool.occupied(a):
        assert choose(pool) is a  # it has proved itself
    pool.failed(a, clock.now)
    pool.failed(a, clock.now)
    clock.now += 1.1
    assert choose(pool) is a  # from the start


def test_a_replica_can_stay_away_for_days(clock: Clock) -> None:
    pool, (a,) = make(1)
    for _ in range(5000):
        pool.failed(a, clock.now)
        clock.now += 31
    assert a.open_at <= clock.now


def test_requests_that_were_under_way_count_once(clock: Clock) -> None:
    pool, (a,) = make(1)
    for _ in range(6):
        pool.failed(a, clock.now - 0.5)
    assert (pool.ejections, a.open_at) == (1, clock.now + 1)


def test_serving_follows_the_last_exchange(clock: Clock) -> None:
    pool, (a, _) = make(2)
    assert not pool.serving
    pool.answered(a)
    assert pool.serving
    pool.failed(a, clock.now)
    assert not pool.serving
