"""The HTTP side of a reward server (ASGI).

Early refusals never close the connection by header: a client that is still writing would see a reset instead of the
answer, and would take a wrong token for a lost server.

Where there is a token, ``/metrics`` asks for it too, also on the loopback: other users of the machine are there as
well. ``/healthz`` and ``/readyz`` ask for none and tell nothing but their status.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rewards.contract import ItemError, Reward, Sample
from rewards.server.batcher import AWAY, LATE, Batcher, Outcome
from rewards.server.compression import ENCODINGS, unfold
from rewards.server.images import decode
from rewards.server.limits import Limits
from rewards.server.metrics import Metrics
from rewards.server.tokens import Tokens
from rewards.wire import CONTENT_TYPE, Failure, Info, ScoreRequest, ScoreResponse, WireItem, WireResult

_log = logging.getLogger(__name__)


class RefusalError(Exception):
    """A request that gets no scores.

    Args:
        status: HTTP status.
        code: word for programs.
        message: for people; says nothing about the inside of the server.
        retry_after: seconds, where trying again later makes sense.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


class _Share:
    """The bytes that one request holds of the budget.

    Raises:
        RefusalError: they are not to be had now.
    """

    def __init__(self, app: "RewardApp", length: int) -> None:
        self._app, self.length = app, 0
        self.grow(length)

    def grow(self, length: int) -> None:
        self._app.hold(length)
        self.length += length

    def release(self) -> None:
        self._app.hold(-self.length)
        self.length = 0


