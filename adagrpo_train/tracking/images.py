"""Image grids with captions: pictures for people, and files from which each image can be cut out again."""

import json
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

_BACKGROUND, _TEXT = (250, 250, 250), (40, 40, 40)
_GAP, _COLUMNS, _SMALLEST, _LARGEST = 8, 7, 128, 512  # all but the second in pixels
_NOTE = "adagrpo-cells"


@dataclass(frozen=True)
class Cell:
    """One image cut out of a saved grid."""

    image: Image.Image
    caption: str


def image_grid(images: np.ndarray, captions: list[str], *, columns: int = _COLUMNS, labels: bool = True) -> np.ndarray:
    """Images in rows with their captions underneath.

    Args:
        images: uint8 [N, H, W, 3], N > 0; those narrower than 128 pixels are enlarged by whole factors, those wider
            than 512 are shrunk.
        captions: N texts, wrapped to the width of an image.
        labels: whether the captions are drawn.

    Returns:
        uint8 [height, width, 3].
    """
    width, height = cell_size(images)
    # Wide images are mostly seen scaled down.
    font_size = 11 if width < 256 else 16
    line_height, font = font_size + 3, ImageFont.load_default(size=font_size)
    texts = [textwrap.fill(text, max(12, 2 * width // font_size), max_lines=6) if labels else "" for text in captions]
    strip = max(6 + line_height * (text.count("\n") + 1) if text else 0 for text in texts)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    size = (columns * (width + _GAP) + _GAP, rows * (height + strip + _GAP) + _GAP)
    canvas = Image.new("RGB", size, _BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = _corner(number, columns, width, height + strip)
        canvas.paste(resized(image, (width, height)), (x, y))
        pen.multiline_text((x, y + height + 3), text, fill=_TEXT, font=font, spacing=2)
    return np.asarray(canvas)


def save_grid(path: Path, images: np.ndarray, captions: list[str], *, labels: bool) -> None:
    """Write image_grid as a PNG that also holds the captions and the places of the images, for read_cells."""
    grid = image_grid(images, captions, labels=labels)
    width, height = cell_size(images)
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    pitch = (grid.shape[0] - _GAP) // rows - _GAP
    note = PngImagePlugin.PngInfo()
    cells = {
        "cell": [width, height],
        "shown": [min(width, images.shape[2]), min(height, images.shape[1])],
        "corners": [_corner(number, columns, width, pitch) for number in range(len(images))],
        "captions": captions,
    }
    note.add_itxt(_NOTE, json.dumps(cells))
    draft = path.with_suffix(".draft")
    Image.fromarray(grid).save(draft, format="PNG", pnginfo=note, compress_level=9)
    os.replace(draft, path)


def read_cells(path: Path) -> list[Cell]:
    """Images and captions of a grid that save_grid wrote, enlarged ones at their own size; [] for any other PNG."""
    with Image.open(path) as grid:
        note = grid.info.get(_NOTE)
        if note is None:
            return []
        cells = json.loads(note)
        width, height = cells["cell"]
        crops = [grid.crop((x, y, x + width, y + height)) for x, y in cells["corners"]]
    shown = tuple(cells["shown"])
    return [
        Cell(crop.resize(shown, Image.Resampling.NEAREST), caption)
        for crop, caption in zip(crops, cells["captions"], strict=True)
    ]


def thumbnails(images: np.ndarray) -> list[np.ndarray]:
    """Images uint8 [N, H, W, 3] no larger than a grid shows them: many of full size would fill the memory."""
    size = cell_size(images)
    return [np.asarray(resized(image, size)) if size[0] < image.shape[1] else image for image in images]


def _corner(number: int, columns: int, width: int, height: int) -> tuple[int, int]:
    """Left and top edge of an image, pixels."""
    return _GAP + number % columns * (width + _GAP), _GAP + number // columns * (height + _GAP)


def cell_size(images: np.ndarray) -> tuple[int, int]:
    """Width and height of an image in the grid, pixels."""
    height, width = images.shape[1:3]
    if width > _LARGEST:
        return _LARGEST, max(1, round(height * _LARGEST / width))
    factor = max(1, -(-_SMALLEST // width))
    return width * factor, height * factor


def resized(image: np.ndarray, size: tuple[int, int]) -> Image.Image:
    shrinks = size[0] < image.shape[1]
    return Image.fromarray(image).resize(size, Image.Resampling.LANCZOS if shrinks else Image.Resampling.NEAREST)
