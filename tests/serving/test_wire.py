"""The wire format: what goes in comes out, and nothing that comes in does harm."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.wire import (
    CONTENT_TYPE,
    MAX_ITEMS,
    MAX_SIDE,
    Failure,
    ScoreRequest,
    ScoreResponse,
    WireImage,
    WireItem,
    WireResult,
)
from tests.serving.conftest import TOKEN, Server

texts = st.text(max_size=40)
identities = st.text(min_size=1, max_size=64)
scalars = st.one_of(texts, st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.booleans())
sides = st.integers(16, MAX_SIDE)
images = st.builds(
    WireImage, st.sampled_from(["raw", "png", "webp", "jpeg"]), sides, sides, st.binary(max_size=200).map(memoryview)
)
items = st.builds(
    WireItem,
    identities,
    texts,
    images,
    st.none() | st.text(max_size=64),
    st.dictionaries(texts, scalars, max_size=4),
)
requests = st.builds(ScoreRequest, st.just(1), st.lists(items, min_size=1, max_size=5))
results = st.one_of(
    st.builds(WireResult, identities, st.dictionaries(texts, st.floats(allow_nan=False)), st.none()),
    st.builds(WireResult, identities, st.none(), st.builds(Failure, texts, texts)),
)
responses = st.builds(ScoreResponse, st.integers(0, 9), texts, st.lists(results, max_size=5))

DECODERS: list[Callable[[Any], Any]] = [
    msgspec.msgpack.Decoder(ScoreRequest).decode,
    msgspec.msgpack.Decoder(ScoreResponse).decode,
]
REFUSED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


@given(requests)
def test_a_request_survives_the_journey(request: ScoreRequest) -> None:
    assert DECODERS[0](msgspec.msgpack.encode(request)) == request


@given(responses)
def test_a_response_survives_the_journey(response: ScoreResponse) -> None:
    assert DECODERS[1](msgspec.msgpack.encode(response)) == response


def test_each_image_gets_its_own_bytes() -> None:
    """Decoders of msgspec before 0.20 give every image the bytes of the whole body."""
    pixels = [np.full((16, 16, 3), n, np.uint8) for n in range(3)]
    request = ScoreRequest(
        1, [WireItem(str(n), "", WireImage("raw", 16, 16, p.data.cast("B"))) for n, p in enumerate(pixels)]
    )
    decoded = DECODERS[0](msgspec.msgpack.encode(request))
    assert [bytes(item.image.data) for item in decoded.items] == [p.tobytes() for p in pixels]


@settings(max_examples=500)
@given(st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    for decode in DECODERS:
        with suppress(REFUSED):
            decode(data)


@settings(max_examples=200)
@given(requests, responses, st.randoms(use_true_random=False))
def test_damaged_messages_are_decoded_or_refused(request: Any, response: Any, random: random.Random) -> None:
    for decode, message in zip(DECODERS, (request, response), strict=True):
        with suppress(REFUSED):
            decode(damaged(msgspec.msgpack.encode(message), random))


def damaged(data: bytes, random: random.Random) -> bytes:
    """The bytes with some changed, left out, repeated or put in between."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        start = random.randrange(len(changed) + 1)
        stop = min(len(changed), start + random.choice((0, 1, 1, 2, 8, 64)))
        piece = random.choice(
            (b"", random.randbytes(stop - start), bytes(changed[start:stop]) * 2, random.randbytes(2))
        )
        changed[start:stop] = piece
    return bytes(changed)


def test_deeply_nested_bytes_are_refused() -> None:
    nested = b"\x91" * 100_000 + b"\x01"
    for decode in DECODERS:
        with pytest.raises(REFUSED):
            decode(b"\x82\xa1v\x01\xa3new" + nested)


# --- over a socket -------------------------------------------------------------------------------------------------

GOOD = {"v": 1, "items": [{"id": "a", "prompt": "", "image": {"fmt": "raw", "w": 16, "h": 16, "data": bytes(768)}}]}
_VALUES = (None, True, 0, -1, 2**63, 1.5, float("nan"), "", "x" * 9000, b"\xff", [], {}, [[]], {"a": {}}, GOOD["items"])


def fuzzed_value(value: Any, random: random.Random) -> Any:
    """The value with one of its parts replaced by something else."""
    if isinstance(value, dict) and value and random.random() < 0.8:
        changed = dict(value)
        key = random.choice(sorted(changed))
        act = random.random()
        if act < 0.1:
            del changed[key]
        elif act < 0.2:
            changed["new"] = random.choice(_VALUES)
        else:
            changed[key] = fuzzed_value(changed[key], random)
        return changed
    if isinstance(value, list) and value and random.random() < 0.8:
        return [fuzzed_value(value[0], random)] * random.choice((1, 1, 2, MAX_ITEMS, MAX_ITEMS + 1))
    return random.choice(_VALUES)


