"""Servers that a run starts: they come back when they die, and die when the run does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards import ping, serve
from rewards.client import supervisor as module
from rewards.client.batch import RewardUnavailableError
from rewards.client.remote import RemoteClient, RemoteSettings
from rewards.client.supervisor import LocalServers
from tests.serving.conftest import ROOT, TOKEN, Server, environment
from tests.serving.test_client import assert_exact, samples

Make = Callable[..., LocalServers]


@pytest.fixture
def local(plugin: Path, tmp_path: Path) -> Iterator[Make]:
    """Starts supervised servers of ordered.py, and ends them after the test."""
    made: list[LocalServers] = []

    def make(name: str = "ordered", *, count: int = 1, **changes: Any) -> LocalServers:
        own = {"settings": {}, "environment": {"PYTHONPATH": environment(plugin)["PYTHONPATH"]}} | changes
        servers = LocalServers(name, devices=["cpu"] * count, log_folder=tmp_path / "logs", **own)
        made.append(servers)
        return servers.start()

    yield make
    for servers in made:
        servers.close()


def client_of(servers: LocalServers, **settings: Any) -> RemoteClient:
    chosen = {"deadline_seconds": 30, "cool_seconds": 0.2} | settings
    return RemoteClient(servers.urls, token=servers.token, settings=RemoteSettings(**chosen))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_servers_score_until_they_are_closed(local: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """They know neither their place in a distributed run nor a token that others can read."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    servers = local(count=2)
    servers.wait_ready(30)
    processes = servers.processes
    assert len(set(processes)) == len(set(servers.urls)) == 2
    client = client_of(servers)
    assert_exact(client.submit(samples()).result())
    client.close()
    for pid in processes:
        seen = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
        assert servers.token.encode() not in seen
        names = {pair.split(b"=")[0] for pair in seen.split(b"\0")}
        assert not names & {b"RANK", b"LOCAL_RANK", b"WORLD_SIZE", b"MASTER_ADDR", b"MASTER_PORT"}
        assert b"CUDA_VISIBLE_DEVICES=\0" in seen
    stranger = RemoteClient(servers.urls, settings=RemoteSettings(deadline_seconds=5))
    with pytest.raises(RuntimeError, match="401"):
        stranger.wait_ready(5)
    stranger.close()
    servers.close()
    servers.close()
    assert not any(alive(pid) for pid in processes)


def test_a_killed_server_comes_back_at_its_address_and_no_score_is_lost(local: Make) -> None:
    servers = local(settings={"seconds": 0.1})
    servers.wait_ready(30)
    (old,) = servers.processes
    client = client_of(servers, chunk_images=4)
    future = client.submit(samples())
    time.sleep(0.3)
    os.kill(old, signal.SIGKILL)
    assert_exact(future.result())
    (new,) = servers.processes
    assert new != old
    client.close()


@pytest.mark.parametrize(
    ("how", "said"),
    [("hang", "the scorer hangs"), pytest.param("stick", "Timeout (0:00:02", marks=pytest.mark.slow)],
)
def test_a_scorer_that_hangs_once_costs_nothing(how: str, said: str, local: Make, tmp_path: Path) -> None:
    """A watchdog of the server ends it, also where no thread of it can run; the supervisor starts it again, the client
    asks again."""
    servers = local(limits={"batch_seconds": 0.5 if how == "hang" else 1.7})
    servers.wait_ready(30)
    client = client_of(servers)
    assert_exact(client.submit(samples(prompts={7: f"{how} once {tmp_path / 'flag'}"})).result())
    assert said in (tmp_path / "logs/ordered-0.log").read_text()
    client.close()


def test_a_lost_gpu_ends_the_server_and_a_new_one_scores(local: Make, tmp_path: Path) -> None:
    servers = local()
    servers.wait_ready(30)
    (old,) = servers.processes
    client = client_of(servers, deadline_seconds=1)
    with pytest.raises(RewardUnavailableError):
        client.submit(samples(3, prompts={0: "lose the GPU"})).result()
    client.close()
    wait_until(lambda: servers.processes not in ([], [old]))
    assert "the GPU is lost" in (tmp_path / "logs/ordered-0.log").read_text()


def test_while_a_server_is_down_its_port_is_kept_and_callers_are_refused(local: Make) -> None:
    servers = local()
    servers.wait_ready(30)
    port = int(servers.urls[0].rsplit(":", 1)[1])
    (old,) = servers.processes
    servers._closing.set()  # nobody starts it again
    servers._watcher.join()
    os.kill(old, signal.SIGKILL)
    process = servers._servers[0].process
    assert process is not None
    process.wait(10)  # until its last thread is gone, and with it its sockets
    with socket.socket() as squatter, pytest.raises(OSError, match="in use"):
        squatter.bind(("127.0.0.1", port))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_a_mistake_in_the_settings_is_told_at_once(local: Make) -> None:
    servers = local(settings={"sconds": 1})
    started = time.monotonic()
    with pytest.raises(RewardUnavailableError, match=r"(?s)reward ordered on cpu ended.*sconds"):
        servers.wait_ready(60)
    assert time.monotonic() - started < 10


