"""Reward servers that a run starts, watches and ends."""

import http.client
import json
import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rewards.client.batch import RewardUnavailableError

_HOST = "127.0.0.1"
_POLL_SECONDS = 0.1
_TOKEN_BYTES = 32
_MOST_RESTARTS = 5  # in a row
_LONGEST_PAUSE_SECONDS = 30.0
_CLOSE_SECONDS = 10.0
_USAGE_ERROR = 2  # exit status after a mistake in the arguments: starting again changes nothing
_TAIL_BYTES = 2000
_LACKING = r"No module named '?([\w.]+).*\Z"  # regular expression, in the last line of a log
# What tells a process of a distributed run its place in it. A server has none.
_RANK_PREFIXES = ("MASTER_", "TORCHELASTIC_", "ACCELERATE_", "DEEPSPEED_", "OMPI_", "PMI_", "SLURM_PROCID")
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "NODE_RANK")

_log = logging.getLogger(__name__)


@dataclass
class _Server:
    device: str
    log: Path
    reservation: socket.socket
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0  # of time.monotonic(), as below
    restarts: int = 0  # in a row
    start_again_at: float | None = None
    given_up: bool = False

    @property
    def port(self) -> int:
        return int(self.reservation.getsockname()[1])


class LocalServers:
    """Servers of one reward on this machine, one per device.

    Their ports are reserved by sockets of this process, which do not listen: nobody else gets a port while its
    server is being restarted, and callers are refused at once instead of waiting. Servers end when this process
    does, however it does. Start them before any process is forked from this one: a fork that outlives it would keep
    them alive.

    Args:
        name: of the reward.
        settings: of the reward.
        devices: "cpu" or "cuda:N" of each server; N counts within this process's CUDA_VISIBLE_DEVICES.
        log_folder: gets a log file per server.
        python: interpreter of the environment that holds the reward.
        limits: of the servers, where they differ from the default ones.
        environment: variables of the servers, in addition to those of this process.
        steady_seconds: a server that ran so long was started well; restarts before that no longer count.

    Raises:
        ValueError: no device, or one that is neither "cpu" nor "cuda:N" of a GPU that this process sees.
    """

    def __init__(
        self,
        name: str,
        *,
        settings: Mapping[str, Any],
        devices: Sequence[str],
        log_folder: Path,
        python: str | os.PathLike[str] = sys.executable,
        limits: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        steady_seconds: float = 60.0,
    ) -> None:
        if not devices:
            raise ValueError("devices is empty: name one per server")
        self._name, self._python = name, os.fspath(python)
        self._options = ["--settings", json.dumps(dict(settings)), "--limits", json.dumps(dict(limits or {}))]
        self._environments = {device: _environment(device, environment or {}) for device in devices}
        self._steady_seconds = steady_seconds
        self._token = secrets.token_hex(_TOKEN_BYTES)
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name=f"servers-{name}", daemon=True)
        log_folder.mkdir(parents=True, exist_ok=True)
        self._servers = [
            _Server(device, log_folder / f"{name}-{n}.log", _reserved_port()) for n, device in enumerate(devices)
        ]

    @property
    def urls(self) -> list[str]:
        """Addresses, which stay the same when servers are restarted."""
        return [f"http://{_HOST}:{server.port}" for server in self._servers]

    @property
    def token(self) -> str:
        """What clients must show. Known to this process and its servers only."""
        return self._token

    @property
    def processes(self) -> list[int]:
        """Process numbers of the servers that run now."""
        return [s.process.pid for s in self._servers if s.process is not None and s.process.poll() is None]

    def start(self) -> Self:
        """Start the servers, and a thread that restarts those that end. Returns at once.

        Raises:
            OSError: the interpreter cannot be started.
        """
        try:
            for server in self._servers:
                self._launch(server)
        except OSError:
            self.close()
            raise
        self._watcher.start()
        return self

    def wait_ready(self, seconds: float) -> None:
        """Return when every server is ready to score.

        Raises:
            RewardUnavailableError: one is not, or has ended too often; the text holds the end of its log.
        """
        deadline = time.monotonic() + seconds
        for server in self._servers:
            while not _is_ready(server.port):
                if server.given_up:
                    raise self._failure(server, "ended, and starting it again does not help")
                if time.monotonic() > deadline:
                    raise self._failure(server, f"is not ready after {seconds:.0f} s")
                time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """End the servers: politely, and after some seconds by force."""
        self._closing.set()
        if self._watcher.is_alive():
            self._watcher.join()
        running = [server.process for server in self._servers if server.process is not None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
        for server in self._servers:
            server.reservation.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _launch(self, server: _Server) -> None:
        local = "cuda:0" if server.device.startswith("cuda") else server.device
        command = [self._python, "-m", "rewards.serve", self._name, "--host", _HOST, "--port", str(server.port)]
        command += ["--device", local, *self._options, "--token-stdin", "--exit-with-stdin", "--reuse-port"]
        with server.log.open("ab") as log:
            server.process = subprocess.Popen(
                command,
                env=self._environments[server.device],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the trainer, which may still need scores to end well
            )
        server.started_at = time.monotonic()
        assert server.process.stdin is not None  # asked for above
        try:
            server.process.stdin.write(f"{self._token}\n".encode())
            server.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended already; the watcher will see

    def _watch(self) -> None:
        while not self._closing.wait(_POLL_SECONDS):
            for server in self._servers:
                self._look_after(server)

    def _look_after(self, server: _Server) -> None:
        if server.given_up or server.process is None:
            return
        now = time.monotonic()
        if server.start_again_at is not None:
            if now >= server.start_again_at:
                server.start_again_at = None
                try:
                    self._launch(server)
                except OSError as error:  # the next look finds the old process ended, and counts another start
                    _log.warning("reward server %s could not be started: %s", self._name, error)
            return
        status = server.process.poll()
        if status is None:
            return
        if server.process.stdin is not None:
            server.process.stdin.close()
        if now - server.started_at > self._steady_seconds:
            server.restarts = 0
        # An environment that lacks the server itself ends before the server could say so by its status.
        lacking = status == 1 and re.search(_LACKING, _tail(server.log))
        if status == _USAGE_ERROR or lacking or server.restarts == _MOST_RESTARTS:
            server.given_up = True
            _log.critical("%s", self._failure(server, f"ended with status {status}, for good"))
            return
        pause = min(_LONGEST_PAUSE_SECONDS, 0.5 * 2**server.restarts)
        server.restarts += 1
        server.start_again_at = now + pause
        _log.warning("reward server %s ended with status %s; starting it again in %.1f s", self._name, status, pause)

    def _failure(self, server: _Server, what: str) -> RewardUnavailableError:
        tail = _tail(server.log)
        lacking = re.search(_LACKING, tail)
        remedy = (
            f" python={self._python} lacks {lacking[1]}: make an environment by `bash scripts/make_reward_env.sh "
            f"{self._name}` and set python to the path that it prints."
            if lacking
            else ""
        )
        return RewardUnavailableError(
            f"the server of reward {self._name} on {server.device} {what}.{remedy} {server.log} ends with:\n{tail}"
        )


def _environment(device: str, additional: Mapping[str, str]) -> dict[str, str]:
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in _RANK_VARIABLES and not name.startswith(_RANK_PREFIXES)
    }
    return own | {"CUDA_VISIBLE_DEVICES": _visible_device(device)} | dict(additional)


def _visible_device(device: str) -> str:
    """The one GPU that a server may see, by the name that CUDA_VISIBLE_DEVICES takes; "" for none."""
    if device == "cpu":
        return ""
    kind, _, number = device.partition(":")
    if kind != "cuda" or not number.isdecimal():
        raise ValueError(f"device {device!r}: expected cpu or cuda:N")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is None:
        return number
    names = [name.strip() for name in seen.split(",") if name.strip()]
    if int(number) >= len(names):
        raise ValueError(f"device {device!r}: CUDA_VISIBLE_DEVICES={seen!r} shows {len(names)} GPUs")
    return names[int(number)]


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace").strip()
    except OSError as error:
        return f"({error})"


def _reserved_port() -> socket.socket:
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reservation.bind((_HOST, 0))
    return reservation


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection(_HOST, port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
