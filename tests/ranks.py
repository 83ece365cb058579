"""Several processes that share this one's imports: launched runs without their start-up time."""

import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch(function: Callable[[int], int | None], processes: int, log: Path, **variables: str) -> list[int]:
    """Start `function(rank)` on each rank, in a fork each; the ranks' process ids.

    Args:
        function: its result is the exit status, None counts as 0.
        log: rank r writes stdout and stderr to `<log>.<r>`.
        variables: of the environment, beside those of a launcher.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(processes):
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            places = (rank, rank, processes, processes, "127.0.0.1", port)
            _work(function, rank, log, dict(zip(LAUNCHED, map(str, places), strict=True)) | variables)
        pids.append(pid)
    return pids


def wait(pids: list[int], *, seconds: float = 600) -> list[int]:
    """Exit statuses; minus the signal of a rank that one ended. Ranks that are not done by then are killed."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(statuses):
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.02)
    return [statuses[pid] for pid in pids]


def output(log: Path, processes: int) -> str:
    """What the ranks wrote, one after the other."""
    return "".join(Path(f"{log}.{rank}").read_text() for rank in range(processes))


def _work(function: Callable[[int], int | None], rank: int, log: Path, variables: dict[str, str]) -> None:
    status = 1
    try:
        descriptor = os.open(f"{log}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        # pytest has put its own in their place
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        for name in LAUNCHED:
            os.environ.pop(name, None)
        os.environ.update(variables)
        warnings.resetwarnings()
        torch.set_num_threads(1)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()
        status = function(rank) or 0
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
