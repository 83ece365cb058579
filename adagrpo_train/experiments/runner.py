"""Runs trainings beside each other within a budget of cores or GPUs, and takes up again what was interrupted."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adagrpo_train.errors import ConfigError
from adagrpo_train.experiments.study import Run

_POLL_SECONDS = 0.1
_LOG = "output.log"
_PARENT_DIED = 1  # PR_SET_PDEATHSIG of prctl(2)


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


def finished(folder: Path) -> bool:
    """Whether a run has come to its last iteration."""
    return (folder / "summary.json").is_file()


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keep a study to one process at a time; runs that outlive it hold the lock, too.

    Yields:
        The descriptor that they inherit.

    Raises:
        ConfigError: someone works there.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{folder}: another process works on this study, or runs of one that was ended are still saving; wait"
            ) from error
        yield file.fileno()


def run_all(
    todo: list[Run], budget: Budget, *, lock: int, done: Callable[[Outcome], None], keep_weights: bool
) -> list[Outcome]:
    """Run trainings, as many at once as the budget allows, until all have ended; a failed one does not end the others.

    Ctrl-C and SIGTERM let them save and then end this: the same call takes them up again.

    Args:
        lock: a descriptor that the runs inherit.
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
                        running[number] = _Job(waiting.pop(0), budget, number, lock)
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
    """One training as a process of its own."""

    def __init__(self, run: Run, budget: Budget, number: int, lock: int) -> None:
        self._run, self._started = run, time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        begun = any((run.folder / "checkpoints").glob("iteration_*"))
        if not begun:
            _clear(run.folder)
        continued = [f"resume={run.folder}"] if begun else []
        program = [sys.executable, "-m"]
        if budget.processes > 1:
            program += ["torch.distributed.run", "--standalone", f"--nproc_per_node={budget.processes}", "-m"]
        self._output = (run.folder / _LOG).open("ab")
        self._process = subprocess.Popen(
            [*program, "adagrpo_train", *run.overrides, f"hydra.run.dir={run.folder}", *continued],
            env=os.environ | budget.variables(number),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            process_group=0,  # Ctrl-C reaches this process alone, which passes it on once
        )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def outcome(self) -> Outcome:
        self._output.close()
        succeeded = self._process.returncode == 0 and finished(self._run.folder)
        return Outcome(self._run, succeeded, time.monotonic() - self._started)

    def stop(self) -> None:
        """Ask it to save and end."""
        if not self.ended:
            self._process.terminate()

    def wait(self) -> None:
        self._process.wait()
        self._output.close()


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


def _end_with_parent() -> None:
    """The kernel asks this process to save and end when the one that started it dies."""
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
