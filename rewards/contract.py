"""What a reward is: images and prompts in, named numbers out. Needs numpy and nothing else.

A plug-in implements `Reward` in a package of its own and announces it as an entry point of the group
``adagrpo.rewards``; the trainer then runs it in its own process, or `python -m rewards.serve` behind a socket.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

API_VERSION = 1

Scalar = str | int | float | bool


@dataclass(frozen=True)
class Sample:
    """One image to score.

    Attributes:
        id: unique within a batch; scores are matched to images by it.
        prompt: what the image should show; may be empty.
        image: uint8 of shape ``[H, W, 3]``, RGB.
        group: images of one group belong to one prompt; for rewards that compare images.
        meta: whatever else the reward needs, such as the text to look for.
    """

    id: str
    prompt: str
    image: np.ndarray
    group: str | None = None
    meta: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardInfo:
    """What a user should know about a reward before trusting its numbers.

    Attributes:
        name: the one it is configured by.
        metrics: names of the numbers it returns for every image; the first is the reward proper.
        value_range: least and greatest possible value of the first metric; None where there is no bound.
        max_batch: most images scored at once.
        tolerance: how much a score may change with the other images of its batch (rounding of batched arithmetic).
        source: checkpoint and reference implementation.
        licence: of the weights.
        example_prompts: some that the reward accepts, for checking it.
        groupwise: whether a score depends on the other images of its group.
        same_size: whether the images of a batch must have one size.

    Raises:
        ValueError: no metric or one twice, no image in a batch, or a tolerance or range that is none.
    """

    name: str
    metrics: tuple[str, ...]
    value_range: tuple[float, float] | None
    max_batch: int
    tolerance: float
    source: str
    licence: str
    example_prompts: tuple[str, ...] = ("a red circle", "two blue squares", "a photo of a cat, 4k", "\u72ac")
    groupwise: bool = False
    same_size: bool = False

    def __post_init__(self) -> None:
        if not self.metrics or len(set(self.metrics)) != len(self.metrics):
            raise ValueError(f"metrics={self.metrics}: name at least one, each once")
        if self.max_batch < 1:
            raise ValueError(f"max_batch={self.max_batch}: must be at least 1")
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance={self.tolerance}: must be a finite number >= 0")
        if self.value_range is not None and not -math.inf < self.value_range[0] < self.value_range[1] < math.inf:
            raise ValueError(f"value_range={self.value_range}: must be two finite numbers, the lesser first, or None")


class ItemError(ValueError):
    """One image cannot be scored, the others can: the reason is told to whoever asked for its score."""


class LostError(RuntimeError):
    """The reward can score nothing any more, whatever the image. Whoever runs it gives it up."""


class UnavailableError(RuntimeError):
    """The reward can score nothing now, and may later: what it asks itself does not answer."""


def is_lost(error: Exception) -> bool:
    """Whether every later call would fail too, as it does after some errors of a GPU.

    torch raises those as RuntimeError. The text of others may hold a prompt, and so the words of whoever asks.
    """
    fatal = isinstance(error, RuntimeError) and "CUDA error" in str(error)
    return isinstance(error, LostError) or (fatal and not out_of_memory(error))


def out_of_memory(error: Exception) -> bool:
    """Whether a reward fails for want of GPU memory, so that fewer images at once may do. Told by torch's name for it,
    since torch is not imported here."""
    return type(error).__name__ == "OutOfMemoryError"


@runtime_checkable
class Reward(Protocol):
    """A scorer. Its constructor takes settings only; heavy imports and weights wait for `load`."""

    api_version: ClassVar[int]

    @property
    def info(self) -> RewardInfo: ...

    def load(self, device: str) -> None:
        """Get ready to score on ``"cpu"``, ``"cuda"`` or ``"cuda:N"``."""
        ...

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        """Every metric of every sample, in the order of the samples.

        Raises:
            ItemError: a sample cannot be scored. The caller then scores the samples one by one, as after any other
                exception.
            LostError: no sample can be scored any more.
            UnavailableError: none can be scored now.
        """
        ...

    def fingerprint(self) -> str:
        """Names everything that scores depend on: weights, preprocessing, precision, library versions.

        Two scorers with equal fingerprints may share the images of one group.
        """
        ...

    def close(self) -> None:
        """Free what `load` took."""
        ...
