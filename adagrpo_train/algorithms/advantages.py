"""Advantages: constants around functional/advantages."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adagrpo_train.errors import ConfigError
from adagrpo_train.functional import advantages as f
from adagrpo_train.types import Level


@dataclass(frozen=True, kw_only=True)
class Group:
    """GRPO's intra-group advantage: how much better than its group (arXiv:2402.03300).

    Args:
        std: "group" divides by the standard deviation of the group, "global" by that of all samples of the
            iteration (Flow-GRPO's default).
        unbiased: whether the group's standard deviation divides by G - 1 (DanceGRPO) or G (Flow-GRPO).
        eps: added to the standard deviation, in reward units.
        limit: advantages are clamped to [-limit, limit].
    """

    std: Literal["group", "global"]
    unbiased: bool
    eps: float
    limit: float

    def __post_init__(self) -> None:
        if self.std not in ("group", "global"):
            raise ConfigError(f"advantage.std={self.std}: choose group or global")
        if not self.limit > 0 or not self.eps > 0:
            raise ConfigError(f"advantage.limit={self.limit}, advantage.eps={self.eps}: both must be > 0")

    def local(self, rewards: Tensor, group: Tensor) -> Tensor:
        """Advantage against the group alone [N]."""
        if self.std == "global":
            values = f.global_std_advantages(rewards, group, eps=self.eps)
        else:
            values = f.group_advantages(rewards, group, eps=self.eps, unbiased=self.unbiased)
        return values.clamp(-self.limit, self.limit)

    def across(self, rewards: Tensor, group: Tensor, level: Level) -> Tensor:
        """Advantage against the policy's past [N]: none."""
        return torch.zeros_like(rewards)


@dataclass(frozen=True, kw_only=True)
class CrossLevel(Group):
    """AdaGRPO: the intra-group advantage plus how much better than the policy's own past (arXiv:2606.06828).

    Args:
        mode: "official" rescales the global part so that gains and losses of each group sum to +1 and -1, as the
            released code does; the group as a whole is then never rewarded. "absolute" is the clipped
            (reward - level) / std, so a group that beats the past as a whole is rewarded for it.
        weight: factor on the global part.
    """

    mode: Literal["official", "absolute"]
    weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("official", "absolute"):
            raise ConfigError(f"advantage.mode={self.mode}: choose official or absolute")

    def across(self, rewards: Tensor, group: Tensor, level: Level) -> Tensor:
        """Advantage against the policy's past [N]."""
        if self.mode == "absolute":
            values = f.capability_advantages_absolute(rewards, mean=level.mean, std=level.std, limit=self.limit)
        else:
            values = f.capability_advantages_official(rewards, group, mean=level.mean, std=level.std)
        return self.weight * values.clamp(-self.limit, self.limit)
