"""Stop cleanly on Ctrl-C and SIGTERM: finish the iteration, save, exit."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_REPEAT_SECONDS = 3.0


class StopRequest:
    """Whether this process was asked to stop. A second signal some seconds later stops at once.

    One wish often arrives twice: a job manager signals every process, and the launcher passes its own on as well.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM set `requested` instead of ending the process."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        self._previous = previous
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._first = True, now
        elif now - self._first > _REPEAT_SECONDS:
            signal.signal(number, self._previous[signal.Signals(number)])
            signal.raise_signal(number)
