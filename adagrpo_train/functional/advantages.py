"""Group-relative and capability-relative advantages, as pure functions of reward vectors.

Identical rewards give exactly 0 everywhere: a rounding error of their mean, divided by a tiny std, would
otherwise pass for a signal. Results are float32, or float64 for float64 rewards.
"""
# ruff: noqa: F722 - shapes in annotations are not code; the leading space keeps linters from reading names

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_SMALLEST_SUM = 1e-6  # below it the official code takes one sign of its global advantage to be absent


def group_advantages(
    rewards: Float[Tensor, " samples"], group: Int64[Tensor, " samples"], *, eps: float, unbiased: bool
) -> Float[Tensor, " samples"]:
    """(reward - group mean) / (group std + eps) [samples], unitless; exactly 0 in a group of equal rewards.

    Args:
        rewards: [samples] reward units.
        group: [samples] group of each sample, any order.
        eps: reward units, >= 0; 1e-8 in DanceGRPO and AdaGRPO, 1e-4 in Flow-GRPO.
        unbiased: divide the sum of squares by n - 1 (DanceGRPO, AdaGRPO) instead of n (Flow-GRPO).

    Raises:
        ValueError: unbiased and a group has a single sample, whose std is undefined. With n as the divisor
            the std of a single sample is 0 and so is its advantage.

    Source: arXiv:2402.03300, sec. 4.1.2; XueZeyue/DanceGRPO@15cc71d; Bujiazi/GRPO-Series@c4028f9,
    compute_relative_adv; yifan123/flow_grpo@ac4c86e, PerPromptStatTracker with global_std off.
    """
    if unbiased:
        sizes = torch.unique(group, return_counts=True)[1]
        if len(sizes) and int(sizes.min()) < 2:
            raise ValueError("every group needs at least 2 samples, the smallest has 1; raise the group size")
    return _by_group(rewards, group, lambda own: (own - own.mean()) / (own.std(correction=int(unbiased)) + eps))


def global_std_advantages(
    rewards: Float[Tensor, " samples"], group: Int64[Tensor, " samples"], *, eps: float
) -> Float[Tensor, " samples"]:
    """(reward - group mean) / (population std of all samples + eps) [samples], unitless.

    Exactly 0 in a group of equal rewards, one sample included.

    Args:
        rewards: [samples] reward units, of every rank.
        group: [samples] group of each sample, any order.
        eps: reward units, >= 0; 1e-4 in Flow-GRPO.

    Source: yifan123/flow_grpo@ac4c86e, PerPromptStatTracker with global_std on.
    """
    std = _widened(rewards).std(correction=0)
    return _by_group(rewards, group, lambda own: (own - own.mean()) / (std + eps))


def global_mean_std_advantages(
    rewards: Float[Tensor, " samples"], *, eps: float, unbiased: bool
) -> Float[Tensor, " samples"]:
    """(reward - mean of all samples) / (std of all samples + eps) [samples], unitless; 0 for equal rewards.

    Args:
        rewards: [samples] reward units, of every rank.
        eps: reward units, >= 0; 1e-8 in DanceGRPO, 1e-4 in Flow-GRPO.
        unbiased: divide the sum of squares by n - 1 (DanceGRPO) instead of n (Flow-GRPO).

    Raises:
        ValueError: unbiased and there is a single sample, whose std is undefined.

    Source: XueZeyue/DanceGRPO@15cc71d without use_group; yifan123/flow_grpo@ac4c86e without
    per_prompt_stat_tracking.
    """
    return group_advantages(rewards, torch.zeros_like(rewards, dtype=torch.int64), eps=eps, unbiased=unbiased)


def capability_advantages_official(
    rewards: Float[Tensor, " samples"], group: Int64[Tensor, " samples"], *, mean: float, std: float, eps: float = 1e-8
) -> Float[Tensor, " samples"]:
    """AdaGRPO's global advantage as its authors compute it [samples], unitless; zero-sum in every group.

    Within a group z = (reward - mean) / (std + eps); positive z are divided by their sum and negative z by
    the sum of their magnitudes. When one sign is absent z - mean(z) takes over, neither rescaled nor bounded:
    the caller clamps it (to 5 in the official code). Being zero-sum, it never rewards a group as a whole for
    exceeding the level; capability_advantages_absolute does.

    Args:
        rewards: [samples] reward units.
        group: [samples] group of each sample, any order.
        mean: running level, reward units.
        std: running std, reward units, > 0; Moments.std has the official floor.
        eps: reward units, >= 0.

    Raises:
        ValueError: std + eps is not positive.

    Source: Bujiazi/GRPO-Series@c4028f9, compute_ema_adv. Equal rewards give exactly 0 here.
    """
    _require_positive_scale(std + eps)

    def balanced(own: Tensor) -> Tensor:
        z = (own - mean) / (std + eps)
        gain, loss = z[z > 0].sum(), z[z < 0].abs().sum()
        if gain < _SMALLEST_SUM or loss < _SMALLEST_SUM:
            return z - z.mean()
        return torch.where(z > 0, z / gain, z / loss)

    return _by_group(rewards, group, balanced)


