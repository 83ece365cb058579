"""The client against real servers that fail in every way: a score is exact or missing, and every wait ends."""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards.client.batch import RewardBatch, RewardRefusedError, RewardUnavailableError
from rewards.client.remote import RemoteClient, RemoteSettings
from rewards.contract import Sample
from tests.serving.conftest import ROOT, TOKEN, Server, environment, free_port

Serve = Callable[..., Server]
Pair = tuple[Server, Server]
COUNT = 60

pytestmark = pytest.mark.filterwarnings("error")


def picture(value: int, side: int = 16) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def samples(count: int = COUNT, prompts: dict[int, str] | None = None) -> list[Sample]:
    """Sample n scores n."""
    return [Sample(f"image {n}", (prompts or {}).get(n, ""), picture(n)) for n in range(count)]


@contextmanager
def client_of(*servers: Server | str, token: str | None = TOKEN, **settings: Any) -> Iterator[RemoteClient]:
    urls = [server if isinstance(server, str) else server.url for server in servers]
    client = RemoteClient(
        urls, token=token, settings=RemoteSettings(**{"deadline_seconds": 10, "cool_seconds": 0.2} | settings)
    )
    try:
        yield client
    finally:
        client.close()


def assert_exact(batch: RewardBatch, count: int = COUNT, missing: dict[int, str] | None = None) -> None:
    """Every score is that of its image, but for these: NaN, for this reason."""
    expected = np.arange(count, dtype=np.float32)
    expected[list(missing or {})] = np.nan
    assert batch.scores["ordered"].dtype == np.float32
    np.testing.assert_array_equal(batch.scores["ordered"], expected)
    for n, reason in enumerate(batch.reasons):
        assert (reason or "").split(":")[0] == (missing or {}).get(n, "")


# --- answers -------------------------------------------------------------------------------------------------------


def test_scores_come_in_the_order_of_the_images(pair: Pair) -> None:
    """Also if the server answers in another order."""
    for server in pair:
        server.fault("edit", edit="shuffle")
    with client_of(*pair) as client:
        client.wait_ready(5)
        assert (client.info.name, client.info.metrics, client.info.max_batch) == ("ordered", ("ordered",), 32)
        batch = client.submit(samples()).result()
    assert_exact(batch)
    assert batch.fingerprint == client.fingerprint == "ordered@1"
    assert batch.stats["requests"] == 8
    assert batch.stats["retries"] == batch.stats["hedges"] == batch.stats["ejections"] == 0
    assert 0 < batch.stats["latency_p50"] <= batch.stats["latency_p95"] < 5
    assert all(server.fault() > 0 for server in pair)  # both worked


def test_nothing_to_score_is_scored_at_once(pair: Pair) -> None:
    with client_of(*pair) as client:
        batch = client.submit([]).result(5)
    assert batch.scores["ordered"].shape == (0,)
    assert batch.reasons == []


def test_several_submissions_run_at_once_and_the_caller_goes_on(pair: Pair) -> None:
    for server in pair:
        server.fault("slow", seconds=0.5)
    with client_of(*pair, in_flight=8) as client:
        client.wait_ready(5)
        started = time.monotonic()
        futures = [client.submit(samples()) for _ in range(2)]
        assert time.monotonic() - started < 0.3
        for future in futures:
            assert_exact(future.result())
        assert time.monotonic() - started < 4


def test_large_images_go_in_requests_that_the_server_takes(serve: Serve) -> None:
    server = serve(limits={"body_bytes": 3_000_000, "queued_bytes": 20_000_000})
    images = [Sample(str(n), "", picture(n, 512)) for n in range(12)]
    with client_of(server, chunk_images=100) as client:
        batch = client.submit(images).result()
    assert_exact(batch, 12)
    assert batch.stats["requests"] == 4  # 0.8 MB each


def test_requests_can_be_compressed(pair: Pair) -> None:
    with client_of(*pair, compress=True) as client:
        assert_exact(client.submit(samples()).result())


