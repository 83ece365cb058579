"""Configuration -> parts -> Trainer, with the checks that need more than one part."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from adagrpo_train.errors import AdaGRPOError, CheckpointError, ConfigError
from adagrpo_train.evaluator import Evaluator
from adagrpo_train.interfaces import Tracker
from adagrpo_train.prompts.source import PromptFile, read_prompts
from adagrpo_train.rollout.sampler import FlowSampler
from adagrpo_train.runtime import checkpoint
from adagrpo_train.runtime.checkpoint import Checkpoints, Snapshot
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.policy import Policy
from adagrpo_train.scoring.weighted import WeightedScorer
from adagrpo_train.settings import Settings
from adagrpo_train.trainer import Schedule, Trainer
from adagrpo_train.types import RunInfo

_log = logging.getLogger(__name__)

FREE_ON_RESUME = ("iterations", "resume", "tracker", "evaluation.every", "checkpoint", "name", "engine")
"""Keys that may differ between a checkpoint and the run that continues from it: they do not change the result."""


@dataclass(frozen=True)
class Parts:
    """What training and evaluation share."""

    policy: Policy
    sampler: FlowSampler
    scorer: WeightedScorer
    evaluator: Evaluator


def make_engine(settings: Settings) -> Engine:
    """The process group, made first: everything else may depend on rank and device."""
    return _make(settings.values["engine"], "engine")


def make_parts(settings: Settings, engine: Engine) -> Parts:
    """Model, policy, sampler, scorer and evaluator."""
    values = settings.values
    # Prompt files are read before the model is loaded: a wrong path should not cost a minute.
    heldout = read_prompts(Path(values["prompts"]["evaluation_path"]), key="prompts.evaluation_path")
    model = _make(values["model"], "model", device=engine.device)
    sampler = FlowSampler(
        transition=_make(values["algorithm"]["transition"], "algorithm.transition"),
        plan=_make(values["plan"], "plan"),
        sigmas=model.sigmas,
        latent_shape=model.latent_shape,
        latent_dtype=model.dtype,
        group_size=values["group_size"],
        micro_batch=values["micro_batch"],
        seed=values["seed"],
        device=engine.device,
    )
    trainable = _make(values["trainable"], "trainable")
    trainable.attach(model, seed=values["seed"], reference=values["algorithm"]["objective"]["kl_weight"] > 0)
    policy = Policy(model=model, trainable=trainable, average=values["weight_average"], engine=engine)
    scorer = WeightedScorer(
        reward=_make(values["reward"]["model"], "reward.model"), weights=values["reward"]["weights"]
    )
    evaluation = values["evaluation"]
    evaluator = Evaluator(
        prompts=heldout,
        images=evaluation["images"],
        grid_images=evaluation["grid_images"],
        batch=evaluation["batch"],
        seed=evaluation["seed"],
        latent_shape=model.latent_shape,
        sampler=sampler,
        scorer=scorer,
        engine=engine,
    )
    return Parts(policy, sampler, scorer, evaluator)


def make_trainer(settings: Settings, engine: Engine, run_dir: Path, snapshot: Snapshot | None) -> tuple[Trainer, Parts]:
    """The trainer of a new run, or of one that continues from a snapshot."""
    values = settings.values
    prompts = PromptFile(path=values["prompts"]["path"], seed=values["seed"])
    curriculum = _make(values["curriculum"], "curriculum")
    if curriculum.candidates > len(prompts):
        raise ConfigError(
            f"curriculum.candidates={curriculum.candidates}: prompts.path holds only {len(prompts)} prompts"
        )
    schedule = Schedule(
        iterations=values["iterations"],
        inner_epochs=values["inner_epochs"],
        updates_per_iteration=values["updates_per_iteration"],
        max_grad_norm=values["max_grad_norm"],
        evaluate_every=values["evaluation"]["every"],
        save_every=values["checkpoint"]["every"],
        seed=values["seed"],
    )
    advantage = _make(values["advantage"], "advantage")
    objective = _make(values["algorithm"]["objective"], "algorithm.objective")
    parts = make_parts(settings, engine)
    trainer = Trainer(
        prompts=prompts,
        curriculum=curriculum,
        sampler=parts.sampler,
        scorer=parts.scorer,
        advantage=advantage,
        objective=objective,
        policy=parts.policy,
        optimizer=_make(values["optimizer"], "optimizer", params=parts.policy.parameters),
        evaluator=parts.evaluator,
        checkpoints=Checkpoints(run_dir / "checkpoints", keep=values["checkpoint"]["keep"]),
        engine=engine,
        schedule=schedule,
        run_dir=run_dir,
        config=values,
    )
    if snapshot:
        trainer.restore(snapshot)
    return trainer, parts


def open_snapshot(settings: Settings, engine: Engine) -> Snapshot | None:
    """The checkpoint that `resume` names; None without it. Every rank reads the one that the main rank found."""
    resume = settings.values["resume"]
    if resume is None:
        return None
    path = engine.broadcast(_found(Path(resume)) if engine.is_main else None)
    if isinstance(path, AdaGRPOError):
        raise path
    assert path is not None
    _log.info("reading %s", path)
    return checkpoint.load(path)


def check_continuation(settings: Settings, engine: Engine, snapshot: Snapshot) -> None:
    """Refuse to continue a run that would then not be the same run.

    Raises:
        CheckpointError: another configuration or number of processes.
        ConfigError: nothing is left to do.
    """
    checkpoint.check_compatible(snapshot.config, settings.values, free=FREE_ON_RESUME)
    if len(snapshot.per_rank) != engine.world_size:
        raise CheckpointError(
            f"resume={settings.values['resume']}: the checkpoint was made by {len(snapshot.per_rank)} processes, "
            f"this run has {engine.world_size}; launch as many"
        )
    if snapshot.iteration >= settings.values["iterations"]:
        raise ConfigError(
            f"resume={settings.values['resume']} is already at iteration {snapshot.iteration}; "
            "set iterations above it to go on"
        )


def check_same_model(settings: Settings, snapshot: Snapshot) -> None:
    """Refuse to score a checkpoint under another model, choice of trained weights or reward than its own.

    Raises:
        CheckpointError: names the differing keys.
    """
    sections = ("model", "trainable", "reward")
    saved, present = ({name: values[name] for name in sections} for values in (snapshot.config, settings.values))
    checkpoint.check_compatible(saved, present, free=())


def choose_run_dir(settings: Settings, engine: Engine) -> Path:
    """Folder of this run, the same on every rank; a resumed run continues in its own unless hydra.run.dir is given.

    In another folder the records so far are copied, so that its metrics and report show the whole run.

    Raises:
        ConfigError: a new run would write over an old one.
    """
    run_dir = engine.broadcast(_run_dir(settings) if engine.is_main else None)
    assert run_dir is not None
    if settings.values["resume"] is None and engine.broadcast((run_dir / "metrics.jsonl").exists()):
        raise ConfigError(
            f"hydra.run.dir={run_dir} already holds a run; continue it with resume={run_dir}, or name another folder"
        )
    return run_dir


def _run_dir(settings: Settings) -> Path:
    resume = settings.values["resume"]
    if resume is None:
        return settings.run_dir
    source = checkpoint.find(Path(resume)).parent.parent
    if not settings.run_dir_given or settings.run_dir.resolve() == source.resolve():
        return source
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "prompts.jsonl", "evaluations", "images"):
        if (source / name).is_dir():
            shutil.copytree(source / name, settings.run_dir / name, dirs_exist_ok=True)
        elif (source / name).is_file():
            shutil.copy2(source / name, settings.run_dir / name)
    return settings.run_dir


def make_tracker(settings: Settings, run_dir: Path, snapshot: Snapshot | None) -> Tracker:
    """The local record and the console, and whatever `tracker` adds; for the main rank only."""
    from adagrpo_train.tracking.composite import CompositeTracker
    from adagrpo_train.tracking.console import ConsoleTracker
    from adagrpo_train.tracking.jsonl import JsonlTracker

    configured = settings.values["tracker"] or {}
    trackers: list[Tracker] = [JsonlTracker(), ConsoleTracker()]
    trackers += [_make(section, f"tracker.{name}") for name, section in configured.items()]
    tracker = CompositeTracker(trackers)
    tracker.start(
        RunInfo(
            run_dir=run_dir,
            name=settings.values["name"] or _default_name(settings),
            config=settings.values,
            total_iterations=settings.values["iterations"],
            first_iteration=snapshot.iteration if snapshot else 0,
            tracker_state=snapshot.state["tracker"] if snapshot else {},
        )
    )
    return tracker


def _default_name(settings: Settings) -> str:
    names: Sequence[str] = ("model", "algorithm", "curriculum", "advantage", "trainable")
    return "-".join([*(settings.choices[name] for name in names), f"seed{settings.values['seed']}"])


def _found(path: Path) -> Path | AdaGRPOError:
    try:
        return checkpoint.find(path)
    except AdaGRPOError as error:
        return error


def _make(section: dict[str, Any], key: str, **arguments: Any) -> Any:
    """Construct the `_target_` of a section; runtime objects are passed as arguments."""
    try:
        return instantiate(section, _partial_=True, _convert_="all")(**arguments)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, AdaGRPOError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from error
        raise ConfigError(f"{key}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from error
