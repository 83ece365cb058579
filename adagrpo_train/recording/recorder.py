"""Collects what an iteration does while it does it, and writes it when it is done."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adagrpo_train.errors import ConfigError
from adagrpo_train.recording.record import Record, drop_later, order, write_record
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.environment import environment
from adagrpo_train.types import Images, Level, Loss, Prompts, Rollout, Selection, Transitions


@dataclass
class _Draft:
    """What there is to tell of the present iteration so far; tensors of all processes, visits of this one."""

    iteration: int
    before: dict[str, Any]
    prompts: Prompts | None = None
    selection: Selection | None = None
    level: Level | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    latents: dict[str, Tensor] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)
    decoded: list[Images] = field(default_factory=list)
    visits: list[dict[str, Any]] = field(default_factory=list)


class Recorder:
    """Records every Nth iteration of a run; between those, and when it is off, its methods do nothing.

    What is recorded changes no number of the run: tensors are read, never drawn or computed with. Every process calls
    every method, the main one writes.

    Args:
        folder: of the records.
        every: iterations between two records; 0 never records.
        latents: whether to keep the samples' latents.
        images: whether to keep the pixels that the rewards saw, of candidates and samples.
        engine: processes of the run.
        about: what is the same for all iterations: configuration, fingerprints and the like, as JSON.

    Raises:
        ConfigError: every < 0.
    """

    def __init__(
        self, *, folder: Path, every: int, latents: bool, images: bool, engine: Engine, about: dict[str, Any]
    ) -> None:
        if every < 0:
            raise ConfigError(f"record.every={every}: must be >= 0; 0 records nothing")
        self._folder, self._every, self._latents, self._images = folder, every, latents, images
        self._engine, self._about = engine, about
        self._versions: dict[str, str] = {}
        self._draft: _Draft | None = None

    def start(self, iteration: int) -> None:
        """Drop what was recorded after an iteration: the run goes on from there."""
        if self._engine.is_main:
            drop_later(self._folder, iteration)
            if self._every:  # once: it asks git
                self._versions = environment()

    def begin(self, iteration: int, curriculum: dict[str, Any], scoring: dict[str, Any]) -> None:
        """An iteration, counted from 1, begins with these states of its parts."""
        due = self._every > 0 and iteration % self._every == 0
        self._draft = _Draft(iteration, {"curriculum": curriculum, "scoring": scoring}) if due else None

    def decoded(self, images: Images) -> None:
        """Images of this process, of candidates or samples, in their order."""
        if self._draft and self._images:
            self._draft.decoded.append(images)

    def chosen(
        self, candidates: Prompts, total: Tensor | None, parts: Mapping[str, Tensor], selection: Selection
    ) -> None:
        """The candidates of all processes, their scores [B] where they have some, and the choice among them."""
        if self._draft:
            self._draft.prompts, self._draft.selection = candidates, selection
            if total is not None:
                self._draft.tensors |= _scores("candidate", total, parts)
                self._draft.images |= self._taken("candidate")

    def compared(self, total: Tensor, parts: Mapping[str, Tensor], group: Tensor, level: Level | None) -> None:
        """Scores [N] and groups [N] of the samples of all processes, and the level that they are compared with here."""
        if self._draft:
            self._draft.level = level
            self._draft.tensors |= _scores("sample", total, parts) | {"sample.group": group}

    def judged(self, rollout: Rollout, usable: Tensor, local: Tensor, across: Tensor, fused: Tensor) -> None:
        """The samples of this process, and the advantages: `across` [n] of this process, the others [N] of all."""
        draft, engine = self._draft, self._engine
        if draft is None:
            return
        prompts_here = int(rollout.prompt.max()) + 1
        draft.tensors |= {
            "sample.prompt": engine.gather(rollout.prompt + engine.rank * prompts_here),
            "sample.usable": usable,
            "sample.local": local,
            "sample.across": engine.gather(across),
            "sample.fused": fused,
        }
        draft.images |= self._taken("sample")
        if self._latents:
            draft.latents = {"sample.x0": engine.gather(rollout.x0)}
        first = engine.rank * len(rollout.x0)
        draft.tensors |= _sorted(_united(engine.gather_objects([_drawn(own, first) for own in rollout.transitions])))

    def visited(self, update: int, batch: Transitions, loss: Loss, weight: float) -> None:
        """One network batch of an optimizer step, from 0: the transitions that counted, what they cost and weighed.

        Nothing is brought to the host yet, which would wait for the device in the middle of the update.
        """
        if self._draft:
            terms = loss.terms
            seen = {"sample": batch.sample, "sigma": batch.sigma, "state": batch.state, "kl": terms.kl}
            seen |= {"log_prob": terms.log_prob, "old_log_prob": terms.old_log_prob, "loss": loss.value.detach()}
            figures = {name: value for name, value in loss.metrics.items() if name != "policy/loss"}
            self._draft.visits.append(seen | {"update": update, "weight": weight, "figures": figures})

    def finish(self, metrics: dict[str, float], curriculum: dict[str, Any]) -> None:
        """The iteration is done; one that was skipped leaves no record.

        Args:
            metrics: its row of the log.
            curriculum: its state after the iteration.
        """
        draft, self._draft, engine = self._draft, None, self._engine
        if draft is None or "sample.fused" not in draft.tensors:
            return
        assert draft.prompts is not None and draft.selection is not None
        own = len(draft.tensors["sample.fused"]) // engine.world_size * engine.rank
        ranks = engine.gather_objects(
            {
                "before": draft.before["curriculum"],
                "after": curriculum,
                "level": _level(draft.level),
                "visits": [_on_host(visit, own) for visit in draft.visits],
            }
        )
        if not engine.is_main:
            return
        visits = [{**visit, "rank": rank} for rank, told in enumerate(ranks) for visit in told["visits"]]
        head = {
            "iteration": draft.iteration,
            "processes": engine.world_size,
            "curriculum": {key: [told[key] for told in ranks] for key in ("before", "after")},
            "scoring": {"before": draft.before["scoring"]},
            "selection": {"rows": list(draft.selection.rows), "level": _level(draft.selection.level)},
            "levels": [told["level"] for told in ranks],
            "metrics": metrics,
            **self._about,
            "versions": self._versions,
        }
        record = Record(head, draft.prompts, draft.tensors | _visits(visits, draft.tensors))
        pictures = {"latents.safetensors": draft.latents, "images.safetensors": draft.images}
        write_record(self._folder, record, pictures)

    def _taken(self, owner: str) -> dict[str, Tensor]:
        """The images since the last call, of all processes."""
        assert self._draft is not None
        images, self._draft.decoded = self._draft.decoded, []
        if not images:
            return {}
        own = torch.cat([torch.from_numpy(piece) for piece in images])
        return {f"{owner}.image": self._engine.gather(own)}


def _scores(owner: str, total: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{owner}.total": total} | {f"{owner}.part.{name}": values for name, values in parts.items()}


def _level(level: Level | None) -> dict[str, float] | None:
    return None if level is None else {"mean": level.mean, "std": level.std}


def _drawn(batch: Transitions, first: int) -> dict[str, Tensor]:
    """The transitions of a rollout; `first` is the number of this process's first sample."""
    sigma, sigma_next = (values.cpu()[batch.state] for values in (batch.sigma, batch.sigma_next))
    drawn = {"sample": batch.sample + first, "sigma": sigma, "sigma_next": sigma_next}
    return drawn | {"rollout_log_prob": batch.rollout_log_prob.cpu()}


