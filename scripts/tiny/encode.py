"""Encodes the training pictures to normalised latents and stores shift and scale in the autoencoder's configuration."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from scripts.tiny import recipe

LOGGER = logging.getLogger(__name__)


@torch.no_grad()
def main() -> None:
    """Writes ``latents.pt`` (float32 of shape ``[N, 4, 8, 8]``, zero mean, unit deviation) to the output folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    parser.add_argument("--vae", type=Path, default=None, help="finished autoencoder; its shift and scale are kept")
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    recipe.setup(seed=0, threads=args.threads)
    vae = AutoencoderKL.from_pretrained(args.vae or args.out / "vae", dtype=torch.float32)
    vae = vae.eval().to(memory_format=torch.channels_last)
    images = np.load(args.out / "train_images.npy", mmap_mode="r")
    parts = []
    for start in range(0, len(images), args.batch):
        pixels = recipe.to_model_range(np.array(images[start : start + args.batch]))
        parts.append(vae.encode(pixels).latent_dist.mean.contiguous())
    latents = torch.cat(parts)
    if args.vae is None:
        shift, scale = latents.mean().item(), 1 / latents.std().item()
        vae.register_to_config(scaling_factor=scale, shift_factor=shift)
        vae.save_pretrained(args.out / "vae")
    else:
        shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    torch.save((latents - shift) * scale, args.out / "latents.pt")
    LOGGER.info("%d latents, shift %.4f, scale %.4f", len(latents), shift, scale)


if __name__ == "__main__":
    main()
