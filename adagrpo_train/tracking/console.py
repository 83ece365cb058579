"""A progress bar with the figures that matter; plain lines where the output is not a terminal."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from adagrpo_train.tracking.records import missing_scores
from adagrpo_train.types import JudgedSamples, RunInfo, SelectedPrompt

_FIGURES = (
    ("reward", "reward/mean", ".3f"),
    ("level", "curriculum/level", ".3f"),
    ("ratio", "policy/ratio_mean", ".4f"),
    ("clip", "policy/clip_fraction", ".2f"),
    ("grad", "policy/grad_norm", ".2f"),
)
_STAGES = ("candidates", "rollout", "update")

# An iteration may take many minutes; the default of 30 s would never see two of them.
_ESTIMATE_OVER_SECONDS = 24 * 3600.0


class ConsoleTracker:
    """Shows reward, proficiency level, ratio, clip fraction, seconds per stage and the time left.

    Args:
        console: where to write; standard output by default.
        plain_every: iterations between two lines where the output is not a terminal.
    """

    def __init__(self, *, console: Console | None = None, plain_every: int = 10) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._every = plain_every
        self._baseline: dict[str, float] = {}

    def start(self, run: RunInfo) -> None:
        self._first, self._total = run.first_iteration, run.total_iterations
        self._baseline = dict(run.tracker_state.get("console_baseline", {}))
        self._console.print(Text.assemble((run.name, "bold"), f"  ->  {run.run_dir}"))
        if run.first_iteration:
            self._console.print(f"continued after iteration {run.first_iteration}", markup=False)
        self._progress = _Progress(
            TextColumn("training"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            speed_estimate_period=_ESTIMATE_OVER_SECONDS,
        )
        self._progress.start()
        self._task = self._progress.add_task("", total=run.total_iterations, completed=run.first_iteration)

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        if any(name.startswith("eval/") for name in metrics):
            self._show_evaluation(metrics, iteration)
            return
        text, skipped = _summary(metrics), "reward/skipped" in metrics
        self._progress.update(self._task, completed=iteration, description=text)
        due = iteration % self._every == 0 or iteration in (self._first + 1, self._total) or skipped
        if not self._console.is_terminal and due:
            self._console.print(f"{iteration:>5}/{self._total}  {text}{self._time_left()}", markup=False)

    def alert(self, title: str, text: str, iteration: int) -> None:
        self._console.print(Text(f"WARNING at {iteration}: {title}", style="bold red"))
        self._console.print(f"  {text}", markup=False)

    def log_images(self, name: str, images: np.ndarray, captions: list[str], iteration: int) -> None:
        """Pictures are for the other trackers."""

    def log_prompts(self, rows: list[SelectedPrompt], iteration: int) -> None:
        """Prompts are for the other trackers."""

    def log_advantages(self, samples: JudgedSamples, iteration: int) -> None:
        """Single samples are for the local record."""

    def state_dict(self) -> dict[str, Any]:
        """The first evaluation, which changes are counted from."""
        return {"console_baseline": self._baseline}

    def finish(self, status: str) -> None:
        self._progress.stop()
        self._console.print(f"run {status}", markup=False)

    def _show_evaluation(self, metrics: dict[str, float], iteration: int) -> None:
        means = {name: value for name, value in metrics.items() if name.startswith("eval/") and name.count("/") == 1}
        parts = [f"{name.split('/')[1]} {value:.3f}{self._change(name, value)}" for name, value in means.items()]
        parts += _missing(metrics, evaluation=True)
        self._console.print(f"held-out at {iteration:>4}: {'  '.join(parts)}", markup=False)
        self._baseline = self._baseline or means

    def _change(self, name: str, value: float) -> str:
        return f" ({value - self._baseline[name]:+.3f})" if name in self._baseline else ""

    def _time_left(self) -> str:
        seconds = self._progress.tasks[self._task].time_remaining
        return f"  left {timedelta(seconds=round(seconds))}" if seconds else ""


@contextmanager
def counted(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that moves on by the counts it is told; nothing where the output is not a terminal."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(escape(label), total=total)
        yield lambda count: progress.advance(task, count)


class _Progress(Progress):
    """The bar on one line and the figures on the next, so that both fit a terminal of 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.description, style="dim", no_wrap=True, overflow="ellipsis")


def _summary(metrics: dict[str, float]) -> str:
    """The figures that are there, in one line."""
    parts = ["skipped"] if "reward/skipped" in metrics else []
    parts += [f"{label} {metrics[name]:{form}}" for label, name, form in _FIGURES if name in metrics]
    parts += _missing(metrics)
    stages = [metrics[name] for name in (f"time/{stage}_seconds" for stage in _STAGES) if name in metrics]
    if "time/iteration_seconds" in metrics:
        parts.append(f"{'+'.join(f'{seconds:.1f}' for seconds in stages)}={metrics['time/iteration_seconds']:.1f} s")
    return "  ".join(parts)


def _missing(metrics: dict[str, float], *, evaluation: bool = False) -> list[str]:
    """A note about scores that are missing, if any is."""
    counts = missing_scores(metrics, evaluation=evaluation)
    return [f"missing {', '.join(f'{count} of {name}' for name, count in counts.items())}"] if counts else []