def capability_advantages_absolute(
    rewards: Float[Tensor, " samples"], *, mean: float, std: float, limit: float
) -> Float[Tensor, " samples"]:
    """(reward - mean) / std, clamped to [-limit, limit] [samples], unitless.

    Not centred again: a group that beats the running level is rewarded as a whole, equal rewards included.

    Args:
        rewards: [samples] reward units.
        mean: running level, reward units.
        std: running std, reward units, > 0.
        limit: unitless, > 0; inf leaves the values alone.

    Raises:
        ValueError: std or limit is not positive.

    Source: a deviation from arXiv:2606.06828's released code; see capability_advantages_official.
    """
    _require_positive_scale(std)
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    return ((_widened(rewards) - mean) / std).clamp(-limit, limit)


def zero_variance_fraction(rewards: Float[Tensor, " samples"], group: Int64[Tensor, " samples"]) -> Float[Tensor, ""]:
    """Share of groups whose rewards are all equal [], in [0, 1]: they teach nothing.

    Args:
        rewards: [samples] reward units, at least one.
        group: [samples] group of each sample, any order.

    Source: yifan123/flow_grpo@ac4c86e, calculate_zero_std_ratio.
    """
    keys = torch.unique(group)
    return torch.stack([_is_constant(rewards[group == key]) for key in keys]).float().mean()


def mean_group_std(rewards: Float[Tensor, " samples"], group: Int64[Tensor, " samples"]) -> Float[Tensor, ""]:
    """Population std within a group, averaged over the groups [], reward units.

    Args:
        rewards: [samples] reward units, at least one.
        group: [samples] group of each sample, any order.

    Source: yifan123/flow_grpo@ac4c86e, reward_std_mean of calculate_zero_std_ratio.
    """
    values = _widened(rewards)
    return torch.stack([values[group == key].std(correction=0) for key in torch.unique(group)]).mean()


def misjudged(
    advantages: Float[Tensor, " samples"], rewards: Float[Tensor, " samples"], level: float
) -> tuple[float | None, float | None]:
    """False-positive and false-negative rate of advantages against the policy's proficiency level, in [0, 1].

    A false positive is encouraged (advantage > 0) although its reward is below the level, a false negative discouraged
    (advantage < 0) although its reward is above it.

    Args:
        advantages: [samples] unitless.
        rewards: [samples] reward units, all finite.
        level: reward units.

    Returns:
        False positives over all samples below the level, None if there are none; false negatives over all samples above
        it, likewise.

    Source: the misjudgements of intra-group advantages shown by arXiv:2606.06828, as the usual rates.
    """
    below, above = rewards < level, rewards > level
    false_positives = float((advantages[below] > 0).float().mean()) if bool(below.any()) else None
    false_negatives = float((advantages[above] < 0).float().mean()) if bool(above.any()) else None
    return false_positives, false_negatives


def _by_group(rewards: Tensor, group: Tensor, advantage: Callable[[Tensor], Tensor]) -> Tensor:
    values = _widened(rewards)
    result = torch.zeros_like(values)
    # A loop, not index_add: it sums in the order of the published codes, whose eps of 1e-8 shows the last bit.
    for key in torch.unique(group):
        own = group == key
        if not _is_constant(values[own]):
            result[own] = advantage(values[own])
    return result


def _is_constant(values: Tensor) -> Tensor:
    return values.min() == values.max()


def _widened(rewards: Tensor) -> Tensor:
    return rewards.to(torch.promote_types(rewards.dtype, torch.float32))


def _require_positive_scale(std: float) -> None:
    if not std > 0:
        raise ValueError(f"std must be positive, got {std}; Moments.std has a floor")
