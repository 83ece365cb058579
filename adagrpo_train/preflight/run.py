"""All checks of a run in their order, and its plan."""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from adagrpo_train import build, continuation
from adagrpo_train.build import Assembly
from adagrpo_train.errors import PreflightError, RewardError
from adagrpo_train.preflight import plan, sizes
from adagrpo_train.preflight.checks import Checks
from adagrpo_train.preflight.counts import Counts, count
from adagrpo_train.preflight.findings import Findings, Note
from adagrpo_train.preflight.measure import Batch, Measurement
from adagrpo_train.preflight.outline import Outline
from adagrpo_train.preflight.words import number, size
from adagrpo_train.prompts.source import read_prompts
from adagrpo_train.runtime.checkpoint import Snapshot
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.scoring.connect import Rewards
from adagrpo_train.settings import Settings
from adagrpo_train.types import Prompts

Write = Callable[[str], object]
_PATIENCE_SECONDS = 30.0
"""For servers elsewhere: before a run they should be up."""


class Preflight:
    """Checks of a run on the machine that is to run it. Nothing of it is left behind.

    Args:
        settings: of the run.
        engine: of the run.
        write: takes the lines of the report; the main rank's alone.
    """

    def __init__(self, settings: Settings, engine: Engine, write: Write) -> None:
        self._settings, self._engine = settings, engine
        self._write: Write = write if engine.is_main else lambda text: None
        self._findings = Findings(engine, write)
        self._snapshot: Snapshot | None = None
        self._run_dir = settings.run_dir
        self._run: Assembly | None = None
        self._reward_failed = False
        self.estimates: tuple[plan.Estimate, plan.Estimate] | None = None
        """Of the clock, and of processor seconds; None unless every check was passed."""

    def __call__(self) -> None:
        """Make the checks and write the plan.

        Raises:
            PreflightError: on every rank, if a check failed.
        """
        with TemporaryDirectory(prefix="adagrpo-check-") as scratch:
            if self._settings.values["resume"] is not None:
                self._findings.check("checkpoint", self._open_snapshot)
            self._findings.check("folder", self._find_folder, needs=["checkpoint"])
            self._findings.check("tracker", self._trackers)
            whole = self._findings.check("parts", lambda: self._assemble(Path(scratch)))
            with ExitStack() as stack:
                if self._run is not None:
                    stack.callback(self._run.parts.rewards.close)
                if self._run is not None and whole:  # on every rank, not on this one alone
                    self._with_parts(self._run)
                else:
                    self._without_parts(Path(scratch))
        self._findings.conclude()

    def _open_snapshot(self) -> str:
        self._snapshot = continuation.open_snapshot(self._settings, self._engine)
        assert self._snapshot is not None
        continuation.check_continuation(self._settings, self._engine, self._snapshot)
        return f"goes on from iteration {self._snapshot.iteration} under the same settings"

    def _find_folder(self) -> str:
        continuation.check_trains(self._settings)
        self._run_dir = continuation.find_run_dir(self._settings, self._engine, self._snapshot)
        return f"{self._run_dir}"

    def _trackers(self) -> str:
        """Their settings; none is started."""
        configured = self._settings.values["tracker"] or {}
        for name, section in configured.items():
            build.make(section, f"tracker.{name}")
        return ", ".join(["the run's folder", *configured])

    def _assemble(self, scratch: Path) -> str:
        try:
            self._run = build.assemble(_for_checks(self._settings, scratch), self._engine, scratch)
        except RewardError:  # on every rank
            self._reward_failed = True
            raise
        return f"{_names(self._settings)} fits together, on {self._engine.world_size} x {self._engine.device.type}"

    def _without_parts(self, scratch: Path) -> None:
        """What can still be checked when the run cannot be built."""
        if not self._reward_failed:  # else it would be waited for once more
            self._findings.check("rewards", lambda: self._rewards_alone(scratch))
        outline = _outlined(self._findings, self._settings, processes=self._engine.world_size)
        if outline:
            self._findings.check("disk", lambda: self._disk(outline.written()))
            self._write(_counted(outline.counts, self._settings))

    def _rewards_alone(self, scratch: Path) -> str:
        values = _for_checks(self._settings, scratch).values
        entries = build.make_entries(values)
        with closing(Rewards(entries, engine=self._engine, log_dir=scratch / "rewards")) as rewards:
            return "\n".join(f"{source.entry.name}: {source.client.fingerprint}" for source in rewards.sources)

    def _with_parts(self, run: Assembly) -> None:
        findings, settings, parts = self._findings, self._settings, run.parts
        counts = count(
            settings.values,
            sampler=parts.sampler,
            curriculum=run.choices.curriculum,
            schedule=run.choices.schedule,
            visits=run.choices.visits,
            evaluations_per_state=parts.model.evaluations_per_velocity,
            processes=self._engine.world_size,
        )
        checks = Checks(settings, run, self._engine, counts)
        findings.check("reward identity", lambda: self._identity(checks))
        if self._snapshot is not None:
            findings.check("state", lambda: self._restore(run), needs=["checkpoint", "reward identity"])
        prompts = checks.draw_prompts()
        written = sizes.written(settings.values, parts.model, parts.policy.trained_sizes, counts)
        findings.check("disk", lambda: self._disk(written))
        fits = partial(_in_memory, settings)
        findings.check("memory", fits(lambda: self._prepare(run, prompts)))
        findings.check("model", fits(lambda: checks.model(prompts)), needs=["memory"])
        findings.check("zero noise", fits(lambda: checks.zero_noise(prompts)), needs=["model"])
        findings.check("rollout", fits(lambda: checks.roll_out(prompts)), needs=["model"])
        findings.check("ratio", fits(checks.ratio), needs=["rollout"])
        findings.check("reward spread", checks.spread, needs=["rollout"])
        if not findings.failed:
            findings.check("pieces", fits(lambda: self._measure(run, checks.drawn, counts)))
        self._write(_counted(counts, settings) + plan.stored(written, keep=settings.values["checkpoint"]["keep"]))
        if self.estimates:
            self._write(plan.estimated(self.estimates[0], counts))

    def _identity(self, checks: Checks) -> str:
        assert self._run is not None
        if self._snapshot is not None:
            continuation.check_same_rewards(self._settings, self._run.parts.scorer, self._snapshot)
        return checks.identity()

    def _restore(self, run: Assembly) -> str:
        assert self._snapshot is not None
        run.trainer.restore(self._snapshot)
        return "weights, averages and optimizer state of the checkpoint fit"

    def _prepare(self, run: Assembly, prompts: Prompts) -> str:
        texts = self._engine.gather_objects(list(prompts.texts))
        build.prepare(self._settings, self._engine, run.parts, [run.parts.evaluator.texts[0], *chain(*texts)])
        network: Any = run.parts.model.transformer
        checkpointing = "on" if network.is_gradient_checkpointing else "off"
        return f"all parts are in memory; gradient checkpointing is {checkpointing}"

    def _disk(self, written: sizes.Written) -> str:
        """Room for checkpoints, export and records, where the run's folder will be."""
        keep = self._settings.values["checkpoint"]["keep"]
        needed, folder = written.needed(keep), self._run_dir.resolve()
        place = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not os.access(place, os.W_OK | os.X_OK):
            raise PreflightError(
                f"hydra.run.dir={self._run_dir}: no file can be written there, {place} belongs to others; name another"
            )
        free = shutil.disk_usage(place).free
        if free < needed:
            raise PreflightError(
                f"hydra.run.dir={self._run_dir}: {size(free)} are free there, checkpoints, export and records "
                f"take {size(needed)} (each checkpoint {size(written.checkpoint)}, all records "
                f"{size(written.records)}); set hydra.run.dir to another disk, lower checkpoint.keep, or raise "
                "record.every"
            )
        return f"{size(free)} are free at {place}, checkpoints, export and records take {size(needed)} at most"

    def _measure(self, run: Assembly, batch: Batch, counts: Counts) -> str:
        measurement = Measurement(run, self._engine, batch, counts)
        self.estimates = measurement.estimate(measurement.pieces())
        return "timed at the shapes of training"


