"""Pictures as Qwen2-VL takes them: resized to about 256 tokens, normalised, cut into patches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from rewards.vision.pixels import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from torch import Tensor

PATCH, MERGE, FRAMES = 14, 2, 2
#: Side of what becomes one token: 2 x 2 patches.
TOKEN_SIDE = PATCH * MERGE
#: HPSv3 asks for at least and at most as much as 256 tokens cover (hpsv3 1.0.0, hpsv3/inference.py).
PIXELS = 256 * TOKEN_SIDE**2
_MOST_ELONGATED = 200


def target_size(height: int, width: int) -> tuple[int, int]:
    """Height and width to resize to: multiples of 28 whose product is about `PIXELS`.

    A picture that is too large is rounded down, one that is too small is rounded up, so that it may end above `PIXELS`;
    one that happens to have the right area is only rounded. Same rule as hpsv3/dataset/utils.py smart_resize.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    rounded = tuple(max(TOKEN_SIDE, round(side / TOKEN_SIDE) * TOKEN_SIDE) for side in (height, width))
    area = rounded[0] * rounded[1]
    if area > PIXELS:
        shrink = math.sqrt(height * width / PIXELS)
        rounded = tuple(math.floor(side / shrink / TOKEN_SIDE) * TOKEN_SIDE for side in (height, width))
    elif area < PIXELS:
        grow = math.sqrt(PIXELS / (height * width))
        rounded = tuple(math.ceil(side * grow / TOKEN_SIDE) * TOKEN_SIDE for side in (height, width))
    for sides in ((height, width), rounded):  # the reference checks before and after
        if max(sides) > _MOST_ELONGATED * min(sides):
            raise ValueError(f"a picture of {height}x{width} is more than {_MOST_ELONGATED} times as long as wide")
    return rounded[0], rounded[1]


def patchify(image: np.ndarray) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches of a picture, and how many there are in time, height and width.

    Args:
        image: uint8 of shape ``[H, W, 3]``, RGB.

    Returns:
        float32 ``[1 * h * w, 3 * 2 * 14 * 14]``, the patches of one token behind each other, and ``(1, h, w)``. The
        model expects two frames per patch: both are this picture.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    import torch

    height, width = target_size(*image.shape[:2])
    # Pillow's bicubic on 8-bit values; torch's differs, and so would the score.
    resized = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(resized).permute(2, 0, 1).float() / 255
    pixels = (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    rows, columns = height // PATCH, width // PATCH
    cells = pixels.reshape(3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    cells = cells.permute(1, 4, 2, 5, 0, 3, 6)  # token row, token column, row, column in the token, then C, y, x
    frames = cells.unsqueeze(5).expand(*cells.shape[:5], FRAMES, PATCH, PATCH)
    return frames.reshape(rows * columns, 3 * FRAMES * PATCH**2), (1, rows, columns)
