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

from scripts.bench.drawn import SIZES

_SD35, _FLUX = SIZES["sd35_medium"], SIZES["flux_dev"]
_PLAIN = {key: value for key, value in _SD35.transformer.items() if key not in ("qk_norm", "dual_attention_layers")}
_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
TRANSFORMERS: dict[str, Mapping[str, Any]] = {
    "sd3_medium": _PLAIN | {"pos_embed_max_size": 192},
    "sd35_medium": _SD35.transformer,
    "sd35_large": _PLAIN | _LARGE | {"qk_norm": "rms_norm"},
    "flux_dev": _FLUX.transformer,
    "flux_schnell": {**_FLUX.transformer, "guidance_embeds": False},
}
SCHEDULERS = {"flux_dev": _FLUX.scheduler, "flux_schnell": {"shift": 1.0, "use_dynamic_shifting": False}}


@cache
def pipeline(name: str) -> Any:
    """The pipeline of a model config, without text encoders; the same one every time until pipeline.cache_clear()."""
    size = _FLUX if name.startswith("flux") else _SD35
    kind: Any = getattr(diffusers, size.transformer_class)
    with torch.device("meta"):
        transformer, vae = kind(**TRANSFORMERS[name]), AutoencoderKL(**size.vae)
    parts = {
        "transformer": transformer,
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULERS.get(name, size.scheduler)),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
    }
    if size is _FLUX:
        return FluxPipeline(**parts)
    return StableDiffusion3Pipeline(**parts, text_encoder_3=None, tokenizer_3=None)


def serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let hub ids of the model configs load those pipelines instead of a download."""
    hub = {
        "stabilityai/stable-diffusion-3-medium-diffusers": "sd3_medium",
        "stabilityai/stable-diffusion-3.5-medium": "sd35_medium",
        "stabilityai/stable-diffusion-3.5-large": "sd35_large",
        "black-forest-labs/FLUX.1-dev": "flux_dev",
        "black-forest-labs/FLUX.1-schnell": "flux_schnell",
    }

    def from_pretrained(path: str, *, dtype: torch.dtype, use_safetensors: bool, **_: None) -> Any:
        whole = pipeline(hub[path])
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
