"""Drawing of ground-truth pictures for scenes of the shapes grammar.

A picture is 32 x 32 pixels of three 8-bit channels: a dark background, a 2 x 2 arrangement of cells of 16 pixels and
at most one object per cell, jittered in position and size and anti-aliased by supersampling.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rewards.shapes.grammar import Scene

IMAGE_SIZE = 32
CELL = 16
BACKGROUND: tuple[int, int, int] = (28, 28, 34)
RGB: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (45, 190, 60),
    "blue": (50, 70, 240),
    "yellow": (240, 215, 50),
    "purple": (200, 50, 220),
    "cyan": (40, 225, 215),
}
#: Range of radii in pixels by requested size.
RADII: dict[str | None, tuple[float, float]] = {"small": (3.7, 4.4), "large": (6.0, 7.0), None: (4.0, 6.6)}

_SUPERSAMPLING = 3
_MAX_JITTER = 2.0
_CELL_MARGIN = 7.4
_AXIS = (np.arange(IMAGE_SIZE * _SUPERSAMPLING, dtype=np.float32) + 0.5) / _SUPERSAMPLING


def draw(scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Draws one random picture of a scene.

    Args:
        scene: What to draw.
        rng: Source of positions and sizes.

    Returns:
        The picture, uint8 of shape ``[32, 32, 3]`` with values in ``[0, 255]``.
    """
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    canvas[:] = BACKGROUND
    cells = _choose_cells(scene, rng)
    low, high = RADII[scene.size]
    position = 0
    for group in scene.groups:
        for _ in range(group.count):
            radius = float(rng.uniform(low, high))
            jitter = min(max(0.0, _CELL_MARGIN - radius), _MAX_JITTER)
            column, row = cells[position]
            dx, dy = rng.uniform(-jitter, jitter, 2)
            centre = (column * CELL + CELL / 2 + float(dx), row * CELL + CELL / 2 + float(dy))
            paint(canvas, group.colour, group.shape, centre=centre, radius=radius)
            position += 1
    return canvas.round().astype(np.uint8)


def paint(
    canvas: npt.NDArray[np.float32], colour: str, shape: str, *, centre: tuple[float, float], radius: float
) -> None:
    """Paints one anti-aliased object over a canvas, in place.

    Args:
        canvas: float32 of shape ``[32, 32, 3]`` with values in ``[0, 255]``.
        colour: A key of `RGB`.
        shape: ``"circle"``, ``"square"`` or ``"triangle"``.
        centre: Horizontal and vertical position in pixels.
        radius: Radius in pixels.
    """
    x, y = centre
    x0, x1 = max(0, int(x - radius - 1)), min(IMAGE_SIZE, int(x + radius + 2))
    y0, y1 = max(0, int(y - radius - 1)), min(IMAGE_SIZE, int(y + radius + 2))
    k = _SUPERSAMPLING
    dx = _AXIS[None, x0 * k : x1 * k] - x
    dy = _AXIS[y0 * k : y1 * k, None] - y
    if shape == "circle":
        mask = dx * dx + dy * dy <= radius * radius
    elif shape == "square":
        mask = (abs(dx) <= 0.92 * radius) & (abs(dy) <= 0.92 * radius)
    elif shape == "triangle":
        height = (dy + radius) / (2 * radius)
        mask = (height >= 0) & (height <= 1) & (abs(dx) <= 1.05 * radius * height)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    alpha = mask.astype(np.float32).reshape(y1 - y0, k, x1 - x0, k).mean((1, 3))[..., None]
    region = canvas[y0:y1, x0:x1]
    region += alpha * (np.asarray(RGB[colour], np.float32) - region)


def _choose_cells(scene: Scene, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Returns one distinct (column, row) cell per object, in the order of the groups."""
    if scene.relation is None:
        count = sum(group.count for group in scene.groups)
        return [(int(cell) % 2, int(cell) // 2) for cell in rng.permutation(4)[:count]]
    axis = 1 if scene.relation in ("above", "below") else 0
    first, second = [0, 0], [0, 0]
    first[axis] = 1 if scene.relation in ("below", "right of") else 0
    second[axis] = 1 - first[axis]
    first[1 - axis] = int(rng.integers(2))
    aligned = rng.random() < 0.6
    second[1 - axis] = first[1 - axis] if aligned else 1 - first[1 - axis]
    return [(first[0], first[1]), (second[0], second[1])]
