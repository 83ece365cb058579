"""Configuration -> parts -> Trainer, with the checks that need more than one part."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from adagrpo_train.algorithms.visits import Visits
from adagrpo_train.continuation import check_same_rewards, checkpoint_of, inputs_of
from adagrpo_train.errors import AdaGRPOError, ConfigError
from adagrpo_train.evaluator import Evaluator
from adagrpo_train.functional.schedules import warmup_constant_anneal
from adagrpo_train.health.monitor import Health
from adagrpo_train.interfaces import Advantage, Curriculum, Objective, PromptSource, Tracker
from adagrpo_train.prompts.source import PromptFile, read_prompts
from adagrpo_train.recording.recorder import Recorder
from adagrpo_train.rollout.sampler import FlowSampler
from adagrpo_train.runtime.checkpoint import Checkpoints, Snapshot
from adagrpo_train.runtime.engine import Engine
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
from adagrpo_train.update import PolicyUpdate


@dataclass(frozen=True)
class Scoring:
    """The rewards of a run: several networks may be scored by the same."""

    rewards: Rewards
    scorer: Scorer
    stop: StopRequest


@dataclass(frozen=True)
class Parts:
    """What training and evaluation share."""

    model: Any
    policy: Policy
    encoder: PromptEncoder
    computation: Computation
    sampler: FlowSampler
    rewards: Rewards
    scorer: Scorer
    evaluator: Evaluator
    optimizer: Optimizer | None  # None when nothing is trained
    stop: StopRequest


@dataclass(frozen=True)
class Choices:
    """Parts of a run that need neither a model nor other processes."""

    curriculum: Curriculum
    advantage: Advantage
    objective: Objective
    schedule: Schedule
    visits: Visits


@dataclass(frozen=True)
class Assembly:
    """A trainer beside what it was made of."""

    trainer: Trainer
    parts: Parts
    prompts: PromptFile
    choices: Choices


def make_engine(settings: Settings) -> Engine:
    """The process group, made first: everything else may depend on rank and device."""
    return make(settings.values["engine"], "engine")


def make_scoring(settings: Settings, engine: Engine, run_dir: Path) -> Scoring:
    """Rewards that are ready, and the scorer that asks them."""
    values = settings.values
    rewards, stop = Rewards(make_entries(values), engine=engine, log_dir=run_dir / "rewards"), StopRequest()
    try:
        scorer = Scorer(
            rewards.sources,
            scale=values["scoring"]["scale"],
            level=values["scoring"]["level"],
            alpha=values["curriculum"]["alpha"],
            engine=engine,
            stop=stop,
        )
    except BaseException:
        rewards.close()
        raise
    return Scoring(rewards, scorer, stop)


def make_parts(
    settings: Settings, engine: Engine, run_dir: Path, *, training: bool, scoring: Scoring | None = None
) -> Parts:
    """Model, policy, sampler, rewards, scorer and evaluator; for training the optimizer too.

    Args:
        training: else every prompt of the file is evaluated, evaluation.samples times, and each rank keeps the
            images that it draws.
        scoring: rewards that are ready already.
    """
    values = settings.values
    make_entries(values)  # like prompt files, before the model is loaded
    # Prompt files are read before the model is loaded: a wrong path should not cost a minute.
    heldout = read_prompts(Path(values["prompts"]["evaluation_path"]), key="prompts.evaluation_path")
    model = make(values["model"], "model", device=engine.device)
    sampler = make_sampler(settings, model, engine.device)
    trainable = make(values["trainable"], "trainable")
    trainable.attach(model, seed=values["seed"], reference=values["algorithm"]["objective"]["kl_weight"] > 0)
    computation = Computation(model, engine.device, **values["network"])
    encoder = PromptEncoder(model, folder=values["prompt_cache"], engine=engine)
    trained = [parameter for parameter in model.transformer.parameters() if parameter.requires_grad]
    optimizer = make(values["optimizer"], "optimizer", params=trained) if training else None
    policy = Policy(
        model=model,
        trainable=trainable,
        encoder=encoder,
        optimizer=optimizer,
        average=values["weight_average"],
        engine=engine,
    )
    scoring = scoring or make_scoring(settings, engine, run_dir)
    evaluation = values["evaluation"]
    try:
        evaluator = Evaluator(
            prompts=heldout,
            images=evaluation["images"],
            samples=0 if training else evaluation["samples"],
            grid_images=evaluation["grid_images"] if training else None,
            batch=values["micro_batch"],
            seed=evaluation["seed"],
            latent_shape=model.latent_shape,
            sampler=sampler,
            scorer=scoring.scorer,
            engine=engine,
        )
    except BaseException:
        scoring.rewards.close()
        raise
    rewards, scorer, stop = scoring.rewards, scoring.scorer, scoring.stop
    return Parts(model, policy, encoder, computation, sampler, rewards, scorer, evaluator, optimizer, stop)


def make_sampler(settings: Settings, model: Any, device: torch.device) -> FlowSampler:
    """The sampler of a flow model."""
    values = settings.values
    return FlowSampler(
        transition=make(values["algorithm"]["transition"], "algorithm.transition"),
        plan=make(values["plan"], "plan"),
        sigmas=model.sigmas,
        latent_shape=model.latent_shape,
        latent_dtype=model.dtype,
        group_size=values["group_size"],
        micro_batch=values["micro_batch"],
        seed=values["seed"],
        device=device,
    )


def make_trainer(settings: Settings, engine: Engine, run_dir: Path, snapshot: Snapshot | None) -> tuple[Trainer, Parts]:
    """The trainer of a new run, or of one that continues from a snapshot, ready to train."""
    run = assemble(settings, engine, run_dir)
    trainer, parts = run.trainer, run.parts
    try:
        if snapshot:
            check_same_rewards(settings, parts.scorer, snapshot)
            trainer.restore(snapshot)
        done = snapshot.iteration if snapshot else 0
        drawn = _upcoming(run.prompts, run.choices.curriculum.candidates, settings.values["iterations"] - done)
        prepare(settings, engine, parts, chain(parts.evaluator.texts, drawn))
    except BaseException:
        parts.rewards.close()
        raise
    return trainer, parts


def assemble(settings: Settings, engine: Engine, run_dir: Path) -> Assembly:
    """All parts of a run, checked against each other; no prompt is encoded yet and nothing written.

    Raises:
        AdaGRPOError: names the first mistake; what had been started for the run has ended.
    """
    values = settings.values
    if values["health"]["stop"] and not values["evaluation"]["every"]:
        raise ConfigError("health.stop=true: an alarm needs evaluations during training; set evaluation.every > 0")
    prompts = PromptFile(path=values["prompts"]["path"], seed=values["seed"])
    choices = make_choices(values)
    if choices.curriculum.candidates > len(prompts):
        raise ConfigError(
            f"curriculum.candidates={choices.curriculum.candidates}: prompts.path holds only {len(prompts)} prompts"
        )
    parts = make_parts(settings, engine, run_dir, training=True)
    assert parts.optimizer is not None
    inputs = inputs_of(settings)
    try:
        trainer = Trainer(
            prompts=prompts,
            curriculum=choices.curriculum,
            advantage=choices.advantage,
            schedule=choices.schedule,
            sampler=parts.sampler,
            scorer=parts.scorer,
            policy=parts.policy,
            update=PolicyUpdate(
                policy=parts.policy,
                optimizer=parts.optimizer,
                rates=_rates(parts.optimizer, values),
                engine=engine,
                objective=choices.objective,
                visits=choices.visits,
                sigma_max=parts.sampler.sigma_max,
                max_grad_norm=values["max_grad_norm"],
            ),
            recorder=_recorder(values, engine, run_dir, parts.scorer, inputs),
            evaluator=parts.evaluator,
            checkpoints=Checkpoints(run_dir / "checkpoints", keep=values["checkpoint"]["keep"]),
            health=Health(**values["health"], heldout=parts.scorer.heldout),
            engine=engine,
            stop=parts.stop,
            run_dir=run_dir,
            config=values,
            inputs=inputs,
        )
    except BaseException:
        parts.rewards.close()
        raise
    return Assembly(trainer, parts, prompts, choices)


def prepare(settings: Settings, engine: Engine, parts: Parts, texts: Iterable[str]) -> None:
    """What comes before the first call of the network: embeddings, and what is kept for the backward pass."""
    parts.encoder.prepare(texts)
    parts.computation.prepare_training(
        lambda: parts.policy.encode([parts.evaluator.texts[0]]),
        settings.values["update_micro_batch"],
        lambda said: any(engine.gather_objects(said)),
        divided=engine.divides_weights,
    )


def make_choices(values: dict[str, Any]) -> Choices:
    """The choices of a resolved configuration, without a past. Mistakes in them are found before a model is loaded."""
    return Choices(
        curriculum=make(values["curriculum"], "curriculum"),
        advantage=make(values["advantage"], "advantage"),
        objective=make(values["algorithm"]["objective"], "algorithm.objective"),
        schedule=Schedule(
            iterations=values["iterations"],
            inner_epochs=values["inner_epochs"],
            updates_per_iteration=values["updates_per_iteration"],
            max_grad_norm=values["max_grad_norm"],
            evaluate_every=values["evaluation"]["every"],
            save_every=values["checkpoint"]["every"],
            max_skipped=values["scoring"]["max_skipped"],
        ),
        visits=Visits(
            inner_epochs=values["inner_epochs"],
            updates=values["updates_per_iteration"],
            states=values["update_micro_batch"],
            rollout_states=values["micro_batch"],
            same_program=not values["network"]["compile"],
            seed=values["seed"],
        ),
    )


def _recorder(
    values: dict[str, Any], engine: Engine, run_dir: Path, scorer: Scorer, inputs: dict[str, str]
) -> Recorder:
    fingerprints = scorer.fingerprints
    rewards = {
        name: {"fingerprint": fingerprints[name], "metrics": list(metrics)} for name, metrics in scorer.metrics.items()
    }
    about = {"config": values, "inputs": inputs, "rewards": rewards}
    return Recorder(folder=run_dir / "record", engine=engine, about=about, **values["record"])


def make_tracker(settings: Settings, run_dir: Path, snapshot: Snapshot | None) -> Tracker:
    """The local record and the console, and whatever `tracker` adds; for the main rank only."""
    from adagrpo_train.tracking.composite import CompositeTracker
    from adagrpo_train.tracking.console import ConsoleTracker
    from adagrpo_train.tracking.jsonl import JsonlTracker

    configured = settings.values["tracker"] or {}
    trackers: list[Tracker] = [JsonlTracker(), ConsoleTracker()]
    trackers += [make(section, f"tracker.{name}") for name, section in configured.items()]
    tracker = CompositeTracker(trackers)
    tracker.start(
        RunInfo(
            run_dir=run_dir,
            name=settings.values["name"] or _default_name(settings),
            config=settings.values,
            choices=settings.choices,
            total_iterations=settings.values["iterations"],
            first_iteration=snapshot.iteration if snapshot else 0,
            tracker_state=snapshot.state["tracker"] if snapshot else {},
            beside=snapshot is not None and run_dir.resolve() != checkpoint_of(settings).parent.parent,
        )
    )
    return tracker


def make_entries(values: dict[str, Any]) -> list[RewardEntry]:
    """What a resolved configuration says of each reward."""
    return [make_entry(name, section) for name, section in values["reward"].items()]


def make_entry(name: str, section: dict[str, Any]) -> RewardEntry:
    if "_target_" not in section:
        raise ConfigError(f"reward.{name}: has settings but is not chosen; add {name} to reward=[...]")
    return make(section, f"reward.{name}", name=name)


def _default_name(settings: Settings) -> str:
    names: Sequence[str] = ("model", "algorithm", "curriculum", "advantage", "trainable")
    return "-".join([*(settings.choices[name] for name in names), f"seed{settings.values['seed']}"])


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


def make(section: dict[str, Any], key: str, **arguments: Any) -> Any:
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
