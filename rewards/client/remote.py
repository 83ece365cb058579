"""A reward behind one or several sockets.

Every wait has an end, every answer is checked, and a missing score stays missing: it never becomes a number. The
clock is time.monotonic() throughout, so that setting the time of the machine changes nothing.
"""

import asyncio
import itertools
import logging
import math
import random
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
import numpy as np
import stamina

from rewards.client.batch import (
    Outcome,
    RewardBatch,
    RewardRefusedError,
    RewardUnavailableError,
    check_samples,
    checked_score,
    columns,
    pack,
    reasons,
)
from rewards.client.replicas import Replica, Replicas
from rewards.client.transport import BusyError, FaultError, Transport
from rewards.contract import RewardInfo, Sample
from rewards.wire import (
    CONTENT_TYPE,
    MAX_PROMPT,
    MAX_SIDE,
    MIN_SIDE,
    Info,
    ScoreRequest,
    ScoreResponse,
    WireImage,
    WireItem,
)

T = TypeVar("T")

_log = logging.getLogger(__name__)
# A line per retry that does not say why would fill the log of the trainer. Retries are counted in the figures of a
# batch, and servers put aside are told by name.
logging.getLogger("stamina").setLevel(logging.ERROR)

_VERSION = 1
_PROBE_PAUSE_SECONDS = 0.25
_INFO_BYTES = 2**20  # longest answer about a server
_ANSWER_BYTES, _RESULT_BYTES = 2**16, 2**13  # longest answer with scores, and what each image adds
_ITEM_BYTES = 2**16  # room for a prompt and metadata in a request
_SERVER_SHARE = 0.9  # of an attempt: the server gives up first, so that its reason still arrives
_TOKEN = r"[!-~]+"  # regular expression
_FINAL = ("unsupported_item",)  # the reward said no: another replica would say the same


@dataclass(frozen=True)
class RemoteSettings:
    """How a client treats its servers.

    Attributes:
        deadline_seconds: longest time for one `submit`, retries included, from when it has its turn: while earlier ones
            are answered, it waits.
        attempt_seconds: longest time for one request, then another replica is asked; None is half the deadline.
        connect_seconds: longest time for a connection.
        chunk_images: most images of a request.
        chunk_bytes: most bytes of a request, as long as it holds more than one image.
        in_flight: requests of this client at a replica at once.
        hedge_seconds: after so long another replica is asked as well, and the first answer counts; 0 never asks.
        faults: so many in a row put a replica aside.
        cool_seconds: how long, at first; doubled while it keeps failing, up to 30.
        compress: send requests through zstd; pays on links below 1 Gbit/s only.
    """

    deadline_seconds: float = 120.0
    attempt_seconds: float | None = None
    connect_seconds: float = 5.0
    chunk_images: int = 8
    chunk_bytes: int = 13 * 2**20
    in_flight: int = 2
    hedge_seconds: float = 0.0
    faults: int = 2
    cool_seconds: float = 1.0
    compress: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None or name == "compress":
                continue
            least = ">= 0" if name in ("hedge_seconds", "cool_seconds") else "> 0"
            if not math.isfinite(value) or value < 0 or (value == 0 and least == "> 0"):
                raise ValueError(f"{name}={value}: must be {least} and finite")


