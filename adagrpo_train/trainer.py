"""The training loop, top-down: prompts -> curriculum -> rollout -> rewards -> advantages -> update."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adagrpo_train.errors import ConfigError, RewardError, StoppedError
from adagrpo_train.evaluator import Evaluator, read_scores
from adagrpo_train.health.best import Best
from adagrpo_train.health.diversity import Diversity
from adagrpo_train.health.figures import level_gap
from adagrpo_train.health.monitor import Health, Verdict
from adagrpo_train.interfaces import Advantage, Curriculum, PromptSource, Tracker
from adagrpo_train.recording.recorder import Recorder
from adagrpo_train.rollout.sampler import FlowSampler
from adagrpo_train.runtime.checkpoint import Checkpoints, Snapshot, random_state, restore_random_state
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.policy import Policy
from adagrpo_train.runtime.stopping import StopRequest
from adagrpo_train.runtime.timing import StageTimer, peak_memory_bytes
from adagrpo_train.scoring.collector import Collector
from adagrpo_train.scoring.comparison import compare
from adagrpo_train.scoring.figures import sample_figures
from adagrpo_train.scoring.scorer import Scorer
from adagrpo_train.types import (
    Conditions,
    Images,
    JudgedSamples,
    Prompts,
    Rollout,
    Scores,
    SelectedPrompt,
    Selection,
    Trunks,
)
from adagrpo_train.update import PolicyUpdate

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long to train, how often to update, evaluate and save. Counts are over all ranks unless they say so.

    Attributes:
        iterations: of the whole run; a resumed run ends there too.
        inner_epochs: passes over the transitions of one iteration.
        updates_per_iteration: optimizer steps per iteration, spread evenly over the inner epochs.
        max_grad_norm: gradients are scaled down to this norm.
        evaluate_every: iterations between evaluations; 0 evaluates before and after training only.
        save_every: iterations between checkpoints; 0 saves at the end only.
        max_skipped: iterations in a row that may be skipped for want of scores.
    """

    iterations: int
    inner_epochs: int
    updates_per_iteration: int
    max_grad_norm: float
    evaluate_every: int
    save_every: int
    max_skipped: int

    def __post_init__(self) -> None:
        for name in ("iterations", "inner_epochs", "updates_per_iteration"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be >= 1")
        for key, count in (
            ("evaluation.every", self.evaluate_every),
            ("checkpoint.every", self.save_every),
            ("scoring.max_skipped", self.max_skipped),
        ):
            if count < 0:
                raise ConfigError(f"{key}={count}: must be >= 0")
        if not self.max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm={self.max_grad_norm}: must be > 0")
        if self.updates_per_iteration % self.inner_epochs:
            raise ConfigError(
                f"updates_per_iteration={self.updates_per_iteration} must be a multiple of "
                f"inner_epochs={self.inner_epochs}: every epoch makes the same number of optimizer steps"
            )


@dataclass(frozen=True)
class _Choice:
    """The prompts of an iteration."""

    selection: Selection  # rows of the candidates of all ranks
    figures: dict[str, float]  # for the log
    rewards: Tensor | None  # [B] of the candidates of all ranks; None when the curriculum does not score them
    parts: dict[str, Tensor]  # each [B]: what those rewards are made of
    prompts: Prompts  # this rank's share of the chosen ones
    trunks: Trunks | None  # of those prompts; branches start from them


class Trainer:
    """Runs the loop; every choice of method sits in the parts it is given."""

    def __init__(
        self,
        *,
        prompts: PromptSource,
        curriculum: Curriculum,
        sampler: FlowSampler,
        scorer: Scorer,
        advantage: Advantage,
        policy: Policy,
        update: PolicyUpdate,
        recorder: Recorder,
        evaluator: Evaluator,
        checkpoints: Checkpoints,
        health: Health,
        engine: Engine,
        stop: StopRequest,
        schedule: Schedule,
        run_dir: Path,
        config: dict[str, Any],
        inputs: dict[str, str],
    ) -> None:
        self._prompts, self._curriculum, self._sampler, self._scorer = prompts, curriculum, sampler, scorer
        self._advantage, self._policy, self._update = advantage, policy, update
        self._recorder, self._evaluator, self._checkpoints = recorder, evaluator, checkpoints
        self._engine, self._stop, self._schedule, self._run_dir = engine, stop, schedule, run_dir
        self._config, self._inputs = config, inputs
        self._first, self._skipped = 0, 0
        self._timer = StageTimer()
        self._tracker: Tracker | None = None
        self._health = health
        update.check_batches(batches_of_each(curriculum, sampler, engine.world_size))

    def train(self, tracker: Tracker | None) -> str:
        """Run until the last iteration, or until asked to stop.

        Args:
            tracker: writes what happens; None on every rank but the main one.

        Returns:
            "completed", "interrupted", or "stopped" by an alarm.
        """
        self._tracker = tracker
        self._recorder.start(self._first)
        if tracker and self._health.blind:
            _log.info("%s", self._health.blind)
        with self._stop.listening():
            try:
                return self._loop()
            except StoppedError as stopped:
                _log.info("%s", stopped)
                return "interrupted"

    @property
    def best(self) -> Best | None:
        """The best evaluation after training began; `checkpoints/best` names its checkpoint."""
        return self._health.best

    def _loop(self) -> str:
        if outcome := self._begin():
            return outcome
        for iteration in range(self._first, self._schedule.iterations):
            metrics = self._train_or_save(iteration)
            self._health.trained(metrics)
            done = iteration + 1
            if self._tracker:
                self._tracker.log(metrics, done)
            last, verdict = done == self._schedule.iterations, Verdict()
            stopping = self._asked() and not last
            # Whoever asks to stop does not wait for an evaluation: the resumed run makes it.
            if self._evaluation_due(done) and not stopping:
                verdict = self._evaluate_or_save(done)
                stopping = (self._asked() or verdict.stop) and not last
            if stopping or last or verdict.improved or _due(done, self._schedule.save_every):
                self._save(done)
            if stopping:
                return "stopped" if verdict.stop else "interrupted"
        return "completed"

    def _begin(self) -> str:
        """Make the evaluation that is due before the next iteration; how the run ends, if it does so here."""
        first = self._first
        if first > 0:
            self._settle_best()
        recorded = first > 0 and self._evaluated(first)
        if not self._evaluation_due(first) or (recorded and self._health.last == first):
            return ""
        # A kill between the record of an evaluation and the next checkpoint leaves scores that the checkpoint lacks.
        verdict = self._judge_recorded(first) if recorded else self._evaluate_or_save(first)
        if verdict.improved or verdict.stop:
            self._save(first)
        if verdict.stop and first < self._schedule.iterations:
            return "stopped"
        return "interrupted" if self._asked() else ""

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a checkpoint as if the run had never stopped."""
        self._policy.load_state_dict(snapshot.tensors)
        self._update.load_state_dict(snapshot.state, snapshot.optimizer)
        # With more processes than there were: their states differ only under per_rank, which then is refused.
        per_rank = snapshot.per_rank[min(self._engine.rank, len(snapshot.per_rank) - 1)]
        self._restore_drawn_state(snapshot.state | per_rank)
        if "health" in snapshot.state:
            self._health.load_state_dict(snapshot.state["health"])
        else:
            _log.warning("the checkpoint is older than the record of health: held-out scores are compared from here on")
        self._first = snapshot.iteration
        if self._health.stopped and self._first < self._schedule.iterations:
            raise ConfigError(
                f"health.stop=true: {self._health.stopped}, and the alarm is not over; set health.stop=false to go on"
            )

    def _train_or_save(self, iteration: int) -> dict[str, float]:
        """One iteration; if its rewards fail for good, or a stop ends the waiting, the state before it is saved."""
        before = self._drawn_state()
        try:
            return self._train_once(iteration)
        except (RewardError, StoppedError) as error:
            if error.on_every_rank:
                self._restore_drawn_state(before)
                self._save(iteration)
            raise

    def _evaluate_or_save(self, iteration: int) -> Verdict:
        """Evaluate; without its rewards, what is trained so far is saved, and the resumed run evaluates it."""
        try:
            return self._evaluate(iteration)
        except (RewardError, StoppedError) as error:
            if error.on_every_rank and iteration > self._first:
                self._save(iteration)
            raise

    def _train_once(self, iteration: int) -> dict[str, float]:
        """One iteration, with what it cost."""
        evaluated = self._policy.evaluations.copy()
        with self._timer.stage("iteration"):
            metrics = self._iterate(iteration)
        spent = self._policy.evaluations - evaluated
        metrics |= {
            f"nfe/{kind}": float(spent[kind] * self._engine.world_size)
            for kind in ("sampling", "training", "reference")
        }
        metrics |= self._timer.drain() | {"memory/peak_bytes": float(peak_memory_bytes())}
        metrics |= self._scorer.drain()
        self._recorder.finish(metrics, self._curriculum.state_dict())
        return metrics

    def _iterate(self, iteration: int) -> dict[str, float]:
        """One pass of the pipeline. Each line's output is the next line's input."""
        self._recorder.begin(iteration + 1, self._curriculum.state_dict(), self._scorer.state_dict())
        candidates = self._prompts.next(self._curriculum.candidates)
        with self._timer.stage("candidates"):
            choice = self._choose(candidates, iteration)
        if isinstance(choice, str):
            return self._skip(choice)
        self._recorder.chosen(candidates, choice.rewards, choice.parts, choice.selection)
        prompts, trunks = choice.prompts, choice.trunks
        with self._timer.stage("rollout"):
            conditions = self._policy.encode(list(prompts.texts))
            collector, diversity = self._scorer.collect(), Diversity()
            rollout = self._roll_out(prompts, conditions, trunks, collector, diversity, iteration)
        with self._timer.stage("reward"):
            scores = collector.scores()
        if too_many := self._scorer.excess(scores):
            return self._skip(too_many)
        advantages, usable, metrics = self._advantages(scores, rollout, choice, iteration)
        if not metrics:
            return self._skip(f"no group has enough scores to be compared; {scores.reason}")
        with self._timer.stage("update"):
            watch = self._recorder.visited
            metrics |= self._update.make(rollout.transitions, conditions, advantages, usable, iteration, watch)
        self._skipped = 0
        metrics |= level_gap(metrics) | {"rollout/diversity": float(self._engine.gather(diversity.by_group()).mean())}
        return metrics | self._log_choice(candidates, choice, iteration)

    def _choose(self, candidates: Prompts, iteration: int) -> "_Choice | str":
        """Score the candidates if the curriculum asks for it, and take this rank's share of the chosen prompts.

        Returns why there is no choice, if too many scores are missing.
        """
        engine, curriculum = self._engine, self._curriculum
        if not curriculum.scores_candidates:
            selection = curriculum.select(None, curriculum.chosen)
            return _Choice(selection, {}, None, {}, candidates[_share(list(selection.rows), engine)], None)
        own = candidates[_share(list(range(len(candidates))), engine)]
        conditions = self._policy.encode(list(own.texts))
        trunks = self._sampler.trunks(self._policy.velocity, conditions, own, iteration)
        collector = self._scorer.collect()
        collector.add(self._decode(trunks.x0), own.texts)
        with self._timer.stage("reward"):
            scores = collector.scores()
        if too_many := self._scorer.excess(scores) or self._too_few(scores):
            return too_many
        rewards = engine.gather(scores.total)
        parts = {name: engine.gather(values) for name, values in scores.parts.items()}
        figures = self._scorer.follow(parts, rewards.isfinite())
        if curriculum.per_rank:
            selection = curriculum.select(scores.total, curriculum.chosen // engine.world_size)
            rows = list(selection.rows)
            offset = engine.rank * len(own)
            everyone = [row for part in engine.gather_objects([r + offset for r in rows]) for row in part]
            selection = Selection(tuple(everyone), selection.level)
            return _Choice(selection, figures, rewards, parts, own[rows], trunks[rows])
        selection = curriculum.select(rewards, curriculum.chosen)
        rows = _share(list(selection.rows), engine)
        everywhere = Trunks(engine.gather(trunks.x0), engine.gather(trunks.anchors))
        return _Choice(selection, figures, rewards, parts, candidates[rows], everywhere[rows])

    def _too_few(self, scores: Scores) -> str:
        """Why a curriculum cannot choose as many prompts as it should; "" if it can."""
        present = [int(count) for count in self._engine.gather_objects(int(scores.total.isfinite().sum()))]
        world, chosen = self._engine.world_size, self._curriculum.chosen
        enough = min(present) * world >= chosen if self._curriculum.per_rank else sum(present) >= chosen
        return "" if enough else f"only {sum(present)} candidates have a score, for {chosen} prompts; {scores.reason}"

    def _roll_out(
        self,
        prompts: Prompts,
        conditions: Conditions,
        trunks: Trunks | None,
        collector: Collector,
        diversity: Diversity,
        iteration: int,
    ) -> Rollout:
        """Draw the samples and hand them to the rewards, which score them while the next ones are drawn."""

        def finished(x0: Tensor, prompt: Tensor, group: Tensor) -> None:
            images = self._decode(x0)
            collector.add(images, [prompts.texts[row] for row in prompt.tolist()], group.tolist())
            diversity.add(images, group.tolist())

        return self._sampler.roll_out(self._policy.velocity, conditions, prompts, trunks, iteration, finished)

    def _decode(self, x0: Tensor) -> Images:
        with self._timer.stage("decode"):
            images = self._policy.decode(x0)
        self._recorder.decoded(images)
        return images

    def _skip(self, reason: str) -> dict[str, float]:
        """Leave the weights as they are for this iteration.

        Raises:
            RewardError: on every rank, when too many iterations in a row were skipped.
        """
        self._skipped += 1
        _log.warning("iteration skipped: %s", reason)
        if self._skipped > self._schedule.max_skipped:
            error = RewardError(
                f"{self._skipped} iterations in a row lack scores (scoring.max_skipped="
                f"{self._schedule.max_skipped}): {reason}"
            )
            error.on_every_rank = True
            raise error
        return {"reward/skipped": 1.0}

    def _advantages(
        self, scores: Scores, rollout: Rollout, choice: "_Choice", iteration: int
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Advantages [N] of this rank's samples, computed over the samples of all ranks, and which may be used [N].

        Also figures for the log; none if no sample of any rank may be used.
        """
        engine, size = self._engine, self._sampler.group_size
        rewards = engine.gather(scores.total)
        parts = {name: engine.gather(values) for name, values in scores.parts.items()}
        groups_here = int(rollout.group.max()) + 1
        group = engine.gather(rollout.group + engine.rank * groups_here)
        here = slice(engine.rank * len(scores.total), (engine.rank + 1) * len(scores.total))
        told = {"scorer": self._scorer, "curriculum": self._curriculum, "advantage": self._advantage}
        found = compare(rewards, parts, group, here, group_size=size, **told)
        usable, kept = found.usable, found.usable[here]
        if not bool(usable.any()):
            return found.fused, kept, {}
        fused = engine.gather(found.fused)
        self._recorder.compared(rewards, parts, group, found.level)
        self._recorder.judged(rollout, usable, found.local, found.across, fused)
        metrics = sample_figures(rewards, parts, group, usable, found.local, fused, found.level)
        if self._tracker:
            own = (rewards[usable], group[usable], found.local[usable], fused[usable])
            judged = JudgedSamples(*own, level=found.level)
            self._tracker.log_advantages(judged, iteration + 1)
        metrics |= choice.figures or self._scorer.follow(parts, usable)
        return found.fused, kept, metrics

    def _log_choice(self, candidates: Prompts, choice: "_Choice", iteration: int) -> dict[str, float]:
        """Log every candidate with its score; return figures about the choice."""
        nan = float("nan")
        selection, rewards = choice.selection, choice.rewards
        scores = [nan] * len(candidates) if rewards is None else rewards.tolist()
        level = selection.level.mean if selection.level else nan
        chosen = set(selection.rows)
        rows = [
            SelectedPrompt(prompt_id, text, label, score, level, row in chosen)
            for row, (prompt_id, text, label, score) in enumerate(
                zip(candidates.ids, candidates.texts, candidates.classes, scores, strict=True)
            )
        ]
        if self._tracker:
            self._tracker.log_prompts(rows, iteration + 1)
        if rewards is None:
            return {}
        picked = rewards[list(selection.rows)]
        return {
            "curriculum/candidate_mean": float(rewards[rewards.isfinite()].mean()),
            "curriculum/chosen_mean": float(picked.mean()),
            "curriculum/chosen_distance": float((picked - level).abs().mean()),
        }

    def _asked(self) -> bool:
        """Whether any process was asked to stop: all of them leave the loop together."""
        return any(self._engine.gather_objects(self._stop.requested))

    def _evaluation_due(self, iteration: int) -> bool:
        return iteration in (0, self._schedule.iterations) or _due(iteration, self._schedule.evaluate_every)

    def _evaluated(self, iteration: int) -> bool:
        return self._engine.broadcast(self._scores_file(iteration).exists())

    def _scores_file(self, iteration: int) -> Path:
        return self._run_dir / "evaluations" / f"{iteration:06d}.jsonl"

    def _evaluate(self, iteration: int) -> Verdict:
        evaluation = self._evaluator.evaluate(self._policy)
        traffic = self._scorer.drain(evaluation=True)
        verdict = self._judge(iteration, {name: values.tolist() for name, values in evaluation.scores.items()})
        if self._tracker:
            self._tracker.log(evaluation.metrics() | verdict.metrics | traffic, iteration)
            captions = list(evaluation.prompts.texts[: len(evaluation.grid)])
            self._tracker.log_images("heldout", evaluation.grid, captions, iteration)
            for alert in verdict.alerts:
                self._tracker.alert(alert.title, alert.text, iteration)
            evaluation.save(self._scores_file(iteration))  # last: where it lies, the evaluation was recorded
        return verdict

    def _judge(self, iteration: int, scores: dict[str, list[float]]) -> Verdict:
        """What an evaluation means for the run, as the main rank sees it."""
        return self._engine.broadcast(self._health.evaluated(iteration, scores))

    def _judge_recorded(self, iteration: int) -> Verdict:
        """The same from the record of an evaluation, whose warnings were given then."""
        scores = read_scores(self._scores_file(iteration)) if self._engine.is_main else {}
        return self._judge(iteration, self._engine.broadcast(scores))

    def _settle_best(self) -> None:
        """After a resume: the best checkpoint is the one that this checkpoint knows of, or none if that is gone."""
        best = self._health.best
        gone = best is not None and self._engine.is_main and not self._checkpoints.holds(best.iteration)
        if self._engine.broadcast(gone) and best is not None:
            _log.warning("the best checkpoint so far, of iteration %d, is not here: counted anew", best.iteration)
            self._health.forget_best()
        if self._engine.is_main:
            self._checkpoints.mark_best(self._health.best and self._health.best.iteration)

    def _drawn_state(self) -> dict[str, Any]:
        """What an iteration changes before its update: copies, small."""
        return {
            "prompts": self._prompts.state_dict(),
            "curriculum": self._curriculum.state_dict(),
            "scoring": self._scorer.state_dict(),
            "skipped": self._skipped,
            "random": random_state(),
        }

    def _restore_drawn_state(self, state: dict[str, Any]) -> None:
        self._prompts.load_state_dict(state["prompts"])
        self._curriculum.load_state_dict(state["curriculum"])
        self._scorer.load_state_dict(state["scoring"])
        self._skipped = state["skipped"]
        restore_random_state(state["random"])

    def _save(self, iteration: int) -> None:
        drawn = self._drawn_state()
        per_rank = self._engine.gather_objects({key: drawn[key] for key in ("curriculum", "random")})
        # What is divided among processes is put together by all of them.
        tensors, optimizer = self._policy.state_dict(), self._update.optimizer_state()
        if self._engine.is_main:
            tracker = self._tracker.state_dict() if self._tracker else {}
            snapshot = Snapshot(
                iteration=iteration,
                tensors=tensors,
                optimizer=optimizer,
                state={
                    "prompts": drawn["prompts"],
                    "scoring": drawn["scoring"],
                    "skipped": drawn["skipped"],
                    **self._update.state_dict(),
                    "inputs": self._inputs,
                    "rewards": self._scorer.fingerprints,
                    "tracker": tracker,
                    "health": self._health.state_dict(),
                },
                per_rank=per_rank,
                config=self._config,
            )
            path = self._checkpoints.save(snapshot, best=self._health.best and self._health.best.iteration)
            _log.info("saved %s", path)
        self._engine.wait()


def batches_of_each(curriculum: Curriculum, sampler: FlowSampler, processes: int) -> list[int]:
    """States of each network batch of one rollout on each process.

    Ranks hold equally many prompts: then no gather needs padding and every gradient has equal weight.

    Raises:
        ConfigError: the prompts of an iteration cannot be divided so.
    """
    for key in ("candidates", "chosen"):
        count = getattr(curriculum, key)
        if count % processes:
            raise ConfigError(f"curriculum.{key}={count} must be a multiple of the {processes} processes")
    return sampler.batch_sizes(curriculum.chosen // processes)


def _share(rows: list[int], engine: Engine) -> list[int]:
    """This rank's contiguous part of `rows`."""
    size = len(rows) // engine.world_size
    return rows[engine.rank * size : (engine.rank + 1) * size]


def _due(iteration: int, every: int) -> bool:
    return every > 0 and iteration % every == 0
