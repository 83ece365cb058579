"""Values with their intervals beside each other, and where 0 is."""

from collections.abc import Sequence
from dataclasses import dataclass

from adagrpo_train.reports.charts.scale import Scale, padded, short, ticks
from adagrpo_train.reports.charts.svg import COLOURS, Chart, Key, Size, circle, text

_ROW, _FOOT, _VALUE = 30, 44, 66  # pixels
_CHARACTER = 7.0
_FAR = 3.0
"""Times the range of the values: 0 is left out of the picture where it is farther away."""


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; without one both ends are None."""

    label: str
    value: float
    low: float | None
    high: float | None

    @property
    def ends(self) -> tuple[float, float]:
        """The interval, or twice the value."""
        return (self.value if self.low is None else self.low), (self.value if self.high is None else self.high)

    @property
    def includes_zero(self) -> bool:
        return self.low is not None and self.ends[0] <= 0 <= self.ends[1]


def dot_chart(estimates: Sequence[Estimate], *, title: str, x_label: str) -> Chart | None:
    """A row for each estimate; hollow dots are those whose interval includes 0. None without any."""
    if not estimates:
        return None
    words = "; ".join(_words(estimate) for estimate in estimates)
    low, high = _range(estimates)

    def draw(size: Size) -> tuple[int, str]:
        stacked = size.width < 600
        names = 0.0 if stacked else min(0.42 * size.width, 16 + _CHARACTER * max(len(e.label) for e in estimates))
        row = _ROW + (18 if stacked else 0)
        height = row * len(estimates) + _FOOT
        scale = Scale(low, high, names + 10, size.width - _VALUE)
        body = [_axis(scale, size, height, x_label)]
        for number, estimate in enumerate(estimates):
            body.append(_row(estimate, scale, size, number * row, stacked=stacked))
        return height, "".join(body)

    kinds = {estimate.includes_zero for estimate in estimates}
    meanings = {False: ("interval without 0", "dot"), True: ("interval includes 0", "ring")}
    keys = [Key(meaning, COLOURS[0], style) for meaning, style in (meanings[kind] for kind in sorted(kinds))]
    return Chart(title, f"{words}.", keys, draw)


def _range(estimates: Sequence[Estimate]) -> tuple[float, float]:
    ends = [end for estimate in estimates for end in (*estimate.ends, estimate.value)]
    spread = max(ends) - min(ends)
    if min(abs(end) for end in ends) <= _FAR * spread or not spread:
        ends.append(0.0)
    low, high = padded(ends)
    return low, high


def _axis(scale: Scale, size: Size, height: int, label: str) -> str:
    parts, bottom = [], height - _FOOT
    for value, number in ticks(scale.low, scale.high, max(4, size.width // 130)):
        x, kind = scale(value), ' class="zero"' if value == 0 else ""
        parts.append(f'<line{kind} x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>')
        parts.append(text(x, bottom + 17, number, anchor="middle"))
    parts.append(text((scale(scale.low) + scale(scale.high)) / 2, bottom + 36, label, anchor="middle"))
    return "".join(parts)


def _row(estimate: Estimate, scale: Scale, size: Size, top: float, *, stacked: bool) -> str:
    y = top + _ROW / 2 + (16 if stacked else 0)
    low, high = estimate.ends
    name_y = top + 15 if stacked else y + 4
    parts = [text(2, name_y, estimate.label, name="name")]
    if estimate.low is not None or estimate.high is not None:
        ends = f'x1="{scale(low):.1f}" x2="{scale(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line class="whisker" {ends} stroke="{COLOURS[0]}"/>')
    parts.append(circle(scale(estimate.value), y, 5.5, COLOURS[0], hollow=estimate.includes_zero))
    parts.append(text(size.width - 2, y + 4, _number(estimate.value, scale), anchor="end", name="name"))
    return "".join(parts)


def _words(estimate: Estimate) -> str:
    low, high = estimate.ends
    interval = "" if estimate.low is None else f" ({low:.4g} to {high:.4g})"
    return f"{estimate.label}: {estimate.value:.4g}{interval}"


def _number(value: float, scale: Scale) -> str:
    reach = max(abs(scale.low), abs(scale.high))
    return f"{value:.{4 if reach < 0.1 else 3}f}" if 1e-3 <= reach < 1e3 else short(value)
