"""Several trackers as one."""

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np

from adagrpo_train.interfaces import Tracker
from adagrpo_train.types import JudgedSamples, RunInfo, SelectedPrompt


class CompositeTracker:
    """Passes everything to each tracker, in order. An error of one ends the run: no record is silently incomplete.

    The error keeps its type and gains a note that names the tracker.
    """

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def start(self, run: RunInfo) -> None:
        for tracker in self._trackers:
            with _Named(tracker):
                tracker.start(run)

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        for tracker in self._trackers:
            with _Named(tracker):
                tracker.log(metrics, iteration)

    def alert(self, title: str, text: str, iteration: int) -> None:
        for tracker in self._trackers:
            with _Named(tracker):
                tracker.alert(title, text, iteration)

    def log_images(self, name: str, images: np.ndarray, captions: list[str], iteration: int) -> None:
        for tracker in self._trackers:
            with _Named(tracker):
                tracker.log_images(name, images, captions, iteration)

    def log_prompts(self, rows: list[SelectedPrompt], iteration: int) -> None:
        for tracker in self._trackers:
            with _Named(tracker):
                tracker.log_prompts(rows, iteration)

    def log_advantages(self, samples: JudgedSamples, iteration: int) -> None:
        for tracker in self._trackers:
            with _Named(tracker):
                tracker.log_advantages(samples, iteration)

    def state_dict(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for tracker in self._trackers:
            with _Named(tracker):
                merged.update(tracker.state_dict())
        return merged

    def finish(self, status: str) -> None:
        """Finish every tracker, also after one of them failed to; its error is raised in the end."""
        with ExitStack() as stack:
            for tracker in reversed(self._trackers):  # a stack calls the last one first
                stack.callback(_finish, tracker, status)


def _finish(tracker: Tracker, status: str) -> None:
    with _Named(tracker):
        tracker.finish(status)


class _Named:
    """Adds the name of a tracker to an error that leaves the block."""

    def __init__(self, tracker: Tracker) -> None:
        self._name = type(tracker).__name__

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            error.add_note(f"raised in {self._name}")
