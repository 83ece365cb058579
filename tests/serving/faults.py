"""`python -m rewards.serve` with faults on demand: an ASGI layer around the real application.

``POST /fault`` says what to do to requests for scores from then on; see the methods of FaultLayer for the kinds. Until
then it is what the variable REWARD_FAULT says.
"""

import asyncio
import json
import os
import random
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from rewards import serve
from rewards.server.app import RewardApp

Message = dict[str, Any]


class FaultLayer:
    """Passes requests on, or spoils them."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._fault: dict[str, Any] = json.loads(os.environ.get("REWARD_FAULT", '{"kind": ""}'))
        self._seen = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        path = scope.get("path")
        if path == "/fault":
            await self._order(receive, send)
        elif path == "/v1/score" and self._strikes():
            fault = random.choice(ANY) if self._fault["kind"] == "any" else self._fault
            await getattr(self, f"_{fault['kind']}")(fault, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _order(self, receive: Any, send: Any) -> None:
        self._fault = json.loads((await receive())["body"])
        seen, self._seen = self._seen, 0
        await _answer(send, 200, str(seen).encode())

    def _strikes(self) -> bool:
        self._seen += 1
        if not self._fault["kind"] or self._fault["times"] <= 0 or random.random() >= self._fault["share"]:
            return False
        self._fault["times"] -= 1
        return True

    async def _status(self, fault: Message, scope: Any, receive: Any, send: Any) -> None:
        """Answer with this status, and these headers."""
        body = json.dumps({"error": {"code": "fault", "message": "ordered by the test"}}).encode()
        await _answer(send, fault["status"], body, fault.get("headers", {}))

    async def _slow(self, fault: Message, scope: Any, receive: Any, send: Any) -> None:
        """Work, but later."""
        await asyncio.sleep(fault["seconds"])
        await self._app(scope, receive, send)

    async def _upload_reset(self, fault: Message, scope: Any, receive: Any, send: Any) -> None:
        """Hang up after the first bytes of the request."""
        await receive()
        send.__self__.transport.abort()

    async def _answer_reset(self, fault: Message, scope: Any, receive: Any, send: Any) -> None:
        """Hang up in the middle of the answer."""
        await _read(receive)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100000")]})
        await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
        await asyncio.sleep(0.05)
        send.__self__.transport.abort()

    async def _garbage(self, fault: Message, scope: Any, receive: Any, send: Any) -> None:
        """A page instead of scores, as a proxy in between may send."""
        await _read(receive)
        await _answer(send, 200, b"<html>welcome</html>")

    async def _crash(self, fault: Message, scope: Any, receive: Any, send: Any) -> None:
        """Die."""
        os._exit(9)

    async def _edit(self, fault: Message, scope: Any, receive: Any, send: Any) -> None:
        """Change the real answer by one of EDITS."""
        started: Message = {}

        async def edited(message: Message) -> None:
            if message["type"] == "http.response.start":
                started.update(message)
                return
            answer = msgspec.msgpack.decode(message["body"])
            EDITS[fault["edit"]](answer)
            await _answer(send, started["status"], msgspec.msgpack.encode(answer))

        await self._app(scope, receive, edited)


def _each_score(value: Any) -> Callable[[Message], None]:
    def change(answer: Message) -> None:
        answer["results"][0]["scores"] = {"ordered": value}

    return change


_FIRST: Message = {}


def _stale(answer: Message) -> None:
    """The first answer that it was asked to spoil, once more, as a cache in between may send it."""
    _FIRST.update(_FIRST or answer)
    answer.update(_FIRST)


EDITS: dict[str, Callable[[Message], Any]] = {
    "shuffle": lambda answer: random.shuffle(answer["results"]),
    "drop": lambda answer: answer["results"].pop(),
    "repeat": lambda answer: answer["results"].append(answer["results"][0]),
    "other id": lambda answer: answer["results"][0].update(id="other"),
    "stale": _stale,
    "string": _each_score("high"),
    "nan": _each_score(float("nan")),
    "infinite": _each_score(float("inf")),
    "too large for float32": _each_score(1e300),
    "no metric": lambda answer: answer["results"][0].update(scores={"other": 1.0}),
    "nothing": lambda answer: answer["results"][0].update(scores=None),
    "both": lambda answer: answer["results"][0].update(error={"code": "bad_image", "message": ""}),
    "version": lambda answer: answer.update(v=2),
    "huge": lambda answer: answer.update(new=bytes(2_000_000)),
    "more fields": lambda answer: (answer.update(new=1), answer["results"][0].update(new={"a": []})),
}

ANY: list[Message] = [
    {"kind": "status", "status": 500},
    {"kind": "status", "status": 429, "headers": {"Retry-After": "0.2"}},
    {"kind": "status", "status": 503, "headers": {"Retry-After": "0.2"}},
    {"kind": "slow", "seconds": 1.0},
    {"kind": "upload_reset"},
    {"kind": "answer_reset"},
    {"kind": "garbage"},
    {"kind": "edit", "edit": "shuffle"},
    {"kind": "edit", "edit": "drop"},
    {"kind": "edit", "edit": "other id"},
]


async def _read(receive: Any) -> None:
    while (await receive()).get("more_body"):
        pass


async def _answer(send: Any, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    pairs = {"content-length": str(len(body))} | (headers or {})
    raw = [(name.encode(), text.encode()) for name, text in pairs.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    real = RewardApp.asgi
    RewardApp.asgi = lambda app: FaultLayer(real(app))  # type: ignore[assignment, method-assign, return-value]
    sys.exit(serve.main())
