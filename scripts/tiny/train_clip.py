"""Trains `tiny_clip`, the open_clip model behind the reward of that name, on drawings of training captions.

Batches are made of families: a scene and scenes that differ from it in one word's meaning (a colour, a shape, a count,
a size, a relation, colours or shapes exchanged). With random batches most captions differ in everything, and a model
that only counts colours already fits them. Pictures are slightly blurred, dimmed and made noisy, as decoded ones are.

2000 steps, 18 minutes, rank the caption of a held-out picture above one with another colour, count, shape or size
always (300 pictures of each class), above one with colours or shapes exchanged in 92 % and above one with the opposite
relation in 42 %, which is guessing: relations were not learnt.

Runs in the environment of open_clip, seeded, on one CPU thread:

    .venvs/open-clip/bin/python -m scripts.tiny.train_clip --steps 2000
    .venvs/open-clip/bin/python -m scripts.tiny.train_clip --evaluate
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch.nn import functional

from rewards.shapes.draw import draw
from rewards.shapes.grammar import (
    CLASSES,
    COLOURS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SIZES,
    Group,
    Scene,
    caption,
    difficulty_class,
    split,
)
from rewards.tiny_clip import ASSETS, MEAN, STD, tokenize
from rewards.vision.torchvision_shim import import_open_clip

LOGGER = logging.getLogger(__name__)
FAMILY = 4
#: Relative frequency of the class of a family's first scene.
CLASS_WEIGHTS = {"one": 1, "count": 2, "size": 1, "pair": 2, "relation": 3, "mixed": 3, "three": 2}
_OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def meaning(scene: Scene) -> tuple[object, ...]:
    """Equal for captions that are true of the same pictures, however they are worded."""
    groups = scene.groups
    if scene.relation is None:
        return (frozenset(groups), scene.size)
    pair = (groups, scene.relation) if scene.relation in RELATIONS[::2] else (groups[::-1], _OPPOSITE[scene.relation])
    return (*pair, scene.size)


def changes(scene: Scene) -> dict[str, list[Scene]]:
    """Scenes that differ from one in one thing, by the thing; none is true of a picture of the first."""
    found: dict[str, list[Scene]] = {}
    for kind, groups, other in _candidates(scene):
        try:
            changed = replace(scene, groups=groups, **other)
        except ValueError:
            continue  # not a scene of the grammar: two groups alike, too many objects
        if meaning(changed) != meaning(scene):
            found.setdefault(kind, []).append(changed)
    return found


def _candidates(scene: Scene) -> Iterator[tuple[str, tuple[Group, ...], dict[str, Any]]]:
    groups = scene.groups
    for place, group in enumerate(groups):
        options = [("colour", replace(group, colour=colour)) for colour in COLOURS]
        options += [("shape", replace(group, shape=shape)) for shape in SHAPES]
        options += [("count", replace(group, count=count + 1)) for count in range(len(NUMBERS))]
        for kind, option in options:
            yield kind, (*groups[:place], option, *groups[place + 1 :]), {}
    for first, second in combinations(range(len(groups)), 2):
        for field in ("colour", "shape"):
            swapped = list(groups)
            swapped[first] = replace(groups[first], **{field: getattr(groups[second], field)})
            swapped[second] = replace(groups[second], **{field: getattr(groups[first], field)})
            yield "exchange", tuple(swapped), {}
    if scene.relation:
        yield "relation", groups, {"relation": _OPPOSITE[scene.relation]}
    for size in SIZES if scene.size else ():
        yield "size", groups, {"size": size}


class Families:
    """Draws batches of families of training scenes."""

    def __init__(self, seed: int) -> None:
        scenes = split().train
        self._by_class = {name: [s for s in scenes if difficulty_class(s) == name] for name in CLASSES}
        self._train = frozenset(scenes)
        self._rng = np.random.default_rng(seed)
        weights = np.asarray([CLASS_WEIGHTS[name] for name in CLASSES], float)
        self._weights = weights / weights.sum()
        self._changes: dict[Scene, list[list[Scene]]] = {}

    def batch(self, families: int) -> tuple[list[Scene], torch.Tensor]:
        """``families * FAMILY`` scenes and their pictures, float32 ``[B, 3, 32, 32]``, normalised."""
        scenes: list[Scene] = []
        for _ in range(families):
            members = self._by_class[self._rng.choice(CLASSES, p=self._weights)]
            first = members[self._rng.integers(len(members))]
            scenes += [first, *(self._relative(first) for _ in range(FAMILY - 1))]
        return scenes, normalise(np.stack([worn(draw(scene, self._rng), self._rng) for scene in scenes]))

    def _relative(self, scene: Scene) -> Scene:
        if scene not in self._changes:
            kinds = ([s for s in kind if s in self._train] for kind in changes(scene).values())
            self._changes[scene] = [kind for kind in kinds if kind]
        kinds = self._changes[scene]
        kind = kinds[self._rng.integers(len(kinds))]
        return kind[self._rng.integers(len(kind))]


def worn(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture, uint8 ``[32, 32, 3]``, as float32 after a little blur, dimming and noise."""
    if rng.random() < 0.5:
        blur = ImageFilter.GaussianBlur(float(rng.uniform(0.2, 0.7)))
        image = np.asarray(Image.fromarray(image).filter(blur))
    pixels = image.astype(np.float32) * rng.uniform(0.88, 1.08, 3).astype(np.float32) + np.float32(rng.uniform(-8, 8))
    return (pixels + rng.normal(0, 4, image.shape).astype(np.float32)).clip(0, 255)


