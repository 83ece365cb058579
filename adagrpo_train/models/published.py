"""Shapes of the released pipelines that have a config in `configs/model`: what builds them without weights.

Sources: model_index.json and the config.json of each part in the repositories on the hub, which the id names;
diffusers' scripts/convert_sd3_to_diffusers.py and convert_flux_to_diffusers.py, which made them.
"""

from collections.abc import Mapping
from typing import Any

Part = tuple[str, Mapping[str, Any]]
"""Name of the class in diffusers or transformers, and its configuration."""

# 8 x 8 pixels per latent pixel, 16 channels; the same in all of them but for the scale of the latents.
_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_SD3_VAE = _VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
_FLUX_VAE = _VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}

_SD3: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_SD35_MEDIUM = _SD3 | {
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
_SD35_LARGE = _SD3 | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
_FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
_SD3_SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0}
_FLUX_SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}

_CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_CLIP_G = _CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


def _sd3(transformer: Mapping[str, Any]) -> dict[str, Part]:
    return {
        "transformer": ("SD3Transformer2DModel", transformer),
        "vae": ("AutoencoderKL", _SD3_VAE),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", _SD3_SCHEDULER),
        "text_encoder": ("CLIPTextModelWithProjection", _CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
        "text_encoder_3": ("T5EncoderModel", _T5_XXL),
    }


def _flux(transformer: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Part]:
    return {
        "transformer": ("FluxTransformer2DModel", transformer),
        "vae": ("AutoencoderKL", _FLUX_VAE),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", scheduler),
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("T5EncoderModel", _T5_XXL),
    }


PIPELINES: dict[str, dict[str, Part]] = {
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(_SD3),
    "stabilityai/stable-diffusion-3.5-medium": _sd3(_SD35_MEDIUM),
    "stabilityai/stable-diffusion-3.5-large": _sd3(_SD35_LARGE),
    "black-forest-labs/FLUX.1-dev": _flux(_FLUX, _FLUX_SCHEDULER),
    "black-forest-labs/FLUX.1-schnell": _flux(
        _FLUX | {"guidance_embeds": False}, {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False}
    ),
}
"""Hub id -> its parts by their names in the pipeline, tokenizers aside."""
