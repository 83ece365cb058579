"""Recorded policy losses, weight averages and learning rates, computed by our formulas."""

from collections.abc import Callable
from typing import Any

import torch
from golden_cases import GoldenCase
from torch import Tensor

from adagrpo_train.functional.losses import clipped_policy_loss
from adagrpo_train.functional.moments import weight_ema, weight_ema_decay
from adagrpo_train.functional.schedules import warmup_constant_anneal
from adagrpo_train.functional.transitions import cps_kl, flow_grpo_kl
from adagrpo_train.types import Gaussian


def flow_grpo_loss(case: GoldenCase) -> dict[str, Any]:
    diffusion = case.inputs["std_dev_t"].flatten()
    return _penalised_loss(case, lambda step, reference: flow_grpo_kl(step, reference, diffusion))


def flow_cps_loss(case: GoldenCase) -> dict[str, Any]:
    return _penalised_loss(case, cps_kl)


def dance_grpo_loss(case: GoldenCase) -> dict[str, Any]:
    log_prob, log_ratio = _log_ratio(case)
    parts = case.inputs["gradient_accumulation_steps"] * case.inputs["train_timesteps"]
    loss = clipped_policy_loss(log_ratio, _advantages(case), clip_range=case.inputs["clip_range"]).mean() / parts
    loss.backward()
    return {"ratio": log_ratio.exp(), "loss": loss, "grad_log_prob": log_prob.grad}


def weight_average(case: GoldenCase) -> dict[str, Any]:
    weight = torch.tensor(case.inputs["initial"])
    average, interval = weight.clone(), case.inputs["update_step_interval"]
    per_call: list[dict[str, Any]] = []
    for step, increment in zip(case.inputs["global_step_at_call"], case.inputs["increments"], strict=True):
        weight = weight + torch.tensor(increment)
        decay = weight_ema_decay(step, decay=case.inputs["decay"])
        if (step + 1) % interval == 0:
            average = weight_ema(average, weight, decay=decay)
        per_call.append({"decay": decay, "param": weight, "ema": average})
    return {"per_call": per_call}


def learning_rate(case: GoldenCase) -> dict[str, Any]:
    lengths = {
        "warmup_steps": case.inputs["num_warmup_steps"],
        "anneal_steps": case.inputs["num_anneal_steps"],
        "total_steps": case.inputs["num_training_steps"],
    }
    steps = range(len(case.outputs["multipliers"]))
    return {"multipliers": [warmup_constant_anneal(step, **lengths) for step in steps]}


def _penalised_loss(case: GoldenCase, kl: Callable[[Gaussian, Tensor], Tensor]) -> dict[str, Any]:
    log_prob, log_ratio = _log_ratio(case)
    mean = case.inputs["prev_sample_mean"].clone().requires_grad_()
    # The recorded std_dev_t is the diffusion; neither penalty may look at the std of the step.
    step = Gaussian(mean, torch.full_like(case.inputs["std_dev_t"], torch.nan))
    policy_loss = clipped_policy_loss(log_ratio, _advantages(case), clip_range=case.inputs["clip_range"]).mean()
    kl_loss = kl(step, case.inputs["prev_sample_mean_ref"]).mean()
    loss = policy_loss + case.inputs["beta"] * kl_loss
    loss.backward()
    return {
        "ratio": log_ratio.exp(),
        "policy_loss": policy_loss,
        "kl_loss": kl_loss,
        "loss": loss,
        "grad_log_prob": log_prob.grad,
        "grad_prev_sample_mean": mean.grad,
    }


def _log_ratio(case: GoldenCase) -> tuple[Tensor, Tensor]:
    log_prob = case.inputs["log_prob_new"].clone().requires_grad_()
    return log_prob, log_prob - case.inputs["log_prob_old"]


def _advantages(case: GoldenCase) -> Tensor:
    return case.inputs["advantages"].clamp(-case.inputs["adv_clip_max"], case.inputs["adv_clip_max"])
