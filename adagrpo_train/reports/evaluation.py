"""Evaluations with their images: the files of one, and of two that are compared."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from adagrpo_train.reports.comparison import Changes, as_json, largest
from adagrpo_train.reports.pairs import Pair, Section, side_by_side
from adagrpo_train.reports.scored import Scored, read_scored
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.files import write_whole
from adagrpo_train.tracking.images import read_cells, save_grid

GRID = "evaluation.png"
_EXTREMES, _FIXED = 12, 12  # pairs of images to look at


@dataclass(frozen=True)
class Pictured:
    """Scores, and images at most as large as a grid shows them.

    Attributes:
        images: those that this rank has: row -> uint8 [H, W, 3].
        rows: of all images that some rank has.
    """

    scored: Scored
    images: dict[int, np.ndarray]
    rows: frozenset[int]

    def gathered(self, rows: Iterable[int], engine: Engine) -> "Pictured":
        """With images of these rows on every rank, and no others; called on every rank."""
        own = {row: self.images[row] for row in rows if row in self.images}
        return replace(self, images={row: image for part in engine.gather_objects(own) for row, image in part.items()})


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
    images = {row: np.asarray(cell.image) for row, cell in zip(rows, cells, strict=True)}
    return Pictured(own, images, frozenset(rows))


def rows_beside(before: Pictured, after: Pictured) -> list[int]:
    """Of the images that save_comparison() shows."""
    return [row for _, rows in _sections(before, after, _shown_score(before, after)) for row in rows]


def save_comparison(folder: Path, before: Pictured, after: Pictured, changes: Changes) -> None:
    """Write comparison.json, and comparison.png with the images that changed most and some that are always the same.

    Args:
        before, after: with the images of rows_beside() on this rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = as_json(before.scored, after.scored, changes)
    write_whole(folder / "comparison.json", json.dumps(figures, indent=1))
    score = _shown_score(before, after)
    sections = [
        Section(heading, [_pair(before, after, score, row) for row in rows])
        for heading, rows in _sections(before, after, score)
    ]
    if any(section.pairs for section in sections):
        names = {"before": before.scored.subject, "after": after.scored.subject}
        side_by_side(sections, **names, score=score).save(folder / "comparison.png")


def _sections(before: Pictured, after: Pictured, score: str) -> list[tuple[str, list[int]]]:
    """Headings, and the rows of the images under each."""
    everywhere = before.rows & after.rows
    fixed = [row for row in after.scored.to_show(len(after.scored)) if row in everywhere][:_FIXED]
    sections = [("The first prompts, classes in turn", fixed)]
    if len(everywhere) == len(after.scored):  # else the images with the largest changes may not be at hand
        gained, lost = largest(before.scored, after.scored, score, _EXTREMES)
        sections += [(f"Largest gains in {score}", gained), (f"Largest losses in {score}", lost)]
    return sections


def _shown_score(before: Pictured, after: Pictured) -> str:
    names = [name for name in after.scored.scores if name in before.scored.scores]
    return "total" if "total" in names else names[0]


def _pair(before: Pictured, after: Pictured, score: str, row: int) -> Pair:
    first, second = (float(side.scored.scores[score][row]) for side in (before, after))
    return Pair(before.images[row], after.images[row], after.scored.texts[row], (first, second))
