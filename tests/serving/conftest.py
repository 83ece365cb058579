"""Real servers in processes of their own, on free ports of the loopback."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOKEN = "t" * 40
LIMITS = {"body_bytes": 8_000_000}


@dataclass
class Server:
    """A running `python -m rewards.serve`, with the faults of faults.py on demand."""

    process: subprocess.Popen[str]
    port: int
    log: Path
    token: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET with the token."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=5) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def fault(self, kind: str = "", *, share: float = 1.0, times: int = 10**9, **details: Any) -> int:
        """From now on strike this share of the requests for scores, at most so often.

        Returns:
            How many of them came since the last call.
        """
        fault = {"kind": kind, "share": share, "times": times} | details
        request = urllib.request.Request(f"{self.url}/fault", json.dumps(fault).encode())
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.read())

    def wait_until(self, path: str, status: int = 200, seconds: float = 30) -> None:
        """Poll a path until it answers with this status."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if self.get(path)[0] == status:
                    return
            except OSError:
                pass
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with installed packages that announce the reward of ordered.py, and one that lacks a library."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copy(Path(__file__).parent / "ordered.py", folder / "ordered_reward.py")
    (folder / "broken_reward.py").write_text("import no_such_library\n")
    for name, kind in (("ordered", "Ordered"), ("broken", "Broken")):
        metadata = folder / f"{name}_reward-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-reward\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[adagrpo.rewards]\n{name} = {name}_reward:{kind}\n")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(plugin: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{plugin}", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def serve(plugin: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers, and ends them after the test."""
    yield from _servers(plugin, tmp_path)


@pytest.fixture(scope="session")
def replicas(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Two servers of one reward that live through all tests."""
    for start in _servers(plugin, tmp_path_factory.mktemp("replicas")):
        yield start(token=TOKEN, limits=LIMITS), start(token=TOKEN, limits=LIMITS)


@pytest.fixture
def pair(replicas: tuple[Server, Server]) -> tuple[Server, Server]:
    """The two servers, without a fault so far."""
    for server in replicas:
        server.fault()
    return replicas


def _servers(plugin: Path, folder: Path) -> Iterator[Callable[..., Server]]:
    running: list[Server] = []

    def start(
        name: str = "ordered",
        *,
        settings: dict[str, Any] | None = None,
        limits: dict[str, Any] | None = None,
        token: str | None = None,
        token_file: Path | None = None,
        port: int | None = None,
        ready: bool = True,
    ) -> Server:
        port, log = port or free_port(), folder / f"server{len(running)}.log"
        command = [sys.executable, "-m", "tests.serving.faults", name, "--port", str(port), "--exit-with-stdin"]
        command += ["--settings", json.dumps(settings or {}), "--limits", json.dumps(limits or {})]
        command += ["--token-file", str(token_file)] if token_file else ["--token-stdin"] if token else []
        with log.open("w") as output:
            process = subprocess.Popen(
                command, env=environment(plugin), stdin=subprocess.PIPE, stdout=output, stderr=output, text=True
            )
        server = Server(process, port, log, token)
        running.append(server)
        assert process.stdin is not None
        if token and not token_file:
            process.stdin.write(token + "\n")
            process.stdin.flush()
        server.wait_until("/readyz" if ready else "/healthz")
        return server

    yield start
    for server in running:
        server.process.kill()
        server.process.communicate()