def plan_only(settings: Settings, write: Write, *, processes: int, tflops: float | None) -> None:
    """Checks and plan of a run that need neither its weights nor its rewards nor a machine like the run's.

    Args:
        write: takes the lines of the report.
        processes: of the run.
        tflops: what a process computes in a second, in 10^12 operations; None if it is not known.

    Raises:
        PreflightError: a check failed.
    """
    findings = Findings(None, write)
    findings.check("settings", lambda: continuation.check_trains(settings) or _names(settings))
    findings.check("prompts", lambda: _prompts(settings))
    outline = _outlined(findings, settings, processes=processes)
    if outline:
        held: dict[str, float] = {}
        findings.check("engine", lambda: held.update(outline.held()) or settings.choices["engine"])
        keep = settings.values["checkpoint"]["keep"]
        write(_counted(outline.counts, settings) + plan.stored(outline.written(), keep=keep))
        if held:
            write(
                plan.by_shapes(held, outline.work(), outline.counts, engine=settings.choices["engine"], tflops=tflops)
            )
    findings.conclude()


def _outlined(findings: Findings, settings: Settings, *, processes: int) -> Outline | None:
    outlines: list[Outline] = []

    def make() -> str:
        outlines.append(Outline(settings, processes=processes))
        trained = number(sum(parameter.numel() for parameter in outlines[0].trained))
        return f"{settings.choices['model']} without its weights, of which {trained} are trained"

    findings.check("shapes", make)
    return outlines[0] if outlines else None


