"""From scores to advantages: which samples are compared, with whom, and what comes of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adagrpo_train.interfaces import Advantage, Curriculum
from adagrpo_train.scoring.scorer import Scorer
from adagrpo_train.types import Level


@dataclass(frozen=True)
class Comparison:
    """What scores say about the N samples of all ranks, and about the n of one."""

    usable: Tensor  # [N] bool: which may be trained on
    local: Tensor  # [N] advantages against the group alone; 0 where not usable
    across: Tensor  # [n] advantages of this rank's samples against the policy's past; 0 where not usable
    fused: Tensor  # [n] their sum: what training uses
    level: Level | None  # what `across` compares with; None before there is one


def compare(
    total: Tensor,
    parts: Mapping[str, Tensor],
    group: Tensor,
    here: slice,
    *,
    group_size: int,
    scorer: Scorer,
    curriculum: Curriculum,
    advantage: Advantage,
) -> Comparison:
    """Advantages of the samples of one rank among those of all. The curriculum follows the usable ones.

    Args:
        total: [N] reward of the samples of all ranks, NaN where missing.
        parts: name -> [N], NaN where missing.
        group: [N] group of each sample; none has samples of two ranks.
        here: the rows of this rank.
        group_size: samples per group, missing ones included.
    """
    usable = scorer.comparable(parts, group, group_size)
    kept, own = usable[here], total[here]
    across = torch.zeros_like(own)
    if not bool(usable.any()):
        return Comparison(usable, torch.zeros_like(total), across, across, None)
    level = curriculum.observe(own[kept] if curriculum.per_rank else total[usable])
    local = scorer.local_advantages(parts, group, group_size, advantage)
    fused = local[here].clone()
    if bool(kept.any()):
        assert level is not None  # it has just followed these samples, or their candidates
        across[kept] = advantage.across(own[kept], group[here][kept], level)
        fused[kept] += across[kept]
    return Comparison(usable, local, across, fused, level)
