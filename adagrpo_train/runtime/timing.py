"""Seconds per stage and peak memory."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageTimer:
    """Wall seconds spent in named stages since the last drain()."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def drain(self) -> dict[str, float]:
        """{"time/<stage>_seconds": seconds}, then start anew."""
        metrics = {f"time/{name}_seconds": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return metrics


def peak_memory_bytes() -> int:
    """Peak of this process: GPU memory where there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024
