"""What a model scored on a set of images: in memory, as files, and summed up by class of prompt."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adagrpo_train.errors import ConfigError
from adagrpo_train.evaluator import Evaluation
from adagrpo_train.runtime.files import without_nan, write_whole

ALL = "all"
"""Stands for the prompts of every class."""
ROWS, FACTS = "evaluation.jsonl", "evaluation.json"
_IDENTITY = ("prompt", "class", "sample")
_SAME_IMAGES = ("path", "decode_batch", "guidance_gradient")
"""Settings of a model that do not change how it draws: which one it is, memory, and how it is trained."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """Scores of images whose prompts and noise are fixed.

    Attributes:
        subject: what drew the images, for people.
        texts, classes, samples: of each image [N]: its prompt, the class of that, and the number of its noise.
        scores: score -> [N] float64, NaN where missing.
        facts: what scores depend on beside the subject: two evaluations with other facts are not compared.
    """

    subject: str
    texts: tuple[str, ...]
    classes: tuple[str, ...]
    samples: tuple[int, ...]
    scores: dict[str, np.ndarray]
    facts: Row

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def units(self) -> np.ndarray:
        """Which images count as one observation [N] int64, numbered from 0 in their order.

        The images of a prompt share its difficulty, so they are averaged, also where a file holds a prompt twice. Those
        of training, numbered through, cycle through the prompts: where some come more often, each image is by itself.
        """
        counts = Counter(zip(self.texts, self.classes, strict=True))
        if len(set(counts.values())) > 1 and self.samples == tuple(range(len(self))):
            return np.arange(len(self))
        numbers = {prompt: number for number, prompt in enumerate(counts)}
        return np.array([numbers[prompt] for prompt in zip(self.texts, self.classes, strict=True)])

    def by_class(self) -> Iterator[tuple[str, np.ndarray]]:
        """ALL and then each class, in the order of their first prompts, with the images [N] bool that belong to it."""
        yield ALL, np.ones(len(self), dtype=bool)
        for label in dict.fromkeys(self.classes):
            if label:
                yield label, np.array([own == label for own in self.classes])

    def to_show(self, count: int) -> list[int]:
        """Rows of so many images, classes in turn, and as many prompts as there are before a second image of one."""
        seen, placed = Counter[tuple[str, str]](), Counter[tuple[str, int]]()
        order = []
        for row, (text, label) in enumerate(zip(self.texts, self.classes, strict=True)):
            again = seen[text, label]
            order.append((again, placed[label, again], row))
            seen[text, label] += 1
            placed[label, again] += 1
        return [row for _, _, row in sorted(order)[:count]]

    def summary(self) -> dict[str, dict[str, Row]]:
        """Score -> class -> mean, its standard error (null for less than two), what it is a mean of, and what lacks."""
        return {
            name: {label: _figures(values[rows], self.units[rows]) for label, rows in self.by_class()}
            for name, values in self.scores.items()
        }

    def save(self, folder: Path) -> None:
        """Write one JSON object per image, and the summary with the facts beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        columns = {name: without_nan(values.tolist()) for name, values in self.scores.items()}
        rows = [
            dict(zip(_IDENTITY, identity, strict=True)) | {name: values[i] for name, values in columns.items()}
            for i, identity in enumerate(zip(self.texts, self.classes, self.samples, strict=True))
        ]
        write_whole(folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows))
        head = {"subject": self.subject, "images": len(self), "observations": int(self.units.max()) + 1}
        write_whole(folder / FACTS, json.dumps(head | {"facts": self.facts, "scores": self.summary()}, indent=1))


def scored(evaluation: Evaluation, samples: tuple[int, ...], *, subject: str, facts: Row) -> Scored:
    """An evaluation as a record of what drew it."""
    prompts = evaluation.prompts
    scores = {name: values.double().numpy() for name, values in evaluation.scores.items()}
    plain = json.loads(json.dumps(facts))  # as a file would give them back
    return Scored(subject, prompts.texts, prompts.classes, samples, scores, plain)


def facts_of(values: Row, *, rewards: dict[str, str], calibration: Any) -> Row:
    """What scores depend on beside the model and the prompts, by the keys of the settings where there are some.

    Args:
        values: the resolved settings.
        rewards: reward -> its fingerprint.
        calibration: the scale of the total, as the scorer keeps it.
    """
    trained = {name: own["weights"] for name, own in values["reward"].items() if own["role"] == "train"}
    return {
        "evaluation": {"seed": values["evaluation"]["seed"]},
        "model": {key: value for key, value in values["model"].items() if key not in _SAME_IMAGES},
        "network": {"autocast": values["network"]["autocast"]},
        "rewards": rewards,
        "total": {"weights": trained, "calibration": calibration},
    }


def read_scored(folder: Path, *, key: str) -> Scored:
    """What save() wrote into a folder.

    Args:
        key: the configuration key that names the folder, for messages.

    Raises:
        ConfigError: a file is absent or damaged.
    """
    try:
        head = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").splitlines()]
        texts, classes, samples = (tuple(row[name] for row in rows) for name in _IDENTITY)
        names = [name for name in rows[0] if name not in _IDENTITY]
        scores = {name: np.array([_number(row[name]) for row in rows]) for name in names}
        return Scored(head["subject"], texts, classes, samples, scores, head["facts"])
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            f"{key}={folder}: {ROWS} and {FACTS} of an evaluation cannot be read there ({error}); evaluate again"
        ) from error


def unit_means(values: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Means of the scores of each unit, NaN where it has none.

    Args:
        values: [N] scores, NaN where missing.
        units: [N] int64, any numbers.

    Returns:
        [U], by ascending number.
    """
    _, own = np.unique(units, return_inverse=True)
    known = np.isfinite(values)
    counts = np.bincount(own, weights=known)
    sums = np.bincount(own, weights=np.where(known, values, 0.0))
    return np.divide(sums, counts, out=np.full(len(counts), math.nan), where=counts > 0)


def _figures(values: np.ndarray, units: np.ndarray) -> Row:
    means = unit_means(values, units)
    present = means[np.isfinite(means)]
    count = len(present)
    error = float(present.std(ddof=1) / count**0.5) if count > 1 else None
    return {
        "mean": float(present.mean()) if count else None,
        "standard_error": error,
        "observations": count,
        "missing": int((~np.isfinite(values)).sum()),
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
