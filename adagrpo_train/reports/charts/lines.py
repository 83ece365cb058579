"""Curves, with bands where an interval is known."""

from collections.abc import Sequence
from dataclasses import dataclass

from adagrpo_train.reports.charts.scale import padded
from adagrpo_train.reports.charts.svg import COLOURS, Chart, Frame, Key, Size, circle

_MOST_POINTS = 300


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        points: (x, y), ascending in x.
        style: "line"; "faint" for a noisy curve; "marked" for one with few points.
        band: (x, low, high), ascending in x; may be shorter than the points, or empty.
    """

    label: str
    points: Sequence[tuple[float, float]]
    style: str = "line"
    band: Sequence[tuple[float, float, float]] = ()


def line_chart(
    lines: Sequence[Line], *, title: str, x_label: str = "iteration", y_label: str = "", whole: bool = True
) -> Chart | None:
    """Curves over iterations or anything else; None without any point.

    Args:
        whole: x is a count, so that fractions are no ticks.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    text = "; ".join(_ends(line, x_label) for line in lines)
    shown = [Line(line.label, _thinned(line.points), line.style, line.band) for line in lines]
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(shown))]
    xs = [x for line in shown for x, _ in line.points]
    ys = [y for line in shown for _, y in line.points] + [y for line in shown for band in line.band for y in band[1:]]

    def draw(size: Size) -> tuple[int, str]:
        frame = Frame(size, (min(xs), max(xs)), padded(ys), x_label=x_label, y_label=y_label, whole=whole)
        pairs = list(zip(shown, colours, strict=True))
        bands = [_band(line, colour, frame) for line, colour in pairs if len(line.band) > 1]
        return size.height, "".join([frame.axes(), *bands, *(_curve(line, colour, frame) for line, colour in pairs)])

    keys = [Key(line.label, colour, line.style) for line, colour in zip(shown, colours, strict=True)]
    return Chart(title, f"{text}.", keys, draw)


def _band(line: Line, colour: str, frame: Frame) -> str:
    edge = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)]
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in edge)
    return f'<polygon points="{path}" fill="{colour}"/>'


def _curve(line: Line, colour: str, frame: Frame) -> str:
    places = [(frame.x(x), frame.y(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline class="{line.style}" points="{path}" stroke="{colour}"/>'
    if len(line.band) == 1:
        drawn += "".join(_whisker(frame, x, low, high, colour) for x, low, high in line.band)
    if line.style == "marked" or len(places) == 1:
        drawn += "".join(circle(x, y, 4, colour) for x, y in places)
    return drawn


def _whisker(frame: Frame, x: float, low: float, high: float, colour: str) -> str:
    place, ends = frame.x(x), f'y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}"'
    return f'<line class="whisker" x1="{place:.1f}" x2="{place:.1f}" {ends} stroke="{colour}"/>'


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about 300 points: means of neighbours, which keeps the page small for long runs."""
    step = -(-len(points) // _MOST_POINTS)
    chunks = (points[start : start + step] for start in range(0, len(points), step))
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _ends(line: Line, x_label: str) -> str:
    """What the curve does, in words."""
    texts = []
    for (x, y), band in zip((line.points[0], line.points[-1]), (line.band[:1], line.band[-1:]), strict=True):
        interval = f" ({band[0][1]:.4g} to {band[0][2]:.4g})" if band and band[0][0] == x else ""
        texts.append(f"{y:.4g}{interval} at {x_label} {x:.6g}")
    return f"{line.label}: {', '.join(texts)}"
