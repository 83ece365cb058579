"""Whole runs of the command line.

A run of the smallest settings takes two seconds, and the imports before it five. So most runs here are forks of one
process that has imported everything and done nothing else; `shell=True` starts one as a user would.
"""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from adagrpo_train.runtime import checkpoint

ROOT = Path(__file__).parents[1]
BASE = ["debug=smoke", "adagrpo=on", "curriculum.candidates=4", "micro_batch=6", "optimizer.lr=1e-3"]
IMPORTS = [
    "tests.runs",
    "adagrpo_train.cli.evaluate",
    "adagrpo_train.cli.subjects",
    "adagrpo_train.reports.evaluation",
    "adagrpo_train.reports.tables",
    "adagrpo_train.cli.train",
    "adagrpo_train.build",
    "adagrpo_train.reports.run_page",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "peft.tuners",
    "scipy.stats",
    "torch._dynamo",
]


def environment() -> dict[str, str]:
    extra = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return os.environ | extra


def command(*overrides: str, processes: int = 1) -> list[str]:
    """What a user would write in a shell."""
    module = ["-m", "adagrpo_train", *BASE, *overrides]
    if processes == 1:
        return [sys.executable, *module]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    launch += ["--num_processes", str(processes), "--main_process_port", "0"]
    return [*launch, "--mixed_precision", "no", "--dynamo_backend", "no", *module]


@dataclass(frozen=True)
class Strike:
    """What befalls a run, in the middle of an iteration and always in the same place.

    Args:
        method: of the trainer; the blow falls before it.
        call: which call of it, from 1.
        blow: `end_oneself` or `end_servers`.
    """

    method: str
    call: int
    blow: Callable[[], None]

    def prepare(self) -> None:
        from adagrpo_train.trainer import Trainer

        original, calls = getattr(Trainer, self.method), 0

        def struck(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call:
                self.blow()
            return original(*arguments, **named)

        setattr(Trainer, self.method, struck)


def end_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_servers() -> None:
    """SIGKILL for every server of rewards that this process has started."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    servers = [pid for path in children for pid in path.read_text().split() if "rewards.serve" in _command_line(pid)]
    assert servers
    for pid in servers:
        os.kill(int(pid), signal.SIGKILL)


def servers_of(mark: str) -> list[int]:
    """Servers of rewards with this text among their variables: those of one run, whoever else has some."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and "rewards.serve" in _command_line(entry.name):
            try:
                variables = (entry / "environ").read_bytes()
            except OSError:
                continue  # it has just ended
            if mark.encode() in variables:
                found.append(int(entry.name))
    return found


def _command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


class Forks:
    """The processes of a run that go on beside the test."""

    def __init__(self, processes: list[BaseProcess], output: list[Any]) -> None:
        self._processes, self._output = processes, output

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid]

    def wait(self, seconds: float = 600) -> list[int]:
        """Exit statuses, minus the signal of a process that one ended. Nothing runs any more afterwards."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process.pid for process in self._processes if process.exitcode is None]
        self.kill()
        assert not late, f"{late} did not end within {seconds} s\n{self.said()[1]}"
        return [process.exitcode for process in self._processes if process.exitcode is not None]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def said(self) -> tuple[str, str]:
        """What all of them have written to stdout, and to stderr."""
        out, error = (
            "".join(Path(file.name).read_text() for file in files) for files in zip(*self._output, strict=True)
        )
        return out, error


def begin(
    *overrides: str,
    processes: int = 1,
    cwd: Path = ROOT,
    variables: dict[str, str] | None = None,
    strike: Strike | None = None,
    module: str = "train",
) -> Forks:
    """Start a run.

    Args:
        processes: with more than one, each is told its place as a launcher would.
        variables: of the environment, beside the usual ones.
        module: the command, a module of `adagrpo_train.cli`.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    places |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started, output = [], []
    for rank in range(processes):
        own = places | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115
        told = (module, [*BASE, *overrides], environment() | own | (variables or {}), cwd, strike)
        process = _context().Process(target=_work, args=(*told, [file.name for file in files]), daemon=True)
        process.start()
        started.append(process)
        output.append(files)
    return Forks(started, output)


def _context() -> Any:
    """What makes processes of the one that has imported everything, which starts now if it has not yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    quiet = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}  # as the command says before it imports
    with mock.patch.dict(os.environ, environment() | quiet):
        forkserver.ensure_running()
    return context


def _work(
    module: str, arguments: list[str], variables: dict[str, str], cwd: Path, strike: Strike | None, output: list[str]
) -> None:
    for stream, path in zip((1, 2), output, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    sys.path[:0] = variables["PYTHONPATH"].split(os.pathsep)
    sys.argv = [module, *arguments]
    torch.set_num_threads(1)
    if strike:
        strike.prepare()
    sys.exit(importlib.import_module(f"adagrpo_train.cli.{module}").main())


def run(*overrides: str, shell: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    """A run from its start to its end.

    Args:
        shell: start it as a user would, with launcher and all.
        options: of `begin`; with `shell` only processes, cwd and variables.
    """
    if shell:
        return _from_the_shell(*overrides, **options)
    forks = begin(*overrides, **options)
    failed = [status for status in forks.wait() if status]
    return subprocess.CompletedProcess(overrides, failed[0] if failed else 0, *forks.said())


def _from_the_shell(
    *overrides: str, processes: int = 1, cwd: Path = ROOT, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*overrides, processes=processes),
        env=environment() | (variables or {}), cwd=cwd, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def succeed(*overrides: str, **options: Any) -> str:
    """What a run wrote that had to end well."""
    done = run(*overrides, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Recorded metrics without what may differ between equal runs: seconds and memory."""
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in rows_so_far(run_dir)]


def rows_so_far(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of recorded metrics, of a run that may still write."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def weights(run_dir: Path) -> dict[str, dict[str, torch.Tensor]]:
    return checkpoint.load(checkpoint.find(run_dir)).tensors