def _united(ranks: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    batches = [batch for rank in ranks for batch in rank]
    return {f"transition.{name}": torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _sorted(transitions: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = order(transitions["transition.sample"], transitions["transition.sigma"])
    return {name: values[rows] for name, values in transitions.items()}


def _on_host(visit: dict[str, Any], first: int) -> dict[str, Any]:
    """A visit as the other processes understand it: samples are counted over all of them."""
    plain = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in visit.items()}
    state, figures = plain.pop("state"), {name: value.cpu() for name, value in visit["figures"].items()}
    return plain | {"sample": plain["sample"] + first, "sigma": plain["sigma"][state], "figures": figures}


def _visits(visits: list[dict[str, Any]], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batches of all optimizer steps, step by step, as columns."""
    visits = sorted(visits, key=lambda visit: (visit["update"], visit["rank"]))
    sample, sigma = tensors["transition.sample"].tolist(), tensors["transition.sigma"].tolist()
    row = {key: number for number, key in enumerate(zip(sample, sigma, strict=True))}
    rows = [[row[key] for key in zip(v["sample"].tolist(), v["sigma"].tolist(), strict=True)] for v in visits]
    columns = {
        "visit.transition": torch.tensor([each for own in rows for each in own], dtype=torch.int64),
        "visit.batch": torch.tensor([n for n, own in enumerate(rows) for _ in own], dtype=torch.int64),
        "batch.update": torch.tensor([visit["update"] for visit in visits], dtype=torch.int64),
        "batch.rank": torch.tensor([visit["rank"] for visit in visits], dtype=torch.int64),
        "batch.weight": torch.tensor([visit["weight"] for visit in visits], dtype=torch.float64),
        "batch.loss": torch.stack([visit["loss"] for visit in visits]),
    }
    for name in visits[0]["figures"]:
        columns[f"batch.figure.{name}"] = torch.stack([visit["figures"][name] for visit in visits])
    for name in ("log_prob", "old_log_prob", "kl"):
        if visits[0][name] is not None:
            columns[f"visit.{name}"] = torch.cat([visit[name] for visit in visits])
    return columns
