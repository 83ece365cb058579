"""Going on from a checkpoint: which one, whether this run is the same run, and in which folder."""

import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from adagrpo_train.errors import CheckpointError, ConfigError
from adagrpo_train.runtime import checkpoint
from adagrpo_train.runtime.checkpoint import Snapshot
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.files import fingerprint
from adagrpo_train.scoring.entry import SERVING
from adagrpo_train.scoring.scorer import Scorer
from adagrpo_train.settings import Settings

T = TypeVar("T")
_log = logging.getLogger(__name__)

FREE_ON_RESUME = (
    "iterations",
    "resume",
    "against",
    "tracker",
    "evaluation.every",
    "evaluation.samples",
    "checkpoint",
    "record",
    "health",
    "name",
    "engine",
    "scoring.accept_changed_rewards",
    "scoring.max_skipped",
    "network.gradient_checkpointing",
)
"""Keys that may differ between a checkpoint and the run that continues from it: they do not change the result."""

INPUTS = ("model.path", "prompts.path", "prompts.evaluation_path")
"""Keys that name files: a run continues from any place that holds the same contents."""


def open_snapshot(settings: Settings, engine: Engine) -> Snapshot | None:
    """The checkpoint that `resume` names; None without it. Every rank reads the one that the main rank found."""
    resume = settings.values["resume"]
    return None if resume is None else snapshot_at(resume, engine, key="resume")


def snapshot_at(value: str, engine: Engine, *, key: str) -> Snapshot:
    """The checkpoint that a run folder or a checkpoint's own path names, the same on every rank.

    Args:
        key: the configuration key that names it, for messages.
    """
    path = _on_main(engine, lambda: checkpoint.find(Path(value).expanduser().resolve(), key=key))
    _log.info("reading %s", path)
    return checkpoint.load(path)


def inputs_of(settings: Settings) -> dict[str, str]:
    """Fingerprints of the files that `INPUTS` name; of a hub id nothing is known."""
    paths = {key: Path(_value(settings, key)).expanduser() for key in INPUTS}
    return {key: fingerprint(path) for key, path in paths.items() if path.exists()}


def check_trains(settings: Settings) -> None:
    """Refuse to train with a setting that asks for something else.

    Raises:
        ConfigError: names it.
    """
    if settings.values["against"] is not None:
        raise ConfigError(
            f"against={settings.values['against']}: training compares with nothing; adagrpo-eval resume=RUN "
            "against=... does. Leave it out"
        )


def check_continuation(settings: Settings, engine: Engine, snapshot: Snapshot) -> None:
    """Refuse to continue a run that would then not be the same run.

    Another engine or number of processes continues it up to rounding, and is named in the log.

    Raises:
        CheckpointError: another configuration, other inputs, or another number of processes that each have a level.
        ConfigError: the run has already gone further.
    """
    resume, iterations = settings.values["resume"], settings.values["iterations"]
    saved, present = set(snapshot.config["reward"]), set(settings.values["reward"])
    if saved != present:
        raise CheckpointError(
            f"resume={resume}: the checkpoint was made with reward=[{','.join(sorted(saved))}], this run has "
            f"[{','.join(sorted(present))}]; choose the same, or start a new run"
        )
    free = FREE_ON_RESUME + _serving(saved) + _same_inputs(settings, snapshot)
    if (snapshot.config.get("prompt_cache") is None) == (settings.values["prompt_cache"] is None):
        free += ("prompt_cache",)  # any folder holds the same; without one prompts are encoded in batches
    if settings.values["lr_schedule"]["anneal_iterations"]:
        free = tuple(key for key in free if key != "iterations")  # the fall of the rate is counted from the end
    checkpoint.check_compatible(snapshot.config, settings.values, free=free)
    processes = len(snapshot.per_rank)
    if processes != engine.world_size and settings.values["curriculum"].get("per_rank", False):
        raise CheckpointError(
            f"resume={resume}: the checkpoint was made by {processes} processes, this run has {engine.world_size}; "
            "with curriculum.per_rank=true each has a level of its own, so launch as many"
        )
    if processes != engine.world_size or snapshot.config["engine"] != settings.values["engine"]:
        _log.info(
            "the checkpoint was made by %d processes with %s, this run has %d with %s: it goes on with the same "
            "weights and optimizer state, equal to an uninterrupted run up to rounding",
            *(processes, _engine_name(snapshot.config), engine.world_size, _engine_name(settings.values)),
        )
    if snapshot.iteration > iterations:
        raise ConfigError(f"resume={resume} is already at iteration {snapshot.iteration}, beyond {iterations=}")


