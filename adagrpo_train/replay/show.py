"""The differences as tables for a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_MOST_ROWS = 40
_COLUMNS = (
    ("level", "level", ".4f"),
    ("mean |A|", "abs", ".4f"),
    ("false+", "positive", ".0%"),
    ("false-", "negative", ".0%"),
    ("loss", "loss", ".1e"),
    ("clipped", "clip", ".0%"),
)


def show(found: dict[str, Any], console: Console) -> None:
    """Print a report of replay.run.replay()."""
    for key, (before, after) in found["changes"].items():
        console.print(f"{key}: {before} -> {after}", markup=False)
    console.print(_reproduced(found["reproduced"]), markup=False)
    for note in found["notes"]:
        console.print(note, markup=False)
    if not found["changes"]:
        return
    records = found["records"]
    console.print(_iterations(records[:_MOST_ROWS]))
    prompts = [(record["iteration"], side, prompt) for record in records for side, prompt in _moved(record)]
    if prompts:
        console.print(_prompts(prompts[:_MOST_ROWS]))
    steps = [(record["iteration"], step) for record in records for step in record["updates"]]
    if len(steps) > len(records):
        console.print(_steps(steps[:_MOST_ROWS]))
    if max(len(records), len(prompts), len(steps)) > _MOST_ROWS:
        console.print(f"tables end after {_MOST_ROWS} rows; --json FILE has them all", markup=False)


def _reproduced(found: dict[str, Any]) -> str:
    if found["exact"]:
        return "under its own configuration: selection, level, advantages and losses as recorded, bit for bit"
    if not found["choice"]:
        return "under its own configuration: other prompts, levels or samples than recorded"
    return (
        "under its own configuration: not as recorded to the last bit, as on another kind of processor; advantages "
        f"differ by up to {found['fused']:.1e}, losses by {found['losses']:.1e}"
    )


def _iterations(records: Sequence[dict[str, Any]]) -> Table:
    """Two lines per iteration: as recorded, and as replayed; flipped signs, prompts that would have been others."""
    titles = ("", "", *(title for title, *_ in _COLUMNS), "flips", "moved")
    table = _table("iterations, as recorded and as replayed", *titles)
    for record in records:
        selection, advantage = record["selection"], record["advantage"]
        moved = str(len(selection["only_replayed"]))
        table.add_row(str(record["iteration"]), "recorded", *_cells(record, "recorded"), "", "")
        flips = _format(advantage["sign_changes"], ".0%")
        table.add_row("", "replayed", *_cells(record, "replayed"), flips, moved)
    return table


def _cells(record: dict[str, Any], side: str) -> list[str]:
    advantage, level = record["advantage"], record["level"][side][0]
    values = {
        "level": level and level["mean"],
        "abs": advantage["abs_mean"][side],
        "positive": advantage["misjudged"][side]["fused_false_positive"],
        "negative": advantage["misjudged"][side]["fused_false_negative"],
        "loss": _mean([step["loss"][side] for step in record["updates"]]),
        "clip": _mean([step["clip_fraction"][side] for step in record["updates"]]),
    }
    return [_format(values[key], shape) for _, key, shape in _COLUMNS]


def _moved(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    selection = record["selection"]
    left, taken = selection["only_recorded"], selection["only_replayed"]
    return [*(("left", prompt) for prompt in left), *(("taken", prompt) for prompt in taken)]


def _prompts(prompts: Sequence[tuple[int, str, dict[str, Any]]]) -> Table:
    table = _table("prompts chosen otherwise", "", "", "score", "class")
    table.add_column("prompt", overflow="fold")
    for iteration, side, prompt in prompts:
        texts = (str(iteration), side, _format(prompt["score"], ".4f"), prompt["class"], prompt["text"])
        table.add_row(*(escape(text) for text in texts))
    return table


def _steps(steps: Sequence[tuple[int, dict[str, Any]]]) -> Table:
    table = _table("optimizer steps", "", "step", "loss recorded", "replayed", "clipped recorded", "replayed")
    for iteration, step in steps:
        loss, clip = step["loss"], step["clip_fraction"]
        losses = [_format(loss[side], ".3e") for side in ("recorded", "replayed")]
        table.add_row(
            str(iteration), str(step["update"]), *losses, *(_format(clip[s], ".0%") for s in ("recorded", "replayed"))
        )
    return table


def _table(title: str, *columns: str) -> Table:
    """A table that fits a terminal of 80 columns."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _format(value: float | None, shape: str) -> str:
    return "-" if value is None else format(value, shape)
