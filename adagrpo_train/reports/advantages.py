"""Maps of single samples: their advantage against their group, and against the policy's past."""

from markupsafe import Markup

from adagrpo_train.reports.charts.clouds import Cloud, Path, cloud_chart
from adagrpo_train.reports.charts.svg import Key, Size, legend_of
from adagrpo_train.reports.rows import Records, Row, spread
from adagrpo_train.reports.scores import figure

_MOST, _SIZE = 6, Size(340, 270, "always")
_KEPT, _CHANGED = "var(--s1)", "var(--s5)"
_LABELS = ("sign as in the group", "sign changed")


def advantage_values(records: Records) -> Row:
    """The maps of up to six iterations and their legend, by the names that the template has for them."""
    rows = [row for row in records.advantages if row["local"]]
    fused = any(abs(global_part) > 1e-6 for row in rows for _, global_part in _points(row))
    maps = [_map(row) for row in spread(rows, _MOST)] if fused else []
    keys = [Key(label, colour, "dot") for label, colour in zip(_LABELS, (_KEPT, _CHANGED), strict=True)]
    return {
        "advantage_maps": Markup("").join(maps),
        "advantage_legend": legend_of(keys),
        "advantages_recorded": bool(rows),
        "sign_changes": _changes(rows),
    }


def _points(row: Row) -> list[tuple[float, float]]:
    """Local advantage and what fusion added to it, for each sample."""
    return [(local, fused - local) for local, fused in zip(row["local"], row["fused"], strict=True)]


def _changed(point: tuple[float, float]) -> bool:
    local, added = point
    return local * (local + added) < 0


def _map(row: Row) -> Markup:
    everyone = _points(row)
    kept, changed = ([point for point in everyone if _changed(point) == kind] for kind in (False, True))
    reach = min(max(abs(point[axis]) for point in everyone) for axis in (0, 1))
    chart = cloud_chart(
        [Cloud(_LABELS[0], kept, _KEPT), Cloud(_LABELS[1], changed, _CHANGED, "strong")],
        [Path("", [(-reach, reach), (reach, -reach)], "var(--soft)", "dashed")],
        title=f"Advantages of iteration {row['iteration']}",
        text=f"Of {len(everyone)} samples {len(changed)} have another sign after fusion than against their group.",
        x_label="against the group",
        y_label="against the policy's past",
        around_zero=True,
    )
    caption = f"iteration {row['iteration']}: {len(changed)} of {len(everyone)} changed"
    return figure(caption, chart.inline(_SIZE, legend=False) if chart else Markup())


def _changes(rows: list[Row]) -> str:
    """How many of all recorded samples changed their sign, and in which direction."""
    everyone = [point for row in rows for point in _points(row)]
    changed = [point for point in everyone if _changed(point)]
    down = sum(local > 0 for local, _ in changed)
    return (
        f"Of {len(everyone)} recorded samples {len(changed)} changed their sign: {down} that beat their group are held "
        f"back, {len(changed) - down} that fell behind it are encouraged."
    )
