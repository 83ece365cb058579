"""Configuration -> parts -> Trainer, with the checks that need more than one part."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from adagrpo_train.algorithms.visits import Visits
from adagrpo_train.errors import AdaGRPOError, CheckpointError, ConfigError
from adagrpo_train.evaluator import Evaluator
from adagrpo_train.functional.schedules import warmup_constant_anneal
from adagrpo_train.interfaces import PromptSource, Tracker
from adagrpo_train.prompts.source import PromptFile, read_prompts
from adagrpo_train.rollout.sampler import FlowSampler
from adagrpo_train.runtime import checkpoint
from adagrpo_train.runtime.checkpoint import Checkpoints, Snapshot
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.files import fingerprint
from adagrpo_train.runtime.network import Computation
from adagrpo_train.runtime.policy import Policy
from adagrpo_train.runtime.prompt_cache import PromptEncoder
from adagrpo_train.runtime.stopping import StopRequest
from adagrpo_train.scoring.connect import Rewards
from adagrpo_train.scoring.entry import RewardEntry
from adagrpo_train.scoring.scorer import Scorer
from adagrpo_train.settings import Settings
from adagrpo_train.trainer import Schedule, Trainer
from adagrpo_train.types import RunInfo

T = TypeVar("T")
_log = logging.getLogger(__name__)

FREE_ON_RESUME = (
    "iterations",
    "resume",
    "tracker",
    "evaluation.every",
    "checkpoint",
    "name",
    "engine",
    "scoring.accept_changed_rewards",
    "network.gradient_checkpointing",
)
"""Keys that may differ between a checkpoint and the run that continues from it: they do not change the result."""

SERVING = (
    "mode",
    "device",
    "devices",
    "python",
    "urls",
    "token_file",
    "settings",
    "on_unavailable",
    "wait_seconds",
    "deadline_seconds",
    "startup_seconds",
    "hedge_seconds",
)
"""Keys of a reward that say where and how it is asked. What it answers is guarded by its fingerprint."""

INPUTS = ("model.path", "prompts.path", "prompts.evaluation_path")
"""Keys that name files: a run continues from any place that holds the same contents."""


@dataclass(frozen=True)
class Parts:
    """What training and evaluation share."""

    policy: Policy
    encoder: PromptEncoder
    computation: Computation
    sampler: FlowSampler
    rewards: Rewards
    scorer: Scorer
    evaluator: Evaluator
    optimizer: Optimizer | None  # None when nothing is trained
    stop: StopRequest


def make_engine(settings: Settings) -> Engine:
    """The process group, made first: everything else may depend on rank and device."""
    return _make(settings.values["engine"], "engine")


def make_parts(settings: Settings, engine: Engine, run_dir: Path, *, training: bool) -> Parts:
    """Model, policy, sampler, rewards, scorer and evaluator; for training the optimizer too."""
    values = settings.values
    entries = [_entry(name, section) for name, section in values["reward"].items()]
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
    computation = Computation(model, engine.device, **values["network"])
    encoder = PromptEncoder(model, folder=values["prompt_cache"], engine=engine)
    trained = [parameter for parameter in model.transformer.parameters() if parameter.requires_grad]
    optimizer = _make(values["optimizer"], "optimizer", params=trained) if training else None
    policy = Policy(
        model=model,
        trainable=trainable,
        encoder=encoder,
        optimizer=optimizer,
        average=values["weight_average"],
        engine=engine,
    )
    rewards, stop = Rewards(entries, engine=engine, log_dir=run_dir / "rewards"), StopRequest()
    scorer = Scorer(
        rewards.sources,
        scale=values["scoring"]["scale"],
        level=values["scoring"]["level"],
        alpha=values["curriculum"]["alpha"],
        engine=engine,
        stop=stop,
    )
    evaluation = values["evaluation"]
    evaluator = Evaluator(
        prompts=heldout,
        images=evaluation["images"],
        grid_images=evaluation["grid_images"],
        batch=values["micro_batch"],
        seed=evaluation["seed"],
        latent_shape=model.latent_shape,
        sampler=sampler,
        scorer=scorer,
        engine=engine,
    )
    return Parts(policy, encoder, computation, sampler, rewards, scorer, evaluator, optimizer, stop)


def make_trainer(settings: Settings, engine: Engine, run_dir: Path, snapshot: Snapshot | None) -> tuple[Trainer, Parts]:
    """The trainer of a new run, or of one that continues from a snapshot."""
    values = settings.values
    prompts = PromptFile(path=values["prompts"]["path"], seed=values["seed"])
    curriculum = _make(values["curriculum"], "curriculum")
    if curriculum.candidates > len(prompts):
        raise ConfigError(
            f"curriculum.candidates={curriculum.candidates}: prompts.path holds only {len(prompts)} prompts"
        )
    choices = _choices(values)
    parts = make_parts(settings, engine, run_dir, training=True)
    assert parts.optimizer is not None
    try:
        trainer = Trainer(
            prompts=prompts,
            curriculum=curriculum,
            sampler=parts.sampler,
            scorer=parts.scorer,
            policy=parts.policy,
            optimizer=parts.optimizer,
            rates=_rates(parts.optimizer, values),
            evaluator=parts.evaluator,
            checkpoints=Checkpoints(run_dir / "checkpoints", keep=values["checkpoint"]["keep"]),
            engine=engine,
            stop=parts.stop,
            run_dir=run_dir,
            config=values,
            inputs=inputs_of(settings),
            **choices,
        )
        if snapshot:
            check_same_rewards(settings, parts.scorer, snapshot)
            trainer.restore(snapshot)
        done = snapshot.iteration if snapshot else 0
        drawn = _upcoming(prompts, curriculum.candidates, values["iterations"] - done)
        parts.encoder.prepare(chain(parts.evaluator.texts, drawn))
        parts.computation.prepare_training(
            lambda: parts.policy.encode([parts.evaluator.texts[0]]),
            values["update_micro_batch"],
            lambda said: any(engine.gather_objects(said)),
        )
    except BaseException:
        parts.rewards.close()
        raise
    return trainer, parts


def _choices(values: dict[str, Any]) -> dict[str, Any]:
    """Parts of a trainer that need no model: mistakes in them are found before one is loaded."""
    return {
        "advantage": _make(values["advantage"], "advantage"),
        "objective": _make(values["algorithm"]["objective"], "algorithm.objective"),
        "schedule": Schedule(
            iterations=values["iterations"],
            inner_epochs=values["inner_epochs"],
            updates_per_iteration=values["updates_per_iteration"],
            max_grad_norm=values["max_grad_norm"],
            evaluate_every=values["evaluation"]["every"],
            save_every=values["checkpoint"]["every"],
            max_skipped=values["scoring"]["max_skipped"],
        ),
        "visits": Visits(
            inner_epochs=values["inner_epochs"],
            updates=values["updates_per_iteration"],
            states=values["update_micro_batch"],
            rollout_states=values["micro_batch"],
            same_program=not values["network"]["compile"],
            seed=values["seed"],
        ),
    }


def open_snapshot(settings: Settings, engine: Engine) -> Snapshot | None:
    """The checkpoint that `resume` names; None without it. Every rank reads the one that the main rank found."""
    resume = settings.values["resume"]
    if resume is None:
        return None
    path = _on_main(engine, lambda: _checkpoint(settings))
    _log.info("reading %s", path)
    return checkpoint.load(path)


def inputs_of(settings: Settings) -> dict[str, str]:
    """Fingerprints of the files that `INPUTS` name; of a hub id nothing is known."""
    paths = {key: Path(_value(settings, key)).expanduser() for key in INPUTS}
    return {key: fingerprint(path) for key, path in paths.items() if path.exists()}


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
    """Refuse to score a checkpoint under another model, choice of trained weights, reward or scale than its own.

    Rewards with role=evaluation may come and go: they change no other score.

    Raises:
        CheckpointError: names the differing keys.
    """
    saved, present = (
        {name: values[name] for name in ("model", "trainable")}
        | {"reward": {name: own for name, own in values["reward"].items() if own["role"] == "train"}}
        | {"scoring": {"scale": values["scoring"]["scale"]}}
        for values in (snapshot.config, settings.values)
    )
    # The prompts are free here: scoring others is what the command is for.
    free = _same_inputs(settings, snapshot, keys=("model.path",)) + _serving(saved["reward"])
    checkpoint.check_compatible(saved, present, free=free)


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
    if snapshot is None:
        return _on_main(engine, lambda: _new_run_dir(settings))
    return _on_main(engine, lambda: _continued_run_dir(settings, snapshot))


def _new_run_dir(settings: Settings) -> Path:
    _refuse_used(settings.run_dir)
    return settings.run_dir


def _checkpoint(settings: Settings) -> Path:
    # Resolved: the run's folder is two above, and a link such as `latest` has another name than its checkpoint.
    return checkpoint.find(Path(settings.values["resume"]).expanduser().resolve())


def _continued_run_dir(settings: Settings, snapshot: Snapshot) -> Path:
    resume = settings.values["resume"]
    path = _checkpoint(settings)
    source = path.parent.parent
    if settings.run_dir_given and settings.run_dir.resolve() != source:
        _refuse_used(settings.run_dir)
        _copy_records(source, settings.run_dir)
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
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "prompts.jsonl", "evaluations", "images"):
        if (source / name).is_dir():
            shutil.copytree(source / name, run_dir / name, dirs_exist_ok=True)
        elif (source / name).is_file():
            shutil.copy2(source / name, run_dir / name)


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
            beside=snapshot is not None and run_dir.resolve() != _checkpoint(settings).parent.parent,
        )
    )
    return tracker


def _serving(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"reward.{name}.{key}" for name in names for key in SERVING)


def _entry(name: str, section: dict[str, Any]) -> RewardEntry:
    if "_target_" not in section:
        raise ConfigError(f"reward.{name}: has settings but is not chosen; add {name} to reward=[...]")
    return _make(section, f"reward.{name}", name=name)


def _engine_name(values: dict[str, Any]) -> str:
    """The engine section of a configuration in words."""
    section = values["engine"]
    return " ".join(f"{key}={value}" for key, value in section.items() if key != "_target_")


def _default_name(settings: Settings) -> str:
    names: Sequence[str] = ("model", "algorithm", "curriculum", "advantage", "trainable")
    return "-".join([*(settings.choices[name] for name in names), f"seed{settings.values['seed']}"])


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


def _upcoming(prompts: PromptSource, count: int, iterations: int) -> Iterator[str]:
    """Every text that so many iterations will draw; after the last one the source is where it was."""
    state = prompts.state_dict()
    for _ in range(iterations):
        yield from prompts.next(count).texts
    prompts.load_state_dict(state)


def _rates(optimizer: Optimizer, values: dict[str, Any]) -> LambdaLR:
    """The learning rate over optimizer steps."""
    lengths = values["lr_schedule"]
    warmup, anneal, iterations = lengths["warmup_iterations"], lengths["anneal_iterations"], values["iterations"]
    if min(warmup, anneal) < 0 or warmup + anneal >= iterations:
        raise ConfigError(
            f"lr_schedule.warmup_iterations={warmup} and lr_schedule.anneal_iterations={anneal} must be >= 0 and "
            f"together less than {iterations=}"
        )
    updates = values["updates_per_iteration"]
    return LambdaLR(
        optimizer,
        partial(
            warmup_constant_anneal,
            warmup_steps=warmup * updates,
            anneal_steps=anneal * updates,
            total_steps=iterations * updates,
        ),
    )


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
