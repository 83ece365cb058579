"""A random FluxPipeline of the real classes, small enough to build in a second: 32 pixels, 16 image tokens."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from adagrpo_train.models.flux import FluxModel
from rewards.shapes.grammar import WORDS
from tests.support import MID

LENGTH = 12


_PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *(("▁" + word, 0.0) for word in WORDS)]


def t5_tokenizer() -> T5TokenizerFast:
    return T5TokenizerFast(vocab=_PIECES, extra_ids=0, model_max_length=LENGTH)


def small_t5(*, width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(_PIECES),
            d_model=width,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def save_flux(folder: Path, *, guidance: bool) -> Path:
    """The scheduler is FLUX.1-dev's or -schnell's, but with 16 to 256 tokens in place of 256 to 4096."""
    torch.manual_seed(7)
    tokenizer = CLIPTokenizer.from_pretrained(MID / "tokenizer")
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance else 1.0,
            use_dynamic_shifting=guidance,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=16,
            max_image_seq_len=256,
        ),
        vae=AutoencoderKL.from_pretrained(MID / "vae"),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=13,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        ),
        tokenizer=tokenizer,
        text_encoder_2=small_t5(width=32),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    pipeline.save_pretrained(folder)
    return folder


def flux_model(path: Path, **changes: Any) -> FluxModel:
    settings: dict[str, Any] = {
        "path": str(path),
        "dtype": "float32",
        "device": torch.device("cpu"),
        "resolution": 32,
        "num_steps": 4,
        "schedule": "flux",
        "guidance_scale": 3.5,
        "max_sequence_length": LENGTH,
        "decode_batch": 64,
    }
    return FluxModel(**(settings | changes))
