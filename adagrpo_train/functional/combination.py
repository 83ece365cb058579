"""Several rewards as one: weighted sums, and advantages of each reward weighted. Missing scores are NaN, never 0."""
# ruff: noqa: F722 - shapes in annotations are not code; the leading space keeps linters from reading names

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from adagrpo_train.functional.moments import Moments


def weighted_sum(
    parts: Mapping[str, Float[Tensor, " samples"]],
    weights: Mapping[str, float],
    *,
    scales: Mapping[str, Moments] | None = None,
) -> Float[Tensor, " samples"]:
    """Sum of weight * part over the weighted parts [samples], reward units; NaN where any of them is missing.

    Args:
        parts: name -> [samples], NaN where missing.
        weights: name -> factor, at least one.
        scales: moments that stand for 0 and 1: each part enters as (part - mean) / std. None takes it as it is.

    Raises:
        KeyError: a weighted part is not there.
    """
    terms = [weight * _scaled(parts[name], scales[name] if scales else None) for name, weight in weights.items()]
    return torch.stack(terms).sum(0)


def comparable(
    values: Float[Tensor, " samples"], group: Int64[Tensor, " samples"], *, group_size: int
) -> Bool[Tensor, " samples"]:
    """Which samples can be judged against their group [samples].

    Those with a score, in a group of which at least max(2, group_size / 2) have one: the mean of fewer says little
    about the group.
    """
    present = values.isfinite()
    counts = torch.zeros(int(group.max()) + 1, dtype=torch.int64).index_add_(0, group.cpu(), present.cpu().long())
    return present & (counts[group.cpu()] * 2 >= max(4, group_size)).to(values.device)


def weighted_advantages(
    parts: Mapping[str, Float[Tensor, " samples"]],
    weights: Mapping[str, float],
    group: Int64[Tensor, " samples"],
    *,
    group_size: int,
    advantage: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, " samples"]:
    """Weighted sum of the advantages of each part [samples], unitless.

    A part counts for a sample where it is comparable() there; the weights of the other parts then grow so that
    their absolute sum stays the same. A sample without any part has advantage 0.

    Args:
        parts: name -> [samples], NaN where missing.
        weights: name -> factor, at least one.
        group: [samples] group of each sample, 0, 1, ...
        group_size: samples per group, missing ones included.
        advantage: (rewards [n], groups [n]) -> advantages [n], all of them present.
    """
    total = torch.zeros(len(group), device=group.device)
    weight_present = torch.zeros_like(total)
    for name, weight in weights.items():
        usable = comparable(parts[name], group, group_size=group_size)
        total[usable] += weight * advantage(parts[name][usable], group[usable]).float()
        weight_present[usable] += abs(weight)
    weight_whole = sum(abs(weight) for weight in weights.values())
    return torch.where(weight_present > 0, total * weight_whole / weight_present.clamp_min(1e-12), total)


def _scaled(values: Tensor, scale: Moments | None) -> Tensor:
    return values if scale is None else (values - scale.mean) / scale.std
