"""From bytes of a request to pixels, trusting none of them."""

import io
import warnings

import numpy as np
from PIL import Image, ImageFile

from rewards.contract import ItemError
from rewards.wire import MAX_SIDE, WireImage

Image.MAX_IMAGE_PIXELS = MAX_SIDE * MAX_SIDE
ImageFile.LOAD_TRUNCATED_IMAGES = False


def decode(image: WireImage) -> np.ndarray:
    """Pixels uint8 [H, W, 3], in memory of their own.

    The declared size is compared with the file's before any pixel is decoded, so that a small file cannot unfold into
    a huge image.

    Raises:
        ItemError: the bytes are not an image of the declared format and size.
    """
    if image.fmt == "raw":
        if len(image.data) != image.w * image.h * 3:
            raise ItemError(f"a raw image of {image.w} x {image.h} pixels cannot have {len(image.data)} bytes")
        return np.frombuffer(image.data, np.uint8).reshape(image.h, image.w, 3)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image.data), formats=[image.fmt]) as file:
                if file.size != (image.w, image.h):
                    raise ItemError(f"the file has {file.size} pixels, declared were {(image.w, image.h)}")
                if getattr(file, "n_frames", 1) != 1:
                    raise ItemError("the file holds several frames")
                return np.asarray(file.convert("RGB"))
    except ItemError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files; the text of some names internals
        raise ItemError(f"not a readable {image.fmt} file") from error
