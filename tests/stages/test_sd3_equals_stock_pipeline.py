"""Without stochastic steps our sampler is the stock diffusers pipeline."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from adagrpo_train.algorithms.plans import EveryStep
from adagrpo_train.algorithms.transitions import FlowSDE
from adagrpo_train.rollout.sampler import FlowSampler
from adagrpo_train.runtime.noise import INITIAL, SHARED, NoiseKey, keyed_noise
from tests.support import MID, PROMPTS, tiny_model


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("schedule", ["uniform", "sd3"])
@pytest.mark.parametrize("num_steps", [4, 7])
def test_latents_and_images_equal_the_stock_pipeline(guidance_scale: float, schedule: str, num_steps: int) -> None:
    model = tiny_model(guidance_scale=guidance_scale, schedule=schedule, num_steps=num_steps)
    sampler = FlowSampler(
        transition=FlowSDE(noise_level=0.7),
        plan=EveryStep(shared_noise=False),
        sigmas=model.sigmas,
        latent_shape=model.latent_shape,
        latent_dtype=model.dtype,
        group_size=2,
        micro_batch=64,
        seed=3,
        device=model.device,
    )

    def velocity(x, sigma, conditions):
        return model.velocity(model.transformer, x, sigma, conditions)

    texts = list(PROMPTS.texts)
    ours = sampler.trunks(velocity, model.encode(texts), PROMPTS, iteration=1).x0

    stock = StableDiffusion3Pipeline.from_pretrained(MID, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    noise = keyed_noise([NoiseKey(3, 1, prompt_id, SHARED, INITIAL) for prompt_id in PROMPTS.ids], model.latent_shape)
    arguments = {
        "prompt": texts,
        "latents": noise,
        "num_inference_steps": num_steps,
        "guidance_scale": guidance_scale,
        "max_sequence_length": 0,
        "height": 32,
        "width": 32,
    }
    if schedule == "uniform":
        arguments["sigmas"] = np.linspace(1, 1 / num_steps, num_steps).tolist()
    latents = stock(**arguments, output_type="latent").images
    images = stock(**arguments, output_type="np").images
    torch.testing.assert_close(ours, latents, rtol=0, atol=1e-5)
    assert np.abs(model.decode(ours).astype(float) - images * 255).max() <= 0.5 + 255e-5  # the rounding of uint8
    assert (model.decode(ours) == (images * 255).round().astype(np.uint8)).mean() > 0.999
