"""The real models as diffusers builds them from their configs, on torch's meta device: all shapes, no weights.

Configs: diffusers' scripts/convert_sd3_to_diffusers.py and convert_flux_to_diffusers.py, which made the released
folders, and the released config.json of each part.
"""

from functools import cache, partial
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

_SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
_FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sd3_medium": _SD3,
    "sd35_medium": _SD3 | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    "sd35_large": _SD3 | _LARGE | {"qk_norm": "rms_norm"},
    "flux_dev": _FLUX | {"guidance_embeds": True},
    "flux_schnell": _FLUX | {"guidance_embeds": False},
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd3": {"shift": 3.0},
    "flux_dev": {
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
    "flux_schnell": {"shift": 1.0, "use_dynamic_shifting": False},
}


@cache
def pipeline(name: str) -> Any:
    """The pipeline of a model config, without text encoders; the same one every time until pipeline.cache_clear()."""
    family = "flux" if name.startswith("flux") else "sd3"
    kind: Any = FluxTransformer2DModel if family == "flux" else SD3Transformer2DModel
    with torch.device("meta"):
        transformer = kind(**TRANSFORMERS[name])
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            scaling_factor={"sd3": 1.5305, "flux": 0.3611}[family],
            shift_factor={"sd3": 0.0609, "flux": 0.1159}[family],
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    parts = {
        "transformer": transformer,
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULERS["sd3" if family == "sd3" else name]),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
    }
    if family == "flux":
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
