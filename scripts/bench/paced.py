"""A reward of a settable price, for benchmarks of what surrounds it. `installed` makes it known to a Python."""

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np

from rewards.client.supervisor import LocalServers
from rewards.contract import API_VERSION, RewardInfo, Sample

ROOT = Path(__file__).parents[2]
NAME = "paced"


class Paced:
    """Red of the first pixel and brightness of the image, after so long.

    Args:
        milliseconds: of every image.
        works: whether it computes so long, mostly without the GIL; else it sleeps, as in front of a GPU.
    """

    api_version: ClassVar[int] = API_VERSION
    info = RewardInfo(
        name=NAME,
        metrics=("first", "brightness"),
        value_range=(0, 255),
        max_batch=32,
        tolerance=0.0,
        source="",
        licence="",
    )

    def __init__(self, *, milliseconds: float = 0.0, works: bool = False) -> None:
        self._seconds, self._works = milliseconds / 1000, works

    def load(self, device: str) -> None: ...

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        seconds = self._seconds * (batch[0].id != "trial") * len(batch)
        if self._works:
            _compute(seconds)
        elif seconds:
            time.sleep(seconds)
        return [{"first": float(s.image[0, 0, 0]), "brightness": float(s.image[::8, ::8].mean())} for s in batch]

    def fingerprint(self) -> str:
        return f"{NAME}@1"

    def close(self) -> None: ...


def _compute(seconds: float) -> None:
    matrix, end = np.eye(256, dtype=np.float32), time.monotonic() + seconds
    while time.monotonic() < end:
        matrix = matrix @ matrix  # about a millisecond without the GIL


def installed(folder: Path) -> dict[str, str]:
    """Lay the reward into a folder as an installed package would lie. Returns variables for a Python that sees it."""
    shutil.copy(__file__, folder / f"{NAME}_reward.py")
    metadata = folder / f"{NAME}_reward-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}-reward\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[adagrpo.rewards]\n{NAME} = {NAME}_reward:Paced\n")
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}


@contextmanager
def server(
    folder: Path,
    name: str = NAME,
    *,
    settings: Mapping[str, object] | None = None,
    limits: Mapping[str, int] | None = None,
) -> Iterator[LocalServers]:
    """One server on the CPU of a reward, this one or a shipped one, ready to score."""
    folder.mkdir()
    with LocalServers(
        name,
        settings=settings or {},
        devices=["cpu"],
        log_folder=folder,
        limits=limits,
        environment=installed(folder),
    ) as servers:
        servers.wait_ready(60)
        yield servers
