"""What one run of a study has left behind, as far as a study looks at it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adagrpo_train.evaluator import read_scores
from adagrpo_train.experiments.study import Run
from adagrpo_train.tracking.records import read_rows

_SPENT = {"evaluations": ("nfe/sampling", "nfe/training", "nfe/reference"), "seconds": ("time/iteration_seconds",)}
"""What counts as spent, by its name in a study: network rows, candidates included, or wall seconds of iterations."""


@dataclass(frozen=True)
class Record:
    """The records of a finished run, read when they are asked for."""

    run: Run

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return read_rows(self.run.folder / "metrics.jsonl")

    @cached_property
    def _evaluations(self) -> dict[int, dict[str, np.ndarray]]:
        paths = sorted((self.run.folder / "evaluations").glob("*.jsonl"))
        return {int(path.stem): _arrays(path) for path in paths}

    @property
    def iterations(self) -> list[int]:
        """At which the held-out images were scored."""
        return list(self._evaluations)

    @property
    def scores(self) -> list[str]:
        """Names of the held-out scores."""
        return list(self._evaluations[self.iterations[-1]])

    def held_out(self, score: str, iteration: int) -> np.ndarray:
        """Scores [images] of the fixed images, NaN where missing."""
        return self._evaluations[iteration][score]

    def last(self, score: str) -> np.ndarray:
        """Scores [images] at the end."""
        return self.held_out(score, self.iterations[-1])

    def spent(self, x: str, iteration: int) -> float:
        """How much of `x` (iteration, evaluations, seconds) the first so many iterations took."""
        if x == "iteration":
            return float(iteration)
        rows = (row for row in self._rows if row["iteration"] <= iteration)
        return float(sum(row.get(name) or 0.0 for row in rows for name in _SPENT[x]))

    def at(self, score: str, x: str, budget: float) -> np.ndarray:
        """Scores [images] when so much of `x` was spent, on a straight line between the evaluations around it."""
        places = [self.spent(x, iteration) for iteration in self.iterations]
        after = min(int(np.searchsorted(places, budget)), len(places) - 1)
        if after == 0:
            return self.held_out(score, self.iterations[0])
        share = min(1.0, (budget - places[after - 1]) / (places[after] - places[after - 1]))
        earlier, later = (self.held_out(score, self.iterations[index]) for index in (after - 1, after))
        if share == 1.0:
            return later  # what the evaluation before it lacks does not matter
        return earlier + share * (later - earlier)

    def mean(self, metric: str) -> float:
        """Over the iterations that have it, NaN where none has."""
        values = [row[metric] for row in self._rows if row.get(metric) is not None]
        return float(np.mean(values)) if values else float("nan")


def _arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in read_scores(path).items()}
