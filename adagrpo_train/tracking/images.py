"""Image grids with captions."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_BACKGROUND, _TEXT = (250, 250, 250), (40, 40, 40)


def image_grid(images: np.ndarray, captions: list[str], *, columns: int = 7, smallest: int = 128) -> np.ndarray:
    """Images in rows with their captions underneath.

    Args:
        images: uint8 [N, H, W, 3]; those smaller than `smallest` pixels are enlarged by whole factors.
        captions: N texts, wrapped to the width of an image.

    Returns:
        uint8 [height, width, 3].
    """
    factor = max(1, -(-smallest // images.shape[2]))
    height, width = images.shape[1] * factor, images.shape[2] * factor
    font = ImageFont.load_default(size=11)
    wrapped = [textwrap.fill(caption, max(12, width // 6)) for caption in captions]
    caption_height = 6 + 14 * max(text.count("\n") + 1 for text in wrapped)
    columns = min(columns, len(images))
    rows, gap = -(-len(images) // columns), 8
    size = (columns * (width + gap) + gap, rows * (height + caption_height + gap) + gap)
    canvas = Image.new("RGB", size, _BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for number, (image, text) in enumerate(zip(images, wrapped, strict=True)):
        x = gap + number % columns * (width + gap)
        y = gap + number // columns * (height + caption_height + gap)
        canvas.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        pen.multiline_text((x, y + height + 3), text, fill=_TEXT, font=font, spacing=2)
    return np.asarray(canvas)
