"""Evaluations with their images: the files of one, and of two that are compared."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adagrpo_train.reports.comparison import Changes, as_json, largest
from adagrpo_train.reports.pairs import Pair, Section, side_by_side
from adagrpo_train.reports.scored import Scored, read_scored
from adagrpo_train.runtime.files import write_whole
from adagrpo_train.tracking.images import read_cells, save_grid

GRID = "evaluation.png"
_EXTREMES, _FIXED = 12, 12  # pairs of images to look at


@dataclass(frozen=True)
class Pictured:
    """Scores, and the images that are at hand: row -> uint8 [H, W, 3], at most as large as a grid shows them."""

    scored: Scored
    images: dict[int, np.ndarray]


def save_evaluation(folder: Path, own: Pictured, *, grid_images: int) -> None:
    """Write scores, summary and a grid of the first images, classes in turn."""
    own.scored.save(folder)
    rows = own.scored.to_show(grid_images)
    images = np.stack([own.images[row] for row in rows])
    save_grid(folder / GRID, images, [own.scored.texts[row] for row in rows], labels=True)


def read_evaluation(folder: Path, *, key: str) -> Pictured:
    """What save_evaluation wrote; the images are those of the grid.

    Raises:
        ConfigError: as of read_scored().
    """
    own = read_scored(folder, key=key)
    cells = read_cells(folder / GRID) if (folder / GRID).is_file() else []
    rows = own.to_show(len(cells))
    return Pictured(own, {row: np.asarray(cell.image) for row, cell in zip(rows, cells, strict=True)})


def save_comparison(folder: Path, before: Pictured, after: Pictured, changes: Changes) -> None:
    """Write comparison.json, and comparison.png with the images that changed most and some that are always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = as_json(before.scored, after.scored, changes)
    write_whole(folder / "comparison.json", json.dumps(figures, indent=1))
    score = "total" if "total" in changes else next(iter(changes))
    sections = _sections(before, after, score)
    if any(section.pairs for section in sections):
        names = {"before": before.scored.subject, "after": after.scored.subject}
        side_by_side(sections, **names, score=score).save(folder / "comparison.png")


def _sections(before: Pictured, after: Pictured, score: str) -> list[Section]:
    def pairs(rows: list[int]) -> list[Pair]:
        first, second = before.scored.scores[score], after.scored.scores[score]
        return [
            Pair(
                before.images[row], after.images[row], after.scored.texts[row], (float(first[row]), float(second[row]))
            )
            for row in rows
        ]

    everywhere = before.images.keys() & after.images.keys()
    fixed = [row for row in after.scored.to_show(len(after.scored)) if row in everywhere][:_FIXED]
    sections = [Section("The first prompts, classes in turn", pairs(fixed))]
    if len(everywhere) == len(after.scored):  # else the images with the largest changes may not be at hand
        gained, lost = largest(before.scored, after.scored, score, _EXTREMES)
        sections += [Section(f"Largest gains in {score}", pairs(gained))]
        sections += [Section(f"Largest losses in {score}", pairs(lost))]
    return sections
