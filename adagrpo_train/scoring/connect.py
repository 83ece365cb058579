"""From what a run says of its rewards to clients that answer: in this process, on servers of its own, or elsewhere."""

import stat
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from adagrpo_train.errors import RewardError
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.scoring.collector import Source
from adagrpo_train.scoring.entry import RewardEntry
from rewards import registry
from rewards.client.batch import RewardClient, RewardRefusedError, RewardUnavailableError
from rewards.client.inproc import InprocClient
from rewards.contract import Reward

Endpoints = dict[str, tuple[list[str], str]]
"""Reward -> addresses and token of this node's servers."""


class Rewards:
    """The rewards of a run, ready to score.

    Args:
        entries: at least one.
        engine: the first process of every node starts that node's local servers; every process connects.
        log_dir: where the servers write their logs.

    Raises:
        ConfigError: an unknown plug-in, a setting it does not have, a token file that cannot be used, or servers of
            another reward.
        RewardError: a reward does not get ready in time, or is not the same for all processes. All on every rank,
            whichever it happened on.
    """

    def __init__(self, entries: Sequence[RewardEntry], *, engine: Engine, log_dir: Path) -> None:
        self._stack, self._engine, self._log_dir = ExitStack(), engine, log_dir
        try:
            local = [entry for entry in entries if entry.mode == "local"]
            started = engine.together(lambda: self._start(local) if engine.local_rank == 0 else {})
            endpoints = engine.gather_objects(started)[engine.rank - engine.local_rank]
            self.sources = engine.together(
                lambda: [Source(entry, self._connect(entry, endpoints)) for entry in entries]
            )
            self._check_equal_everywhere()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End clients, then the servers that were started for them."""
        self._stack.close()

    def _check_equal_everywhere(self) -> None:
        """Samples of all processes are compared with each other, so one reward must have scored them all."""
        own = {source.entry.name: source.client.fingerprint for source in self.sources}
        everyone = self._engine.gather_objects(own)
        for rank, others in enumerate(everyone):
            for name, fingerprint in everyone[0].items():
                if others[name] != fingerprint:
                    error = RewardError(
                        f"reward {name} is {fingerprint} for process 0 and {others[name]} for process {rank}; give all "
                        "nodes the same weights and library versions, or serve it in one place"
                    )
                    error.on_every_rank = True
                    raise error

    def _start(self, entries: Sequence[RewardEntry]) -> Endpoints:
        from rewards.client.supervisor import LocalServers

        started: list[tuple[RewardEntry, LocalServers]] = []
        for entry in entries:
            if entry.python is None:
                make(entry)  # a mistake in its settings is found here, not in the log of a server
            try:
                servers = LocalServers(
                    entry.reward,
                    settings=entry.settings,
                    devices=entry.devices or ["cpu"],
                    log_folder=self._log_dir / entry.name,
                    python=entry.python or sys.executable,
                )
            except ValueError as error:
                raise entry.error("devices", str(error)) from error
            self._stack.callback(servers.close)
            try:
                servers.start()
            except OSError as error:
                raise entry.error("python", f"cannot be started: {error}") from error
            started.append((entry, servers))
        for entry, servers in started:  # all load at once
            try:
                servers.wait_ready(entry.startup_seconds)
            except RewardUnavailableError as error:
                raise RewardError(f"reward {entry.name}: {error}") from error
        return {entry.name: (servers.urls, servers.token) for entry, servers in started}

    def _connect(self, entry: RewardEntry, endpoints: Endpoints) -> RewardClient:
        if entry.mode == "inproc":
            client: RewardClient = InprocClient(
                make(entry),
                device=entry.device or str(self._engine.device),
                deadline_seconds=entry.deadline_seconds,
            )
        else:
            client = _remote(entry, *(endpoints[entry.name] if entry.mode == "local" else (entry.urls, _token(entry))))
        self._stack.callback(client.close)
        try:
            client.wait_ready(entry.startup_seconds)
        except RewardUnavailableError as error:
            raise RewardError(
                f"reward {entry.name}: {error}; not ready after reward.{entry.name}.startup_seconds="
                f"{entry.startup_seconds}"
            ) from error
        except RewardRefusedError as error:
            raise RewardError(f"reward {entry.name}: {error}") from error
        except Exception as error:
            raise RewardError(f"reward {entry.name} could not be loaded: {type(error).__name__}: {error}") from error
        if entry.mode == "remote" and client.info.name != entry.reward:
            # Metrics do not tell: several rewards call theirs "score".
            raise entry.error("urls", f"the reward served there is {client.info.name}, not {entry.reward}")
        return client


def _remote(entry: RewardEntry, urls: list[str], token: str | None) -> RewardClient:
    try:
        from rewards.client.remote import RemoteClient, RemoteSettings
    except ImportError as error:
        raise entry.error("mode", f"needs the client extra, pip install 'adagrpo-train[client]' ({error})") from error
    settings = RemoteSettings(deadline_seconds=entry.deadline_seconds, hedge_seconds=entry.hedge_seconds)
    try:
        return RemoteClient(urls, token=token, settings=settings)
    except ValueError as error:
        raise entry.error("urls", str(error)) from error


def make(entry: RewardEntry) -> Reward:
    """The plug-in of an entry, not loaded yet.

    Raises:
        ConfigError: it is not known, or a setting is not one of its own.
    """
    try:
        return registry.make(entry.reward, entry.settings)
    except registry.UnknownRewardError as error:
        raise entry.error("reward", str(error)) from error
    except (TypeError, ValueError) as error:
        raise entry.error("settings", str(error)) from error


def _token(entry: RewardEntry) -> str | None:
    if entry.token_file is None:
        return None
    path = Path(entry.token_file).expanduser()
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise entry.error("token_file", f"others can read it; chmod 600 {path}")
        token = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise entry.error("token_file", str(error)) from error
    if not token:
        raise entry.error("token_file", "the first line is empty; the token belongs there")
    return token
