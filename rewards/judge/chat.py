"""One question to a server that speaks OpenAI's chat format: its answer, or which class of failure it is."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from rewards.contract import LostError

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

_ANSWER_BYTES = 2**20
_CONNECT_SECONDS = 5.0
_FATAL = {
    401: "it wants another key: set api_key_env or api_key_file",
    403: "the key does not allow this",
    404: "no such address or model: check base_url, which usually ends in /v1, and model",
}


class TransientError(RuntimeError):
    """No answer this time; the same question may get one later.

    Args:
        seconds: when, if the server said so.
    """

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


class QuestionRefusedError(RuntimeError):
    """The server does not take this question, and would not take it later."""


class JudgeRefusedError(LostError):
    """The server takes no question at all with these settings; the message names them."""


@dataclass(frozen=True)
class Connection:
    """How to reach a judge, and how long to wait for it.

    Attributes:
        base_url: of the server, as OpenAI's clients take it: ``http://host:port/v1``.
        model: name under which it serves the judge (``--served-model-name``).
        api_key_env: name of an environment variable that holds the key.
        api_key_file: file that holds the key; only its owner may be able to read it.
        max_tokens: longest answer. One that is cut off there has no score.
        concurrency: most questions at once.
        attempt_seconds: longest time for one try.
        deadline_seconds: longest time for a batch, retries included. Keep it below the time that whoever asks will
            wait, so that a reason arrives in place of nothing.
        startup_seconds: how long `load` waits for the server.
        attempts: most tries of a question.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    api_key_file: str | None = None
    max_tokens: int = 1024
    concurrency: int = 16
    attempt_seconds: float = 40.0
    deadline_seconds: float = 100.0
    startup_seconds: float = 60.0
    attempts: int = 4

    def __post_init__(self) -> None:
        if not _is_address(self.base_url):
            # It is not repeated: somebody may have put a key into it.
            raise ValueError("base_url: give http://host:port/v1, with neither a key nor a question mark in it")
        if not self.model:
            raise ValueError("model: give the name under which the server serves the judge")
        if self.api_key_env and self.api_key_file:
            raise ValueError("api_key_env and api_key_file: give one of them")
        for name in ("max_tokens", "concurrency", "attempt_seconds", "deadline_seconds", "startup_seconds", "attempts"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be > 0")

    def read_key(self) -> str | None:
        """The key, if there is one.

        Raises:
            JudgeRefusedError: it is not where the settings say.
        """
        if self.api_key_env:
            key = os.environ.get(self.api_key_env, "").strip()
            if not key:
                raise JudgeRefusedError(f"api_key_env={self.api_key_env}: this environment variable is not set")
            return key
        if self.api_key_file:
            path = Path(self.api_key_file).expanduser()
            if not path.is_file():
                raise JudgeRefusedError(f"api_key_file={path}: no such file")
            if path.stat().st_mode & 0o077:
                raise JudgeRefusedError(f"api_key_file={path}: others can read it; chmod 600 {path}")
            return path.read_text(encoding="utf-8").strip()
        return None


class Chat:
    """Questions to one server, on one event loop. An async context manager.

    Args:
        connection: where to, and for how long.
        key: shown to the server; appears in no message.
    """

    def __init__(self, connection: Connection, key: str | None) -> None:
        self._connection, self._key = connection, key
        self._base = connection.base_url.rstrip("/")
        self._last_failure = "no answer"

    async def __aenter__(self) -> Chat:
        import aiohttp

        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=aiohttp.ClientTimeout(total=self._connection.attempt_seconds, sock_connect=_CONNECT_SECONDS),
            connector=aiohttp.TCPConnector(limit=self._connection.concurrency),
            trust_env=False,  # a proxy for the outside world knows nothing of servers in the cluster
            auto_decompress=False,  # answers are small; one that unfolds is no answer
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def served_as(self) -> str:
        """What the server says about the model: its name and, where told, what it was loaded from.

        Waits for a server that is still starting.

        Raises:
            JudgeRefusedError: nobody answered in time, or the server takes no questions for this model.
        """
        seconds = self._connection.startup_seconds
        try:
            async with asyncio.timeout(seconds):
                listing = await self._asked("GET", "/models", None, dict)
        except TimeoutError as error:
            raise JudgeRefusedError(
                f"base_url: nobody answered there within {seconds:g} s ({self._last_failure})"
            ) from error
        entries = listing.get("data")
        models = {e.get("id"): e for e in entries if isinstance(e, Mapping)} if isinstance(entries, list) else {}
        name = self._connection.model
        if name not in models:
            known = ", ".join(str(model)[:60] for model in list(models)[:5]) or "none"
            raise JudgeRefusedError(f"model={name}: the server does not serve it (it serves {known})")
        return f"{name} from {models[name].get('root', name)}"

    async def answer(self, question: str, png: str) -> str:
        """What the judge says about a picture, greedily decoded.

        Args:
            question: text of the only message, behind the picture.
            png: the picture as a base64 PNG file.

        Raises:
            TransientError: none of the tries got an answer.
            QuestionRefusedError: the server does not take this question, or said nothing or not all.
            JudgeRefusedError: the server takes no question with these settings.
        """
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}
        body = {
            "model": self._connection.model,
            "messages": [{"role": "user", "content": [picture, {"type": "text", "text": question}]}],
            "temperature": 0,
            "max_tokens": self._connection.max_tokens,
        }
        return await self._asked("POST", "/chat/completions", json.dumps(body).encode(), _said)

    async def _asked(self, method: str, path: str, body: bytes | None, read: Callable[[Mapping[str, Any]], T]) -> T:
        """What `read` finds in the answer, after as many tries as it takes and may take."""
        import stamina

        # /models belongs to the start: how often it is tried is bounded by time alone.
        attempts = self._connection.attempts if body else None
        retries = stamina.retry_context(
            on=_pause, attempts=attempts, timeout=None, wait_initial=0.2, wait_max=5.0, wait_jitter=0.5
        )
        async for attempt in retries:
            with attempt:
                try:
                    return read(await self._once(method, path, body))
                except TransientError as error:
                    self._last_failure = str(error)
                    raise
        raise AssertionError  # the loop above ends by its return or by an exception

    async def _once(self, method: str, path: str, body: bytes | None) -> Mapping[str, Any]:
        import aiohttp

        headers = {"Content-Type": "application/json"} if body else {}
        try:
            async with self._session.request(
                method, self._base + path, data=body, headers=headers, allow_redirects=False
            ) as response:
                content = await _read(response)
        except TimeoutError as error:
            raise TransientError(f"no answer within {self._connection.attempt_seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise TransientError(f"no answer ({type(error).__name__})") from error
        _check_status(response.status, content, response.headers.get("Retry-After", ""))
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise TransientError("the answer is no JSON") from error
        if not isinstance(parsed, Mapping):
            raise TransientError("the answer is no JSON object")
        return parsed


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number or too large, half an IPv6 address
        return False
    return bool(known) and "@" not in url and not parts.query and not parts.fragment


async def _read(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for piece in response.content.iter_any():
        content += piece
        if len(content) > _ANSWER_BYTES:
            raise TransientError(f"the answer is longer than {_ANSWER_BYTES} bytes")
    return bytes(content)


def _check_status(status: int, content: bytes, retry_after: str) -> None:
    if status == 200:
        return
    if status in (408, 429) or status >= 500:
        raise TransientError(f"the server answered {status}", _seconds(retry_after))
    if status in _FATAL or status < 400:
        raise JudgeRefusedError(f"the server answered {status}: {_FATAL.get(status, 'base_url is not its address')}")
    raise QuestionRefusedError(f"the server answered {status}: {_message(content)}")


def _message(content: bytes) -> str:
    """What a server says about a refusal, short and printable."""
    try:
        parsed = json.loads(content)
        error = parsed.get("error", parsed)
        text = error.get("message", "") if isinstance(error, Mapping) else error
    except (ValueError, RecursionError, AttributeError):
        text = ""
    return "".join(letter if letter.isprintable() else " " for letter in str(text)[:120]) or "no reason given"


def _said(answer: Mapping[str, Any]) -> str:
    try:
        choice = answer["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError) as error:
        raise TransientError("the answer is not in OpenAI's chat format") from error
    if not isinstance(text, str) or not text.strip():
        raise QuestionRefusedError("the judge said nothing")
    if reason == "length":  # whatever number stands last may lack its end
        raise QuestionRefusedError("the answer was cut off at max_tokens")
    return text


def _seconds(retry_after: str) -> float | None:
    try:
        seconds = float(retry_after)
    except ValueError:  # none, or a date, which vLLM and SGLang do not send
        return None
    return min(max(seconds, 0.05), 30.0) if math.isfinite(seconds) else None


def _pause(error: Exception) -> bool | float:
    """Whether to try again; a number says after how many seconds."""
    if not isinstance(error, TransientError):
        return False
    return True if error.seconds is None else error.seconds * random.uniform(1.0, 1.5)
