"""A chart as a file of its own, for Markdown pages: explicit colours on white, title and legend inside."""

import html
import re
from collections.abc import Sequence

from adagrpo_train.reports.charts.svg import Chart, Key, Size, circle, text

PAPER = "#ffffff"
_COLOURS = ("#3b6fd4", "#d9822b", "#1f9d76", "#8b5fc7", "#d0506a", "#3aa3bd", "#9aa12e", "#8a7360")
_STYLE = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:#5b6478}"
    ".title{font-size:16px;font-weight:600;fill:#1b2130}.name{font-size:13px;fill:#1b2130}"
    "line:not(.whisker){stroke:#e4e7ef}line.zero{stroke:#5b6478}.whisker{stroke-width:2}"
    "polyline{fill:none;stroke-width:2.2;stroke-linejoin:round}.faint{stroke-width:1.4;opacity:.55}"
    ".dots{fill:none;stroke-linecap:round}.haze{opacity:.28}.cloud{opacity:.62}.dashed{stroke-dasharray:5 4}"
    f"polygon{{opacity:.16}}.ring{{fill:{PAPER};stroke-width:2.2}}"
)
_SIZE = Size(880, 330, "always")
_MARGIN, _TITLE, _LEGEND = 16, 26, 22  # pixels
_CHARACTER, _MARK = 7.0, 34


def standalone_svg(chart: Chart) -> str:
    """The whole text of an SVG file.

    Colours are written out: not every viewer of SVG files knows the variables of style sheets.
    """
    rows = _rows(chart.keys) if len(chart.keys) > 1 else []
    head = _MARGIN + _TITLE + _LEGEND * len(rows)
    height, body = chart.draw(_SIZE)
    whole_width, whole_height = _SIZE.width + 2 * _MARGIN, head + height + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole_width} {whole_height}" width="{whole_width}" '
        f'height="{whole_height}" role="img" aria-label="{html.escape(f"{chart.title}. {chart.text}")}">',
        f"<title>{html.escape(chart.title)}</title><style>{_STYLE}</style>",
        f'<rect width="{whole_width}" height="{whole_height}" rx="10" fill="{PAPER}"/>',
        text(_MARGIN, _MARGIN + 14, chart.title, name="title"),
    ]
    for number, row in enumerate(rows):
        parts.append(_legend_row(row, _MARGIN + _TITLE + _LEGEND * number + 8))
    parts += [f'<g transform="translate({_MARGIN} {head})">', body, "</g></svg>\n"]
    return re.sub(r"var\(--s(\d)\)", lambda found: _COLOURS[int(found[1]) - 1], "".join(parts))


def _rows(keys: Sequence[Key]) -> list[list[tuple[float, Key]]]:
    """Entries of the legend with their places, pixels from the left, in as many rows as they need."""
    rows: list[list[tuple[float, Key]]] = [[]]
    x = float(_MARGIN)
    for key in keys:
        width = _MARK + _CHARACTER * len(key.label)
        if rows[-1] and x + width > _SIZE.width:
            rows.append([])
            x = float(_MARGIN)
        rows[-1].append((x, key))
        x += width
    return rows


def _legend_row(row: Sequence[tuple[float, Key]], y: float) -> str:
    parts = []
    for x, key in row:
        if key.style in ("dot", "ring"):
            parts.append(circle(x + 7, y, 5, key.colour, hollow=key.style == "ring"))
        else:
            parts.append(f'<rect x="{x}" y="{y - 2}" width="14" height="4" rx="2" fill="{key.colour}"/>')
        parts.append(text(x + 20, y + 4, key.label))
    return "".join(parts)