LACKING = """#!{python}
import runpy, sys
class Lacks:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "{library}":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Lacks())
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("library", ["rewards", "numpy", "uvicorn"])
def test_an_environment_that_lacks_something_is_named_at_once(library: str, local: Make, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(LACKING.format(python=sys.executable, library=library))
    python.chmod(0o755)
    servers = local(python=python)
    expected = rf"ended, and starting.*python={python} lacks {library}:.*make_reward_env\.sh ordered"
    with pytest.raises(RewardUnavailableError, match=expected):
        servers.wait_ready(60)
    assert servers._servers[0].restarts == 0


def test_a_reward_that_cannot_be_loaded_is_tried_some_times_and_told(
    local: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_MOST_RESTARTS", 1)
    servers = local(settings={"broken": True})
    with pytest.raises(RewardUnavailableError, match=r"(?s)ended, and starting it again.*the weights are damaged"):
        servers.wait_ready(60)
    assert (tmp_path / "logs/ordered-0.log").read_text().count("could not be loaded") == 2


def test_a_server_that_takes_too_long_is_told(local: Make) -> None:
    with pytest.raises(RewardUnavailableError, match="not ready after 0 s"):
        local(settings={"load_seconds": 30}).wait_ready(0.4)


def test_an_interpreter_that_does_not_exist_is_told(local: Make) -> None:
    with pytest.raises(OSError, match="no-such-python"):
        local(python="/no-such-python")


TRAINER = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
from rewards.client.supervisor import LocalServers
servers = LocalServers("ordered", settings={}, devices=["cpu"] * 2, log_folder=Path(sys.argv[1])).start()
servers.wait_ready(30)
if sys.argv[2] == "stuck":
    from rewards.client.remote import RemoteClient
    from rewards.contract import Sample
    import numpy
    client = RemoteClient(servers.urls[:1], token=servers.token)
    client.submit([Sample("a", "stick", numpy.zeros((16, 16, 3), numpy.uint8))])
    time.sleep(0.7)
    os.kill(servers.processes[1], signal.SIGSTOP)
print(*servers.processes, flush=True)
if sys.argv[2] == "raise":
    raise RuntimeError("elsewhere")
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("end", "what"),
    [
        (signal.SIGKILL, "sleep"),
        (signal.SIGTERM, "sleep"),
        (signal.SIGINT, "sleep"),
        (None, "raise"),
        pytest.param(
            signal.SIGKILL, "stuck", marks=pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux")
        ),
    ],
)
def test_no_server_outlives_the_run(end: signal.Signals | None, what: str, plugin: Path, tmp_path: Path) -> None:
    """Not even one whose interpreter is stuck in one call of C, nor one that is stopped."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path), what],
        env=environment(plugin),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert trainer.stdout is not None
    servers = [int(word) for word in trainer.stdout.readline().split()]
    assert len(servers) == 2
    assert all(alive(pid) for pid in servers)
    try:
        if end is not None:
            trainer.send_signal(end)
        trainer.wait(timeout=10)
        trainer.stdout.close()
        wait_until(lambda: not any(alive(pid) for pid in servers), 10)
    finally:
        for pid in filter(alive, servers):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("device", "seen", "shown"),
    [
        ("cpu", None, ""),
        ("cpu", "0,1", ""),
        ("cuda:1", None, "1"),
        ("cuda:1", "4,7", "7"),
        ("cuda:0", "GPU-a1", "GPU-a1"),
    ],
)
def test_a_server_sees_its_device_only(
    device: str, seen: str | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert module._environment(device, {})["CUDA_VISIBLE_DEVICES"] == shown


@pytest.mark.parametrize("device", ["cuda", "gpu:1", "cuda:x", "cuda:2"])
def test_mistakes_in_devices_are_named(device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with pytest.raises(ValueError, match=device):
        LocalServers("ordered", settings={}, devices=[device], log_folder=tmp_path)
    with pytest.raises(ValueError, match="devices"):
        LocalServers("ordered", settings={}, devices=[], log_folder=tmp_path)


# --- the command lines ---------------------------------------------------------------------------------------------


def test_ping_says_what_is_served(
    pair: tuple[Server, Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    urls = [server.url for server in pair]
    assert ping.main([*urls, "--token-file", str(file)]) == 0
    said = capsys.readouterr().out
    assert said.count("ordered@1") == 2
    assert "a picture    ordered 0," in said
    assert ping.main([urls[0]]) == 1
    assert "401" in capsys.readouterr().err
    assert ping.main(["http://127.0.0.1:9", "--seconds", "0.3"]) == 1
    assert "no reward server is ready" in capsys.readouterr().err
    assert ping.main(["nonsense"]) == 2


def test_ping_compares_fingerprints(serve: Callable[..., Server], capsys: pytest.CaptureFixture[str]) -> None:
    servers = [serve(settings={"fingerprint": text}) for text in "ab"]
    assert ping.main([server.url for server in servers]) == 1
    assert "the fingerprints differ" in capsys.readouterr().err


def test_print_info_says_what_a_reward_is_without_loading_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["jpeg_size", "--print-info"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["name"], info["metrics"], info["max_batch"]) == ("jpeg_size", ["jpeg_size"], 64)


def test_a_port_in_use_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert serve.main(["jpeg_size", "--port", str(other.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err
