"""Programmatic verifier of the shapes task: sees a decoded picture and a caption, nothing else.

The picture is cut into connected foreground components. Every component gets a colour (by the direction of its pixels
away from the background, which ignores anti-aliasing), a purity (how much of it has another hue), a shape (overlap
with templates of the size of its bounding box), a position and a radius. Components are matched to the requested
objects one to one; missing and surplus components cost score.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage, optimize

from rewards.shapes.draw import BACKGROUND, IMAGE_SIZE, RGB
from rewards.shapes.grammar import COLOURS, SHAPES, Scene, parse_caption

_COVERAGE = 0.45  # an object's pixel lies at least this far between the background and the full colour
_MIN_AREA = 8  # pixels
_SIZE_BOUNDARY = 5.1  # radius in pixels between small and large
_RADIUS_RANGE = (2.4, 8.2)  # plausible radii in pixels
_SAME_HUE = 0.945  # cosine with the direction of a colour
_STRICT_COLOUR = 0.85  # smallest pure fraction
_STRICT_IOU = 0.70
_STRICT_DISTANCE = 6.0  # pixels along the axis of a relation
_STRICT_HAZE = 30.0  # mean deviation of the background in RGB units
_MIN_ASPECT = 0.75

_BACKGROUND = np.asarray(BACKGROUND, np.float32)
_DIRECTIONS = np.asarray([RGB[colour] for colour in COLOURS], np.float32) - _BACKGROUND
_LENGTHS = np.linalg.norm(_DIRECTIONS, axis=1)
_DIRECTIONS /= _LENGTHS[:, None]

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ShapesScore:
    """Result of the verifier.

    Attributes:
        smooth: Graded agreement in ``[0, 1]``.
        strict: 1.0 if everything the caption asks for is right, else 0.0.
    """

    smooth: float
    strict: float


@dataclass(frozen=True)
class Component:
    """One connected foreground component.

    Attributes:
        colour: Fraction of its pixels (weighted by brightness) with the hue of each colour, shape ``[6]``, in
            ``[0, 1]``.
        iou: Overlap with each shape template, shape ``[3]``, in ``[0, 1]``.
        x: Horizontal centre in pixels.
        y: Vertical centre in pixels.
        radius: Mean of half width and half height in pixels.
    """

    colour: FloatArray
    iou: FloatArray
    x: float
    y: float
    radius: float


def score(image: npt.NDArray[np.uint8], prompt: str) -> ShapesScore:
    """Scores one picture against one caption.

    Args:
        image: uint8 of shape ``[S, S, 3]`` with values in ``[0, 255]``, S a multiple of 32 (larger pictures are
            averaged down to 32 x 32).
        prompt: A caption of the grammar.

    Returns:
        The smooth and the strict score.

    Raises:
        ValueError: If the picture or the caption is not acceptable.
    """
    scene = parse_caption(prompt)
    pixels = _to_pixels(image)
    components, haze = find_components(pixels)
    if not components:
        return ShapesScore(0.0, 0.0)
    required = [
        (COLOURS.index(group.colour), SHAPES.index(group.shape)) for group in scene.groups for _ in range(group.count)
    ]
    quality, right = _agreement(required, components)
    rows, columns = optimize.linear_sum_assignment(quality, maximize=True)
    match = {int(row): components[int(column)] for row, column in zip(rows, columns, strict=True)}
    smooth = float(quality[rows, columns].sum()) / max(len(required), len(components))
    strict = len(components) == len(required) and bool(right[rows, columns].all())
    smooth *= float(np.clip(1.5 - haze / (2 * _STRICT_HAZE), 0.0, 1.0))
    strict = strict and haze < _STRICT_HAZE
    factor, holds = _constraint(scene, match)
    return ShapesScore(float(np.clip(smooth * factor, 0.0, 1.0)), float(strict and holds))


def find_components(pixels: FloatArray) -> tuple[list[Component], float]:
    """Finds the objects of a picture.

    Args:
        pixels: float32 of shape ``[32, 32, 3]`` with values in ``[0, 255]``.

    Returns:
        The components of at least eight pixels, and the haze: the mean distance of the other pixels from the
        background colour, in RGB units (specks count fully).
    """
    difference = pixels - _BACKGROUND
    norm = np.sqrt((difference * difference).sum(-1))
    cosine = (difference @ _DIRECTIONS.T) / np.maximum(norm, 1.0)[..., None]
    nearest = cosine.argmax(-1)
    coverage = norm / _LENGTHS[nearest]
    foreground = coverage > _COVERAGE
    labels = np.asarray(ndimage.label(foreground)[0])  # pyright: ignore[reportIndexIssue, reportGeneralTypeIssues]
    hue = np.where(cosine.max(-1) > _SAME_HUE, nearest, len(COLOURS))
    components = []
    rest = np.ones(foreground.shape, dtype=np.bool_)
    areas = np.bincount(labels.reshape(-1))
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        area = int(areas[index])
        if window is None or area < _MIN_AREA:
            continue
        mask = labels[window] == index
        rest[window] &= ~mask
        weight = np.minimum(coverage[window][mask], 1.0)
        share = np.bincount(hue[window][mask], weights=weight, minlength=len(COLOURS) + 1) / weight.sum()
        iou = _template_overlap(mask)
        ys, xs = np.nonzero(mask)
        height, width = mask.shape
        components.append(
            Component(
                colour=share[: len(COLOURS)].astype(np.float32),
                iou=iou,
                x=float(xs.mean()) + window[1].start,
                y=float(ys.mean()) + window[0].start,
                radius=(height + width) / 4,
            )
        )
    if components:
        rest = ~np.asarray(ndimage.binary_dilation(~rest), dtype=np.bool_)  # anti-aliased rims belong to the objects
    haze = float(norm[rest].mean()) if rest.any() else float(norm.mean())
    return components, haze


def _to_pixels(image: npt.NDArray[np.uint8]) -> FloatArray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a uint8 picture of shape [S, S, 3], got {image.dtype} {image.shape}")
    side = image.shape[0]
    if image.shape[1] != side or side % IMAGE_SIZE:
        raise ValueError(f"expected a square picture with a side divisible by {IMAGE_SIZE}, got {image.shape[:2]}")
    pixels = image.astype(np.float32)
    k = side // IMAGE_SIZE
    return pixels if k == 1 else pixels.reshape(IMAGE_SIZE, k, IMAGE_SIZE, k, 3).mean((1, 3))


@lru_cache(maxsize=2048)
def _templates(height: int, width: int) -> FloatArray:
    """Returns anti-aliased circle, square and triangle templates, shape ``[3, height, width]``, in ``[0, 1]``."""
    y = ((np.arange(height * 4, dtype=np.float32) + 0.5) / (height * 4) * 2 - 1)[:, None]
    x = ((np.arange(width * 4, dtype=np.float32) + 0.5) / (width * 4) * 2 - 1)[None]
    masks = (x * x + y * y <= 1, (abs(x) <= 1) & (abs(y) <= 1), abs(x) <= (y + 1) / 2)
    return np.stack([mask.reshape(height, 4, width, 4).mean((1, 3)) for mask in masks]).astype(np.float32)


def _template_overlap(mask: npt.NDArray[np.bool_]) -> FloatArray:
    height, width = mask.shape
    templates = _templates(height, width)
    solid = mask.astype(np.float32)
    iou = np.minimum(templates, solid).sum((1, 2)) / np.maximum(templates, solid).sum((1, 2))
    aspect = min(height, width) / max(height, width)
    return (iou * min(1.0, aspect / _MIN_ASPECT)).astype(np.float32)


def _sigmoid(value: float | FloatArray) -> FloatArray:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(np.asarray(value, np.float32), -30.0, 30.0))), np.float32)


def _agreement(
    required: list[tuple[int, int]], components: list[Component]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Returns graded and strict agreement of every required object with every component.

    Args:
        required: Colour and shape indices of N objects.
        components: M components.

    Returns:
        Quality of shape ``[N, M]`` in ``[0, 1]`` and correctness of shape ``[N, M]``.
    """
    quality = np.zeros((len(required), len(components)))
    right = np.zeros(quality.shape, np.bool_)
    for j, component in enumerate(components):
        low, high = _RADIUS_RANGE
        outside = max(low - component.radius, component.radius - high, 0.0)
        plausible = float(np.exp(-outside))
        best = int(component.iou.argmax())
        for i, (colour, shape) in enumerate(required):
            share = float(component.colour[colour])
            other = float(max(value for k, value in enumerate(component.iou) if k != shape))
            iou = float(component.iou[shape])
            shape_term = float(np.clip((iou - 0.5) / 0.35, 0, 1) * _sigmoid((iou - other) * 25 + 1))
            colour_term = float(np.clip((share - 0.3) / 0.65, 0, 1))
            quality[i, j] = plausible * (0.15 * colour_term + 0.15 * shape_term + 0.7 * colour_term * shape_term)
            right[i, j] = share > _STRICT_COLOUR and best == shape and iou > _STRICT_IOU and outside == 0.0
    return quality, right


def _constraint(scene: Scene, match: dict[int, Component]) -> tuple[float, bool]:
    """Returns the factor on the smooth score and the truth of the size or relation of a scene."""
    if scene.size is not None:
        margin = match[0].radius - _SIZE_BOUNDARY if 0 in match else -np.inf
        margin = margin if scene.size == "large" else -margin
        return 0.3 + 0.7 * float(_sigmoid(margin * 4)), bool(margin > 0)
    if scene.relation is not None:
        if 0 not in match or 1 not in match:
            return 0.3, False
        vertical = scene.relation in ("above", "below")
        distance = match[1].y - match[0].y if vertical else match[1].x - match[0].x
        distance = distance if scene.relation in ("above", "left of") else -distance
        return 0.3 + 0.7 * float(_sigmoid((distance - 5) * 0.8)), distance > _STRICT_DISTANCE
    return 1.0, True
