"""A reward for tests of the server, announced by a package of its own: slow, ordered, and faulty on demand."""

import re
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from rewards.contract import API_VERSION, ItemError, RewardInfo, Sample, UnavailableError


class Ordered:
    """The red channel of the first pixel; prompts make it misbehave.

    Args:
        seconds: of every batch.
        load_seconds: of loading.
        memory: more images at once are too many.
        fingerprint: of the weights.
        broken: whether loading fails.
    """

    api_version: ClassVar[int] = API_VERSION
    info = RewardInfo(
        name="ordered",
        metrics=("ordered",),
        value_range=(0, 255),
        max_batch=32,
        tolerance=0.0,
        source="",
        licence="",
    )

    def __init__(
        self,
        *,
        seconds: float = 0.0,
        load_seconds: float = 0.0,
        memory: int = 1000,
        fingerprint: str = "ordered@1",
        broken: bool = False,
    ) -> None:
        self._seconds, self._load_seconds, self._memory = seconds, load_seconds, memory
        self._fingerprint, self._broken = fingerprint, broken

    def load(self, device: str) -> None:
        time.sleep(self._load_seconds)
        if self._broken:
            raise RuntimeError("the weights are damaged")

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        prompts = [sample.prompt for sample in batch]
        trial = batch[0].id == "trial"
        time.sleep(0 if trial else self._seconds)
        if len(batch) > self._memory and not trial:
            raise OutOfMemoryError("CUDA error: out of memory")
        if "poison" in prompts:
            raise RuntimeError("secret of the inside")
        if "away" in prompts or any(prompt.startswith("away once") and _first(prompt) for prompt in prompts):
            raise UnavailableError("secret of the inside")
        if "refuse" in prompts:
            raise ItemError("this prompt cannot be scored")
        if "stick" in prompts or any(prompt.startswith("stick once") and _first(prompt) for prompt in prompts):
            re.match(r"(a+)+$", "a" * 60 + "b")  # one call of C that lets no other thread run, for years
        if "lose the GPU" in prompts:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if "hang" in prompts or any(prompt.startswith("hang once") and _first(prompt) for prompt in prompts):
            time.sleep(60)
        return [{"ordered": float("nan") if s.prompt == "nan" else float(s.image[0, 0, 0])} for s in batch]

    def fingerprint(self) -> str:
        return self._fingerprint

    def close(self) -> None: ...


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


class Tensor:
    """Stands for what a batch takes."""


class Greedy(Ordered):
    """Has memory for two images, if what the batches before took is free again."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: list[weakref.ref[Tensor]] = []

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        tensor = Tensor()
        if len(batch) > 2 or any(taken() for taken in self._taken):
            self._taken.append(weakref.ref(tensor))
            raise OutOfMemoryError("CUDA out of memory")
        return super().score(batch)


def _first(prompt: str) -> bool:
    """Whether the file that the prompt ends with is not there yet; it is afterwards."""
    try:
        Path(prompt.split()[-1]).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
