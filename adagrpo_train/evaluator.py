"""Fixed held-out prompts, fixed noise, noise-free sampling: the yardstick of a run."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adagrpo_train.errors import ConfigError
from adagrpo_train.rollout.sampler import FlowSampler
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.files import without_nan, write_whole
from adagrpo_train.runtime.noise import INITIAL, NoiseKey, keyed_noise
from adagrpo_train.runtime.policy import Policy
from adagrpo_train.scoring.scorer import Scorer
from adagrpo_train.tracking.images import thumbnails
from adagrpo_train.types import Prompts


@dataclass(frozen=True)
class Evaluation:
    """Scores of the fixed images, in their fixed order and NaN where missing, and some of the images."""

    prompts: Prompts
    scores: dict[str, Tensor]  # each [N]; "total" and every part
    grid: np.ndarray  # uint8 [g, H, W, 3]
    rows: tuple[int, ...]  # which images these are [g]

    def metrics(self) -> dict[str, float]:
        """`eval/<part>` for each part, and `eval/<class>/<part>` where the prompts have classes."""
        metrics = {f"eval/{name}": _mean(values) for name, values in self.scores.items()}
        for label in sorted(set(self.prompts.classes) - {""}):
            rows = torch.tensor([own == label for own in self.prompts.classes])
            for name, values in self.scores.items():
                metrics[f"eval/{label}/{name}"] = _mean(values[rows])
        return metrics

    def save(self, path: Path) -> None:
        """Write one JSON object per image, so that two evaluations can be compared in pairs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {name: without_nan(values.tolist()) for name, values in self.scores.items()}
        rows = [
            {"prompt": text, "class": label} | {name: values[i] for name, values in columns.items()}
            for i, (text, label) in enumerate(zip(self.prompts.texts, self.prompts.classes, strict=True))
        ]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


class Evaluator:
    """Renders and scores the same images every time it is asked.

    Args:
        prompts: held-out prompts; images cycle through their classes, and through the prompts of each class.
        images: number of images, over all ranks.
        samples: if not 0, every prompt gets so many images instead, whose noise depends on the line of the prompt and
            not on how many there are.
        grid_images: how many of the first images every rank is given to look at; None: each rank keeps those that it
            has drawn itself, no larger than a grid shows them, because all of full size would fill the memory.
        batch: images per network call.
        seed: of the initial noise; apart from the run's seed, so that runs are compared on the same noise.
        latent_shape: shape of one latent.
    """

    def __init__(
        self,
        *,
        prompts: Prompts,
        images: int,
        samples: int,
        grid_images: int | None,
        batch: int,
        seed: int,
        latent_shape: tuple[int, ...],
        sampler: FlowSampler,
        scorer: Scorer,
        engine: Engine,
    ) -> None:
        if images < 1 or (grid_images is not None and grid_images < 1) or batch < 1:
            raise ConfigError("evaluation.images, evaluation.grid_images and micro_batch must be >= 1")
        if samples < 0:
            raise ConfigError(f"evaluation.samples={samples}: must be >= 1, or 0 for the images of training")
        rows = sorted([*range(len(prompts))] * samples) or _spread(prompts.classes, images)
        self._prompts = prompts[rows]
        self.samples = tuple(number % samples if samples else number for number in range(len(rows)))
        """Number of each image, by which its noise is drawn: among the images of its prompt, or among all."""
        self._batch, self._grid_images = batch, grid_images
        self._sampler, self._scorer, self._engine = sampler, scorer, engine
        pairs = zip(self._prompts.ids, self.samples, strict=True)
        keys = [NoiseKey(seed, 0, prompt_id, number, INITIAL) for prompt_id, number in pairs]
        self._noise = keyed_noise(keys, latent_shape)

    @property
    def texts(self) -> tuple[str, ...]:
        """Prompts of the images, in their order."""
        return self._prompts.texts

    @property
    def share(self) -> int:
        """Images that each rank draws."""
        return -(-len(self._prompts) // self._engine.world_size)

    def evaluate(self, policy: Policy, drawn: Callable[[int], None] = lambda count: None) -> Evaluation:
        """Score the fixed images with the averaged weights; every rank returns all scores.

        Args:
            drawn: told the number of images of each batch once this rank has drawn it.
        """
        share, total = self.share, len(self._prompts)
        # Ranks hold equally many rows; the last rank repeats the last row and the surplus is cut off below.
        rows = [min(row, total - 1) for row in range(self._engine.rank * share, (self._engine.rank + 1) * share)]
        with policy.average.applied():
            images = np.concatenate(
                [
                    self._render(policy, rows[start : start + self._batch], drawn)
                    for start in range(0, share, self._batch)
                ]
            )
        scores = self._scorer.score(images, self._prompts[rows].texts, evaluation=True)
        parts = {name: self._engine.gather(values)[:total] for name, values in scores.parts.items()}
        self._scorer.calibrate(parts)
        gathered = {"total": self._scorer.total(parts)} | parts
        if self._grid_images is None:
            return Evaluation(self._prompts, gathered, np.stack(thumbnails(images)), tuple(rows))
        pixels = self._engine.gather(torch.from_numpy(images)).numpy()[:total][: self._grid_images]
        return Evaluation(self._prompts, gathered, pixels, tuple(range(len(pixels))))

    @torch.no_grad()
    def _render(self, policy: Policy, rows: list[int], drawn: Callable[[int], None]) -> np.ndarray:
        conditions = policy.encode(list(self._prompts[rows].texts))
        images = policy.decode(self._sampler.render(policy.velocity, conditions, self._noise[rows]))
        drawn(len(rows))
        return images


class PairedGain(NamedTuple):
    """What changed on the images that have both scores; NaN where there are too few to tell."""

    before: float
    after: float
    gain: float
    standard_error: float  # of the gain


def paired_gain(before: list[float], after: list[float]) -> PairedGain:
    """Compare two scores of the same images, NaN where one is missing."""
    pairs = np.array([before, after])
    first, second = pairs[:, np.isfinite(pairs).all(0)]
    count = len(first)
    if not count:
        return PairedGain(*[math.nan] * 4)
    difference = second - first
    error = float(difference.std(ddof=1) / count**0.5) if count > 1 else math.nan
    return PairedGain(float(first.mean()), float(second.mean()), float(difference.mean()), error)


def read_scores(path: Path) -> dict[str, list[float]]:
    """Columns of numbers of a file written by Evaluation.save, NaN where a score is missing."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = [name for name in rows[0] if name not in ("prompt", "class")]
    return {name: [float("nan") if row[name] is None else float(row[name]) for row in rows] for name in names}


def _mean(values: Tensor) -> float:
    """Over what is not missing; NaN of nothing."""
    return float(values[values.isfinite()].mean())


def _spread(classes: tuple[str, ...], images: int) -> list[int]:
    """Rows of prompts for each image: classes in turn, and inside a class its prompts in turn."""
    by_class: dict[str, list[int]] = {}
    for row, label in enumerate(classes):
        by_class.setdefault(label, []).append(row)
    groups = list(by_class.values())
    return [groups[i % len(groups)][i // len(groups) % len(groups[i % len(groups)])] for i in range(images)]
