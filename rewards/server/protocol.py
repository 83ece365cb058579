"""HTTP/1.1 with an end to waiting for the head of a request, which uvicorn by itself awaits for ever."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def impatient(head_seconds: float) -> type[H11Protocol]:
    """A protocol for uvicorn that hangs up on who does not send a whole head in so many seconds."""

    class Impatient(H11Protocol):
        _hang_up: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _watch_head(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._forget()
            elif self._hang_up is None and not self.transport.is_closing():
                self._hang_up = self.loop.call_later(head_seconds, self.transport.close)

        def _forget(self) -> None:
            if self._hang_up is not None:
                self._hang_up.cancel()
                self._hang_up = None

    return Impatient