class RemoteClient:
    """Scores by asking servers that all serve one reward with one set of weights.

    Args:
        urls: ``http://host:port`` of each server.
        token: what the servers ask for; None if they let everybody in.
        settings: None takes the default ones.

    Raises:
        ValueError: no address, one that is none, holds a password, or is given twice; a token that no header can carry.
    """

    def __init__(
        self, urls: Sequence[str], *, token: str | None = None, settings: RemoteSettings | None = None
    ) -> None:
        self._urls = [_checked_url(url) for url in urls]
        if not urls or len(set(self._urls)) != len(urls):
            raise ValueError(f"urls={self._urls}: give each server once, and at least one")
        if token is not None and not re.fullmatch(_TOKEN, token):
            raise ValueError("the token holds something else than visible ASCII characters")
        self._settings = settings or RemoteSettings()
        self._token = token
        self._identity: Info | None = None
        self._decode_info = msgspec.json.Decoder(Info).decode
        self._decode_answer = msgspec.msgpack.Decoder(ScoreResponse).decode
        self._compress = _compressor() if self._settings.compress else bytes
        self._closed = False
        self._answered_at = -math.inf  # of time.monotonic()
        self._requests = (f"{secrets.token_hex(4)}-{number}" for number in itertools.count())
        self._loop = asyncio.new_event_loop()
        # A daemon: a process that fails elsewhere must not be kept alive by its reward.
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-client", daemon=True)
        self._thread.start()
        self._transport, self._replicas = self._run(self._open()).result()

    @property
    def info(self) -> RewardInfo:
        known = self._known
        return RewardInfo(
            name=known.name,
            metrics=tuple(known.metrics),
            value_range=known.value_range,
            max_batch=known.max_batch,
            tolerance=known.tolerance,
            source=known.source,
            licence=known.licence,
            example_prompts=tuple(known.example_prompts),
        )

    @property
    def fingerprint(self) -> str:
        return self._known.fingerprint

    def wait_ready(self, seconds: float) -> None:
        self._run(self._contact(time.monotonic() + seconds)).result()

    def submit(self, samples: Sequence[Sample]) -> Future[RewardBatch]:
        check_samples(samples)
        deadline = time.monotonic() + self._settings.deadline_seconds
        return self._run(self._score(list(samples), deadline))

    def close(self) -> None:
        if self._closed:
            return
        self._run(self._end()).result()
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def _known(self) -> Info:
        if self._identity is None:
            raise RewardUnavailableError(f"no server of {', '.join(self._urls)} was reached yet")
        return self._identity

    def _run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._closed:
            work.close()
            raise RuntimeError("the client is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _open(self) -> tuple[Transport, Replicas]:
        """On the event loop, which both belong to."""
        own = self._settings
        transport = Transport(token=self._token, connect_seconds=own.connect_seconds)
        return transport, Replicas(
            self._urls, in_flight=own.in_flight, faults=own.faults, cool_seconds=own.cool_seconds
        )

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._transport.close()

    async def _contact(self, deadline: float) -> None:
        """Ask all servers who they are, until one answers."""
        while True:
            seconds = min(self._settings.connect_seconds, max(deadline - time.monotonic(), _PROBE_PAUSE_SECONDS))
            found = await asyncio.gather(*(self._probe(replica, seconds) for replica in self._replicas.all))
            if not all(found):
                return
            if time.monotonic() + _PROBE_PAUSE_SECONDS > deadline:
                raise RewardUnavailableError(f"no reward server is ready: {'; '.join(found)}")
            await asyncio.sleep(_PROBE_PAUSE_SECONDS)

    async def _probe(self, replica: Replica, seconds: float) -> str:
        """Get to know a server. Returns "", or what is wrong for now."""
        url, asked_at = f"{replica.url}/v1/info", time.monotonic()
        try:
            content = await self._transport.get(url, seconds=seconds, most=_INFO_BYTES)
            self._recognise(replica.url, self._decode_info(content))
        except BusyError as error:
            return str(error)
        except FaultError as error:
            self._replicas.failed(replica, asked_at)
            return str(error)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise RewardRefusedError(f"{url} is not a reward server of this version: {error}") from error
        self._replicas.answered(replica)
        return ""

    def _recognise(self, url: str, info: Info) -> None:
        if _VERSION not in info.api:
            raise RewardRefusedError(f"{url} speaks the versions {info.api}, this client version {_VERSION}")
        if self._identity is None:
            self._identity = info
        if (info.name, info.metrics) != (self._identity.name, self._identity.metrics):
            raise RewardRefusedError(
                f"{url} serves {info.name} {info.metrics}, others {self._identity.name} {self._identity.metrics}"
            )
        self._check_fingerprint(url, info.fingerprint)

    def _check_fingerprint(self, url: str, found: str) -> None:
        if found != self._known.fingerprint:
            raise RewardRefusedError(
                f"{url} scores with {found!r}, the first server known scored with {self._known.fingerprint!r}. Scores "
                "of different weights cannot be compared: give all servers the weights that the run began with"
            )

    async def _score(self, samples: list[Sample], deadline: float) -> RewardBatch:
        if self._identity is None:
            await self._contact(deadline)
        known = self._known
        job = _Job(deadline)
        job.outcomes |= {sample.id: f"unsupported_item: {flaw}" for sample in samples if (flaw := _flaw(sample))}
        sent = [sample for sample in samples if sample.id not in job.outcomes]
        chunks = pack(sent, self.info, most=self._chunk_images(sent))
        tasks = [asyncio.create_task(self._chunk(chunk, job)) for chunk in chunks]
        ejections = self._replicas.ejections
        try:
            await self._until_deadline(asyncio.gather(*tasks), job)
        except TimeoutError:
            unanswered = len(samples) - len(job.outcomes)
            # With servers that work, single images may be late. With none, the whole batch can be had again later.
            if unanswered and not (job.latencies and self._replicas.serving):
                raise RewardUnavailableError(
                    f"{unanswered} of {len(samples)} images have no score after deadline_seconds="
                    f"{self._settings.deadline_seconds:g}; {job.last_fault or 'no server answered'}"
                ) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        late = f"deadline: not scored within deadline_seconds={self._settings.deadline_seconds:g}; {job.last_fault}"
        ordered = [job.outcomes.get(sample.id, late) for sample in samples]
        stats = job.figures() | {"ejections": float(self._replicas.ejections - ejections)}
        return RewardBatch(columns(ordered, known.metrics), reasons(ordered), known.fingerprint, stats)

    async def _until_deadline(self, work: asyncio.Future[list[None]], job: "_Job") -> None:
        """Wait for the work; TimeoutError at the deadline, which does not pass while the job waits for its turn."""
        while not work.done():
            turn = job.deadline
            if not job.counts["requests"]:
                turn = max(turn, self._answered_at + self._settings.deadline_seconds)
            if time.monotonic() >= turn:
                raise TimeoutError
            await asyncio.wait({work}, timeout=turn - time.monotonic())
        work.result()

    def _chunk_images(self, samples: Sequence[Sample]) -> int:
        """Most images of a request, by our own settings and by what the server takes."""
        limits, own = self._known.limits, self._settings
        room = min(own.chunk_bytes, limits.get("body_bytes", math.inf))
        largest = max((sample.image.nbytes for sample in samples), default=1) + _ITEM_BYTES
        return max(1, int(min(own.chunk_images, limits.get("items", math.inf), room // largest)))

    async def _chunk(self, samples: list[Sample], job: "_Job") -> None:
        """Ask about a chunk until it is answered, and once more, elsewhere, about images that failed."""
        tried: Counter[Replica] = Counter()
        job.outcomes |= await self._persist(samples, job, tried)
        again = [sample for sample in samples if _may_change(job.outcomes[sample.id])]
        if again:
            job.counts["retries"] += 1
            job.outcomes |= await self._persist(again, job, tried, without=list(tried))

    async def _persist(
        self, samples: list[Sample], job: "_Job", tried: Counter[Replica], *, without: Sequence[Replica] = ()
    ) -> dict[str, Outcome]:
        # No bound but the deadline, which cancels this task.
        retries = stamina.retry_context(on=_pause, attempts=None, timeout=None, wait_max=5.0, wait_jitter=0.5)
        async for attempt in retries:
            with attempt:
                job.counts["retries"] += attempt.num > 1
                return await self._hedge(samples, job, tried, without)
        raise AssertionError  # the loop above ends by its return or by an exception

    async def _hedge(
        self, samples: list[Sample], job: "_Job", tried: Counter[Replica], without: Sequence[Replica]
    ) -> dict[str, Outcome]:
        """One attempt, or two overlapping ones at different replicas."""
        asked = list(without)
        patience = self._settings.hedge_seconds
        if not patience:
            return await self._attempt(samples, job, tried, asked)
        tasks = [asyncio.create_task(self._attempt(samples, job, tried, asked))]
        try:
            await asyncio.wait(tasks, timeout=patience)
            if not tasks[0].done() and len(asked) > len(without) and self._replicas.others(asked):
                job.counts["hedges"] += 1
                tasks.append(asyncio.create_task(self._attempt(samples, job, tried, asked)))
            for finished in asyncio.as_completed(tasks):
                try:
                    return await finished
                except (FaultError, BusyError):
                    if len(asked) - len(without) < len(tasks):  # the other one still waits for a replica
                        raise
            return tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _attempt(
        self, samples: list[Sample], job: "_Job", tried: Counter[Replica], asked: list[Replica]
    ) -> dict[str, Outcome]:
        """Ask one replica, and none of those asked already if another can be."""
        replica = await self._replicas.take(tried, without=asked)
        asked.append(replica)
        with self._replicas.occupied(replica):
            asked_at = time.monotonic()
            if not job.counts["requests"]:
                job.deadline = asked_at + self._settings.deadline_seconds
            job.counts["requests"] += 1
            try:
                outcomes = await self._ask(replica, samples, job.deadline - asked_at)
            except BusyError as error:
                replica.serving = error.serving
                job.last_fault = str(error)
                raise
            except FaultError as error:
                seconds = self._replicas.failed(replica, asked_at)
                if seconds:
                    _log.warning("reward server put aside for %.1f s: %s", seconds, error)
                job.last_fault = str(error)
                raise
            self._replicas.answered(replica)
            self._answered_at = time.monotonic()
            job.latencies.append(self._answered_at - asked_at)
            return outcomes

    async def _ask(self, replica: Replica, samples: list[Sample], left: float) -> dict[str, Outcome]:
        own = self._settings
        seconds = min(left, own.attempt_seconds or own.deadline_seconds / 2)
        url = f"{replica.url}/v1/score"
        headers = {"Content-Type": CONTENT_TYPE, "X-Deadline-Ms": str(max(1, int(1000 * _SERVER_SHARE * seconds)))}
        if own.compress:
            headers["Content-Encoding"] = "zstd"
        # Ids of samples come again in every iteration; these do not, so that no answer fits two requests.
        request = next(self._requests)
        asked = {f"{request}-{number}": sample for number, sample in enumerate(samples)}
        items = [_wire_item(identity, sample) for identity, sample in asked.items()]
        body = self._compress(msgspec.msgpack.encode(ScoreRequest(_VERSION, items)))
        most = _ANSWER_BYTES + _RESULT_BYTES * len(samples)
        content = await self._transport.post(url, body, headers, seconds=seconds, most=most)
        return self._outcomes(url, content, asked)

    def _outcomes(self, url: str, content: bytes, asked: Mapping[str, Sample]) -> dict[str, Outcome]:
        """The checked content of an answer, by id of the sample.

        Args:
            asked: id on the way -> sample.
        """
        try:
            answer = self._decode_answer(content)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise FaultError(f"{url}: the answer cannot be read: {error}") from error
        if answer.v != _VERSION:
            raise RewardRefusedError(f"{url} answered in version {answer.v}, this client speaks version {_VERSION}")
        self._check_fingerprint(url, answer.fingerprint)
        if sorted(result.id for result in answer.results) != sorted(asked):
            raise FaultError(f"{url}: the answer is not about the images asked about")
        if all(result.error is not None and result.error.code == "deadline" for result in answer.results):
            raise FaultError(f"{url}: no image was scored in time")
        outcomes: dict[str, Outcome] = {}
        for result in answer.results:
            if (result.scores is None) == (result.error is None):
                raise FaultError(f"{url}: an image has neither scores nor an error, or both")
            if result.scores is not None:
                try:
                    outcomes[asked[result.id].id] = checked_score(result.scores, self._known.metrics)
                except KeyError as error:
                    raise FaultError(f"{url}: the answer lacks the metric {error}") from error
            elif result.error is not None:
                outcomes[asked[result.id].id] = f"{result.error.code}: {result.error.message}"[:300]
        return outcomes


@dataclass
class _Job:
    """What is known about one `submit` so far."""

    deadline: float  # of time.monotonic(); moved when the first request is sent
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)  # seconds, of answered requests
    counts: Counter[str] = field(default_factory=lambda: Counter(requests=0, retries=0, hedges=0))
    last_fault: str = ""

    def figures(self) -> dict[str, float]:
        counts = {name: float(count) for name, count in self.counts.items()}
        if not self.latencies:
            return counts
        p50, p95 = np.percentile(self.latencies, (50, 95))
        return counts | {"latency_p50": float(p50), "latency_p95": float(p95)}


def _pause(error: Exception) -> bool | float:
    """Whether to try again; a number says after how many seconds."""
    if isinstance(error, BusyError):
        return error.seconds * random.uniform(0.5, 1.5)
    return isinstance(error, FaultError)


def _may_change(outcome: Outcome) -> bool:
    return isinstance(outcome, str) and not outcome.startswith(_FINAL)


def _wire_item(identity: str, sample: Sample) -> WireItem:
    image = np.ascontiguousarray(sample.image)
    height, width, _ = image.shape
    pixels = WireImage("raw", width, height, image.data.cast("B"))
    # Without its group: no server serves a reward that compares the images of one.
    return WireItem(identity, sample.prompt, pixels, meta=dict(sample.meta))


def _flaw(sample: Sample) -> str:
    """What keeps a sample out of every request, or ""."""
    height, width, _ = sample.image.shape
    if not MIN_SIDE <= min(height, width) <= max(height, width) <= MAX_SIDE:
        return f"an image of {width} x {height} pixels; servers take {MIN_SIDE} to {MAX_SIDE} on a side"
    if len(sample.prompt) > MAX_PROMPT:
        return f"servers take prompts of at most {MAX_PROMPT} characters"
    if not all(isinstance(value, str | int | float) for value in sample.meta.values()):
        return "metadata must be texts and numbers"
    try:
        msgspec.msgpack.encode((sample.prompt, dict(sample.meta)))
    except (UnicodeEncodeError, OverflowError) as error:
        return f"its text or metadata cannot be sent: {error}"[:200]
    return ""


def _checked_url(url: str) -> str:
    """Repeats no password: neither an error of ours, nor any later message about this server."""
    if "@" in url:
        hidden = f"***{url[url.rindex('@') :]}"
        raise ValueError(f"url {hidden!r}: holds a user name or a password; servers take a token, from token_file")
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError as error:  # a port that is no number or too large, half an IPv6 address
        raise ValueError(f"url {url!r}: expected http://host:port ({error})") from error
    if wrong or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError(f"url {url!r}: expected http://host:port")
    return f"{parts.scheme}://{parts.netloc}"


def _compressor() -> Any:
    import zstandard

    return zstandard.ZstdCompressor(level=1).compress
