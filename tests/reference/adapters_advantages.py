"""Recorded advantages, running levels and selections, computed by our formulas."""

from typing import Any

import torch
from golden_cases import GoldenCase
from torch import Tensor

from adagrpo_train.functional.advantages import (
    capability_advantages_official,
    global_mean_std_advantages,
    global_std_advantages,
    group_advantages,
    mean_group_std,
    zero_variance_fraction,
)
from adagrpo_train.functional.moments import Moments, batch_moments, ema_moments
from adagrpo_train.functional.selection import nearest_to


def adagrpo(case: GoldenCase) -> dict[str, Any]:
    return adagrpo_clamped(
        case.inputs["rewards"],
        mean=case.inputs.get("ema_mean"),
        std=case.inputs.get("ema_std"),
        limit=case.inputs["adv_clip_max"],
    )


def adagrpo_clamped(rewards: Tensor, *, mean: float | None, std: float | None, limit: float) -> dict[str, Tensor]:
    """Local, global and fused advantages of one group, clamped before they are added; local only without a level."""
    group = torch.zeros(len(rewards), dtype=torch.int64)
    local = group_advantages(rewards, group, eps=1e-8, unbiased=True).clamp(-limit, limit)
    if mean is None or std is None:
        return {"relative_adv": local}
    overall = capability_advantages_official(rewards, group, mean=mean, std=std).clamp(-limit, limit)
    return {"relative_adv": local, "global_adv": overall, "fused_adv": local + overall}


def level_and_selection(case: GoldenCase) -> dict[str, Any]:
    level: Moments | None = None
    per_step: list[dict[str, Any]] = []
    for scores in case.inputs["candidate_scores_per_step"]:
        level = ema_moments(level, batch_moments(scores), alpha=case.inputs["ema_alpha"])
        (row,) = nearest_to(scores, level.mean, 1)
        per_step.append({"ema_mean": level.mean, "ema_var": level.var, "ema_std": level.std, "selected_idx": row})
    return {"per_step": per_step}


def flow_grpo_tracker(case: GoldenCase) -> dict[str, Any]:
    rewards, group = case.inputs["rewards"], _group_of(case.inputs["prompts"])

    def of_column(column: Tensor) -> Tensor:
        if case.inputs["global_std"]:
            return global_std_advantages(column, group, eps=1e-4)
        return group_advantages(column, group, eps=1e-4, unbiased=False)

    columns = [of_column(column) for column in rewards.reshape(len(rewards), -1).unbind(1)]
    return {
        "advantages": torch.stack(columns, 1).reshape(rewards.shape),
        "avg_group_size": len(group) / len(torch.unique(group)),
    }


def flow_grpo_batch(case: GoldenCase) -> dict[str, Any]:
    return {"advantages": global_mean_std_advantages(case.inputs["rewards"], eps=1e-4, unbiased=False)}


def zero_std_metric(case: GoldenCase) -> dict[str, Any]:
    rewards, group = case.inputs["rewards"], _group_of(case.inputs["prompts"])
    return {
        "zero_std_ratio": zero_variance_fraction(rewards, group),
        "reward_std_mean": mean_group_std(rewards, group),
    }


def dance_grpo(case: GoldenCase) -> dict[str, Any]:
    rewards = case.inputs["rewards"]
    if case.inputs["use_group"]:
        group = torch.arange(len(rewards)) // case.inputs["num_generations"]
        return {"advantages": group_advantages(rewards, group, eps=1e-8, unbiased=True)}
    gathered = torch.as_tensor(case.inputs["gathered_reward"], dtype=rewards.dtype)
    of_all = global_mean_std_advantages(gathered, eps=1e-8, unbiased=True)
    # Equal rewards have equal advantages, so any occurrence of a rank's reward among all of them will do.
    return {"advantages": of_all[[int((gathered == reward).nonzero()[0]) for reward in rewards]]}


def _group_of(prompts: list[str]) -> Tensor:
    return torch.tensor([prompts.index(prompt) for prompt in prompts])
