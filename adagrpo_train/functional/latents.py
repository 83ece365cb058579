"""FLUX's view of a latent: a row of tokens, one for each 2 x 2 patch, with a position each."""
# ruff: noqa: F722 - shapes in annotations are not code; the leading space keeps linters from reading names

import torch
from jaxtyping import Float, Float32
from torch import Tensor

PATCH = 2
"""Latent pixels, in height and in width, of one token."""


def pack(x: Float[Tensor, " rows channels height width"]) -> Float[Tensor, " rows tokens patch"]:
    """Tokens [rows, (height / 2) (width / 2), 4 channels] of latents, row by row; a token holds its channels one
    after the other, each as the patch's four values row by row.

    Args:
        x: [rows, channels, height, width], latent units; height and width even.

    Raises:
        ValueError: height or width is odd.

    Source: diffusers 0.42, FluxPipeline._pack_latents.
    """
    if x.shape[-2] % PATCH or x.shape[-1] % PATCH:
        raise ValueError(f"height and width of {tuple(x.shape)} must be multiples of {PATCH}")
    return torch.nn.functional.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)


def unpack(
    tokens: Float[Tensor, " rows tokens patch"], *, height: int, width: int
) -> Float[Tensor, " rows channels height width"]:
    """Latents [rows, channels, height, width] of their tokens: undoes pack.

    Args:
        tokens: [rows, (height / 2) (width / 2), 4 channels], latent units.
        height: of the latents, even.
        width: of the latents, even.

    Raises:
        RuntimeError: the tokens are not as many as the size has.

    Source: diffusers 0.42, FluxPipeline._unpack_latents.
    """
    patches = tokens.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
    return torch.nn.functional.pixel_shuffle(patches, PATCH)


def position_ids(height: int, width: int, *, device: torch.device) -> Float32[Tensor, " tokens 3"]:
    """Position (0, row, column) of each token [(height / 2) (width / 2), 3], in patches. Text tokens are at (0, 0, 0).

    Args:
        height: of the latents, even.
        width: of the latents, even.
        device: where the ids are made.

    Source: diffusers 0.42, FluxPipeline._prepare_latent_image_ids.
    """
    rows = torch.arange(height // PATCH, device=device, dtype=torch.float32)
    columns = torch.arange(width // PATCH, device=device, dtype=torch.float32)
    zero = torch.zeros(1, device=device)
    return torch.cartesian_prod(zero, rows, columns)
