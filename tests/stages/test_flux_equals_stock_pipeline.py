"""Without stochastic steps our sampler is the stock diffusers FluxPipeline."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from adagrpo_train.algorithms.transitions import FlowSDE
from adagrpo_train.errors import ConfigError
from adagrpo_train.functional import latents
from adagrpo_train.models.flux import FluxModel
from adagrpo_train.runtime.noise import INITIAL, SHARED, NoiseKey, keyed_noise
from tests.small_flux import LENGTH, flux_model, save_flux
from tests.support import PROMPTS, assert_training_repeats_the_rollout, make_sampler, own_velocity


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("flux"), guidance=request.param)


@pytest.mark.parametrize("schedule", ["flux", "uniform"])
@pytest.mark.parametrize("num_steps", [3, 6])
def test_latents_and_images_equal_the_stock_pipeline(folder: Path, schedule: str, num_steps: int) -> None:
    stock = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    guidance_scale = 3.5 if stock.transformer.config.guidance_embeds else 0.0
    model = flux_model(folder, guidance_scale=guidance_scale, schedule=schedule, num_steps=num_steps)
    sampler, texts = make_sampler(model, FlowSDE(noise_level=0.7)), list(PROMPTS.texts)
    ours = sampler.trunks(own_velocity(model), model.encode(texts), PROMPTS, iteration=1).x0

    if schedule == "uniform":
        stock.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            stock.scheduler.config, use_dynamic_shifting=False
        )
    noise = keyed_noise([NoiseKey(3, 1, prompt_id, SHARED, INITIAL) for prompt_id in PROMPTS.ids], model.latent_shape)
    arguments = {
        "prompt": texts,
        "latents": FluxPipeline._pack_latents(noise, 3, *model.latent_shape),
        "num_inference_steps": num_steps,
        "guidance_scale": guidance_scale,
        "max_sequence_length": LENGTH,
        "height": 32,
        "width": 32,
    }
    packed = stock(**arguments, output_type="latent").images
    images = stock(**arguments, output_type="np").images
    torch.testing.assert_close(latents.pack(ours), packed, rtol=0, atol=1e-5)
    assert np.abs(model.decode(ours).astype(float) - images * 255).max() <= 0.5 + 255e-5  # the rounding of uint8
    assert (model.decode(ours) == (images * 255).round().astype(np.uint8)).mean() > 0.999


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_gives_the_rollouts_log_probability_bit_for_bit(folder: Path, dtype: str) -> None:
    assert_training_repeats_the_rollout(flux_model_of(folder, dtype=dtype), FlowSDE(noise_level=0.9))


@pytest.mark.parametrize("image_seq_len", [16, 64])
def test_the_grid_is_the_stock_one_for_every_number_of_steps(folder: Path, image_seq_len: int) -> None:
    """The stock pipeline hands linspace(1, 1 / N, N) and the shift of its tokens to its scheduler."""
    model = flux_model_of(folder, resolution=2 * 4 * math.isqrt(image_seq_len))
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    exponent = {16: 0.5, 64: 0.5 + 0.65 * 48 / 240}[image_seq_len]
    for num_steps in range(2, 61):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=exponent)
        model.num_steps = num_steps
        torch.testing.assert_close(model.sigmas, scheduler.sigmas, rtol=5e-7, atol=0)


def test_the_guidance_scale_and_time_reach_the_network(folder: Path) -> None:
    model = flux_model_of(folder)
    seen = {}

    class Network(torch.nn.Module):
        def forward(self, **arguments):
            seen.update(arguments)
            return (arguments["hidden_states"],)

    x = torch.randn(3, *model.latent_shape)
    sigma = torch.tensor([1.0, 0.5, 0.1])
    assert torch.equal(model.velocity(Network(), x, sigma, model.encode(list(PROMPTS.texts))), x)
    if model.transformer.config.guidance_embeds:
        assert seen["guidance"].tolist() == [3.5, 3.5, 3.5]
    else:
        assert seen["guidance"] is None
    assert torch.equal(seen["timestep"], sigma)
    assert model.evaluations_per_velocity == 1


def test_a_guidance_scale_that_would_do_nothing_is_refused(folder: Path) -> None:
    if flux_model_of(folder).transformer.config.guidance_embeds:
        with pytest.raises(ConfigError, match="guidance_scale=-1"):
            flux_model(folder, guidance_scale=-1.0)
    else:
        with pytest.raises(ConfigError, match=r"has no guidance input.*set model\.guidance_scale=0\.0"):
            flux_model(folder, guidance_scale=3.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "sd3"}, "model.schedule=sd3: choose flux or uniform"),
        ({"max_sequence_length": 513}, "model.max_sequence_length=513"),
        ({"max_sequence_length": 0}, "model.max_sequence_length=0"),
        ({"resolution": 36}, "model.resolution=36: must be a multiple of 8"),
        ({"resolution": 0}, "model.resolution=0: must be a multiple of 8"),
    ],
)
def test_a_setting_out_of_range_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        flux_model_of(folder, **change)
    assert message in str(caught.value)


def flux_model_of(folder: Path, **changes: Any) -> FluxModel:
    guided = json.loads((folder / "transformer" / "config.json").read_text())["guidance_embeds"]
    return flux_model(folder, guidance_scale=3.5 if guided else 0.0, **changes)
