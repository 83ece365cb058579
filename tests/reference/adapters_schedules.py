"""Recorded sigma grids, computed by our schedules."""

from typing import Any

from golden_cases import GoldenCase

from adagrpo_train.functional.schedules import (
    flux_shift_exponent,
    flux_sigmas,
    sd3_sigmas,
    shifted_sigmas,
    truncated_timesteps,
)


def sd3(case: GoldenCase) -> dict[str, Any]:
    num_train_timesteps = case.inputs["num_train_timesteps"]
    sigmas = sd3_sigmas(case.inputs["num_steps"], shift=case.inputs["shift"], num_train_timesteps=num_train_timesteps)
    return {"sigmas": sigmas, "timesteps": sigmas[:-1] * num_train_timesteps}


def flux(case: GoldenCase) -> dict[str, Any]:
    shift = {key: value for key, value in case.inputs.items() if key != "num_steps"}
    sigmas = flux_sigmas(case.inputs["num_steps"], **shift)
    return {"sigmas": sigmas, "timesteps": sigmas[:-1] * 1000, "mu": flux_shift_exponent(**shift)}


def time_shift(case: GoldenCase) -> dict[str, Any]:
    sigmas = shifted_sigmas(case.inputs["num_steps"], shift=case.inputs["shift"])
    return {"sigmas": sigmas, "model_timesteps_int": truncated_timesteps(sigmas[:-1])}
