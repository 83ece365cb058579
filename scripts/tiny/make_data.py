"""Draws the pictures that the bundled model is trained on (training captions only) and an evaluation set."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np

from rewards.shapes.draw import draw
from rewards.shapes.grammar import CLASSES, Scene, difficulty_class, enumerate_scenes, split
from scripts.tiny import recipe

LOGGER = logging.getLogger(__name__)
#: Relative frequency of each class in the training data.
CLASS_WEIGHTS = {"one": 2, "count": 2.5, "size": 2, "pair": 3, "relation": 3, "mixed": 2.5, "three": 1.5}


def main() -> None:
    """Writes ``{train,eval}_{images,scenes}.npy`` to the output folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="working folder")
    parser.add_argument("--images", type=int, default=100_000, help="number of training pictures")
    parser.add_argument("--eval-images", type=int, default=1_400, help="number of evaluation pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe.setup(seed=args.seed, threads=1)
    args.out.mkdir(parents=True, exist_ok=True)
    parts = split()
    weights = np.asarray([CLASS_WEIGHTS[name] for name in CLASSES])
    _write(args.out, "train", parts.train, count=args.images, weights=weights, seed=args.seed)
    _write(args.out, "eval", parts.heldout, count=args.eval_images, weights=np.ones(len(CLASSES)), seed=args.seed + 1)


def _write(out: Path, name: str, scenes: tuple[Scene, ...], *, count: int, weights: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = {scene: number for number, scene in enumerate(enumerate_scenes())}
    members = [[scene for scene in scenes if difficulty_class(scene) == cls] for cls in CLASSES]
    images = np.empty((count, recipe.IMAGE_SIZE, recipe.IMAGE_SIZE, 3), np.uint8)
    chosen = np.empty(count, np.int32)
    classes = rng.choice(len(CLASSES), size=count, p=weights / weights.sum())
    for index, cls in enumerate(classes):
        scene = members[cls][int(rng.integers(len(members[cls])))]
        images[index] = draw(scene, rng)
        chosen[index] = numbers[scene]
    np.save(out / f"{name}_images.npy", images)
    np.save(out / f"{name}_scenes.npy", chosen)
    LOGGER.info("%s: %d pictures of %d captions", name, count, len(scenes))


if __name__ == "__main__":
    main()