def _names(settings: Settings) -> str:
    groups = ("model", "algorithm", "curriculum", "advantage", "trainable", "engine")
    build.make_entries(settings.values)
    return "-".join(settings.choices[group] for group in groups)


def _prompts(settings: Settings) -> str:
    """Both files, if they are here: where a plan is made, the run's prompts need not be."""
    counts = []
    for key in ("path", "evaluation_path"):
        path = Path(settings.values["prompts"][key]).expanduser()
        if not path.exists():
            return Note(f"prompts.{key}={path}: not here; nothing is known of it")
        counts.append(len(read_prompts(path, key=f"prompts.{key}")))
    wanted = settings.values["curriculum"].get("candidates", settings.values["curriculum"]["chosen"])
    if wanted > counts[0]:
        raise PreflightError(f"curriculum.candidates={wanted}: prompts.path holds only {counts[0]} prompts")
    return f"{number(counts[0])} to train on, {number(counts[1])} held out"


def _counted(counts: Counts, settings: Settings) -> str:
    entries = settings.values["reward"].items()
    return plan.counted(counts, {name: entry.get("role", "train") == "train" for name, entry in entries})


def _for_checks(settings: Settings, scratch: Path) -> Settings:
    """The same run without its traces: a cache of prompts in a folder that goes, less patience with servers."""
    values: dict[str, Any] = deepcopy(settings.values)
    if values["prompt_cache"] is not None:
        values["prompt_cache"] = str(scratch / "prompts")
    for entry in values["reward"].values():
        if entry.get("mode") == "remote":
            entry["startup_seconds"] = min(entry["startup_seconds"], _PATIENCE_SECONDS)
    return replace(settings, values=values)


def _in_memory(settings: Settings, check: Callable[[], str]) -> Callable[[], str]:
    """The same check; a GPU that is too small for it makes it fail."""

    values = settings.values

    def within() -> str:
        try:
            return check()
        except torch.OutOfMemoryError as error:
            raise PreflightError(
                f"out of memory ({str(error).partition('. ')[0]}). Lower update_micro_batch="
                f"{values['update_micro_batch']} or micro_batch={values['micro_batch']}, set "
                "network.gradient_checkpointing=always, prompt_cache=FOLDER, or an engine that divides more"
            ) from error

    return within
