"""A FLUX policy trains, and what it exports gives its own picture in stock diffusers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from adagrpo_train.runtime.noise import INITIAL, NoiseKey, keyed_noise
from tests.small_flux import LENGTH, flux_model, save_flux
from tests.support import Memory, make_trainer

TEXTS = ["a red circle", "two blue squares"]


def _render(parts, texts: list[str], noise: torch.Tensor) -> torch.Tensor:
    with parts.policy.average.applied():
        return parts.sampler.render(parts.policy.velocity, parts.policy.encode(texts), noise)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainable", "overrides"),
    [
        ("lora", ["plan=branch", "adagrpo=on", "curriculum.candidates=4", "optimizer.lr=1e-2"]),
        ("full", ["model.dtype=float32", "optimizer.lr=1e-3"]),
    ],
)
def test_stock_diffusers_loads_the_export_and_draws_the_same_picture(
    trainable: str, overrides: list[str], tmp_path: Path
) -> None:
    folder = save_flux(tmp_path / "flux", guidance=True)
    trainer, parts, _ = make_trainer(
        "model=tiny_flux", f"model.path={folder}", f"trainable={trainable}", *overrides, "iterations=2",
        run_dir=tmp_path / "run",
    )  # fmt: skip
    memory = Memory()
    assert trainer.train(memory) == "completed"
    assert [row["policy/first_ratio_deviation"] for row in memory.training] == [0, 0]

    export = tmp_path / "export"
    with parts.policy.average.applied():
        parts.policy.export(export)
    stock = FluxPipeline.from_pretrained(export if trainable == "full" else folder, dtype=torch.float32)
    if trainable == "lora":
        stock.load_lora_weights(export)
    stock.set_progress_bar_config(disable=True)

    base = flux_model(folder, num_steps=6)
    noise = keyed_noise([NoiseKey(0, 0, n, 0, INITIAL) for n in range(2)], base.latent_shape)
    ours = _render(parts, TEXTS, noise)
    untrained = parts.sampler.render(
        lambda x, sigma, conditions: base.velocity(base.transformer, x, sigma, conditions), base.encode(TEXTS), noise
    )
    arguments = {
        "prompt": TEXTS,
        "latents": FluxPipeline._pack_latents(noise, 2, *base.latent_shape),
        "num_inference_steps": 6,
        "guidance_scale": 3.5,
        "max_sequence_length": LENGTH,
        "height": 32,
        "width": 32,
    }
    images = stock(**arguments, output_type="np").images
    latents = stock(**arguments, output_type="latent").images
    torch.testing.assert_close(FluxPipeline._pack_latents(ours, 2, *base.latent_shape), latents, rtol=0, atol=1e-5)
    assert (ours - untrained).abs().max() > 1e-4  # the trained weights do take part
    assert np.abs(base.decode(ours).astype(float) - images * 255).max() <= 0.5 + 255e-5  # the rounding of uint8
