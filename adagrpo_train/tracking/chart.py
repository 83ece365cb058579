"""Small line, band and bar charts as inline SVG."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)", "var(--e)", "var(--f)", "var(--g)", "var(--h)")

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 30


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[tuple[float, float]]
    marked: bool = False  # dots on the points, for curves with few of them


def line_chart(lines: Sequence[Line], *, title: str, x_label: str) -> str:
    """Curves over a shared x axis, "" without any point.

    Args:
        title: also the text alternative.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_scale = _Scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    low, high = _padded(min(ys), max(ys))
    y_scale = _Scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    body = [_grid(x_scale, y_scale, x_label)]
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in line.points)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if line.marked:
            body += [
                f'<circle cx="{x_scale(x):.1f}" cy="{y_scale(y):.1f}" r="3.5" fill="{colour}"/>' for x, y in line.points
            ]
    return _svg(title, body) + legend([line.label for line in lines])


def stacked_shares(columns: Sequence[tuple[float, Sequence[float]]], labels: Sequence[str], *, title: str) -> str:
    """Shares of each label per x, stacked to 1; "" without columns."""
    if not columns:
        return ""
    width = (_WIDTH - _LEFT - _RIGHT) / len(columns)
    y_scale = _Scale(0, 1, _HEIGHT - _BOTTOM, _TOP)
    x_scale = _Scale(columns[0][0], columns[-1][0], _LEFT, _WIDTH - _RIGHT)
    body = [_grid(x_scale, y_scale, "iteration")]
    for position, (_, values) in enumerate(columns):
        bottom, total = 0.0, sum(values) or 1.0
        for number, value in enumerate(values):
            top = bottom + value / total
            body.append(
                f'<rect x="{_LEFT + position * width:.1f}" y="{y_scale(top):.1f}" width="{max(width - 1, 0.5):.1f}" '
                f'height="{y_scale(bottom) - y_scale(top):.1f}" fill="{COLOURS[number % len(COLOURS)]}"/>'
            )
            bottom = top
    return _svg(title, body) + legend(labels)


def legend(labels: Sequence[str]) -> str:
    """Coloured names under a chart."""
    items = (
        f'<span><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{html.escape(label)}</span>'
        for number, label in enumerate(labels)
    )
    return f'<p class="legend">{"".join(items)}</p>'


class _Scale:
    """Linear map of a data range to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high if high > low else low + 1
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)

    def ticks(self, count: int) -> list[float]:
        step = 10 ** math.floor(math.log10((self.high - self.low) / count))
        step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (step * m) <= count)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _padded(low: float, high: float) -> tuple[float, float]:
    space = (high - low) * 0.06 or 0.5
    return low - space, high + space


def _grid(x_scale: _Scale, y_scale: _Scale, x_label: str) -> str:
    parts = []
    for tick in y_scale.ticks(5):
        y = y_scale(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in x_scale.ticks(8):
        parts.append(f'<text x="{x_scale(tick):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 1}" text-anchor="end">{html.escape(x_label)}</text>')
    return "".join(parts)


def _svg(title: str, body: Sequence[str]) -> str:
    name = html.escape(title)
    opening = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}"><title>{name}</title>'
    return f"{opening}{''.join(body)}</svg>"