def fuzzed_request(random: random.Random) -> tuple[bytes, bool]:
    """The bytes of a request, and whether they hold the token."""

    def choose(usual: Any, *others: Any, share: float = 0.04) -> Any:
        return random.choice(others) if random.random() < share else usual

    value = fuzzed_value(GOOD, random)
    body = random.choice(
        (
            lambda: msgspec.msgpack.encode(value),
            lambda: damaged(msgspec.msgpack.encode(GOOD), random),
            lambda: msgspec.json.encode(str(value)),
            lambda: random.randbytes(random.randrange(2000)),
            lambda: msgspec.msgpack.encode(GOOD),
        )
    )()
    method = choose("POST", "GET", "PUT", "HEAD", "OPTIONS", "BREW")
    path = choose("/v1/score", "/v1/info", "/metrics", "/../etc/passwd", "/v1/score?x=%00", "//", "*")
    shown = choose(TOKEN, "", "x" * 40, TOKEN[:-1], TOKEN + "t", "\xe9", " " + TOKEN, share=0.2)
    headers = {
        "Host": "x",
        "Authorization": choose("Bearer ", "bearer ", "Basic ", "", "Bearer") + shown,
        "Content-Type": choose(CONTENT_TYPE, "application/json", "", "\xff"),
        "Content-Length": choose(str(len(body)), "0", str(len(body) + 9), "1", "x", "-1", "9" * 30, "99999999"),
        "X-Deadline-Ms": random.choice(("1000", "1000", "0", "-5", "x", "9" * 20, "\xb2")),
        "Content-Encoding": random.choice(("zstd", "gzip", "identity", "")),
        "Transfer-Encoding": "chunked",
        "Expect": "100-continue",
    }
    optional = {"X-Deadline-Ms": 0.2, "Content-Encoding": 0.05, "Transfer-Encoding": 0.02, "Expect": 0.1}
    for name in list(headers):
        if random.random() > optional.get(name, 0.98):
            del headers[name]
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {text}\r\n" for name, text in headers.items()) + "\r\n"
    data = head.encode("latin-1") + body
    if random.random() < 0.05:
        data = damaged(data, random)
        # Damage may turn a wrong header into the right one: believe what is there.
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    right = scheme.lower() == "bearer" and token.strip() == TOKEN
    return data, right or b"bearer " + TOKEN.encode() in data.lower()


async def _send(server: Server, data: bytes) -> int | None:
    """Status of the answer, None if there is none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(data)
        while True:
            line = await asyncio.wait_for(reader.readline(), 10)
            words = line.split()
            if len(words) < 2 or words[1] != b"100":
                return int(words[1]) if len(words) > 1 else None
            await reader.readline()
    except ConnectionError:
        return None
    finally:
        writer.close()


def _fuzz(server: Server, count: int, seed: int) -> Counter[int | None]:
    """How often each status came; fails on a 5xx, and on a 200 without the token."""
    rng = random.Random(seed)
    statuses: Counter[int | None] = Counter()

    async def worker() -> None:
        while sum(statuses.values()) < count:
            data, authorised = fuzzed_request(rng)
            try:
                status = await _send(server, data)
            except TimeoutError:
                raise AssertionError(f"no answer to {data!r}") from None
            statuses[status] += 1
            assert status is None or status < 500, data
            assert status != 200 or authorised, data

    async def workers() -> None:
        await asyncio.gather(*(worker() for _ in range(8)))

    asyncio.run(workers())
    return statuses


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzzed_requests_do_no_harm(count: int, serve: Callable[..., Server]) -> None:
    """No crash, no answer without the token, no error of the server that a client caused."""
    server = serve(token=TOKEN, limits={"read_seconds": 0.3, "body_bytes": 1_000_000})
    statuses = _fuzz(server, count, seed=count)
    print(dict(statuses))
    assert {200, 400, 401, 411, 413, 415} <= set(statuses)
    assert server.process.poll() is None
    assert server.get("/healthz") == (200, b"ok")
    assert json.loads(server.get("/v1/info")[1])["name"] == "ordered"
    log = server.log.read_text()
    # uvicorn answers a broken chunk of a body by itself, and grumbles when the answer of the application follows.
    assert log.count("Traceback") == log.count("\nh11._util.LocalProtocolError")
