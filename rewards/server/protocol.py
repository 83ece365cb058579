"""HTTP/1.1 with an end to what uvicorn bears for ever: a head that does not come, a body that nobody wants."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# After an answer the rest of a refused body is still read, so that a client that writes before it reads finds the
# answer and no reset; but not for long.
_LINGER_SECONDS = 5.0
_LINGER_BYTES = 8 * 2**20


class Impatient(H11Protocol):
    """Hangs up on clients; `impatient` says when."""

    head_seconds: float
    most_connections: int
    _hang_up: asyncio.TimerHandle | None = None
    _linger: asyncio.TimerHandle | None = None
    _unwanted = 0  # bytes

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            transport.abort()
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        if self._linger is not None:
            self._unwanted += len(data)
            if self._unwanted > _LINGER_BYTES:
                self.transport.abort()
                return
        super().data_received(data)
        if self.conn.their_state is not h11.SEND_BODY:
            self._stop_lingering()
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._unwanted = 0
            self._linger = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._stop_lingering()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._hang_up is None and not self.transport.is_closing():
            self._hang_up = self.loop.call_later(self.head_seconds, self.transport.close)

    def _forget(self) -> None:
        if self._hang_up is not None:
            self._hang_up.cancel()
            self._hang_up = None

    def _stop_lingering(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None


def impatient(head_seconds: float, connections: int) -> type[Impatient]:
    """A protocol for uvicorn.

    Args:
        head_seconds: a whole head of a request must come in so many.
        connections: more at once are not taken.
    """
    return type("Protocol", (Impatient,), {"head_seconds": head_seconds, "most_connections": connections})
