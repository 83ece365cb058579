"""A toy reward for tests of the machinery: how little a JPEG file of the image needs. No weights."""

import io
from collections.abc import Mapping, Sequence
from typing import ClassVar

import PIL
from PIL import Image, features

from rewards.contract import API_VERSION, RewardInfo, Sample


class JpegSize:
    """Minus the kilobytes of a JPEG file: plain images score high (DDPO's compressibility, arXiv:2305.13301).

    Checkpoint: none. Range: below 0, unbounded. Preprocessing: none. Reference implementation: the paper's section
    5.1, which counts the kilobytes of a file of quality 95; here its colours are not subsampled.

    Args:
        quality: of the JPEG file, 1 to 95.
    """

    api_version: ClassVar[int] = API_VERSION
    info = RewardInfo(
        name="jpeg_size",
        metrics=("jpeg_size",),
        value_range=None,
        max_batch=64,
        tolerance=0.0,
        source="arXiv:2305.13301, section 5.1",
        licence="none needed",
    )

    def __init__(self, *, quality: int = 95) -> None:
        if not 1 <= quality <= 95:
            raise ValueError(f"quality={quality}: must be 1 to 95")
        self._quality = quality

    def load(self, device: str) -> None:
        """Nothing to load."""

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        """Minus kilobytes (1000 bytes) of each image."""
        return [{"jpeg_size": -self._bytes(sample) / 1000} for sample in batch]

    def fingerprint(self) -> str:
        encoder = features.version("libjpeg_turbo")
        return f"jpeg_size@quality={self._quality}/pillow={PIL.__version__}/libjpeg-turbo={encoder}"

    def close(self) -> None:
        """Nothing to free."""

    def _bytes(self, sample: Sample) -> int:
        file = io.BytesIO()
        Image.fromarray(sample.image).save(file, format="JPEG", quality=self._quality, subsampling=0)
        return file.tell()
