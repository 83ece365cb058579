"""A progress bar with the figures that matter; plain lines where the output is not a terminal."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adagrpo_train.types import RunInfo, SelectedPrompt

_STAGES = ("candidates", "rollout", "update", "iteration")


class ConsoleTracker:
    """Shows reward, proficiency level, ratio, clip fraction and seconds per stage.

    Args:
        console: where to write; standard output by default.
        plain_every: iterations between two lines where the output is not a terminal.
    """

    def __init__(self, *, console: Console | None = None, plain_every: int = 10) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._every = plain_every
        self._baseline: dict[str, float] | None = None

    def start(self, run: RunInfo) -> None:
        self._total = run.total_iterations
        self._console.print(f"[bold]{run.name}[/bold]  ->  {run.run_dir}")
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._progress.start()
        self._task = self._progress.add_task("", total=run.total_iterations, completed=run.first_iteration)

    def log(self, metrics: dict[str, float], iteration: int) -> None:
        if "reward/mean" not in metrics:
            self._show_evaluation(metrics, iteration)
            return
        text = _summary(metrics)
        self._progress.update(self._task, completed=iteration, description=text)
        if not self._console.is_terminal and (iteration % self._every == 0 or iteration in (1, self._total)):
            self._console.print(f"{iteration:>5}/{self._total}  {text}", markup=False)

    def log_images(self, name: str, images: np.ndarray, captions: list[str], iteration: int) -> None:
        """Pictures are for the other trackers."""

    def log_prompts(self, rows: list[SelectedPrompt], iteration: int) -> None:
        """Prompts are for the other trackers."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def finish(self, status: str) -> None:
        self._progress.stop()
        self._console.print(f"run {status}")

    def _show_evaluation(self, metrics: dict[str, float], iteration: int) -> None:
        means = {name: value for name, value in metrics.items() if name.count("/") == 1}
        self._baseline = self._baseline or means
        parts = [
            f"{name.split('/')[1]} {value:.3f} ({value - self._baseline[name]:+.3f})" for name, value in means.items()
        ]
        self._console.print(f"held-out at {iteration:>4}: {'  '.join(parts)}", markup=False)


def _summary(metrics: dict[str, float]) -> str:
    stages = "+".join(f"{metrics[f'time/{stage}_seconds']:.1f}" for stage in _STAGES[:-1])
    return (
        f"reward {metrics['reward/mean']:.3f}  level {metrics['curriculum/level']:.3f}  "
        f"ratio {metrics['policy/ratio_mean']:.4f}  clip {metrics['policy/clip_fraction']:.2f}  "
        f"grad {metrics['policy/grad_norm']:.2f}  {stages}={metrics['time/iteration_seconds']:.1f} s"
    )
