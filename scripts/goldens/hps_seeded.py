"""Weights and pictures that every environment makes alike, so that recorded scores need no recorded weights."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from PIL import Image

#: A CLIP that takes pictures as the real one does and is small elsewhere.
SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
#: Square, wide, tall, as long as the input, and with a margin whose half is rounded up or down (227 - 224).
SIZES = ((224, 224), (512, 512), (300, 431), (97, 33), (640, 224), (33, 200), (300, 305))
PROMPTS = (
    "a photo of a cat",
    "",
    "Ein Bär, 4k &amp; <b>HDR</b>!",
    "\u72ac with \ufb01ligree and\u3000wide letters \uff21",
    "long " * 100 + "end",
)


def seeded(state: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random weights for every name of a state dict, from its name, its shape and the seed alone.

    Args:
        state: tensors by name; only shapes are looked at.
        seed: of all of them.

    Returns:
        float32 arrays: norms around 1, everything else small.
    """
    weights = {}
    for name, value in state.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        noise = rng.standard_normal(tuple(value.shape)).astype(np.float32)
        norm = value.ndim == 1 and name.endswith("weight")
        fan = max(1, value.shape[-1] if value.ndim > 1 else 1)
        weights[name] = 1 + 0.1 * noise if norm else noise * np.float32(min(0.7, 1 / np.sqrt(fan)))
        if name == "logit_scale":
            weights[name] = np.asarray(3.0, np.float32)
    return weights


def picture(number: int, size: tuple[int, int]) -> np.ndarray:
    """A picture of soft blobs with fine noise, uint8 of shape ``[H, W, 3]``."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BILINEAR), np.int16)
    return (smooth + rng.integers(-40, 41, smooth.shape)).clip(0, 255).astype(np.uint8)


#: A BERT vocabulary that spells everything.
WORD_PIECES = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("photo", "cat", "of", "##ee", "long"),
    *(prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.;&<>/!" for prefix in ("", "##")),
)
#: Sizes of a small ImageReward, in the words of transformers' configs.
SMALL_BLIP: dict[str, dict[str, Any]] = {
    "vision": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 32,
    },
    "text": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(WORD_PIECES) + 2,
        "max_position_embeddings": 64,
    },
}
