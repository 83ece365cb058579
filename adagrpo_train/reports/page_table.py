"""Tables of numbers for people."""

from collections.abc import Sequence
from dataclasses import dataclass

NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Table:
    """Texts of a table, and which of its columns hold numbers."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[bool]

    @classmethod
    def of(cls, title: str, note: str, columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> "Table":
        """Numbers of a column get equally many decimals; None is a dash."""
        cells = [_column([row[place] for row in rows]) for place in range(len(columns))]
        numeric = [_is_numeric([row[place] for row in rows]) for place in range(len(columns))]
        return cls(title, note, columns, [list(row) for row in zip(*cells, strict=True)], numeric)


def _column(values: Sequence[str | float | None]) -> list[str]:
    numbers = [abs(value) for value in values if isinstance(value, int | float)]
    whole = all(isinstance(value, str | int | None) for value in values)
    largest = max(numbers, default=0.0)
    decimals = 0 if whole or largest >= 1000 else 1 if largest >= 100 else 2 if largest >= 10 else 3
    return [_cell(value, decimals) for value in values]


def _cell(value: str | float | None, decimals: int) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return value
    if value and abs(value) < 0.5 * 10**-decimals:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:,.{decimals}f}"


def _is_numeric(values: Sequence[str | float | None]) -> bool:
    """Whether a column is set flush right: numbers, or texts that begin like one."""
    shown = [value for value in values if value not in (None, "")]
    return bool(shown) and all(not isinstance(value, str) or value[:1] in set("+-0123456789<.") for value in shown)
