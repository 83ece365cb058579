"""Shares of classes over time, stacked to 1."""

from collections.abc import Sequence

from adagrpo_train.reports.charts.svg import COLOURS, Chart, Frame, Key, Size


def share_chart(
    columns: Sequence[tuple[float, Sequence[float]]], labels: Sequence[str], *, title: str, x_label: str = "iteration"
) -> Chart | None:
    """Shares of each label per (first iteration, counts) column; None without columns."""
    if not columns:
        return None
    totals = [sum(counts[number] for _, counts in columns) for number in range(len(labels))]
    whole = sum(totals) or 1
    shares = ", ".join(f"{label} {total / whole:.0%}" for label, total in zip(labels, totals, strict=True))
    last = columns[-1][0] + (columns[-1][0] - columns[0][0]) / max(1, len(columns) - 1)

    def draw(size: Size) -> tuple[int, str]:
        frame = Frame(size, (columns[0][0], last), (0, 1), x_label=x_label, whole=True, percent=True)
        width = (frame.right - frame.left) / len(columns)
        body = [frame.axes()]
        for position, (_, counts) in enumerate(columns):
            body += _stack(frame, frame.left + position * width, max(width - 1, 0.5), counts)
        return size.height, "".join(body)

    return Chart(title, f"Over the whole run: {shares}.", class_keys(labels), draw)


def class_keys(labels: Sequence[str]) -> list[Key]:
    """The legend of the classes."""
    return [Key(label, COLOURS[number % len(COLOURS)], "box") for number, label in enumerate(labels)]


def _stack(frame: Frame, x: float, width: float, counts: Sequence[float]) -> list[str]:
    drawn, bottom, total = [], 0.0, sum(counts) or 1
    for number, count in enumerate(counts):
        top = bottom + count / total
        if count:
            place = (
                f'x="{x:.1f}" y="{frame.y(top):.1f}" width="{width:.1f}" height="{frame.y(bottom) - frame.y(top):.1f}"'
            )
            drawn.append(f'<rect {place} fill="{COLOURS[number % len(COLOURS)]}"/>')
        bottom = top
    return drawn
