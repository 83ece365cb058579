"""Writes the prompt files of the shapes task: one JSON object ``{"prompt": ..., "class": ...}`` per line."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from rewards.shapes.grammar import Scene, caption, difficulty_class, split, subsample

LOGGER = logging.getLogger(__name__)


def main() -> None:
    """Writes ``shapes_train.jsonl`` and ``shapes_heldout.jsonl``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True, help="folder of the prompt files")
    parser.add_argument("--per-class", type=int, default=400, help="largest number of prompts of a class")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    args.target.mkdir(parents=True, exist_ok=True)
    parts = split()
    _write(args.target / "shapes_train.jsonl", subsample(parts.train, per_class=args.per_class))
    _write(args.target / "shapes_heldout.jsonl", subsample(parts.heldout, per_class=args.per_class))


def _write(path: Path, scenes: tuple[Scene, ...]) -> None:
    lines = [json.dumps({"prompt": caption(scene), "class": difficulty_class(scene)}) for scene in scenes]
    path.write_text("\n".join(lines) + "\n")
    LOGGER.info("%s: %d prompts", path, len(lines))


if __name__ == "__main__":
    main()