class RewardApp:
    """Routes of one server.

    Args:
        reward: not loaded yet; the app loads it when it starts.
        device: passed to the reward.
        tokens: what clients must show; None lets everybody in.
        limits: what is accepted.

    Raises:
        ValueError: the reward compares the images of a group, which a batch of many clients would tear apart.
    """

    def __init__(self, reward: Reward, *, device: str, tokens: Tokens | None, limits: Limits) -> None:
        if reward.info.groupwise:
            raise ValueError(
                f"{reward.info.name} compares the images of a group: it runs in the process of the trainer"
            )
        self._reward, self._tokens, self._limits = reward, tokens, limits
        self._metrics = Metrics()
        self._batcher = Batcher(reward, device=device, limits=limits, metrics=self._metrics)
        self._held_bytes = 0
        self._decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")
        self._request_decoder = msgspec.msgpack.Decoder(ScoreRequest)
        self._loading: asyncio.Task[None] | None = None

    def asgi(self) -> Starlette:
        """The application to serve."""
        routes = [
            Route("/healthz", self._health),
            Route("/readyz", self._readiness),
            Route("/v1/info", self._counted(self._info)),
            Route("/v1/score", self._counted(self._score), methods=["POST"]),
            Route("/metrics", self._counted(self._show_metrics)),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._loading = asyncio.create_task(self._batcher.start())
        yield
        self._loading.cancel()
        await asyncio.gather(self._loading, return_exceptions=True)
        await self._batcher.stop()
        self._decoders.shutdown()

    def _counted(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def counted(request: Request) -> Response:
            try:
                self._authorise(request)
                response = await handler(request)
            except RefusalError as refusal:
                headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
                content = {"error": {"code": refusal.code, "message": str(refusal)}}
                response = JSONResponse(content, refusal.status, headers)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it
            self._metrics.requests.labels(response.status_code).inc()
            return response

        return counted

    async def _health(self, request: Request) -> Response:
        return PlainTextResponse("ok")

    async def _readiness(self, request: Request) -> Response:
        if self._batcher.ready and not self._batcher.overdue:
            return PlainTextResponse("ready")
        return PlainTextResponse("not ready", 503, {"Retry-After": "1"})

    async def _info(self, request: Request) -> Response:
        self._require_ready()
        info = self._reward.info
        return JSONResponse(
            msgspec.to_builtins(
                Info(
                    api=[1],
                    name=info.name,
                    metrics=list(info.metrics),
                    value_range=info.value_range,
                    max_batch=info.max_batch,
                    tolerance=info.tolerance,
                    source=info.source,
                    licence=info.licence,
                    example_prompts=list(info.example_prompts),
                    fingerprint=self._batcher.fingerprint,
                    formats=["raw", "png", "webp", "jpeg"],
                    limits=self._limits.public(),
                )
            )
        )

    async def _show_metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _score(self, request: Request) -> Response:
        self._require_ready()
        deadline = time.monotonic() + self._seconds_left(request)
        length = self._body_length(request)
        compressed = "content-encoding" in request.headers
        share = _Share(self, self._limits.body_bytes if compressed else length)
        samples: list[Sample] = []
        try:
            body = await self._body(request, length)
            if compressed:
                body = await asyncio.get_running_loop().run_in_executor(self._decoders, self._unfold, body)
            items = self._items(body)
            share.grow(self._unpacked(items, share.length))
            results = await self._unless_abandoned(request, self._results(items, deadline, samples))
        finally:
            # The images of a request that was given up may still be in the batch at hand, and in memory.
            self._batcher.when_let_go(samples, share.release)
        response = ScoreResponse(v=1, fingerprint=self._batcher.fingerprint, results=results)
        return Response(msgspec.msgpack.encode(response), media_type=CONTENT_TYPE)

    def hold(self, length: int) -> None:
        """Count bytes of a request, negative ones when it is over; refuse those above the budget."""
        if length > 0 and self._held_bytes + length > self._limits.queued_bytes:
            raise RefusalError(429, "overloaded", "too many images are waiting; try again later", retry_after=1.0)
        self._held_bytes += length
        self._metrics.queued_bytes.set(self._held_bytes)

    def _authorise(self, request: Request) -> None:
        if self._tokens is None:
            return
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not self._tokens.accept(shown):
            raise RefusalError(401, "unauthorised", "a valid token is needed: Authorization: Bearer <token>")

    def _require_ready(self) -> None:
        if not self._batcher.ready:
            raise RefusalError(503, "loading", "the reward is not loaded", retry_after=1.0)

    def _seconds_left(self, request: Request) -> float:
        text = request.headers.get("x-deadline-ms")
        if text is None:
            return self._limits.deadline_seconds
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise RefusalError(400, "malformed", "X-Deadline-Ms must be a whole number of milliseconds")
        return min(int(text) / 1000, self._limits.deadline_seconds)

    def _body_length(self, request: Request) -> int:
        encoding = request.headers.get("content-encoding")
        if request.headers.get("content-type") != CONTENT_TYPE or encoding not in (None, *ENCODINGS):
            taken = " or ".join(("plain", *ENCODINGS))
            raise RefusalError(415, "unsupported_type", f"the body must be {CONTENT_TYPE}, {taken}")
        text = request.headers.get("content-length")
        if text is None:
            raise RefusalError(411, "length_required", "the request must declare Content-Length")
        if not (text.isascii() and text.isdigit()):
            raise RefusalError(400, "malformed", "Content-Length must be a whole number")
        length = int(text) if len(text) < 16 else self._limits.body_bytes + 1
        if length > self._limits.body_bytes:
            raise RefusalError(413, "too_large", f"a body has at most {self._limits.body_bytes} bytes")
        return length

    async def _body(self, request: Request, length: int) -> bytearray:
        body = bytearray(length)  # at once: one that grows takes an eighth more than it holds
        came = 0
        try:
            async with asyncio.timeout(self._limits.read_seconds):
                async for chunk in request.stream():
                    body[came : came + len(chunk)] = chunk
                    came += len(chunk)
                    if came > length:  # sent in chunks, which end whatever length was declared
                        break
        except TimeoutError as error:
            raise RefusalError(408, "too_slow", f"the body did not come in {self._limits.read_seconds} s") from error
        if came != length:
            raise RefusalError(400, "malformed", "the body is not as long as declared")
        return body

    def _unfold(self, body: bytearray) -> bytes:
        try:
            return unfold(body, self._limits.body_bytes)
        except OverflowError as error:
            raise RefusalError(
                413, "too_large", f"a body unfolds to more than {self._limits.body_bytes} bytes"
            ) from error
        except ValueError as error:
            raise RefusalError(400, "malformed", "the body is not zstd") from error

    def _items(self, body: bytes | bytearray) -> list[WireItem]:
        try:
            request = self._request_decoder.decode(body)
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
            raise RefusalError(400, "malformed", f"the body is not a request of version 1: {error}"[:300]) from error
        if len({item.id for item in request.items}) != len(request.items):
            raise RefusalError(400, "duplicate_id", "the ids of a request must differ")
        return request.items

    def _unpacked(self, items: list[WireItem], held: int) -> int:
        """Bytes of the pixels that the image files of a request unfold to. Raw images are part of its body."""
        pixels = sum(3 * item.image.w * item.image.h for item in items if item.image.fmt != "raw")
        if held + pixels > self._limits.queued_bytes:
            raise RefusalError(
                413, "too_large", f"the images of a request unfold to {pixels} bytes: send fewer at once"
            )
        return pixels

    async def _results(self, items: list[WireItem], deadline: float, samples: list[Sample]) -> list[WireResult]:
        """An outcome of every item, by the deadline.

        Args:
            samples: filled with those that are given to the batcher.

        Raises:
            RefusalError: the reward cannot score anything now.
        """
        loop = asyncio.get_running_loop()
        decoded: list[Sample | Failure] = [LATE] * len(items)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline - time.monotonic()):
                decoded = await asyncio.gather(*(loop.run_in_executor(self._decoders, _sample, item) for item in items))
        samples += [sample for sample in decoded if isinstance(sample, Sample)]
        outcomes = await self._batcher.score(samples, deadline) if samples else []
        if AWAY in outcomes:
            raise RefusalError(503, AWAY.code, AWAY.message, retry_after=1.0)
        scored = iter(outcomes)
        results = [
            _result(item.id, next(scored) if isinstance(sample, Sample) else sample)
            for item, sample in zip(items, decoded, strict=True)
        ]
        for result in results:
            self._metrics.images.labels(result.error.code if result.error else "scored").inc()
        return results

    async def _unless_abandoned(self, request: Request, work: Awaitable[list[WireResult]]) -> list[WireResult]:
        """The result of the work, which is cancelled when the client hangs up."""
        task = asyncio.ensure_future(work)
        watcher = asyncio.create_task(_hung_up(request))
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return task.result()
        finally:
            task.cancel()
            watcher.cancel()
            await asyncio.gather(task, watcher, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    """Returns when the client is gone. The body has been read, so the next message can only be that."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sample(item: WireItem) -> Sample | Failure:
    try:
        return Sample(item.id, item.prompt, decode(item.image), item.group, item.meta)
    except ItemError as error:
        return Failure("bad_image", str(error)[:200])


def _result(identity: str, outcome: Outcome) -> WireResult:
    if isinstance(outcome, Failure):
        return WireResult(identity, error=outcome)
    return WireResult(identity, scores=outcome)
