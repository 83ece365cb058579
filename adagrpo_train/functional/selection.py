"""Which candidates to train on, as pure functions of their scores. Ties go to the earlier row."""
# ruff: noqa: F722 - shapes in annotations are not code; the leading space keeps linters from reading names

import torch
from jaxtyping import Float
from torch import Tensor


def nearest_to(scores: Float[Tensor, " candidates"], level: float, count: int) -> list[int]:
    """The count rows whose score lies nearest to level, nearest first.

    Args:
        scores: [candidates] reward units.
        level: reward units.
        count: in [1, candidates].

    Raises:
        ValueError: count is out of range.

    Source: Bujiazi/GRPO-Series@c4028f9, sample_evaluate_and_select_ema, which takes one row.
    """
    return _smallest((scores - level).abs(), count)


def nearest_to_median(scores: Float[Tensor, " candidates"], count: int) -> list[int]:
    """The count rows whose score lies nearest to the batch median, nearest first.

    Args:
        scores: [candidates] reward units; an even number has the mean of its middle two as median.
        count: in [1, candidates].

    Raises:
        ValueError: count is out of range.
    """
    return nearest_to(scores, float(torch.quantile(scores, 0.5)) if scores.numel() else 0.0, count)


def easiest(scores: Float[Tensor, " candidates"], count: int) -> list[int]:
    """The count rows with the highest score, highest first.

    Args:
        scores: [candidates] reward units.
        count: in [1, candidates].

    Raises:
        ValueError: count is out of range.
    """
    return _smallest(-scores, count)


def hardest(scores: Float[Tensor, " candidates"], count: int) -> list[int]:
    """The count rows with the lowest score, lowest first.

    Args:
        scores: [candidates] reward units.
        count: in [1, candidates].

    Raises:
        ValueError: count is out of range.
    """
    return _smallest(scores, count)


def _smallest(distances: Tensor, count: int) -> list[int]:
    if not 1 <= count <= len(distances):
        raise ValueError(f"cannot select {count} of {len(distances)} candidates")
    return torch.argsort(distances, stable=True)[:count].tolist()
