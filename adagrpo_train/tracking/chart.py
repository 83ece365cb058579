"""Small line and share charts as inline SVG.

A chart is drawn once for a wide page and once for a narrow one, and the style sheet shows the fitting one: scaled
text would be unreadable on a phone.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = tuple(f"var(--s{number})" for number in range(1, 9))

_TOP, _RIGHT, _BOTTOM, _LEFT = 10, 14, 40, 44
_MOST_POINTS = 300


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        points: (x, y), ascending in x.
        style: "line"; "faint" for a noisy curve; "marked" for one with few points.
    """

    label: str
    points: Sequence[tuple[float, float]]
    style: str = "line"


@dataclass(frozen=True)
class Size:
    """Width and height in pixels, and the class of the style sheet that decides when it is shown."""

    width: int
    height: int
    shown: str


WIDE, NARROW = Size(960, 300, "wide"), Size(400, 250, "narrow")
HALF, SMALL = Size(460, 240, "always"), Size(340, 170, "always")
RESPONSIVE = (WIDE, NARROW)


def line_chart(lines: Sequence[Line], *, title: str, sizes: Sequence[Size] = RESPONSIVE) -> str:
    """Curves over iterations with a legend where there is more than one; "" without any point.

    Args:
        title: what the chart shows; with the ends of every curve it is the text alternative.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    ends = "; ".join(_ends(line) for line in lines)
    shown = [Line(line.label, _thinned(line.points), line.style) for line in lines]
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(shown))]
    key = legend([line.label for line in shown]) if len(shown) > 1 else ""
    return key + "".join(_line_svg(shown, colours, size, f"{title}. {ends}.") for size in sizes)


def share_chart(
    columns: Sequence[tuple[float, Sequence[float]]], labels: Sequence[str], *, title: str, sizes: Sequence[Size]
) -> str:
    """Shares of each label, stacked to 1, per (first iteration, counts) column; "" without columns."""
    if not columns:
        return ""
    totals = [sum(counts[number] for _, counts in columns) for number in range(len(labels))]
    whole = sum(totals) or 1
    shares = ", ".join(f"{label} {total / whole:.0%}" for label, total in zip(labels, totals, strict=True))
    return "".join(_share_svg(columns, size, f"{title}. Over the whole run: {shares}.") for size in sizes)


def legend(labels: Sequence[str]) -> str:
    """Coloured names of the curves or shares, in the order they were given."""
    items = (
        f'<span><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{html.escape(label)}</span>'
        for number, label in enumerate(labels)
    )
    return f'<p class="legend">{"".join(items)}</p>'


def _line_svg(lines: Sequence[Line], colours: Sequence[str], size: Size, text: str) -> str:
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_scale = _Scale(min(xs), max(xs), _LEFT, size.width - _RIGHT)
    y_scale = _Scale(*_padded(min(ys), max(ys)), size.height - _BOTTOM, _TOP)
    body = [_axes(x_scale, y_scale, size)]
    for line, colour in zip(lines, colours, strict=True):
        places = [(x_scale(x), y_scale(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        body.append(f'<polyline class="{line.style}" points="{path}" stroke="{colour}"/>')
        if line.style == "marked" or len(places) == 1:
            body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places]
    return _svg(size, text, body)


def _share_svg(columns: Sequence[tuple[float, Sequence[float]]], size: Size, text: str) -> str:
    y_scale = _Scale(0, 1, size.height - _BOTTOM, _TOP)
    span = columns[-1][0] + (columns[-1][0] - columns[0][0]) / max(1, len(columns) - 1)
    x_scale = _Scale(columns[0][0], span, _LEFT, size.width - _RIGHT)
    width = (size.width - _LEFT - _RIGHT) / len(columns)
    body = [_axes(x_scale, y_scale, size, percent=True)]
    for position, (_, counts) in enumerate(columns):
        bottom, total = 0.0, sum(counts) or 1
        for number, count in enumerate(counts):
            top = bottom + count / total
            if count:
                body.append(
                    f'<rect x="{_LEFT + position * width:.1f}" y="{y_scale(top):.1f}" '
                    f'width="{max(width - 1, 0.5):.1f}" height="{y_scale(bottom) - y_scale(top):.1f}" '
                    f'fill="{COLOURS[number % len(COLOURS)]}"/>'
                )
            bottom = top
    return _svg(size, text, body)


class _Scale:
    """Linear map of a data range to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high if high > low else low + 1
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)

    def ticks(self, count: int, *, smallest: float = 0.0) -> list[float]:
        """Round values inside the range, about `count` of them and at least `smallest` apart."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / count))
        step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (step * m) <= count)
        step = max(step, smallest)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _padded(low: float, high: float) -> tuple[float, float]:
    space = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
    padded_low, padded_high = low - space, high + space
    return (0.0 if low >= 0 > padded_low else padded_low), padded_high


def _axes(x_scale: _Scale, y_scale: _Scale, size: Size, *, percent: bool = False) -> str:
    parts = []
    for tick in y_scale.ticks(5 if size.height > 200 else 4):
        y = y_scale(tick)
        text = f"{tick:.0%}" if percent else _short(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{size.width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in x_scale.ticks(max(3, size.width // 90), smallest=1):
        x, y = x_scale(tick), size.height - _BOTTOM + 17
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{tick:.6g}</text>')
    middle = (_LEFT + size.width - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{size.height - 5}" text-anchor="middle">iteration</text>')
    return "".join(parts)


def _short(value: float) -> str:
    """A number of at most six characters or so."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{round(value, 6):.5g}"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about 300 points: means of neighbours, which keeps the page small for long runs."""
    step = -(-len(points) // _MOST_POINTS)
    chunks = (points[start : start + step] for start in range(0, len(points), step))
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _ends(line: Line) -> str:
    (first_x, first), (last_x, last) = line.points[0], line.points[-1]
    return f"{line.label}: {first:.4g} at iteration {first_x:.0f}, {last:.4g} at iteration {last_x:.0f}"


def _svg(size: Size, text: str, body: Sequence[str]) -> str:
    opening = f'<svg class="{size.shown}" viewBox="0 0 {size.width} {size.height}" role="img"'
    return f'{opening} aria-label="{html.escape(text)}">{"".join(body)}</svg>'
