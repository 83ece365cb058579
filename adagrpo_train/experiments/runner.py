"""Runs trainings beside each other within a budget of cores or GPUs, and takes up again what was interrupted."""

import ctypes
import fcntl
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from adagrpo_train.errors import ConfigError
from adagrpo_train.experiments.study import Run

_POLL_SECONDS = 0.1
_LOG = "output.log"
_LOCK, _RUNS_LOCK = "lock", "runs.lock"
_PARENT_DIED = 1  # PR_SET_PDEATHSIG of prctl(2)
_IMPORTS = [
    "adagrpo_train.build",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.pipelines.flux.pipeline_flux",
    "peft.tuners",
    "scipy.stats",
    "torch._dynamo",
]
_QUIET = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}  # as the command says before it imports


@dataclass(frozen=True)
class Budget:
    """What all runs at once may use.

    Attributes:
        cores: of the CPU.
        gpus: 0 trains on the CPU.
        processes: of each run; on GPUs one for each.
    """

    cores: int
    gpus: int
    processes: int

    def __post_init__(self) -> None:
        if self.cores < 1 or self.gpus < 0 or self.processes < 1:
            raise ConfigError("--cores and --processes must be >= 1, --gpus >= 0")
        if self.processes > (self.gpus or self.cores):
            raise ConfigError(
                f"--processes {self.processes}: a run needs more than the budget of {self.gpus or self.cores} "
                f"{'GPUs' if self.gpus else 'cores'}; raise --{'gpus' if self.gpus else 'cores'}"
            )

    @property
    def jobs(self) -> int:
        """Runs at once."""
        return (self.gpus or self.cores) // self.processes

    def variables(self, job: int) -> dict[str, str]:
        """Of the environment of the job with this number, 0 .. jobs - 1."""
        threads = {"OMP_NUM_THREADS": str(max(1, self.cores // (self.jobs * self.processes)))}
        if not self.gpus:
            return threads | {"ACCELERATE_USE_CPU": "true"}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        own = visible if visible != [""] else [str(number) for number in range(self.gpus)]
        first = job * self.processes
        return threads | {"CUDA_VISIBLE_DEVICES": ",".join(own[first : first + self.processes])}


@dataclass(frozen=True)
class Outcome:
    """A run that has come to an end, and how long this took."""

    run: Run
    succeeded: bool
    seconds: float


def check_gpus(budget: Budget) -> None:
    """Refuse a budget of GPUs that are not there: runs that find none train on the CPU and say nothing.

    Raises:
        ConfigError: says how many this process sees.
    """
    if budget.gpus:
        import torch

        there = torch.cuda.device_count()
        if there < budget.gpus:
            raise ConfigError(
                f"--gpus {budget.gpus}: only {there} can be seen here (CUDA_VISIBLE_DEVICES="
                f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')}); lower --gpus"
            )


def finished(folder: Path) -> bool:
    """Whether a run has come to its last iteration."""
    return (folder / "summary.json").is_file()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a study to one process at a time.

    Raises:
        ConfigError: another one works there, or runs that outlive theirs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as own, (folder / _RUNS_LOCK).open("w") as of_runs:
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(of_runs, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{folder}: another process works on this study, or runs of one that was ended are still saving; wait"
            ) from error
        fcntl.flock(of_runs, fcntl.LOCK_UN)
        yield


def run_all(
    todo: list[Run], budget: Budget, *, folder: Path, done: Callable[[Outcome], None], keep_weights: bool
) -> list[Outcome]:
    """Run trainings, as many at once as the budget allows, until all have ended; a failed one does not end the others.

    Ctrl-C and SIGTERM let them save and then end this: the same call takes them up again.

    Args:
        folder: of the study, which is kept locked as long as one of them lives.
        done: told of each run that has ended.
        keep_weights: whether finished runs keep their checkpoints and exports.

    Returns:
        Every run with its outcome, in the order in which they ended.

    Raises:
        KeyboardInterrupt: asked to stop; the runs have ended.
    """
    waiting, running, outcomes = list(todo), dict[int, _Job](), list[Outcome]()
    with _interrupted_by(signal.SIGTERM):
        try:
            while waiting or running:
                for number in range(budget.jobs):
                    if number not in running and waiting:
                        running[number] = _Job(waiting.pop(0), budget, number, folder / _RUNS_LOCK)
                time.sleep(_POLL_SECONDS)
                for number in [number for number, job in running.items() if job.ended]:
                    outcome = running.pop(number).outcome()
                    if outcome.succeeded and not keep_weights:
                        _drop_weights(outcome.run.folder)
                    outcomes.append(outcome)
                    done(outcome)
        finally:
            for job in running.values():
                job.stop()
            for job in running.values():
                job.wait()
    return outcomes


class _Job:
    """One training in a process of its own."""

    def __init__(self, run: Run, budget: Budget, number: int, lock: Path) -> None:
        self._run, self._started = run, time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        begun = any((run.folder / "checkpoints").glob("iteration_*"))
        if not begun:
            _clear(run.folder)
        continued = [f"resume={run.folder}"] if begun else []
        arguments = [*run.overrides, f"hydra.run.dir={run.folder}", *continued]
        variables = dict(os.environ) | budget.variables(number)
        # On the CPU a run of the tiny model takes less than the imports before it.
        start = _fork if budget.processes == 1 and not budget.gpus else _launch
        self._process = start(arguments, variables, budget.processes, run.folder / _LOG, lock)

    @property
    def ended(self) -> bool:
        return self._status() is not None

    def outcome(self) -> Outcome:
        succeeded = self._status() == 0 and finished(self._run.folder)
        return Outcome(self._run, succeeded, time.monotonic() - self._started)

    def stop(self) -> None:
        """Ask it to save and end."""
        if not self.ended:
            self._process.terminate()

    def wait(self) -> None:
        while not self.ended:
            time.sleep(_POLL_SECONDS)

    def _status(self) -> int | None:
        return self._process.poll() if isinstance(self._process, subprocess.Popen) else self._process.exitcode


def _launch(
    arguments: list[str], variables: dict[str, str], processes: int, log: Path, lock: Path
) -> "subprocess.Popen[bytes]":
    """A training as a program of its own, by torch's launcher where it has several processes."""
    program = [sys.executable, "-m"]
    if processes > 1:
        program += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    with log.open("ab") as output, lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # the program inherits it
        return subprocess.Popen(
            [*program, "adagrpo_train", *arguments],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(held.fileno(),),
            preexec_fn=_end_with_parent,
            process_group=0,  # Ctrl-C reaches the study alone, which passes it on once
        )


def _fork(arguments: list[str], variables: dict[str, str], _processes: int, log: Path, lock: Path) -> Any:
    """A training as a fork of a process that has imported everything and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)
    before = dict(os.environ)
    os.environ.update(variables | _QUIET)  # the libraries read them when they are imported
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    process = context.Process(target=_train, args=(arguments, variables, log, lock, os.getpid()))
    process.start()
    return process


def _train(arguments: list[str], variables: dict[str, str], log: Path, lock: Path, study: int) -> None:
    """In the forked process: `python -m adagrpo_train`.

    Args:
        study: the process that asked for it, which is not its parent.
    """
    threading.Thread(target=_end_with, args=(study,), daemon=True).start()
    os.setpgid(0, 0)  # Ctrl-C reaches the study alone, which passes it on once
    with lock.open("w") as held, log.open("ab") as output, Path(os.devnull).open() as nothing:
        fcntl.flock(held, fcntl.LOCK_SH)
        for stream, file in enumerate((nothing, output, output)):
            os.dup2(file.fileno(), stream)
        os.environ.clear()
        os.environ.update(variables)
        sys.argv = ["adagrpo-train", *arguments]
        runpy.run_module("adagrpo_train", run_name="__main__")


def last_words(run: Run) -> str:
    """The last lines that a run has written."""
    path = run.folder / _LOG
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return "\n".join(lines[-5:])


def _clear(folder: Path) -> None:
    """Remove what a run left that was ended before its first checkpoint."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != _LOG:
            entry.unlink()


def _drop_weights(folder: Path) -> None:
    """Tables and figures are made of the records alone, and weights of many runs fill a disk."""
    for name in ("checkpoints", "export"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _end_with(process: int) -> None:
    """Ask this process to save and end when another one has died."""
    if hasattr(os, "pidfd_open"):
        with suppress(ProcessLookupError):  # it has died already
            select.select([os.pidfd_open(process)], [], [])
        os.kill(os.getpid(), signal.SIGTERM)


def _end_with_parent() -> None:
    """The kernel asks this process to save and end when the one that started it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGTERM)


@contextmanager
def _interrupted_by(number: signal.Signals) -> Iterator[None]:
    """Treat a signal as Ctrl-C."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)
