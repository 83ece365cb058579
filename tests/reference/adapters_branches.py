"""Recorded anchors, branches and losses of AdaGRPO, rebuilt from our transitions, advantages and loss.

The network is the toy velocity v(x, sigma) = a x + b sigma x + c.
"""

from typing import Any

import torch
from adapters_advantages import adagrpo_clamped
from golden_cases import GoldenCase
from torch import Tensor

from adagrpo_train.functional.losses import clipped_policy_loss
from adagrpo_train.functional.transitions import (
    clean_estimate,
    flow_sde_step,
    gaussian_log_prob_unnormalised,
    noise_estimate,
    ode_step,
)
from adagrpo_train.types import Gaussian


def singular_sampling(case: GoldenCase) -> dict[str, Any]:
    sigmas, coefficients = case.inputs["sigmas"], case.inputs["velocity_coefficients"]
    height, width = case.inputs["height"] // 8, case.inputs["width"] // 8
    num_steps = len(sigmas) - 1

    anchors = [_packed(case.inputs["initial_noise_bf16"])]
    noises, cleans = [], []
    for index in range(num_steps):
        x, sigma = anchors[-1], sigmas[index].expand(len(anchors[-1]))
        velocity = _toy_velocity(x, sigmas[index], coefficients)
        noises.append(noise_estimate(x, velocity, sigma))
        cleans.append(clean_estimate(x, velocity, sigma))
        anchors.append(_euler(x, sigmas, index, coefficients))

    branches: dict[str, Tensor] = {}
    images: dict[str, Tensor] = {}
    for first in case.inputs["sde_steps"]:
        step = _branch_step(anchors[first][:1], sigmas, first, coefficients, case.inputs["eta"])
        x = branches[str(first)] = step.mean + step.std * case.inputs["branch_noise"][str(first)]
        for index in range(first + 1, num_steps):
            x = _euler(x, sigmas, index, coefficients)
        images[str(first)] = _unpacked(x, height, width)

    return {
        "anchor_latents": anchors,
        "anchor_pred_noise": noises,
        "anchor_pred_clean": cleans,
        "anchor_final_unpacked": _unpacked(anchors[-1], height, width),
        "branch_latents": branches,
        "branch_final_unpacked": images,
    }


def adagrpo_loss(case: GoldenCase) -> dict[str, Any]:
    inputs, group_size = case.inputs, case.inputs["group_size"]
    per_step: dict[str, Any] = {}
    for position, index in enumerate(inputs["sde_steps"]):
        coefficients = {
            key: torch.tensor(value).requires_grad_() for key, value in inputs["velocity_coefficients"].items()
        }
        step = _branch_step(inputs["anchor_state"][str(index)], inputs["sigmas"], index, coefficients, inputs["eta"])
        log_prob = gaussian_log_prob_unnormalised(inputs["branch_latents"][str(index)], step)
        # The first reward belongs to the anchor's own image.
        rewards = inputs["rewards"][1 + position * group_size : 1 + (position + 1) * group_size]
        advantages = adagrpo_clamped(
            rewards, mean=inputs["ema_mean"], std=inputs["ema_std"], limit=inputs["adv_clip_max"]
        )["fused_adv"]
        loss = clipped_policy_loss(log_prob - log_prob.detach(), advantages, clip_range=float("inf")).mean()
        loss.backward()
        gradients = {f"grad_{key}": value.grad for key, value in coefficients.items()}
        per_step[str(index)] = {"loss": loss} | gradients
    return {"per_step": per_step}


def _toy_velocity(x: Tensor, sigma: Tensor, coefficients: dict[str, Any]) -> Tensor:
    x = x.float()
    return coefficients["a"] * x + coefficients["b"] * sigma * x + coefficients["c"]


def _euler(x: Tensor, sigmas: Tensor, index: int, coefficients: dict[str, Any]) -> Tensor:
    velocity = _toy_velocity(x, sigmas[index], coefficients)
    return ode_step(x, velocity, sigmas[index].expand(len(x)), sigmas[index + 1].expand(len(x)))


def _branch_step(x: Tensor, sigmas: Tensor, index: int, coefficients: dict[str, Any], eta: float) -> Gaussian:
    velocity = _toy_velocity(x, sigmas[index], coefficients)
    return flow_sde_step(
        x,
        velocity,
        sigmas[index : index + 1],
        sigmas[index + 1 : index + 2],
        noise_level=eta,
        sigma_max=float(sigmas[1]),
    )


def _packed(latents: Tensor) -> Tensor:
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // 4, channels * 4)


def _unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    batch, _, channels = tokens.shape
    patches = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, height, width)
