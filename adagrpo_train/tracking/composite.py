"""Several trackers as one."""

from collections.abc import Callable
from typing import Any

import numpy as np

from adagrpo_train.interfaces import Tracker
from adagrpo_train.types import RunInfo, SelectedPrompt


class CompositeTracker:
    """Passes everything to each tracker, in order. An error of one ends the run: no record is silently incomplete."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def start(self, run: RunInfo) -> None:
        self._each(lambda tracker: tracker.start(run))

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        self._each(lambda tracker: tracker.log(metrics, iteration))

    def log_images(self, name: str, images: np.ndarray, captions: list[str], iteration: int) -> None:
        self._each(lambda tracker: tracker.log_images(name, images, captions, iteration))

    def log_prompts(self, rows: list[SelectedPrompt], iteration: int) -> None:
        self._each(lambda tracker: tracker.log_prompts(rows, iteration))

    def state_dict(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        self._each(lambda tracker: merged.update(tracker.state_dict()))
        return merged

    def finish(self, status: str) -> None:
        self._each(lambda tracker: tracker.finish(status))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            call(tracker)
