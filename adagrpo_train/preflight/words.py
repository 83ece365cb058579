"""Figures as people read them."""


def size(count: float) -> str:
    """Bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= 0.95 * factor:
            return f"{count / factor:.1f} {unit}" if count < 99.5 * factor else f"{count / factor:.0f} {unit}"
    return f"{count / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    for unit, factor, most in (("min", 60, 120), ("h", 3600, 72)):
        if seconds < factor * most:
            return f"{seconds / factor:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def number(count: float) -> str:
    """A count, with separators."""
    return f"{count:,.0f}"


def table(rows: dict[str, str], *, indent: int = 2) -> str:
    """Lines of names and texts."""
    width = max(len(name) for name in rows) + 2
    return "".join(f"{'':<{indent}}{name:<{width}}{text}\n" for name, text in rows.items())
