"""What every chart is made of: sizes, colours, the frame with its axes, the finished picture."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from adagrpo_train.reports.charts.scale import Scale, ticks

COLOURS = tuple(f"var(--s{number})" for number in range(1, 9))
_TOP, _RIGHT, _BOTTOM = 12, 14, 40
_CHARACTER = 6.7
"""Width of a character of the axes, pixels."""


@dataclass(frozen=True)
class Size:
    """Width and height in pixels, and the class of the style sheet that decides when it is shown."""

    width: int
    height: int
    shown: str


WIDE, HALF, NARROW = Size(960, 310, "wide"), Size(480, 270, "wide"), Size(350, 240, "narrow")
SMALL = Size(340, 190, "always")
RESPONSIVE = (WIDE, NARROW)


@dataclass(frozen=True)
class Key:
    """One entry of a legend."""

    label: str
    colour: str
    style: str = "line"  # a class of the style sheet: line, faint, marked, box, dot, ring


@dataclass(frozen=True)
class Chart:
    """A picture that can be drawn in several sizes.

    Attributes:
        title: what it shows.
        text: the alternative to the picture, which names its numbers.
        keys: of the legend; a single one is not shown.
        draw: size -> its height in pixels, and its elements.
    """

    title: str
    text: str
    keys: Sequence[Key]
    draw: Callable[[Size], tuple[int, str]]

    def inline(self, *sizes: Size, legend: bool = True) -> Markup:
        """The picture in some sizes, a wide and a narrow one by default, for a page with the style sheet."""
        names = str(legend_of(self.keys)) if legend and len(self.keys) > 1 else ""
        return Markup(names + "".join(self._picture(size) for size in sizes or RESPONSIVE))

    def _picture(self, size: Size) -> str:
        height, body = self.draw(size)
        label, box = html.escape(f"{self.title}. {self.text}"), f"0 0 {size.width} {height}"
        return f'<svg class="{size.shown}" viewBox="{box}" role="img" aria-label="{label}">{body}</svg>'


def legend_of(keys: Sequence[Key]) -> Markup:
    """Coloured names in the order they were given."""
    items = (f'<li><i class="{key.style}" style="--c:{key.colour}"></i>{html.escape(key.label)}</li>' for key in keys)
    return Markup(f'<ul class="legend">{"".join(items)}</ul>')


class Frame:
    """The plane of a chart: scales, and axes with round numbers.

    Args:
        x, y: ranges.
        x_label, y_label: under the axis, and above it.
        whole: x counts something.
        percent: y is a share.
    """

    def __init__(
        self,
        size: Size,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        x_label: str,
        y_label: str = "",
        whole: bool = False,
        percent: bool = False,
    ) -> None:
        self._x_label, self._y_label, self._size = x_label, y_label, size
        across = max(4, size.width // 95)
        self._x_ticks = ticks(*x, across, smallest=1.0 if whole else 0.0)
        self._y_ticks = ticks(*y, 6 if size.height > 200 else 4)
        if percent:
            self._y_ticks = [(value, f"{value:.0%}") for value, _ in self._y_ticks]
        self.left = 12 + _CHARACTER * max((len(number) for _, number in self._y_ticks), default=1)
        self.right, self.top = size.width - _RIGHT, _TOP + (16 if y_label else 0)
        self.bottom = size.height - _BOTTOM
        self.x, self.y = Scale(*x, self.left, self.right), Scale(*y, self.bottom, self.top)

    def axes(self) -> str:
        """Lines across, numbers and labels."""
        parts = []
        for value, number in self._y_ticks:
            y = self.y(value)
            kind = ' class="zero"' if value == 0 and self.y.low < 0 else ""
            parts.append(f'<line{kind} x1="{self.left:.1f}" x2="{self.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(text(self.left - 7, y + 4, number, anchor="end"))
        for value, number in self._x_ticks:
            parts.append(text(self.x(value), self.bottom + 17, number, anchor="middle"))
        parts.append(text((self.left + self.right) / 2, self.bottom + 35, self._x_label, anchor="middle"))
        if self._y_label:
            parts.append(text(2, 13, self._y_label))
        return "".join(parts)


def circle(x: float, y: float, radius: float, colour: str, *, hollow: bool = False) -> str:
    """A dot."""
    paint = f'class="ring" stroke="{colour}"' if hollow else f'fill="{colour}"'
    return f'<circle {paint} cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>'


def text(x: float, y: float, value: str, *, anchor: str = "start", name: str = "") -> str:
    """A line of text; `name` is its class."""
    kind = f' class="{name}"' if name else ""
    place = f'x="{x:.1f}" y="{y:.1f}"' + ("" if anchor == "start" else f' text-anchor="{anchor}"')
    return f"<text{kind} {place}>{html.escape(value, quote=False)}</text>"
