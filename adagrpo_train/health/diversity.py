"""How much the images of a group differ: what collapses when a policy answers a prompt with one picture."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adagrpo_train.types import Images

_PIXELS = 32
"""Longer side of what is compared: composition and colours survive, the grain of single pixels does not, and a sample
of any resolution costs at most 3 KiB."""


class Diversity:
    """Collects the samples of an iteration as they are finished. Groups are whole on one process."""

    def __init__(self) -> None:
        self._groups: defaultdict[int, list[np.ndarray]] = defaultdict(list)

    def add(self, images: Images, group: Sequence[int]) -> None:
        """Take in images [n, H, W, 3] of the given groups [n]; only reduced copies are kept."""
        for image, own in zip(images, group, strict=True):
            self._groups[own].append(_reduced(image))

    def by_group(self) -> Tensor:
        """Distance inside each group [groups] float64, in the order of their numbers; see group_distance()."""
        return torch.tensor([group_distance(np.stack(self._groups[own])) for own in sorted(self._groups)]).double()


def group_distance(images: Images) -> float:
    """Root mean square difference of two images of a group, over all pairs; in [0, 1], of the full range of a pixel.

    Two independent draws differ by sqrt(2) standard deviations, so the unbiased variance of each value over the group
    gives the mean over all pairs without visiting them.

    Args:
        images: uint8 [G, H, W, 3], G >= 2.
    """
    return float(np.sqrt(2 * np.var(images.astype(np.float64), axis=0, ddof=1).mean()) / 255)


def _reduced(image: np.ndarray) -> np.ndarray:
    """Mean over boxes, the longer side at most `_PIXELS` long."""
    height, width = image.shape[:2]
    scale = _PIXELS / max(height, width)
    if scale >= 1:
        return image.copy()
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
