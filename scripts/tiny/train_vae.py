"""Trains the autoencoder of the bundled model, in two phases.

``--phase autoencoder`` trains encoder and decoder; after `encode` has fixed the latents, ``--phase decoder`` refines
the decoder alone on slightly noisy latents with more weight on edges.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from scripts.tiny import recipe

LOGGER = logging.getLogger(__name__)
KL_WEIGHT = 1e-3
LATENT_NOISE = 0.05


def main() -> None:
    """Writes the autoencoder to the folder ``vae`` (first phase) or ``vae_final`` (second phase)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    parser.add_argument("--phase", choices=("autoencoder", "decoder"), required=True)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=None, help="default: 3e-3 (autoencoder), 1.5e-3 (decoder)")
    parser.add_argument("--eval-every", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    recipe.setup(seed=args.seed, threads=args.threads)
    decoder_only = args.phase == "decoder"
    vae = AutoencoderKL.from_pretrained(args.out / "vae") if decoder_only else recipe.build_vae()
    vae = vae.to(memory_format=torch.channels_last)
    parameters = list(vae.decoder.parameters() if decoder_only else vae.parameters())
    peak = args.lr or (1.5e-3 if decoder_only else 3e-3)
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0, fused=True)
    images = np.load(args.out / "train_images.npy", mmap_mode="r")
    latents = torch.load(args.out / "latents.pt") if decoder_only else None
    rng = np.random.default_rng(args.seed)
    start = time.perf_counter()
    for step in range(args.steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / args.steps)) + 0.01
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 30) * decay
        chosen = np.sort(rng.choice(len(images), args.batch, replace=False))
        target = recipe.to_model_range(images[chosen])
        if latents is not None:
            loss = _decoder_loss(vae, latents[torch.from_numpy(chosen)], target)
        else:
            loss = _autoencoder_loss(vae, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            LOGGER.info("step %d  %.0f s  loss %.4f", step + 1, time.perf_counter() - start, loss.item())
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            LOGGER.info("reconstruction: %s", recipe.format_table(_evaluate(vae, args.out)))
    vae.eval().save_pretrained(args.out / ("vae_final" if decoder_only else "vae"))


def _weights(target: torch.Tensor) -> torch.Tensor:
    """Returns a weight of 1 (background) to 4 (objects) per pixel, shape ``[B, 1, 32, 32]``."""
    return 1 + 3 * (target - target[:, :, :1, :1]).abs().amax(1, keepdim=True).clamp(0, 1)


def _autoencoder_loss(vae: AutoencoderKL, target: torch.Tensor) -> torch.Tensor:
    posterior = vae.encode(target).latent_dist
    latents = posterior.sample()
    error = vae.decode(latents).sample - target
    weight = _weights(target)
    kl = posterior.kl().mean() / latents[0].numel()
    return (error.abs() * weight).mean() + 2 * (error.square() * weight).mean() + KL_WEIGHT * kl


def _decoder_loss(vae: AutoencoderKL, latents: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    strength = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1)
    noisy = latents + torch.randn_like(latents) * strength
    error = vae.decode(noisy / vae.config.scaling_factor + vae.config.shift_factor).sample - target
    across = (target[..., 1:] - target[..., :-1]).abs().amax(1, keepdim=True).clamp(0, 1)
    down = (target[..., 1:, :] - target[..., :-1, :]).abs().amax(1, keepdim=True).clamp(0, 1)
    pad = torch.nn.functional.pad
    weight = _weights(target) + 3 * pad(across, (0, 1)) + 3 * pad(down, (0, 0, 0, 1))
    return (error.abs() * weight).mean() + 2 * (error.square() * weight).mean()


@torch.no_grad()
def _evaluate(vae: AutoencoderKL, folder: Path) -> dict[str, tuple[float, float, int]]:
    images = np.load(folder / "eval_images.npy")[:700]
    vae.eval()
    out = []
    for start in range(0, len(images), 100):
        latents = vae.encode(recipe.to_model_range(images[start : start + 100])).latent_dist.mean
        out.append(recipe.to_images(vae.decode(latents).sample))
    vae.train()
    scenes = recipe.load_scenes(folder / "eval_scenes.npy")[: len(images)]
    return recipe.score_by_class(np.concatenate(out), scenes)


if __name__ == "__main__":
    main()
