"""A reward server over a real socket: what it answers, what it refuses, and what it survives."""

import asyncio
import dataclasses
import io
import json
import pickle
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
import zstandard
from PIL import Image

from rewards.wire import CONTENT_TYPE, ScoreResponse
from tests.serving.conftest import TOKEN, Server, environment, free_port


def _wide_window(data: bytes) -> bytes:
    """A frame that asks for a window of 32 MB to unfold a few bytes."""
    parameters = zstandard.ZstdCompressionParameters(window_log=25, write_content_size=False)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return frame.compress(data) + frame.flush()


Serve = Callable[..., Server]
Pair = tuple[Server, Server]


def item(identity: str, value: int = 0, *, prompt: str = "", side: int = 16, **changes: Any) -> dict[str, Any]:
    pixels = np.full((side, side, 3), value, np.uint8)
    image = {"fmt": "raw", "w": side, "h": side, "data": pixels.tobytes()}
    return {"id": identity, "prompt": prompt, "image": image} | changes


def body(*items: dict[str, Any], **changes: Any) -> bytes:
    return msgspec.msgpack.encode({"v": 1, "items": list(items)} | changes)


async def post(server: Server, data: Any, headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
    own = {"Content-Type": CONTENT_TYPE} | ({"Authorization": f"Bearer {server.token}"} if server.token else {})
    data = io.BytesIO(data) if isinstance(data, bytes) else data  # aiohttp warns of large bodies that are plain bytes
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/v1/score", data=data, headers=own | (headers or {}), expect100=True) as answer,
    ):
        content = await answer.read()
        if answer.status == 200:
            decoded: Any = msgspec.msgpack.decode(content, type=ScoreResponse)
        else:
            decoded = json.loads(content)["error"]
        return answer.status, decoded, dict(answer.headers)


def ask(server: Server, data: Any, headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
    return asyncio.run(post(server, data, headers))


def scores(response: ScoreResponse) -> dict[str, Any]:
    """Score of each id, or the code of its error."""
    return {r.id: r.error.code if r.error else (r.scores or {}).get("ordered") for r in response.results}


def batches(server: Server) -> float:
    return metric(server, "reward_batch_images_count")


def metric(server: Server, name: str) -> float:
    lines = server.get("/metrics")[1].decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name))


def test_every_image_gets_its_own_score(serve: Serve) -> None:
    """More images than one batch holds, from several requests at once."""
    server = serve()

    async def several() -> list[Any]:
        requests = [[item(f"{r}-{n}", 5 * r + n) for n in range(50)] for r in range(4)]
        return await asyncio.gather(*(post(server, body(*items)) for items in requests))

    for r, (status, response, _) in enumerate(asyncio.run(several())):
        assert status == 200
        assert scores(response) == {f"{r}-{n}": 5 * r + n for n in range(50)}
        assert response.fingerprint == "ordered@1"


@pytest.mark.parametrize("fmt", ["png", "webp"])
def test_lossless_files_score_as_raw_pixels(fmt: str, serve: Serve) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=fmt, lossless=True)
    server = serve("jpeg_size")
    images = [{"fmt": "raw", "data": pixels.tobytes()}, {"fmt": fmt, "data": file.getvalue()}]
    items = [item(str(n), image=image | {"w": 16, "h": 24}) for n, image in enumerate(images)]
    _, response, _ = ask(server, body(*items))
    first, second = (result.scores for result in response.results)
    assert first == second
    assert first["jpeg_size"] < 0


@pytest.mark.parametrize("shown", [None, "Bearer wrong", f"Basic {TOKEN}", "Bearer", "Bearer \u00e9"])
@pytest.mark.parametrize("size", [100, 6_000_000])
def test_without_the_token_nothing_is_answered(shown: str | None, size: int, pair: Pair) -> None:
    """Also a large body gets its 401: an answer that looked like a lost connection would be tried again for ever."""
    server = dataclasses.replace(pair[0], token=None)
    status, error, _ = ask(server, b"x" * size, {"Authorization": shown} if shown else {})
    assert (status, error["code"]) == (401, "unauthorised")
    assert server.get("/v1/info")[0] == server.get("/metrics")[0] == 401
    assert server.get("/healthz")[0] == server.get("/readyz")[0] == 200
    server.token = TOKEN
    assert ask(server, body(item("a", 3)))[0] == 200


