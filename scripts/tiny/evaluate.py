"""Measures how often a pipeline follows captions, by class, on training and on held-out captions.

The pipeline is either a finished folder (``--pipeline``) or a checkpoint in the making (``--checkpoint`` and
``--vae``). Pictures go through the stock pipeline of the family.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusion3Pipeline
from PIL import Image

from rewards.shapes.grammar import CLASSES, Scene, caption, difficulty_class, split, subsample
from scripts.tiny import recipe
from scripts.tiny.families import FAMILIES

LOGGER = logging.getLogger(__name__)
BATCH = 80

Pipeline = StableDiffusion3Pipeline | FluxPipeline


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=tuple(FAMILIES), default="sd3")
    parser.add_argument("--pipeline", type=Path, default=None, help="folder of a pipeline")
    parser.add_argument("--checkpoint", type=Path, default=None, help="weights from `pretrain`")
    parser.add_argument("--vae", type=Path, default=None, help="autoencoder folder, with --checkpoint")
    parser.add_argument("--parts", nargs="+", choices=("train", "heldout"), default=["train", "heldout"])
    parser.add_argument("--per-class", type=int, default=100, help="pictures per class and part")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="append the numbers to this file of JSON lines")
    parser.add_argument("--grid", type=Path, default=None, help="write a picture grid of the last part")
    args = parser.parse_args()
    if (args.pipeline is None) == (args.checkpoint is None) or (args.checkpoint is not None and args.vae is None):
        parser.error("give either --pipeline or both --checkpoint and --vae")
    return args


def main() -> None:
    """Evaluates and prints a Markdown table (rows: captions, columns: classes, cells: smooth/strict)."""
    args = parse_args()
    recipe.setup(seed=args.seed, threads=args.threads)
    pipeline = load(family=args.family, pipeline=args.pipeline, checkpoint=args.checkpoint, vae=args.vae)
    rows = []
    for part in args.parts:
        scenes = choose(part, per_class=args.per_class)
        images = sample(
            pipeline,
            scenes,
            steps=args.steps,
            guidance=args.guidance,
            seed=args.seed,
            arguments=FAMILIES[args.family].SAMPLING,
        )
        table = recipe.score_by_class(images, scenes)
        rows.append(
            f"| {part} | " + " | ".join(f"{smooth:.2f}/{strict:.2f}" for smooth, strict, _ in table.values()) + " |"
        )
        if args.json is not None:
            record = {
                "source": (args.pipeline or args.checkpoint).name,
                "part": part,
                "steps": args.steps,
                "guidance": args.guidance,
                "seed": args.seed,
                "classes": {name: {"smooth": a, "strict": b, "n": n} for name, (a, b, n) in table.items()},
            }
            with args.json.open("a") as file:
                file.write(json.dumps(record) + "\n")
        if args.grid is not None:
            write_grid(args.grid, images, per_class=args.per_class)
    header = "| captions | all | " + " | ".join(CLASSES) + " |"
    print("\n".join([header, "|---" * (len(CLASSES) + 2) + "|", *rows]))


def load(*, family: str, pipeline: Path | None, checkpoint: Path | None, vae: Path | None) -> Pipeline:
    """Loads a finished pipeline, or assembles one from a checkpoint rounded to half precision, in float32."""
    made_by = FAMILIES[family]
    if pipeline is not None:
        loaded = made_by.load_pipeline(pipeline)
    else:
        model = made_by.FlowModel()
        model.load_state_dict(torch.load(checkpoint))
        loaded = made_by.assemble(model, AutoencoderKL.from_pretrained(vae)).to(torch.float16).to(torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def choose(part: str, *, per_class: int) -> list[Scene]:
    """Returns `per_class` scenes of every class from a part of the split, cycling through small classes."""
    parts = split()
    pool = subsample(parts.train if part == "train" else parts.heldout, per_class=per_class)
    scenes = []
    for name in CLASSES:
        members = [scene for scene in pool if difficulty_class(scene) == name]
        scenes.extend(members[i % len(members)] for i in range(per_class))
    return scenes


def sample(
    pipeline: Pipeline, scenes: list[Scene], *, steps: int, guidance: float, seed: int, arguments: Mapping[str, int]
) -> npt.NDArray[np.uint8]:
    """Samples one picture per scene, with further `arguments` of the pipeline.

    Returns:
        uint8 of shape ``[len(scenes), 32, 32, 3]``.
    """
    generator = torch.Generator().manual_seed(seed)
    out = []
    for start in range(0, len(scenes), BATCH):
        result = pipeline(
            [caption(scene) for scene in scenes[start : start + BATCH]],
            num_inference_steps=steps,
            guidance_scale=guidance,
            **arguments,
            output_type="np",
            generator=generator,
        )
        out.append((result.images * 255).round().astype(np.uint8))
    return np.concatenate(out)


def write_grid(path: Path, images: npt.NDArray[np.uint8], *, per_class: int, columns: int = 14, zoom: int = 2) -> None:
    """Writes the first pictures of every class as one row each."""
    rows = [
        np.concatenate(list(np.pad(images[start : start + columns], ((0, 0), (1, 1), (1, 1), (0, 0)))), axis=1)
        for start in range(0, len(images), per_class)
    ]
    grid = Image.fromarray(np.concatenate(rows, axis=0))
    grid = grid.resize((grid.width * zoom, grid.height * zoom), Image.Resampling.NEAREST)
    grid.quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main()
