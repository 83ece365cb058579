"""Data to pixels, and round numbers along an axis."""

import math
from collections.abc import Iterable


class Scale:
    """Linear map of a data range to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high if high > low else low + 1
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)


def ticks(low: float, high: float, count: int, *, smallest: float = 0.0) -> list[tuple[float, str]]:
    """Round values inside a range with their texts, about `count` of them and at least `smallest` apart."""
    high = high if high > low else low + 1
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count + 0.5)
    step = max(step, smallest)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(k * step, _tick_text(k * step, step)) for k in range(first, last + 1)]


def padded(values: Iterable[float], *, share: float = 0.06) -> tuple[float, float]:
    """The range of some values with room around it; it does not cross 0 for the room's sake."""
    values = list(values)
    low, high = min(values), max(values)
    space = (high - low) * share or abs(high) * 0.1 or 0.5
    return (0.0 if low >= 0 > low - space else low - space), (0.0 if high <= 0 < high + space else high + space)


def short(value: float) -> str:
    """A number of at most six characters or so."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{round(value, 6):.5g}"


def _tick_text(value: float, step: float) -> str:
    """Every tick of an axis has as many decimals as its step."""
    if not step >= 1e-3 or max(abs(value), step) >= 1e4:
        return short(value)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{decimals}f}"