@pytest.mark.parametrize(
    ("data", "headers", "status", "code"),
    [
        (b"", {}, 400, "malformed"),
        (b"\xc1garbage", {}, 400, "malformed"),
        (pickle.dumps({"v": 1}), {}, 400, "malformed"),
        (body(item("a"))[:-7], {}, 400, "malformed"),
        (body(item("a"), v=2), {}, 400, "malformed"),
        (body(item("a"), surprise=1), {}, 400, "malformed"),
        (body(), {}, 400, "malformed"),
        (body(*[item(str(n)) for n in range(257)]), {}, 400, "malformed"),
        (body(item("a", meta={"path": ["/etc/passwd"]})), {}, 400, "malformed"),
        (body(item("a"), item("a")), {}, 400, "duplicate_id"),
        (body(item("a")), {"X-Deadline-Ms": "-1"}, 400, "malformed"),
        (body(item("a")), {"Content-Type": "application/json"}, 415, "unsupported_type"),
        (body(item("a")), {"Content-Encoding": "gzip"}, 415, "unsupported_type"),
        (b"x" * 8_000_001, {}, 413, "too_large"),
    ],
)  # fmt: skip
def test_what_is_not_a_request_is_refused_with_its_reason(
    data: bytes, headers: dict[str, str], status: int, code: str, pair: Pair
) -> None:
    found, error, _ = ask(pair[0], data, headers)
    assert (found, error["code"]) == (status, code)
    assert scores(ask(pair[0], body(item("b", 9)))[1]) == {"b": 9}


ZSTD = {"Content-Encoding": "zstd"}
HUGE = zstandard.ZstdCompressor().compress(bytes(1_000_000_000))  # 30 kB


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (zstandard.ZstdCompressor().compress(body(item("a", 3))), 200, None),
        (zstandard.ZstdCompressor(write_content_size=False).compress(body(item("a", 3))), 200, None),
        (body(item("a", 3)), 400, "malformed"),
        (zstandard.ZstdCompressor().compress(body(item("a", 3)))[:-5], 400, "malformed"),
        (zstandard.ZstdCompressor().compress(b"no request"), 400, "malformed"),
        (HUGE, 413, "too_large"),
        (zstandard.ZstdCompressor().compress(HUGE), 400, "malformed"),  # a bomb in a bomb is unfolded once
        (_wide_window(body(item("a", 3))), 400, "malformed"),
    ],
    ids=["good", "good, of unknown size", "plain", "cut", "garbage", "bomb", "bomb in a bomb", "wide window"],
)  # fmt: skip
def test_a_compressed_body_is_unfolded_up_to_the_limit(data: bytes, status: int, code: str | None, pair: Pair) -> None:
    server = pair[0]
    before = _peak_bytes(server)
    found, answer, _ = ask(server, data, ZSTD)
    assert found == status
    assert (scores(answer) == {"a": 3}) if code is None else (answer["code"] == code)
    assert _peak_bytes(server) - before < 40e6
    assert scores(ask(server, body(item("b", 9)))[1]) == {"b": 9}