def check_same_model(settings: Settings, snapshot: Snapshot) -> None:
    """Refuse to score a checkpoint under another model, choice or average of weights, reward or scale than its own.

    Rewards with role=evaluation may come and go: they change no other score.

    Raises:
        CheckpointError: names the differing keys.
    """
    saved, present = (
        {name: values[name] for name in ("model", "trainable", "weight_average")}  # what was evaluated and exported
        | {"reward": {name: own for name, own in values["reward"].items() if own["role"] == "train"}}
        | {"scoring": {"scale": values["scoring"]["scale"]}}
        for values in (snapshot.config, settings.values)
    )
    # The prompts are free here: scoring others is what the command is for.
    free = _same_inputs(settings, snapshot, keys=("model.path",)) + _serving(saved["reward"])
    checkpoint.check_compatible(saved, present, free=free)


def with_weights_of(settings: Settings, snapshot: Snapshot, *, key: str) -> Settings:
    """The same settings for the network of another run: its choice of trained weights, on the model it started from.

    Args:
        key: the configuration key that names the run, for messages.

    Raises:
        CheckpointError: the model draws differently, or what the run started from is not there any more.
    """
    own = {name: snapshot.config[name] for name in ("trainable", "weight_average")}
    saved, present = ({"model": values["model"]} for values in (snapshot.config, settings.values))
    try:
        checkpoint.check_compatible(saved, present, free=("model.path",))
    except CheckpointError as error:
        raise CheckpointError(f"{key}={settings.values[key]}: {error}") from error
    known, started = snapshot.state["inputs"].get("model.path"), snapshot.config["model"]["path"]
    if known is not None:  # a local folder, which may have moved
        paths = [path for path in (settings.values["model"]["path"], started) if Path(path).expanduser().exists()]
        same = [path for path in paths if fingerprint(Path(path).expanduser()) == known]
        if not same:
            raise CheckpointError(
                f"{key}={settings.values[key]}: the model that it started from is neither at model.path="
                f"{settings.values['model']['path']} nor at {started}; put it back there"
            )
        started = same[0]
    return replace(settings, values=settings.values | own | {"model": present["model"] | {"path": started}})


def check_same_rewards(settings: Settings, scorer: Scorer, snapshot: Snapshot) -> None:
    """Refuse to go on with scores of another make: weights, preprocessing or library versions of a reward.

    Rewards that only one side has are not compared: see check_continuation() and check_same_model().

    Raises:
        CheckpointError: names the reward, unless scoring.accept_changed_rewards is set.
    """
    saved = snapshot.state["rewards"]
    for name, present in scorer.fingerprints.items():
        if name not in saved or saved[name] == present:
            continue
        change = f"reward {name} is not the one that the checkpoint was made with: {present} now, {saved[name]} then"
        if not settings.values["scoring"]["accept_changed_rewards"]:
            raise CheckpointError(
                f"{change}; serve that one again, start a new run, or set scoring.accept_changed_rewards=true"
            )
        _log.warning("%s; accepted by scoring.accept_changed_rewards=true", change)


def choose_run_dir(settings: Settings, engine: Engine, snapshot: Snapshot | None) -> Path:
    """Folder of this run, the same on every rank; a resumed run continues in its own unless hydra.run.dir is given.

    In another folder the records so far are copied, so that its metrics and report show the whole run.

    Raises:
        ConfigError: a new run would write over an old one, or a continued one over its own later part; or nothing
            is left to do.
    """
    run_dir = find_run_dir(settings, engine, snapshot)
    if snapshot is not None:
        _on_main(engine, lambda: _copy_records(checkpoint_of(settings).parent.parent, run_dir))
    return run_dir