def test_images_need_not_be_contiguous(pair: Pair) -> None:
    image = np.stack([picture(7)[..., 0], picture(8)[..., 0], picture(9)[..., 0]]).transpose(1, 2, 0)
    with client_of(*pair) as client:
        batch = client.submit([Sample("a", "", image), Sample("b", "", picture(3, 64)[::2, ::-1])]).result()
    assert batch.scores["ordered"].tolist() == [7, 3]


def test_new_fields_in_answers_are_ignored(pair: Pair) -> None:
    for server in pair:
        server.fault("edit", edit="more fields")
    with client_of(*pair) as client:
        assert_exact(client.submit(samples()).result())


def test_proxies_of_the_environment_are_not_asked(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with client_of(*pair) as client:
        assert_exact(client.submit(samples()).result())


# --- missing scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", ["nan", "infinite", "too large for float32"])
def test_a_score_that_is_no_number_is_missing(edit: str, pair: Pair) -> None:
    for server in pair:
        server.fault("edit", edit=edit)
    with client_of(*pair, chunk_images=10) as client:
        batch = client.submit(samples()).result()
    assert_exact(batch, missing=dict.fromkeys(range(0, COUNT, 10), "non_finite"))
    assert batch.stats["retries"] == 6  # each was asked for once more


def test_a_poison_image_costs_its_own_score_only(pair: Pair) -> None:
    """What might be the server's fault is tried once more, on the other one; what the reward refuses is not."""
    with client_of(*pair, chunk_images=30) as client:
        batch = client.submit(samples(prompts={5: "poison", 40: "nan", 41: "refuse"})).result()
        assert_exact(batch, missing={5: "scorer_error", 40: "non_finite", 41: "unsupported_item"})
        assert (batch.stats["requests"], batch.stats["retries"]) == (4, 2)
        refused = client.submit(samples(prompts={0: "refuse"})).result()
    assert_exact(refused, missing={0: "unsupported_item"})
    assert refused.stats["retries"] == 0
    assert batch.reasons[41] == "unsupported_item: this prompt cannot be scored"


def test_an_image_that_failed_by_the_server_alone_is_scored_by_the_other(pair: Pair) -> None:
    pair[0].fault("edit", edit="nan")
    with client_of(*pair) as client:
        assert_exact(client.submit(samples()).result())


def test_out_of_memory_makes_batches_smaller(serve: Serve) -> None:
    server = serve(settings={"memory": 5})
    with client_of(server, chunk_images=32) as client:
        assert_exact(client.submit(samples()).result())
    assert "from now on at most 4" in server.log.read_text()


def test_what_the_deadline_cuts_off_is_missing_and_the_rest_is_not(pair: Pair) -> None:
    pair[0].fault("slow", seconds=30)
    with client_of(*pair, deadline_seconds=1.5, attempt_seconds=30, chunk_images=10, in_flight=1) as client:
        started = time.monotonic()
        batch = client.submit(samples()).result()
        assert time.monotonic() - started < 2.5
    late = [n for n, reason in enumerate(batch.reasons) if reason]
    assert len(late) == 10
    assert_exact(batch, missing=dict.fromkeys(late, "deadline"))


# --- servers that fail ---------------------------------------------------------------------------------------------

FAULTS: list[dict[str, Any]] = [
    {"kind": "status", "status": 500},
    {"kind": "status", "status": 502},
    {"kind": "status", "status": 408},
    {"kind": "upload_reset"},
    {"kind": "answer_reset"},
    {"kind": "garbage"},
    *(
        {"kind": "edit", "edit": edit}
        for edit in ("huge", "drop", "repeat", "other id", "string", "no metric", "nothing", "both")
    ),
]


def _name(fault: dict[str, Any]) -> str:
    return " ".join(str(part) for part in fault.values())


@pytest.mark.parametrize("fault", FAULTS, ids=_name)
def test_what_one_server_spoils_the_other_scores(fault: dict[str, Any], pair: Pair) -> None:
    pair[0].fault(**fault)
    with client_of(*pair) as client:
        batch = client.submit(samples()).result()
    assert_exact(batch)
    assert batch.stats["retries"] > 0
    assert batch.stats["ejections"] > 0
    assert pair[0].fault() < 8  # it was put aside


def test_an_answer_to_an_earlier_request_is_none_to_this_one(pair: Pair) -> None:
    """Images of every iteration have the same ids."""
    pair[0].fault("edit", edit="stale")
    others = [Sample(sample.id, "", picture(99)) for sample in samples(4)]
    with client_of(pair[0], deadline_seconds=0.7) as client:
        assert_exact(client.submit(samples(4)).result(), 4)
        with pytest.raises(RewardUnavailableError, match="not about the images asked about"):
            client.submit(others).result()
    with client_of(*pair) as client:
        assert client.submit(others).result().scores["ordered"].tolist() == [99.0] * 4


@pytest.mark.parametrize("fault", FAULTS[::3], ids=_name)
def test_when_all_servers_spoil_all_answers_it_is_said_within_the_deadline(fault: dict[str, Any], pair: Pair) -> None:
    for server in pair:
        server.fault(**fault)
    with client_of(*pair, deadline_seconds=0.7) as client:
        client.wait_ready(5)
        started = time.monotonic()
        with pytest.raises(RewardUnavailableError, match="60 of 60 images have no score"):
            client.submit(samples()).result()
        assert time.monotonic() - started < 2


def test_servers_that_fail_now_and_then_score_everything(pair: Pair) -> None:
    for server in pair:
        server.fault("status", share=0.3, status=500)
    with client_of(*pair, chunk_images=2) as client:
        assert_exact(client.submit(samples()).result())


def test_a_slow_server_is_given_up_for_the_other(pair: Pair) -> None:
    pair[0].fault("slow", seconds=30)
    with client_of(*pair, attempt_seconds=0.7) as client:
        started = time.monotonic()
        batch = client.submit(samples()).result()
    assert_exact(batch)
    assert batch.stats["ejections"] > 0
    assert time.monotonic() - started < 4


@pytest.mark.slow
def test_a_server_that_scores_nothing_in_time_is_given_up(serve: Serve, pair: Pair) -> None:
    """It answers in time, and says so: that is no answer either."""
    slow = serve(token=TOKEN, settings={"seconds": 30})
    with client_of(slow, pair[1], attempt_seconds=0.5) as client:
        batch = client.submit(samples()).result()
    assert_exact(batch)
    assert batch.stats["ejections"] > 0
    late = r"60 of 60 images have no score.*no image was scored in time"
    with (
        client_of(slow, deadline_seconds=1.5, attempt_seconds=0.5) as client,
        pytest.raises(RewardUnavailableError, match=late),
    ):
        client.submit(samples()).result()


def test_hedging_asks_the_other_server_without_waiting_for_the_time_out(pair: Pair) -> None:
    pair[0].fault("slow", seconds=30)
    with client_of(*pair, hedge_seconds=0.3) as client:
        started = time.monotonic()
        batch = client.submit(samples()).result()
    assert_exact(batch)
    assert batch.stats["hedges"] > 0
    assert time.monotonic() - started < 3


def test_a_busy_server_is_waited_for_and_not_blamed(pair: Pair) -> None:
    for server in pair:
        server.fault("status", times=6, status=429, headers={"Retry-After": "0.2"})
    with client_of(*pair, chunk_images=5) as client:
        started = time.monotonic()
        batch = client.submit(samples()).result()
    assert_exact(batch)
    assert batch.stats["ejections"] == 0
    assert batch.stats["retries"] == 12
    assert time.monotonic() - started < 5


def test_retry_after_is_honoured(pair: Pair) -> None:
    for server, status in zip(pair, (429, 503), strict=True):
        server.fault("status", times=1, status=status, headers={"Retry-After": "1"})
    with client_of(*pair) as client:
        started = time.monotonic()
        assert_exact(client.submit(samples(2)).result(), 2)
    assert 0.9 < time.monotonic() - started < 4


def test_a_server_that_stands_still_is_given_up(serve: Serve, pair: Pair) -> None:
    """Stopped by SIGSTOP it still accepts connections, and nothing else."""
    still = serve(token=TOKEN)
    with client_of(still, pair[1], attempt_seconds=0.7) as client:
        client.wait_ready(5)
        still.process.send_signal(signal.SIGSTOP)
        batch = client.submit(samples()).result()
        still.process.send_signal(signal.SIGCONT)
    assert_exact(batch)
    assert batch.stats["ejections"] > 0


def test_addresses_that_lead_nowhere_cost_nothing_but_time(pair: Pair) -> None:
    with (
        _blackhole() as nowhere,
        client_of(nowhere, "http://no-such-host.invalid:9001", pair[0], connect_seconds=0.5) as client,
    ):
        assert_exact(client.submit(samples()).result())
    with _blackhole() as nowhere, client_of(nowhere, connect_seconds=0.3) as client:
        with pytest.raises(RewardUnavailableError, match=r"no (connection|answer) within 0\.3 s"):
            client.wait_ready(0.5)
        with pytest.raises(RewardUnavailableError):
            _ = client.info


@contextmanager
def _blackhole() -> Iterator[str]:
    """An address whose packets are dropped: a listener whose queue is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        callers = [socket.socket() for _ in range(4)]
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for caller in callers:
            caller.close()


def test_a_server_killed_in_the_middle_costs_nothing(serve: Serve, pair: Pair) -> None:
    victim = serve(token=TOKEN)
    victim.fault("slow", seconds=0.3)
    with client_of(victim, pair[1], chunk_images=2) as client:
        client.wait_ready(5)
        future = client.submit(samples())
        time.sleep(0.2)
        victim.process.kill()
        batch = future.result()
    assert_exact(batch)
    assert batch.stats["ejections"] > 0


def test_servers_that_die_and_come_back_are_found_again(serve: Serve) -> None:
    ports = [free_port(), free_port()]
    servers = [serve(token=TOKEN, port=port) for port in ports]
    for server in servers:
        server.fault("slow", seconds=0.3)
    with client_of(*servers, deadline_seconds=20) as client:
        client.wait_ready(5)
        future = client.submit(samples())
        time.sleep(0.2)
        for server in servers:
            server.process.kill()
        time.sleep(0.5)
        for port in ports:
            serve(token=TOKEN, port=port)
        assert_exact(future.result())


def test_with_nobody_there_the_deadline_holds_and_waiting_later_succeeds(serve: Serve) -> None:
    port = free_port()
    with client_of(f"http://127.0.0.1:{port}", deadline_seconds=0.7) as client:
        started = time.monotonic()
        with pytest.raises(RewardUnavailableError, match=r"no reward server is ready.*Connect"):
            client.submit(samples()).result()
        assert time.monotonic() - started < 2
        threading.Timer(0.3, lambda: serve(token=TOKEN, port=port, settings={"load_seconds": 0.5})).start()
        client.wait_ready(20)
        assert_exact(client.submit(samples()).result())


@pytest.mark.slow
def test_waiting_for_its_turn_is_no_silence_of_the_servers(serve: Serve) -> None:
    """Pieces of an iteration are submitted faster than a slow reward scores them."""
    slow = serve(token=TOKEN, settings={"seconds": 0.3})
    with client_of(slow, deadline_seconds=2, in_flight=1) as client:
        client.wait_ready(5)
        pieces = [client.submit(samples(8)) for _ in range(8)]
        for piece in pieces:
            assert_exact(piece.result(), 8)
        slow.process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        pieces = [client.submit(samples(8)) for _ in range(2)]
        for piece in pieces:
            with pytest.raises(RewardUnavailableError, match="8 of 8 images have no score"):
                piece.result()
        assert time.monotonic() - started < 6


def test_a_reward_that_cannot_score_now_is_waited_for(pair: Pair, tmp_path: Path) -> None:
    """A judge, say, whose model is being loaded: its images are not missing, they can be had later."""
    with client_of(pair[0]) as client:
        assert_exact(client.submit(samples(4, {2: f"away once {tmp_path / 'back'}"})).result(), 4)
    with (
        client_of(pair[0], deadline_seconds=0.5) as client,
        pytest.raises(RewardUnavailableError, match=r"503: the reward cannot score now"),
    ):
        client.submit(samples(4, {2: "away"})).result()


# --- what asking again does not help -------------------------------------------------------------------------------


def test_a_wrong_token_is_fatal_at_once(pair: Pair) -> None:
    with client_of(*pair) as client:
        client.wait_ready(5)
        client._transport._session.headers["Authorization"] = "Bearer " + "w" * 40
        started = time.monotonic()
        with pytest.raises(RewardRefusedError, match=r"401: a valid token is needed.*give the token of that server"):
            client.submit([Sample(str(n), "", picture(n, 512)) for n in range(8)]).result()
        assert time.monotonic() - started < 1
        assert sum(server.fault() for server in pair) == 1
    with client_of(*pair, token="w" * 40) as client, pytest.raises(RewardRefusedError, match="401"):
        client.wait_ready(5)


@pytest.mark.parametrize("status", [302, 400, 404, 413, 415])
def test_a_refusal_is_fatal_at_once(status: int, pair: Pair) -> None:
    for server in pair:
        server.fault("status", status=status, headers={"Location": pair[0].url})
    with client_of(*pair) as client:
        with pytest.raises(RewardRefusedError, match=f"{status}: ordered by the test"):
            client.submit(samples(8)).result()
        assert sum(server.fault() for server in pair) == 1


def test_another_version_is_fatal(pair: Pair) -> None:
    for server in pair:
        server.fault("edit", edit="version")
    with client_of(*pair) as client, pytest.raises(RewardRefusedError, match="answered in version 2"):
        client.submit(samples()).result()


def test_servers_with_different_weights_are_refused(serve: Serve, pair: Pair) -> None:
    other = serve(token=TOKEN, settings={"fingerprint": "ordered@2"})
    with client_of(pair[0], other) as client, pytest.raises(RewardRefusedError, match=r"ordered@[12].*ordered@[12]"):
        client.wait_ready(5)
    toy = serve("jpeg_size", token=TOKEN)
    with client_of(pair[0], toy) as client, pytest.raises(RewardRefusedError, match="jpeg_size"):
        client.wait_ready(5)


def test_a_server_restarted_with_other_weights_is_refused(serve: Serve) -> None:
    port = free_port()
    first = serve(token=TOKEN, port=port)
    with client_of(first) as client:
        assert_exact(client.submit(samples()).result())
        first.process.kill()
        first.process.wait()
        serve(token=TOKEN, port=port, settings={"fingerprint": "ordered@2"})
        with pytest.raises(RewardRefusedError, match=r"ordered@2.*ordered@1.*weights that the run began with"):
            client.submit(samples()).result()
        with pytest.raises(RewardRefusedError, match="ordered@2"):
            client.wait_ready(5)


def test_a_token_can_be_replaced_while_servers_run(serve: Serve, tmp_path: Path) -> None:
    old, new, file = "o" * 40, "n" * 40, tmp_path / "token"

    def write(text: str) -> None:
        file.write_text(text)
        file.chmod(0o600)

    def works(token: str) -> bool:
        with client_of(server, token=token) as client:
            try:
                return client.submit(samples(3)).result().reasons == [None] * 3
            except RewardRefusedError:
                return False

    write(old + "\n")
    server = serve(token=old, token_file=file)
    assert (works(old), works(new)) == (True, False)
    write(f"{old}\n{new}\n")
    assert (works(old), works(new)) == (True, True)
    write(new)
    assert (works(old), works(new)) == (False, True)
    for useless in ("", "short"):
        write(useless)
        assert (works(old), works(new)) == (False, True)
    file.unlink()
    assert (works(old), works(new)) == (False, True)


# --- the client itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "urls",
    [
        [],
        ["localhost:9001"],
        ["ftp://a:1"],
        ["http://a:1/v1"],
        ["http://a:1#x"],
        ["http://a:1", "http://a:1/"],
        ["http://a:65536"],
        ["http://a:0"],
        ["http://a:b"],
        ["http://[::1"],
        ["http://user:secret@a:1"],
        ["http://secret@a:1"],
        ["ftp://user:se/c@ret@a:1", "http://a:1"],
        ["user:secret@a:1"],
    ],
)
def test_mistakes_in_addresses_are_named(urls: list[str]) -> None:
    """And passwords are not repeated."""
    with pytest.raises(ValueError, match="url") as caught:
        RemoteClient(urls)
    assert "ret" not in str(caught.value).replace("secrets", "")


@pytest.mark.parametrize("token", ["two\nlines", "\u00e9" * 40, "with space"])
def test_a_token_that_no_header_can_carry_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="token") as caught:
        RemoteClient(["http://a:1"], token=token)
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"deadline_seconds": 0}, {"chunk_images": -1}, {"hedge_seconds": -1}, {"attempt_seconds": 0}]
    + [
        {name: value}
        for name in ("deadline_seconds", "hedge_seconds", "cool_seconds")
        for value in (math.nan, math.inf)
    ],
)
def test_mistakes_in_settings_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        RemoteSettings(**change)


def test_what_no_request_can_carry_is_missing_alone(pair: Pair) -> None:
    own = samples(6, {1: "x" * 8193, 2: "\ud800"})
    own[3] = Sample("image 3", "", picture(3, 8))
    own[4] = Sample("i" * 65, "", picture(4))  # of no concern to anybody else
    with client_of(*pair) as client:
        batch = client.submit(own).result()
    assert_exact(batch, 6, dict.fromkeys((1, 2, 3), "unsupported_item"))
    assert "8192" in (batch.reasons[1] or "")


def test_what_cannot_be_scored_is_refused_by_submit(pair: Pair) -> None:
    with client_of(*pair) as client:
        with pytest.raises(ValueError, match="ids"):
            client.submit([Sample("a", "", picture(1)), Sample("a", "", picture(2))])
        with pytest.raises(ValueError, match="float32"):
            client.submit([Sample("a", "", picture(1).astype(np.float32))])  # type: ignore[arg-type]


def test_closing_cancels_and_can_be_repeated(pair: Pair) -> None:
    for server in pair:
        server.fault("slow", seconds=30)
    with client_of(*pair) as client:
        client.wait_ready(5)
        future = client.submit(samples())
        time.sleep(0.2)
        client.close()
        client.close()
        assert future.cancelled()
        with pytest.raises(RuntimeError, match="closed"):
            client.submit(samples())


def test_a_client_keeps_no_failed_process_alive(pair: Pair, plugin: Path) -> None:
    pair[0].fault("slow", seconds=60)
    code = (
        "import numpy as np; from rewards.client.remote import RemoteClient; from rewards.contract import Sample;"
        f"c = RemoteClient(['{pair[0].url}'], token='{TOKEN}'); c.wait_ready(5);"
        "c.submit([Sample('a', '', np.zeros((16, 16, 3), np.uint8))]); raise RuntimeError('elsewhere')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(plugin),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    assert done.returncode == 1
    assert "RuntimeError: elsewhere" in done.stderr


def test_a_client_leaves_no_open_files(pair: Pair) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    with client_of(*pair) as client:
        client.submit(samples()).result()
    before = opened()
    for _ in range(3):
        with client_of(*pair) as client:
            client.submit(samples()).result()
    assert opened() <= before
