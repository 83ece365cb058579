"""Without stochastic steps our sampler is the stock diffusers pipeline."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from adagrpo_train.algorithms.transitions import FlowSDE
from adagrpo_train.runtime.noise import INITIAL, SHARED, NoiseKey, keyed_noise
from tests.small_flux import small_t5, t5_tokenizer
from tests.support import MID, PROMPTS, make_sampler, own_velocity, tiny_model


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("schedule", ["uniform", "sd3"])
@pytest.mark.parametrize("num_steps", [4, 7])
def test_latents_and_images_equal_the_stock_pipeline(guidance_scale: float, schedule: str, num_steps: int) -> None:
    model = tiny_model(guidance_scale=guidance_scale, schedule=schedule, num_steps=num_steps)
    sampler, texts = make_sampler(model, FlowSDE(noise_level=0.7)), list(PROMPTS.texts)
    ours = sampler.trunks(own_velocity(model), model.encode(texts), PROMPTS, iteration=1).x0

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


def test_with_t5_the_prompt_embeddings_are_those_of_the_stock_pipeline(tmp_path: Path) -> None:
    """The released models have a T5, tiny_sd3 has none: its embeddings follow CLIP's, and so does its length."""
    stock = StableDiffusion3Pipeline.from_pretrained(MID, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    stock.register_modules(text_encoder_3=small_t5(width=128), tokenizer_3=t5_tokenizer())
    stock.save_pretrained(tmp_path)
    model = tiny_model(path=str(tmp_path), text_encoder_3=True, max_sequence_length=9, guidance_scale=3.5)
    texts = list(PROMPTS.texts)
    ours = model.encode(texts)
    embeds, negative, pooled, negative_pooled = stock.encode_prompt(texts, texts, texts, max_sequence_length=9)
    assert embeds.shape == (3, 13 + 9, 128)
    assert embeds[:, 13:].abs().min() > 0  # of T5, where zeros stand in without it
    for expected, found in (
        (embeds, ours.prompt_embeds),
        (negative, ours.negative_prompt_embeds),
        (pooled, ours.pooled_prompt_embeds),
        (negative_pooled, ours.negative_pooled_prompt_embeds),
    ):
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(list(model.text_encoders())) == 3
