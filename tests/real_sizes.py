"""The real models as diffusers builds them from their configs, on torch's meta device: all shapes, no weights.

Configs: diffusers' scripts/convert_sd3_to_diffusers.py and convert_flux_to_diffusers.py, which made the released
folders, and the released config.json of each part.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline

from adagrpo_train.models.published import PIPELINES

HUB = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3_medium",
    "stabilityai/stable-diffusion-3.5-medium": "sd35_medium",
    "stabilityai/stable-diffusion-3.5-large": "sd35_large",
    "black-forest-labs/FLUX.1-dev": "flux_dev",
    "black-forest-labs/FLUX.1-schnell": "flux_schnell",
}
PARTS = {name: PIPELINES[hub] for hub, name in HUB.items()}
TRANSFORMERS: dict[str, Mapping[str, Any]] = {name: parts["transformer"][1] for name, parts in PARTS.items()}


@cache
def pipeline(name: str) -> Any:
    """The pipeline of a model config, without text encoders; the same one every time until pipeline.cache_clear()."""
    (class_name, config), (_, vae_config), (_, scheduler) = (
        PARTS[name][part] for part in ("transformer", "vae", "scheduler")
    )
    kind: Any = getattr(diffusers, class_name)
    with torch.device("meta"):
        transformer, vae = kind(**config), AutoencoderKL(**vae_config)
    parts = {
        "transformer": transformer,
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(**scheduler),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
    }
    if name.startswith("flux"):
        return FluxPipeline(**parts)
    return StableDiffusion3Pipeline(**parts, text_encoder_3=None, tokenizer_3=None)


def serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let hub ids of the model configs load those pipelines instead of a download."""

    def from_pretrained(path: str, *, dtype: torch.dtype, use_safetensors: bool, **_: None) -> Any:
        whole = pipeline(HUB[path])
        whole.transformer.to = partial(_stay, whole.transformer)
        whole.to = lambda device: whole
        for part in (whole.transformer, whole.vae):
            torch.nn.Module.to(part, dtype)
        return whole

    for kind in (StableDiffusion3Pipeline, FluxPipeline):
        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)


def _stay(module: torch.nn.Module, *_: Any, **__: Any) -> torch.nn.Module:
    """Weights that are nowhere go nowhere."""
    return module