def normalise(images: np.ndarray) -> torch.Tensor:
    """Pictures ``[B, 32, 32, 3]`` in 0 to 255 as the model takes them, float32 ``[B, 3, 32, 32]``."""
    pixels = torch.from_numpy(np.asarray(images, np.float32) / 255)
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2).contiguous()


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, same: torch.Tensor
) -> torch.Tensor:
    """CLIP's symmetric cross-entropy (arXiv:2103.00020, figure 3), shared equally among captions that mean the same.

    Args:
        images: unit vectors of shape ``[B, D]``.
        texts: unit vectors of shape ``[B, D]``.
        scale: inverse temperature.
        same: bool of shape ``[B, B]``, whether two captions mean the same.
    """
    logits = scale * images @ texts.T
    target = same.float() / same.sum(1, keepdim=True)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def build() -> Any:
    """The untrained model."""
    config = json.loads((ASSETS / "config.json").read_text())
    return import_open_clip().CLIP(**config)


def train(steps: int, families: int, peak: float, seed: int) -> Any:
    torch.manual_seed(seed)
    model, data = build(), Families(seed)
    plain = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW([{"params": plain, "weight_decay": 0.0}, {"params": decayed}], betas=(0.9, 0.98))
    average = {name: value.clone() for name, value in model.state_dict().items()}
    total, start = 0.0, time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        scenes, pixels = data.batch(families)
        keys = [meaning(scene) for scene in scenes]
        same = torch.tensor([[a == b for b in keys] for a in keys])
        images, texts, scale = model(pixels, torch.tensor(tokenize([caption(scene) for scene in scenes])))
        loss = contrastive_loss(images, texts, scale, same)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - min(0.995, (step + 1) / (step + 10)))
        total += loss.item()
        if (step + 1) % 50 == 0:
            LOGGER.info("step %d  %.0f s  loss %.3f", step + 1, time.perf_counter() - start, total / 50)
            total = 0.0
    model.load_state_dict(average)
    return model


@torch.no_grad()
def evaluate(model: Any, per_class: int, seed: int) -> dict[str, float]:
    """How often the caption of a picture scores above one with one thing changed, by that thing; held-out captions."""
    model.eval()
    rng = np.random.default_rng(seed)
    right: dict[str, list[bool]] = {}
    for name in CLASSES:
        members = [scene for scene in split().heldout if difficulty_class(scene) == name]
        for _ in range(per_class):
            scene = members[rng.integers(len(members))]
            options = {kind: others[rng.integers(len(others))] for kind, others in changes(scene).items()}
            texts = model.encode_text(torch.tensor(tokenize([caption(s) for s in (scene, *options.values())])), True)
            cosines = (model.encode_image(normalise(draw(scene, rng)[None]), True) @ texts.T)[0].tolist()
            for kind, cosine in zip(options, cosines[1:], strict=True):
                right.setdefault(kind, []).append(cosines[0] > cosine)
    table = {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}
    return table | {"all": sum(map(sum, right.values())) / sum(map(len, right.values()))}


def main() -> None:
    """Trains, saves half-precision weights beside the config, and prints the ranking accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--families", type=int, default=32, help=f"per batch, each of {FAMILY} pictures")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=Path, default=ASSETS / "model.safetensors")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate what was saved")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    if not options.evaluate:
        model = train(options.steps, options.families, options.lr, options.seed)
        save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, options.target)
    model = build()
    model.load_state_dict({k: v.float() for k, v in load_file(options.target).items()})
    for kind, accuracy in evaluate(model, per_class=300, seed=options.seed + 1).items():
        print(f"{kind:10} {accuracy:.3f}")


if __name__ == "__main__":
    main()
