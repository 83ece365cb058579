"""The same held-out prompts from the same noise at every evaluation: how their images change."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from adagrpo_train.reports.rows import Row, spread
from adagrpo_train.tracking.images import Cell, read_cells

_MOST_MOMENTS, _SMALL_PIXELS = 6, 64
_TILE_PIXELS, _GRID_PIXELS = 256, 1400
_LARGE_ROWS = 12
"""Prompts shown where images are photographs: each costs tens of kilobytes."""


def gallery(run_dir: Path, scores: Mapping[int, Sequence[Row]]) -> Row:
    """A strip of images for each prompt where the grids can be cut apart, the first and the last grid otherwise.

    Args:
        scores: iteration -> rows of that evaluation, in the order of the images.
    """
    paths = spread(sorted((run_dir / "images").glob("heldout_*.png")), _MOST_MOMENTS)
    cells = [read_cells(path) for path in paths]
    captions = {tuple(cell.caption for cell in column) for column in cells}
    if not cells or not all(cells) or len(captions) != 1:
        ends = paths if len(paths) < 2 else [paths[0], paths[-1]]
        grids = [{"iteration": _iteration(path), "source": _grid(path)} for path in ends]
        return {"iterations": [_iteration(path) for path in ends], "strips": [], "grids": grids, "pixels": False}
    iterations, pixels = [_iteration(path) for path in paths], _is_small(cells[0][0])
    most = len(cells[0]) if pixels else _LARGE_ROWS
    strips = [
        {
            "caption": row[0].caption,
            "sources": [_tile(cell) for cell in row],
            "scores": [_score(scores.get(iteration, ()), number) for iteration in iterations],
        }
        for number, row in enumerate(list(zip(*cells, strict=True))[:most])
    ]
    return {"iterations": iterations, "strips": strips, "grids": [], "pixels": pixels}


def _score(rows: Sequence[Row], number: int) -> float | None:
    """The total reward of an image, None where it was not recorded."""
    return rows[number].get("total") if number < len(rows) else None


def _iteration(path: Path) -> int:
    return int(path.stem.rsplit("_", 1)[1])


def _is_small(cell: Cell) -> bool:
    return cell.image.width <= _SMALL_PIXELS


def _tile(cell: Cell) -> str:
    image = cell.image.convert("RGB")
    image.thumbnail((_TILE_PIXELS, _TILE_PIXELS))
    return _data_url(image, "png" if _is_small(cell) else "jpeg")


def _grid(path: Path) -> str:
    with Image.open(path) as image:
        picture = image.convert("RGB")
    if picture.width <= _GRID_PIXELS:
        return _data_url(picture, "png")
    picture.thumbnail((_GRID_PIXELS, 4 * _GRID_PIXELS))
    return _data_url(picture, "jpeg")


def _data_url(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"quality": 85} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
