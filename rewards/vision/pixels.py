"""Pictures as image towers take them: ``uint8 [H, W, 3]`` in, normalised ``float32 [3, S, S]`` out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

Triple = tuple[float, float, float]

#: Mean and standard deviation of CLIP's training pictures (openai/CLIP, clip/clip.py).
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)


def pad_to_square(image: np.ndarray, size: int) -> Tensor:
    """The whole picture, its longest side resized to ``size``, centred on black. HPSv2's way.

    The resize is bicubic with antialiasing on floats in [0, 1], whose overshoots are kept; the border is black before
    normalising, not the mean colour. Equals hpsv2 1.2.0, src/open_clip/transform.py, which crashes on a picture that is
    ``size`` long and not square: it leaves that one unpadded.
    """
    import torch
    from torch.nn import functional

    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255
    scale = size / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    if scale != 1:
        pixels = functional.interpolate(
            pixels[None], (height, width), mode="bicubic", align_corners=False, antialias=True
        )[0]
    left, top = (size - width) // 2, (size - height) // 2
    pixels = functional.pad(pixels, (left, size - width - left, top, size - height - top))
    return _normalise(pixels, CLIP_MEAN, CLIP_STD)


def crop_to_square(
    image: np.ndarray,
    size: int,
    *,
    centre: Literal["rounded", "floored"],
    mean: Triple = CLIP_MEAN,
    std: Triple = CLIP_STD,
) -> Tensor:
    """The middle of the picture, its shortest side resized to ``size``. CLIP's way.

    The resize is Pillow's bicubic on 8-bit values.

    Args:
        image: uint8 of shape ``[H, W, 3]``.
        size: side of the square in pixels.
        centre: where the middle lies when the margin is odd: ``"rounded"`` half to even as in torchvision, OpenAI's
            CLIP and open_clip, or ``"floored"`` as in transformers.
        mean: of the colours, in [0, 1].
        std: of the colours.
    """
    import torch

    height, width = image.shape[:2]
    shortest = min(height, width)
    height, width = int(size * height / shortest), int(size * width / shortest)
    picture = Image.fromarray(image)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    top, left = ((side - size) // 2 if centre == "floored" else round((side - size) / 2) for side in (height, width))
    square = np.array(picture.crop((left, top, left + size, top + size)))
    return _normalise(torch.from_numpy(square).permute(2, 0, 1).float() / 255, mean, std)


def _normalise(pixels: Tensor, mean: Triple, std: Triple) -> Tensor:
    import torch

    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
