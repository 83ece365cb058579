"""One request to a reward server: what it answered, or which class of failure it is."""

import asyncio
import io
import math
from collections.abc import Mapping

import aiohttp
import msgspec

from rewards.client.batch import RewardRefusedError, RewardUnavailableError

_REMEDIES = {
    401: "give the token of that server",
    404: "the address does not belong to a reward server",
    413: "lower chunk_bytes or raise body_bytes of the server",
    415: "client and server differ in version, or the server cannot read compressed requests",
}


class FaultError(RewardUnavailableError):
    """A server did not do its work; another may."""


class BusyError(RewardUnavailableError):
    """A server asks to come back.

    Args:
        seconds: when.
        serving: whether it scores for others meanwhile.
    """

    def __init__(self, message: str, *, seconds: float, serving: bool) -> None:
        super().__init__(message)
        self.seconds, self.serving = seconds, serving


class Transport:
    """Connections to servers. To be made and used on one event loop.

    Args:
        token: shown to the servers, if any.
        connect_seconds: longest time for a connection.
    """

    def __init__(self, *, token: str | None, connect_seconds: float) -> None:
        self._connect_seconds = connect_seconds
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_seconds),
            connector=aiohttp.TCPConnector(limit=0),
            trust_env=False,  # a proxy for the outside world knows nothing of servers in the cluster
            auto_decompress=False,  # answers are small; one that unfolds is no answer
        )

    async def close(self) -> None:
        await self._session.close()

    async def get(self, url: str, *, seconds: float, most: int) -> bytes:
        """Content of at most so many bytes; see `post` for what is raised."""
        return await self._request("GET", url, None, {}, seconds, most)

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], *, seconds: float, most: int) -> bytes:
        """Content of at most so many bytes that a server answered with 200.

        Raises:
            FaultError: no complete answer within so many seconds, or 408 or 5xx.
            BusyError: 429 or 503.
            RewardRefusedError: any other status; with the reason of the server and a remedy.
        """
        return await self._request("POST", url, body, headers, seconds, most)

    async def _request(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], seconds: float, most: int
    ) -> bytes:
        # A BytesIO is sent piece by piece, so that other requests move meanwhile. With expect100 the server sees the
        # head first: a refusal arrives before megabytes have left, and is not lost among them.
        data = None if body is None else io.BytesIO(body)
        try:
            async with (
                asyncio.timeout(seconds),
                self._session.request(
                    method, url, data=data, headers=headers, expect100=body is not None, allow_redirects=False
                ) as answer,
            ):
                content = bytearray()
                async for piece in answer.content.iter_any():
                    content += piece
                    if len(content) > most:
                        raise FaultError(f"{url}: the answer is longer than {most} bytes")
                if answer.status != 200:
                    # A server that refused early still awaits the body: the next request on this connection would
                    # hang. aiohttp closes it by itself since 3.14.2 only.
                    answer.close()
        except aiohttp.ConnectionTimeoutError as error:
            raise FaultError(f"{url}: no connection within {self._connect_seconds:.1f} s") from error
        except TimeoutError as error:
            raise FaultError(f"{url}: no answer within {seconds:.1f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise FaultError(f"{url}: {type(error).__name__}: {error}"[:300]) from error
        _check_status(url, answer.status, bytes(content), answer.headers.get("Retry-After", "1"))
        return bytes(content)


def _check_status(url: str, status: int, content: bytes, retry_after: str) -> None:
    if status == 200:
        return
    said = f"{url} answered {status}: {_message(content)}"
    if status in (429, 503):
        raise BusyError(said, seconds=_seconds(retry_after), serving=status == 429)
    if status == 408 or status >= 500:
        raise FaultError(said)
    remedy = _REMEDIES.get(status)
    raise RewardRefusedError(f"{said}; {remedy}" if remedy else said)


def _seconds(retry_after: str) -> float:
    try:
        seconds = float(retry_after)
    except ValueError:  # a date, which no server of ours sends
        return 1.0
    return min(max(seconds, 0.05), 30.0) if math.isfinite(seconds) else 1.0


def _message(content: bytes) -> str:
    """The text of the server, if it is one of ours."""
    try:
        return str(msgspec.json.decode(content)["error"]["message"])[:300]
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError):
        return "(no reason given)"
