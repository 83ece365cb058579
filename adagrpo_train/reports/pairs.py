"""Images of two models side by side."""

import textwrap
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from adagrpo_train.tracking.images import cell_size, resized

_BACKGROUND, _TEXT, _FAINT = (250, 250, 250), (40, 40, 40), (120, 120, 120)
_RULE, _UP, _DOWN = (215, 215, 215), (16, 120, 60), (180, 40, 40)
_MARGIN, _SEAM, _GAP, _LARGEST = 16, 2, 20, 256  # pixels
_FONT = 13


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt, uint8 [H, W, 3], and the score of each."""

    before: np.ndarray
    after: np.ndarray
    prompt: str
    scores: tuple[float, float]


@dataclass(frozen=True)
class Section:
    """Pairs under one heading."""

    heading: str
    pairs: list[Pair]


def side_by_side(sections: list[Section], *, before: str, after: str, score: str) -> Image.Image:
    """Pairs of images in rows: left the first model, right the second, the prompt and both scores underneath.

    Args:
        sections: each with a heading; one without pairs says so.
        before, after: names of the models.
        score: the name of the scores.
    """
    shown = next(pair for section in sections for pair in section.pairs)
    width, height = cell_size(shown.before[None])
    if width > _LARGEST:
        width, height = _LARGEST, max(1, round(height * _LARGEST / width))
    across = 2 * width + _SEAM
    columns = 4 if width <= _LARGEST * 3 // 4 else 3
    page = _Page(2 * _MARGIN + columns * (across + _GAP) - _GAP)
    page.line(f"left: {before}", _TEXT, bold=True)
    page.line(f"right: {after}", _TEXT, bold=True)
    page.line(f"same prompt, same noise; below each pair: {score} left -> right", _FAINT)
    for section in sections:
        page.rule()
        page.line(section.heading, _TEXT, bold=True)
        for start in range(0, len(section.pairs), columns):
            page.row(section.pairs[start : start + columns], (width, height))
        if not section.pairs:
            page.line("none", _FAINT)
    return page.finished()


class _Page:
    """A canvas that grows downwards."""

    def __init__(self, width: int) -> None:
        self._canvas = Image.new("RGB", (width, 64), _BACKGROUND)
        self._y, self._pitch = _MARGIN, _FONT + 4
        self._plain, self._large = ImageFont.load_default(size=_FONT), ImageFont.load_default(size=_FONT + 3)

    def line(self, text: str, colour: tuple[int, int, int], *, bold: bool = False) -> None:
        font = self._large if bold else self._plain
        room = self._canvas.width - 2 * _MARGIN
        while font.getlength(text) > room:
            text = text[:-4].rstrip() + "..."
        self._reach(self._pitch + 6)
        ImageDraw.Draw(self._canvas).text((_MARGIN, self._y), text, fill=colour, font=font)
        self._y += self._pitch + (8 if bold else 2)

    def rule(self) -> None:
        self._reach(24)
        self._y += 8
        ends = ((_MARGIN, self._y), (self._canvas.width - _MARGIN, self._y))
        ImageDraw.Draw(self._canvas).line(ends, fill=_RULE)
        self._y += 10

    def row(self, pairs: list[Pair], cell: tuple[int, int]) -> None:
        width, height = cell
        across = 2 * width + _SEAM
        prompts = [self._wrapped(pair.prompt, across) for pair in pairs]
        most = max(len(lines) for lines in prompts)
        self._reach(height + (most + 1) * self._pitch + 20)
        pen = ImageDraw.Draw(self._canvas)
        for number, (pair, lines) in enumerate(zip(pairs, prompts, strict=True)):
            x = _MARGIN + number * (across + _GAP)
            self._canvas.paste(resized(pair.before, cell), (x, self._y))
            self._canvas.paste(resized(pair.after, cell), (x + width + _SEAM, self._y))
            y = self._y + height + 4
            pen.multiline_text((x, y), "\n".join(lines), fill=_TEXT, font=self._plain, spacing=3)
            self._scores(pen, (x, y + len(lines) * self._pitch), pair.scores)
        self._y += height + (most + 1) * self._pitch + 14

    def finished(self) -> Image.Image:
        return self._canvas.crop((0, 0, self._canvas.width, self._y + _MARGIN - 8))

    def _scores(self, pen: ImageDraw.ImageDraw, corner: tuple[int, int], scores: tuple[float, float]) -> None:
        change = scores[1] - scores[0]
        colour = _UP if change > 0 else _DOWN if change < 0 else _FAINT
        pen.text(corner, f"{scores[0]:.3f} -> {scores[1]:.3f}  ({change:+.3f})", fill=colour, font=self._plain)

    def _wrapped(self, text: str, room: int) -> list[str]:
        wide = self._plain.getlength(text) / max(1, len(text))
        return textwrap.wrap(text, max(12, int(0.95 * room / max(wide, 1))), max_lines=4, placeholder=" ...") or [""]

    def _reach(self, height: int) -> None:
        """Make sure that so many pixels are left below."""
        missing = self._y + height + _MARGIN - self._canvas.height
        if missing > 0:
            taller = Image.new("RGB", (self._canvas.width, self._canvas.height + max(missing, 512)), _BACKGROUND)
            taller.paste(self._canvas)
            self._canvas = taller
