"""Many points in a plane, in a few kinds: one path each, since a circle for every point would make pages heavy."""

from collections.abc import Sequence
from dataclasses import dataclass

from adagrpo_train.reports.charts.scale import padded
from adagrpo_train.reports.charts.svg import Chart, Frame, Key, Size

_MOST = 2500


@dataclass(frozen=True)
class Cloud:
    """Points of one kind.

    Attributes:
        colour: of the style sheet, "var(--s1)".
        style: "cloud"; "haze" for what lies in the background, "strong" for a few points that matter.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    style: str = "cloud"


@dataclass(frozen=True)
class Path:
    """A line through a cloud."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    style: str = "line"


def cloud_chart(
    clouds: Sequence[Cloud],
    paths: Sequence[Path] = (),
    *,
    title: str,
    text: str,
    x_label: str,
    y_label: str,
    whole: bool = False,
    around_zero: bool = False,
) -> Chart | None:
    """Points and lines; None without any point.

    Args:
        text: what the points show, in words.
        around_zero: whether 0 is in the middle of both axes, with a line through it.
    """
    clouds = [cloud for cloud in clouds if cloud.points]
    if not clouds:
        return None
    everything = [point for part in (*clouds, *paths) for point in part.points]
    x, y = _ranges(everything, around_zero=around_zero)
    shown = [Cloud(cloud.label, _thinned(cloud.points), cloud.colour, cloud.style) for cloud in clouds]

    def draw(size: Size) -> tuple[int, str]:
        frame = Frame(size, x, y, x_label=x_label, y_label=y_label, whole=whole)
        lines = [_zero(frame)] if around_zero else []
        dots = [_dots(cloud, frame, 4.4 if size.width > 500 or around_zero else 3.6) for cloud in shown]
        return size.height, "".join([frame.axes(), *lines, *dots, *(_line(path, frame) for path in paths)])

    keys = [Key(cloud.label, cloud.colour, f"dot {cloud.style}") for cloud in clouds]
    keys += [Key(path.label, path.colour, path.style) for path in paths if path.label]
    return Chart(title, text, keys, draw)


def _ranges(points: Sequence[tuple[float, float]], *, around_zero: bool) -> tuple[tuple[float, float], ...]:
    if not around_zero:
        return (min(x for x, _ in points), max(x for x, _ in points)), padded(y for _, y in points)
    reach = [1.08 * (max(abs(point[axis]) for point in points) or 1.0) for axis in (0, 1)]
    return (-reach[0], reach[0]), (-reach[1], reach[1])


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    return points[:: -(-len(points) // _MOST)]


def _dots(cloud: Cloud, frame: Frame, width: float) -> str:
    """Lines of no length with round ends."""
    places = "".join(f"M{frame.x(x):.0f} {frame.y(y):.0f}h0" for x, y in cloud.points)
    width += 2 if cloud.style == "strong" else 0
    return f'<path class="dots {cloud.style}" d="{places}" stroke="{cloud.colour}" stroke-width="{width}"/>'


def _line(path: Path, frame: Frame) -> str:
    places = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in path.points)
    return f'<polyline class="{path.style}" points="{places}" stroke="{path.colour}"/>'


def _zero(frame: Frame) -> str:
    x = frame.x(0)
    return f'<line class="zero" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top:.1f}" y2="{frame.bottom:.1f}"/>'
