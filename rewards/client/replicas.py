"""Which of several servers to ask next: the least busy one that works."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_LONGEST_COOL_SECONDS = 30.0


@dataclass(eq=False)
class Replica:
    """One server as this client sees it.

    Attributes:
        serving: whether its last exchange was an answer.
        outstanding: requests of this client that it is working on.
        faults: in a row.
        ejections: in a row.
        open_at: of time.monotonic(); nobody asks it before.
    """

    url: str
    serving: bool = False
    outstanding: int = 0
    faults: int = 0
    ejections: int = 0
    open_at: float = 0.0


class Replicas:
    """Servers of one reward. All methods run on one event loop.

    Args:
        urls: distinct.
        in_flight: most requests at a replica at once.
        faults: so many in a row put a replica aside; the first request after that is alone and decides.
        cool_seconds: how long, at first; doubled while it keeps failing, up to 30.
    """

    def __init__(self, urls: Sequence[str], *, in_flight: int, faults: int, cool_seconds: float) -> None:
        self.all = tuple(Replica(url) for url in urls)
        self.ejections = 0
        self._in_flight, self._faults, self._cool_seconds = in_flight, faults, cool_seconds
        self._changed = asyncio.Event()

    @property
    def serving(self) -> bool:
        """Whether any replica answered the last time it was asked."""
        return any(replica.serving for replica in self.all)

    async def take(self, tried: Counter[Replica], *, without: Sequence[Replica] = ()) -> Replica:
        """Wait for a replica with room: of those asked least often about this chunk, the least busy.

        Args:
            tried: how often each was asked about this chunk.
            without: not to be taken while any other can be.
        """
        while True:
            now = time.monotonic()
            others = self.others(without)
            free = [replica for replica in others or self.all if self._has_room(replica, now)]
            if free:
                replica = min(free, key=lambda r: (tried[r], r.outstanding))
                tried[replica] += 1
                return replica
            self._changed.clear()
            later = min((r.open_at - now for r in self.all if r.open_at > now), default=None)
            with suppress(TimeoutError):
                async with asyncio.timeout(later):
                    await self._changed.wait()

    def others(self, without: Sequence[Replica]) -> list[Replica]:
        """Those that can be asked now, or as soon as they have room, and are not among these."""
        now = time.monotonic()
        return [replica for replica in self.all if replica.open_at <= now and replica not in without]

    @contextmanager
    def occupied(self, replica: Replica) -> Iterator[None]:
        """Counts a request at the replica while it runs."""
        replica.outstanding += 1
        try:
            yield
        finally:
            replica.outstanding -= 1
            self._changed.set()

    def answered(self, replica: Replica) -> None:
        """It works: every earlier fault is forgotten."""
        replica.serving, replica.faults, replica.ejections, replica.open_at = True, 0, 0, 0.0
        self._changed.set()

    def failed(self, replica: Replica, asked_at: float) -> float:
        """It did not answer, or not with an answer. Returns for how many seconds it is put aside, 0 if it is not.

        Args:
            asked_at: of time.monotonic(). Requests that were under way when it was put aside count once together.
        """
        replica.serving = False
        if asked_at < replica.open_at:
            return 0.0
        replica.faults += 1
        if replica.faults < self._faults:
            return 0.0
        cool = min(_LONGEST_COOL_SECONDS, self._cool_seconds * 2.0 ** min(replica.ejections, 30))
        replica.ejections += 1
        replica.open_at = time.monotonic() + cool
        self.ejections += 1
        return cool

    def _has_room(self, replica: Replica, now: float) -> bool:
        return replica.open_at <= now and replica.outstanding < (1 if replica.ejections else self._in_flight)
