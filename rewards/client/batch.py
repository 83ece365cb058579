"""What a trainer sees of a reward, wherever the reward runs: samples in, a batch of scores later."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rewards.contract import LostError, RewardInfo, Sample, UnavailableError

Outcome = dict[str, float] | str  # every metric of a sample, or why there is no score
_LARGEST = float(np.finfo(np.float32).max)


class RewardUnavailableError(UnavailableError):
    """Nobody answered in time. The same request may succeed later."""


class RewardRefusedError(LostError):
    """A server will not score, or not with the weights the run began with. Asking again does not help."""


@dataclass(frozen=True)
class RewardBatch:
    """Scores of N samples, in the order of the samples.

    Attributes:
        scores: metric -> float32 [N]; NaN, never a number, where there is no score.
        reasons: N texts, why there is no score; None where there is one.
        fingerprint: of the reward that gave every one of these scores.
        stats: figures about the traffic: counts, and latencies in seconds (their names contain "latency").
    """

    scores: Mapping[str, np.ndarray]
    reasons: Sequence[str | None]
    fingerprint: str
    stats: Mapping[str, float]


class RewardClient(Protocol):
    """A reward that scores while its caller does something else."""

    @property
    def info(self) -> RewardInfo:
        """What the reward says about itself.

        Raises:
            RewardUnavailableError: no server has been reached yet; `wait_ready` reaches one.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Of the reward that scores; known once `wait_ready` has returned.

        Raises:
            RewardUnavailableError: no server has been reached yet.
        """
        ...

    def wait_ready(self, seconds: float) -> None:
        """Return as soon as somebody is ready to score.

        Raises:
            RewardUnavailableError: nobody was within so many seconds; the text says what was found instead.
            RewardRefusedError: a server wants another token, speaks another version, or scores with other weights.
        """
        ...

    def submit(self, samples: Sequence[Sample]) -> Future[RewardBatch]:
        """Begin to score; returns at once.

        The images are read later, so they must not change. Results raise RewardUnavailableError or
        RewardRefusedError; of a reward in this process also what loading it raised, and the loss of its GPU.

        Raises:
            ValueError: two samples have one id, or an image is not uint8 [H, W, 3].
        """
        ...

    def close(self) -> None:
        """End threads and connections. What was submitted and not scored is cancelled."""
        ...


def check_samples(samples: Sequence[Sample]) -> None:
    """Refuse what no reward could score.

    Raises:
        ValueError: two samples have one id, or an image is not uint8 [H, W, 3].
    """
    if len({sample.id for sample in samples}) != len(samples):
        raise ValueError("the ids of the samples of a batch must differ")
    for sample in samples:
        image = sample.image
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"sample {sample.id}: the image is {image.dtype} {image.shape}, expected uint8 [H, W, 3]")


def pack(samples: Sequence[Sample], info: RewardInfo, *, most: int) -> list[list[Sample]]:
    """Cut samples into batches that the reward takes: whole groups, or images of one size, where it wants that.

    Args:
        most: samples of a batch, more only if one group is larger.
    """
    batches: list[list[Sample]] = []
    for unit in units(samples, info):
        fits = batches and len(batches[-1]) + len(unit) <= most
        if not fits or (info.same_size and unit[0].image.shape != batches[-1][0].image.shape):
            batches.append([])
        batches[-1] += unit
    return batches


def units(samples: Sequence[Sample], info: RewardInfo) -> list[list[Sample]]:
    """The least that can be scored by itself: a group if scores compare its images, else a sample."""
    if not info.groupwise:
        return [[sample] for sample in samples]
    groups: dict[str | None, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    return list(groups.values())


def checked_score(score: Mapping[str, float], metrics: Sequence[str]) -> Outcome:
    """The metrics of a score, or `non_finite` if one of them is no float32 number.

    Raises:
        KeyError: a metric is missing.
    """
    values = {metric: float(score[metric]) for metric in metrics}
    if all(abs(value) <= _LARGEST for value in values.values()):  # false for NaN
        return values
    return "non_finite: the score is not a finite number"


def columns(outcomes: Sequence[Outcome], metrics: Sequence[str]) -> dict[str, np.ndarray]:
    """Metric -> float32 [N], NaN where the outcome is a reason."""
    return {
        metric: np.array([math.nan if isinstance(o, str) else o[metric] for o in outcomes], np.float32)
        for metric in metrics
    }


def reasons(outcomes: Sequence[Outcome]) -> list[str | None]:
    """Why there is no score, for each outcome that is none."""
    return [outcome if isinstance(outcome, str) else None for outcome in outcomes]