def _peak_bytes(server: Server) -> int:
    """Most memory that the server ever held."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def test_a_body_without_a_length_is_refused(pair: Pair) -> None:
    async def pieces() -> Any:
        yield body(item("a"))

    status, error, _ = ask(pair[0], pieces())
    assert (status, error["code"]) == (411, "length_required")


def test_a_body_in_chunks_ends_where_its_length_said(serve: Serve) -> None:
    """HTTP lets the chunks win over the length, which is what the byte budget counts. Who goes on sending after the
    refusal can read it, and is hung up on."""
    server = serve()
    before = _peak_bytes(server)
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: 1000\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as caller:
        caller.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(3):
            caller.sendall(b"100000\r\n" + bytes(2**20) + b"\r\n")
        assert caller.recv(4096).startswith(b"HTTP/1.1 400")
        with pytest.raises(ConnectionError):
            for _ in range(100):
                caller.sendall(b"100000\r\n" + bytes(2**20) + b"\r\n")
    assert _peak_bytes(server) - before < 40e6


@pytest.mark.slow
def test_a_refused_client_that_sends_slowly_is_hung_up_on(pair: Pair) -> None:
    """After a 401 and a 413, although it never sends many bytes."""
    heads = {b"401": "", b"413": f"Authorization: Bearer {TOKEN}\r\nContent-Type: {CONTENT_TYPE}\r\n"}
    callers = [socket.create_connection(("127.0.0.1", pair[0].port), timeout=20) for _ in heads]
    for caller, (status, head) in zip(callers, heads.items(), strict=True):
        caller.sendall(f"POST /v1/score HTTP/1.1\r\nHost: x\r\n{head}Content-Length: 999000000\r\n\r\n".encode())
        assert caller.recv(4096)[9:12] == status
    for caller in callers:
        started = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() - started < 20:
                caller.sendall(b"x")
                time.sleep(0.1)
        caller.close()


def test_connections_are_bounded(serve: Serve) -> None:
    server = serve(limits={"connections": 4})
    callers = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(4)]
    time.sleep(0.2)
    with pytest.raises(OSError):
        server.get("/healthz")
    for caller in callers[:2]:
        caller.close()
    time.sleep(0.2)
    assert scores(ask(server, body(item("b", 9)))[1]) == {"b": 9}
    callers[2].sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert callers[2].recv(4096).startswith(b"HTTP/1.1 200")
    for caller in callers[2:]:
        caller.close()


def test_a_bad_image_costs_only_its_own_score(pair: Pair) -> None:
    bomb = _png_header(30_000, 30_000)
    bad = {
        "short": {"fmt": "raw", "w": 16, "h": 16, "data": b"123"},
        "garbage": {"fmt": "png", "w": 16, "h": 16, "data": b"no image"},
        "bomb": {"fmt": "png", "w": 2048, "h": 2048, "data": bomb},
        "disguised": {"fmt": "jpeg", "w": 16, "h": 16, "data": bomb},
    }
    items = [item(name, image=image) for name, image in bad.items()]
    status, response, _ = ask(pair[0], body(item("good", 7), *items))
    assert status == 200
    assert scores(response) == {"good": 7} | dict.fromkeys(bad, "bad_image")


def test_an_image_that_the_reward_fails_on_fails_alone_and_tells_nothing_of_the_inside(serve: Serve) -> None:
    server = serve()
    items = [item("a", 1), item("b", 2, prompt="poison"), item("c", 3, prompt="refuse"), item("d", 4, prompt="nan")]
    status, response, _ = ask(server, body(*items))
    assert status == 200
    assert scores(response) == {"a": 1, "b": "scorer_error", "c": "unsupported_item", "d": "non_finite"}
    assert "secret" not in str(response)
    assert "secret of the inside" in server.log.read_text()


def test_what_cannot_be_scored_in_time_is_not_scored(serve: Serve) -> None:
    server = serve(settings={"seconds": 1.0})
    _, response, _ = ask(server, body(*[item(str(n), n) for n in range(96)]), {"X-Deadline-Ms": "1500"})
    assert batches(server) == 1  # the answer comes at the deadline, not when the batch at hand is done
    assert scores(response) == {str(n): n if n < 32 else "deadline" for n in range(96)}
    assert scores(ask(server, body(item("b", 9)))[1]) == {"b": 9}
    assert batches(server) == 3


@pytest.mark.slow
def test_images_of_requests_that_are_late_leave_the_queue(serve: Serve) -> None:
    """And those in the batch at hand when that is done; so do their bytes."""
    server = serve(settings={"seconds": 1.5}, limits={"body_bytes": 4_000_000, "queued_bytes": 8_000_000})
    large = body(*[item(str(n), side=512) for n in range(4)])

    async def both() -> list[Any]:
        first = asyncio.create_task(post(server, large, {"X-Deadline-Ms": "400"}))
        await asyncio.sleep(0.2)
        return await asyncio.gather(first, post(server, large, {"X-Deadline-Ms": "300"}))

    for status, response, _ in asyncio.run(both()):
        assert (status, set(scores(response).values())) == (200, {"deadline"})
    assert metric(server, "reward_queued_bytes") == len(large)  # of the batch at hand; the other one left the queue
    assert ask(server, body(item("b", 9)))[0] == 200
    assert batches(server) == 2
    assert metric(server, "reward_queued_bytes") == 0


def test_images_nobody_waits_for_any_more_are_not_scored(serve: Serve) -> None:
    server = serve(settings={"seconds": 0.5})

    async def impatient() -> None:
        calls = [post(server, body(*[item(f"{r}-{n}") for n in range(32)])) for r in range(6)]
        await asyncio.wait_for(asyncio.gather(*calls), 0.3)

    with pytest.raises(TimeoutError):
        asyncio.run(impatient())
    assert scores(ask(server, body(item("late", 8)))[1]) == {"late": 8}
    assert batches(server) <= 3


def test_more_than_the_byte_budget_is_asked_to_come_back(serve: Serve) -> None:
    large = body(*[item(str(n), side=512) for n in range(4)])
    server = serve(settings={"seconds": 1.0}, limits={"body_bytes": 4_000_000, "queued_bytes": 8_000_000})

    async def many() -> list[Any]:
        return await asyncio.gather(*(post(server, large) for _ in range(8)))

    answers = asyncio.run(many())
    codes = [status for status, _, _ in answers]
    assert codes.count(200) >= 2
    assert codes.count(429) == 8 - codes.count(200) > 0
    refused = next(headers for status, _, headers in answers if status == 429)
    assert float(refused["Retry-After"]) > 0
    assert "connection" not in {name.lower() for name in refused}
    assert ask(server, large)[0] == 200  # every byte was given back


def test_image_files_count_with_the_pixels_they_unfold_to(serve: Serve) -> None:
    file = io.BytesIO()
    Image.new("RGB", (1024, 1024), (5, 5, 5)).save(file, format="png")  # 6 kB, 3.1 MB of pixels
    image = {"fmt": "png", "w": 1024, "h": 1024, "data": file.getvalue()}
    server = serve(settings={"seconds": 1.0}, limits={"body_bytes": 4_000_000, "queued_bytes": 8_000_000})
    two, three = (body(*[item(str(n), image=image) for n in range(count)]) for count in (2, 3))

    async def many() -> list[Any]:
        return await asyncio.gather(*(post(server, two) for _ in range(4)))

    assert sorted(status for status, _, _ in asyncio.run(many())) == [200, 429, 429, 429]
    status, error, _ = ask(server, three)
    assert (status, error["code"]) == (413, "too_large")
    for headers in ({}, ZSTD):  # every byte was given back
        data = zstandard.ZstdCompressor().compress(body(item("a", image=image))) if headers else two
        assert set(scores(ask(server, data, headers)[1]).values()) == {5.0}


def test_a_server_is_alive_at_once_and_ready_when_its_reward_is(serve: Serve) -> None:
    server = serve(settings={"load_seconds": 1.5}, ready=False)
    assert server.get("/readyz")[0] == 503
    assert server.get("/v1/info")[0] == 503
    status, error, headers = ask(server, body(item("a")))
    assert (status, error["code"], "Retry-After" in headers) == (503, "loading", True)
    server.wait_until("/readyz")
    info = json.loads(server.get("/v1/info")[1])
    assert (info["name"], info["metrics"], info["api"]) == ("ordered", ["ordered"], [1])
    assert info["limits"]["items"] == 256


def test_health_answers_while_a_batch_is_scored(serve: Serve) -> None:
    server = serve(settings={"seconds": 1.5})

    async def both() -> list[float]:
        call = asyncio.create_task(post(server, body(item("a"))))
        await asyncio.sleep(0.3)
        seconds = []
        async with aiohttp.ClientSession() as session:
            while not call.done():
                started = time.monotonic()
                async with session.get(f"{server.url}/readyz") as answer:
                    assert answer.status == 200
                seconds.append(time.monotonic() - started)
        return seconds

    seconds = asyncio.run(both())
    assert len(seconds) > 10
    assert float(np.percentile(seconds, 95)) < 0.5


def test_a_scorer_that_hangs_ends_the_process_for_its_supervisor(serve: Serve) -> None:
    server = serve(limits={"batch_seconds": 0.5})
    with pytest.raises(aiohttp.ClientError):
        ask(server, body(item("a", prompt="hang")))
    assert server.process.wait(timeout=5) == 70
    assert "the scorer hangs" in server.log.read_text()


def test_a_slow_upload_does_not_keep_its_place(serve: Serve) -> None:
    server = serve(limits={"read_seconds": 0.5})
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as slow:
        head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: 1000\r\n\r\n"
        slow.sendall(head.encode() + b"a")
        answer = slow.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408")
    assert scores(ask(server, body(item("b", 9)))[1]) == {"b": 9}


def test_a_slow_head_does_not_keep_its_connection(serve: Serve) -> None:
    """Neither the first of a connection nor a later one; and who is answered slowly is not hung up on."""
    server = serve(limits={"read_seconds": 0.4}, settings={"seconds": 0.6})
    for before in (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as slow:
            slow.sendall(before)
            answer = b""
            while before and not answer.endswith(b"ok"):
                answer += slow.recv(4096)
            slow.sendall(b"POST /v1/score HTTP/1.1\r\nHos")
            started = time.monotonic()
            assert slow.recv(4096) == b""
            assert time.monotonic() - started < 3
    assert scores(ask(server, body(item("b", 9)))[1]) == {"b": 9}


@pytest.mark.slow
def test_an_idle_connection_is_for_its_client_to_end(pair: Pair) -> None:
    """aiohttp ends them after 15 seconds. Ended by the server, a request may just be on its way."""
    with socket.create_connection(("127.0.0.1", pair[0].port), timeout=18) as idle:
        idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while not answer.endswith(b"ok"):
            answer += idle.recv(4096)
        with pytest.raises(TimeoutError):
            idle.recv(4096)


def test_sigterm_finishes_what_was_begun_and_refuses_what_comes_after(serve: Serve) -> None:
    server = serve(settings={"seconds": 2.0})

    async def during() -> Any:
        call = asyncio.create_task(post(server, body(item("a", 6))))
        await asyncio.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        while _listens(server.port):
            await asyncio.sleep(0.05)
        with pytest.raises(aiohttp.ClientConnectorError):
            await post(server, body(item("b")))
        return await call

    status, response, _ = asyncio.run(during())
    assert (status, scores(response)) == (200, {"a": 6})
    assert server.process.wait(timeout=10) in (0, -signal.SIGTERM)


def _listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ordered", "--host", "0.0.0.0"], "can be reached from other machines"),
        (["orderd"], "did you mean ordered?"),
        (["os:system"], "no reward 'os:system'"),
        (["jpeg_size", "--settings", '{"quality": 0}'], "quality=0"),
        (["jpeg_size", "--settings", '{"qualty": 9}'], "qualty"),
        (["ordered", "--limits", '{"body_bytes": 0}'], "body_bytes=0"),
        (["ordered", "--limits", '{"batch_seconds": "1"}'], "batch_seconds=1: must be a finite number"),
        (["ordered", "--limits", '{"batch_seconds": NaN}'], "NaN"),
        (["ordered", "--settings", '{"seconds": 1e999}'], "settings.seconds=inf"),
        (["ordered", "--port", "65536"], "must be 1 to 65535"),
        (["ordered", "--host", "no-such-host.invalid"], "--host no-such-host.invalid"),
        (["broken"], "broken-reward cannot be imported (ModuleNotFoundError: No module named 'no_such_library')"),
        (["ordered", "--token-file", "readable"], "chmod 600"),
        (["ordered", "--token-file", "short"], "at least 32"),
        (["ordered", "--token-file", "absent"], "No such file"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_named(
    arguments: list[str], message: str, plugin: Path, tmp_path: Path
) -> None:
    (tmp_path / "readable").write_text(TOKEN)
    (tmp_path / "readable").chmod(0o644)
    (tmp_path / "short").write_text("short")
    (tmp_path / "short").chmod(0o600)
    command = [sys.executable, "-m", "rewards.serve", "--port", str(free_port()), *arguments]
    done = subprocess.run(
        command, env=environment(plugin), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def _png_header(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that declares a huge picture."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