def find_run_dir(settings: Settings, engine: Engine, snapshot: Snapshot | None) -> Path:
    """What choose_run_dir() chooses, or its refusal; nothing is written."""
    if snapshot is None:
        return _on_main(engine, lambda: _new_run_dir(settings))
    return _on_main(engine, lambda: _continued_run_dir(settings, snapshot))


def _new_run_dir(settings: Settings) -> Path:
    _refuse_used(settings.run_dir)
    return settings.run_dir


def checkpoint_of(settings: Settings) -> Path:
    """Folder of the checkpoint that `resume` names."""
    # Resolved: the run's folder is two above, and a link such as `latest` has another name than its checkpoint.
    return checkpoint.find(Path(settings.values["resume"]).expanduser().resolve())


def _continued_run_dir(settings: Settings, snapshot: Snapshot) -> Path:
    resume = settings.values["resume"]
    path = checkpoint_of(settings)
    source = path.parent.parent
    if settings.run_dir_given and settings.run_dir.resolve() != source:
        _refuse_used(settings.run_dir)
        return settings.run_dir
    later = checkpoint.later_than(path)
    if later:
        raise ConfigError(
            f"resume={resume}: {source} goes on to {later[-1].name}; resume={source} continues there, "
            "hydra.run.dir=ANOTHER_FOLDER goes on from this one beside it"
        )
    if snapshot.iteration == settings.values["iterations"] and (source / "summary.json").exists():
        raise ConfigError(
            f"resume={resume} is finished at iteration {snapshot.iteration}; set iterations above it to go on"
        )
    return source


def _refuse_used(run_dir: Path) -> None:
    if (run_dir / "metrics.jsonl").exists() or (run_dir / "checkpoints").exists():
        raise ConfigError(
            f"hydra.run.dir={run_dir} already holds a run; continue it with resume={run_dir}, or name another folder"
        )


def _copy_records(source: Path, run_dir: Path) -> None:
    if run_dir.resolve() == source:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "prompts.jsonl", "advantages.jsonl", "alerts.jsonl", "evaluations", "images"):
        if (source / name).is_dir():
            shutil.copytree(source / name, run_dir / name, dirs_exist_ok=True)
        elif (source / name).is_file():
            shutil.copy2(source / name, run_dir / name)


def _serving(names: Iterable[str]) -> tuple[str, ...]:
    """Keys of rewards that are free: what is answered, settings included, is guarded by the fingerprint."""
    return tuple(f"reward.{name}.{key}" for name in names for key in (*SERVING, "settings"))


def _engine_name(values: dict[str, Any]) -> str:
    """The engine section of a configuration in words."""
    section = values["engine"]
    return " ".join(f"{key}={value}" for key, value in section.items() if key != "_target_")


def _on_main(engine: Engine, function: Callable[[], T]) -> T:
    """What a function returns on the main rank, on every rank; its error likewise."""
    return engine.broadcast(engine.together(lambda: function() if engine.is_main else None))  # pyright: ignore


def _same_inputs(settings: Settings, snapshot: Snapshot, keys: tuple[str, ...] = INPUTS) -> tuple[str, ...]:
    """Keys of `INPUTS` whose files hold what they held.

    Raises:
        CheckpointError: a file or folder of the same name holds something else now.
    """
    saved, present = snapshot.state["inputs"], inputs_of(settings)
    for key in keys:
        if key in saved and key not in present:
            raise CheckpointError(
                f"{key}={_value(settings, key)}: no such file or folder; the checkpoint was made with a local one"
            )
        if saved.get(key) != present.get(key):
            raise CheckpointError(
                f"{key}={_value(settings, key)}: its content is not what the checkpoint was made with; put it back, "
                "or start a new run"
            )
    return tuple(key for key in keys if key in saved)


def _value(settings: Settings, key: str) -> Any:
    section, name = key.split(".")
    return settings.values[section][name]
