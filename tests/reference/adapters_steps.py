"""Recorded sampling steps and log-probabilities, computed by our transitions."""

from collections.abc import Callable
from typing import Any

import torch
from golden_cases import GoldenCase
from torch import Tensor

from adagrpo_train.functional.transitions import (
    clean_estimate,
    constant_sde_step,
    cps_log_prob,
    cps_step,
    flow_sde_diffusion,
    flow_sde_step,
    gaussian_log_prob,
    gaussian_log_prob_unnormalised,
    ode_step,
)
from adagrpo_train.types import Gaussian

Step = Callable[[Tensor], Gaussian]  # of a velocity; the rest of the transition is fixed
LogProb = Callable[[Tensor, Gaussian], Tensor]


def flow_grpo(case: GoldenCase) -> dict[str, Any]:
    x, sigmas = case.inputs["sample"], case.inputs["sigmas"]
    sigma, sigma_next = _interval(case)
    noise = {"noise_level": case.inputs["noise_level"], "sigma_max": float(sigmas[1])}

    def step(velocity: Tensor) -> Gaussian:
        return flow_sde_step(x, velocity, sigma, sigma_next, **noise)

    ours = _step_outputs(case, step, gaussian_log_prob)
    return ours | {"std_dev_t": flow_sde_diffusion(sigma, **noise).view(-1, *[1] * (x.ndim - 1))}


def flow_cps(case: GoldenCase) -> dict[str, Any]:
    x = case.inputs["sample"]
    sigma, sigma_next = _interval(case)
    # The official code also takes levels in (1, 2], where sine and |cosine| fold back; ours refuses them.
    level = min(case.inputs["noise_level"], 2 - case.inputs["noise_level"])

    def step(velocity: Tensor) -> Gaussian:
        return cps_step(x, velocity, sigma, sigma_next, noise_level=level)

    ours = _step_outputs(case, step, cps_log_prob)
    return ours | {"std_dev_t": step(case.inputs["model_output_old"]).std}


def dance_grpo(case: GoldenCase) -> dict[str, Any]:
    x, eta = case.inputs["latents"], case.inputs["eta"]
    sigma, sigma_next = _interval(case)

    def step(velocity: Tensor) -> Gaussian:
        # The official code scales the velocity in the velocity's own precision, once per term. The velocities
        # below are the ones its rounded products stand for; for float32 and float64 they are the velocity itself.
        for_euler = _rounded_through(velocity, sigma_next[0] - sigma[0])
        for_score = _rounded_through(velocity, sigma[0])
        euler = ode_step(x, for_euler, sigma, sigma_next)
        sde = constant_sde_step(x, for_score, sigma, sigma_next, eta=eta)
        if not case.inputs["sde_solver"]:
            return Gaussian(euler, sde.std)
        return Gaussian(sde.mean + (euler - ode_step(x, for_score, sigma, sigma_next)), sde.std)

    return _step_outputs(case, step, gaussian_log_prob) | {
        "pred_original_old": clean_estimate(x, _rounded_through(case.inputs["model_output_old"], sigma[0]), sigma),
        "pred_original_new": clean_estimate(x, _rounded_through(case.inputs["model_output_new"], sigma[0]), sigma),
        "transition_std": step(case.inputs["model_output_old"]).std.flatten()[0],
    }


def grpo_series(case: GoldenCase) -> dict[str, Any]:
    inputs = case.inputs
    x, branches = inputs["image_latents"], inputs["group_latents"]
    sigma, sigma_next = torch.tensor([inputs["sigma"]]), torch.tensor([inputs["sigma_next"]])
    # This code's stand-in for sigma = 1 is the end of the step, not the grid's second sigma.
    noise = {"noise_level": inputs["eta"], "sigma_max": inputs["sigma_next"]}
    step = flow_sde_step(x, inputs["pred_velocity"], sigma, sigma_next, **noise)
    perturbed = flow_sde_step(x, inputs["pred_velocity_perturbed"], sigma, sigma_next, **noise)
    return {
        "std_dev_t": flow_sde_diffusion(sigma, **noise)[0],
        "mean_next": step.mean,
        "log_prob": gaussian_log_prob_unnormalised(branches, step),
        "mean_next_perturbed": perturbed.mean,
        "log_prob_perturbed": gaussian_log_prob_unnormalised(branches, perturbed),
    }


def _interval(case: GoldenCase) -> tuple[Tensor, Tensor]:
    sigmas = case.inputs["sigmas"]
    index = torch.as_tensor(case.inputs["step_index"]).expand(len(case.inputs["model_output_old"]))
    return sigmas[index], sigmas[index + 1]


def _step_outputs(case: GoldenCase, step: Step, log_prob: LogProb) -> dict[str, Any]:
    old, new = step(case.inputs["model_output_old"]), step(case.inputs["model_output_new"])
    again = step(case.inputs["model_output_old"])
    # Log-probabilities are taken of the recorded state, so that their check does not hang on that of the sample.
    x_next = case.outputs["prev_sample"]
    log_prob_old, log_prob_new = log_prob(x_next, old), log_prob(x_next, new)
    return {
        "prev_sample": old.mean + old.std * case.inputs["noise"],
        "prev_sample_mean_old": old.mean,
        "prev_sample_mean_new": new.mean,
        "log_prob_old": log_prob_old,
        "log_prob_new": log_prob_new,
        "ratio": torch.exp(log_prob_new - log_prob_old),
        "ratio_same_policy": torch.exp(log_prob(x_next, again) - log_prob_old),
    }


def _rounded_through(velocity: Tensor, factor: Tensor) -> Tensor:
    if velocity.dtype in (torch.float32, torch.float64):
        return velocity
    return (factor * velocity).float() / factor
