"""What one training iteration does, on the real tiny model."""

import os
import signal
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import LambdaLR

from adagrpo_train.algorithms.advantages import CrossLevel
from adagrpo_train.errors import ConfigError, RewardError, TrainingError
from adagrpo_train.health.monitor import Verdict
from adagrpo_train.runtime import checkpoint
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.trainer import Trainer, batches_of_each
from adagrpo_train.types import Level
from rewards.shapes.reward import ShapesReward
from tests.support import Memory, make_trainer, use_reward

ALGORITHMS = ("flow_grpo", "dance_grpo", "flow_cps")
STEPS = 4
CASES = [
    pytest.param([f"algorithm={algorithm}", f"trainable={trainable}", *extra], id=f"{algorithm}-{trainable}-{name}")
    for algorithm in ALGORITHMS
    for trainable in ("lora", "full")
    for name, extra in (("trajectories", []), ("branches", ["plan=branch", "plan.at=[0,2]"]))
]


@pytest.mark.parametrize("overrides", CASES)
def test_the_first_ratio_is_bitwise_one(overrides: list[str], tmp_path: Path) -> None:
    """Before any update the policy is the one that sampled, so new and old log-probabilities are equal bit for bit.

    The adapters are trained for one iteration first: with B = 0 they would not take part.
    """
    trainer, _, _ = make_trainer(f"model.num_steps={STEPS}", "optimizer.lr=1e-3", *overrides, run_dir=tmp_path)
    memory = Memory()
    trainer.train(memory)
    assert [row["policy/first_ratio_deviation"] for row in memory.training] == [0.0, 0.0]


def test_adapters_of_a_half_precision_model_are_trained_in_single_precision(tmp_path: Path) -> None:
    trainer, parts, _ = make_trainer("model.dtype=bfloat16", "optimizer.lr=1e-3", run_dir=tmp_path)
    before = [parameter.detach().clone() for parameter in parts.policy.parameters]
    memory = Memory()
    trainer.train(memory)
    assert {parameter.dtype for parameter in parts.policy.parameters} == {torch.float32}
    assert [row["policy/first_ratio_deviation"] for row in memory.training] == [0.0, 0.0]
    assert any(not torch.equal(old, new) for old, new in zip(before, parts.policy.parameters, strict=True))
    with pytest.raises(ConfigError, match=r"trainable=full needs model\.dtype=float32"):
        make_trainer("model.dtype=bfloat16", "trainable=full", run_dir=tmp_path)


def test_later_updates_of_an_iteration_have_ratios_other_than_one(tmp_path: Path) -> None:
    """The second inner epoch compares with the stored log-probabilities, not with itself."""
    trainer, _, _ = make_trainer(
        "inner_epochs=2",
        "updates_per_iteration=2",
        "optimizer.lr=1e-3",
        "reward.shapes.weights={smooth: 1.0}",
        run_dir=tmp_path,
    )
    _reward_pixels(trainer)
    memory = Memory()
    trainer.train(memory)
    for row in memory.training:
        assert row["policy/first_ratio_deviation"] == 0.0
        assert row["policy/ratio_max_deviation"] > 1e-7


def _expected_evaluations(overrides: str, prompts: int, size: int) -> dict[str, int]:
    """Closed formulas: B candidates of T steps each, then per algorithm."""
    candidates = 4 if "boundary" in overrides else 0
    branch = "branch" in overrides
    at = (0, 2)
    trunks = (candidates or prompts) if branch or candidates else 0
    sampling = trunks * STEPS
    if branch:
        # The anchors are evaluated once more in the shape that training uses, then each sample goes on by the ODE.
        sampling += prompts * len(at) + prompts * size * sum(STEPS - 1 - k for k in at)
        training = prompts * len(at)
    else:
        sampling += prompts * size * STEPS
        trained = max(1, int(0.6 * (STEPS - 1))) if "dance_grpo" in overrides else STEPS - 1
        training = prompts * size * trained
    guided = 2 if "guidance" in overrides else 1
    reference = training if "kl_weight" in overrides else 0
    return {"sampling": guided * sampling, "training": guided * training, "reference": guided * reference}


@pytest.mark.parametrize(
    "overrides",
    [
        f"algorithm={algorithm} curriculum={curriculum} plan={plan}{extra}"
        for algorithm, plan in (("flow_grpo", "every_step"), ("dance_grpo", "random_steps"), ("flow_cps", "branch"))
        for curriculum in ("uniform", "boundary")
        for extra in ("", " model.guidance_scale=2.0", " algorithm.objective.kl_weight=0.1")
    ],
)
def test_network_evaluations_equal_the_closed_formula(overrides: str, tmp_path: Path) -> None:
    extra = ["curriculum.candidates=4"] if "boundary" in overrides else []
    extra += ["plan.at=[0,2]"] if "branch" in overrides else []
    trainer, _, _ = make_trainer(
        f"model.num_steps={STEPS}", "iterations=1", *overrides.split(), *extra, run_dir=tmp_path
    )
    memory = Memory()
    trainer.train(memory)
    expected = _expected_evaluations(overrides, prompts=2, size=2)
    assert {kind: int(memory.training[0][f"nfe/{kind}"]) for kind in expected} == expected


@pytest.mark.parametrize("updates", [1, 3])
def test_exactly_the_configured_number_of_optimizer_steps_is_made(updates: int, tmp_path: Path) -> None:
    trainer, parts, _ = make_trainer(f"updates_per_iteration={updates}", "micro_batch=2", run_dir=tmp_path)
    trainer.train(Memory())
    (state,) = {int(s["step"]) for s in trainer._update._optimizer.state.values()}
    assert state == 2 * updates
    assert all(parameter.grad is None for parameter in parts.policy.parameters)  # none reaches the next update


def test_gradients_do_not_depend_on_the_micro_batch(tmp_path: Path) -> None:
    weights = []
    for micro_batch in (3, 4):  # of 4 samples: batches of unequal sizes, and one alone
        trainer, parts, _ = make_trainer(f"micro_batch={micro_batch}", "iterations=1", run_dir=tmp_path)
        _reward_pixels(trainer)
        _use_sgd(trainer, parts)
        trainer.train(Memory())
        weights.append(torch.cat([p.detach().flatten() for p in parts.policy.parameters]))
    start = torch.cat([p.detach().flatten() for p in make_trainer(run_dir=tmp_path)[1].policy.parameters])
    assert (weights[0] - start).norm() > 1e-4
    assert (weights[0] - weights[1]).norm() / (weights[0] - start).norm() < 1e-3


def test_an_anchor_shared_by_its_group_has_the_gradient_of_replicated_anchors(tmp_path: Path) -> None:
    """One forward per group equals one forward per sample."""
    trainer, parts, _ = make_trainer("plan=branch", "plan.at=[0,2]", "group_size=3", run_dir=tmp_path)
    sampler, policy = parts.sampler, parts.policy
    prompts = trainer._prompts.next(2)
    conditions = policy.encode(list(prompts.texts))
    (batch,) = sampler.roll_out(policy.velocity, conditions, prompts, None, 0).transitions
    advantages = torch.randn(len(batch.sample))
    replicated = type(batch)(
        batch.x[batch.state],
        batch.sigma[batch.state],
        batch.sigma_next[batch.state],
        batch.prompt[batch.state],
        batch.x_next,
        torch.arange(len(batch.state)),
        batch.sample,
        batch.log_prob,
        batch.rollout_log_prob,
    )
    gradients = []
    for shape in (batch, replicated):
        loss = trainer._update._objective.loss(policy, shape, conditions[shape.prompt], advantages, sampler.sigma_max)
        grads = torch.autograd.grad(loss.value, policy.parameters, allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in grads if g is not None]))
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-5


def test_candidates_are_trunks_and_are_sampled_once(tmp_path: Path) -> None:
    """The anchors of the branches are the very states of the scored candidates."""
    trainer, parts, _ = make_trainer(
        "plan=branch",
        "plan.at=[0,2]",
        "curriculum=boundary",
        "curriculum.candidates=4",
        "iterations=1",
        run_dir=tmp_path,
    )
    sampler, seen = parts.sampler, {}
    trunks_of, roll_out = sampler.trunks, sampler.roll_out

    def trunks(*args):
        seen["trunks"] = trunks_of(*args)
        return seen["trunks"]

    def branch(velocity, conditions, prompts, trunks, *others):
        seen["used"] = trunks
        return roll_out(velocity, conditions, prompts, trunks, *others)

    sampler.trunks, sampler.roll_out = trunks, branch  # type: ignore[method-assign]
    memory = Memory()
    trainer.train(memory)
    chosen = [row for row, prompt in enumerate(memory.prompts[0]) if prompt.chosen]
    used = {tuple(a.flatten().tolist()) for a in seen["used"].anchors}
    assert used == {tuple(a.flatten().tolist()) for a in seen["trunks"].anchors[chosen]}


def test_groups_without_spread_do_not_move_the_weights_and_are_counted(tmp_path: Path) -> None:
    trainer, parts, _ = make_trainer("iterations=1", "optimizer.weight_decay=0.0", run_dir=tmp_path)
    use_reward(trainer, _Constant())
    before = [p.detach().clone() for p in parts.policy.parameters]
    memory = Memory()
    trainer.train(memory)
    assert memory.training[0]["reward/zero_variance_fraction"] == 1.0
    assert memory.training[0]["policy/grad_norm"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, parts.policy.parameters, strict=True))


class _Constant(ShapesReward):
    """0.3 is not exact in binary: a float32 standard deviation would not be 0."""

    def score(self, batch):
        return [{"smooth": 0.3, "strict": 0.3}] * len(batch)


class _Fails(ShapesReward):
    def __init__(self, value: float) -> None:
        self._value = value

    def score(self, batch):
        return [{"smooth": self._value, "strict": 0.0}] * len(batch)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_stops_the_run(value: float, tmp_path: Path) -> None:
    trainer, _, _ = make_trainer(run_dir=tmp_path)
    use_reward(trainer, _Fails(value))
    with pytest.raises(RewardError, match=r"reward shapes: none of .* got a score; .*finite"):
        trainer.train(Memory())


def test_a_gradient_that_is_not_finite_stops_the_run_and_leaves_the_weights(tmp_path: Path) -> None:
    trainer, parts, _ = make_trainer(run_dir=tmp_path)
    _reward_pixels(trainer)
    advantages = trainer._advantages

    def poisoned(*arguments):
        values, usable, metrics = advantages(*arguments)
        return values * float("nan"), usable, metrics

    trainer._advantages = poisoned  # type: ignore[method-assign]
    before = [p.detach().clone() for p in parts.policy.parameters]
    with pytest.raises(TrainingError, match="gradient norm is nan"):
        trainer.train(Memory())
    assert all(torch.equal(a, b) for a, b in zip(before, parts.policy.parameters, strict=True))


@pytest.mark.parametrize("plan", ["every_step", "random_steps", "branch"])
@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_the_batches_counted_before_a_run_are_those_of_its_rollouts(
    plan: str, micro_batch: int, tmp_path: Path
) -> None:
    trainer, parts, _ = make_trainer(f"plan={plan}", f"micro_batch={micro_batch}", run_dir=tmp_path)
    prompts = trainer._prompts.next(2)
    conditions = parts.policy.encode(list(prompts.texts))
    rollout = parts.sampler.roll_out(parts.policy.velocity, conditions, prompts, None, 0)
    assert parts.sampler.batch_sizes(2) == [len(batch.x) for batch in rollout.transitions]


def test_an_embedding_does_not_depend_on_the_prompts_beside_it(tmp_path: Path) -> None:
    """Nor, with it, on how many processes share the prompts."""
    _, parts, _ = make_trainer("model.guidance_scale=2.0", run_dir=tmp_path)
    texts = ["a red circle", "two blue squares", "a small green triangle"] * 5
    together = parts.policy.encode(texts)
    assert len(together.prompt_embeds) == 15
    for count in (1, 2, 7):
        alone = parts.policy.encode(texts[:count])
        rows = together[torch.arange(count)]
        assert all(torch.equal(getattr(alone, f.name), getattr(rows, f.name)) for f in fields(rows))


def check_batches(trainer: Trainer, engine: Engine) -> None:
    """What the constructor of a trainer checks, for the present number of processes."""
    trainer._update.check_batches(batches_of_each(trainer._curriculum, trainer._sampler, engine.world_size))


def test_processes_must_hold_equally_many_batches_for_every_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _, engine = make_trainer("updates_per_iteration=2", "micro_batch=2", run_dir=tmp_path)
    check_batches(trainer, engine)  # 2 x 5 batches on one process
    monkeypatch.setattr(type(engine), "world_size", 2)
    with pytest.raises(ConfigError, match=r"updates_per_iteration=2: with 2 processes the 5 batches"):
        check_batches(trainer, engine)


@pytest.mark.parametrize(("plan", "states"), [("every_step", "4 and of 2"), ("branch", "4 and of 1")])
def test_batches_of_several_processes_must_fall_into_equally_many_parts(
    plan: str, states: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update would visit another number of parts on each process, which then wait for each other for ever."""
    settings = ["curriculum.chosen=2", "group_size=6", "micro_batch=4", f"plan={plan}", "iterations=1"]
    settings += ["updates_per_iteration=2", "model.num_steps=6", *(["plan.at=[0,1,2,3,4]"] if plan == "branch" else [])]
    trainer, _, engine = make_trainer(*settings, "update_micro_batch=2", run_dir=tmp_path)
    monkeypatch.setattr(type(engine), "world_size", 2)
    with pytest.raises(ConfigError, match=rf"update_micro_batch=2: with 2 processes .* batches of {states} states"):
        check_batches(trainer, engine)
    trainer._update._visits = replace(trainer._update._visits, states=4)
    check_batches(trainer, engine)


def test_whole_weights_are_put_together_in_the_memory_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each GPU holds a share of the weights, none has room for them all, let alone for their average as well."""
    _, parts, _ = make_trainer(run_dir=tmp_path)
    with FakeTensorMode():
        gathered = torch.empty(1, device="cuda")
    monkeypatch.setattr(parts.policy._weights, "whole", lambda values: (gathered for _ in values))
    saved = [value for tensors in parts.policy.state_dict().values() for value in tensors.values()]
    assert {value.device.type for value in [*saved, *parts.policy.exported().values()]} == {"cpu"}


def test_a_prompt_that_the_reward_refuses_stops_the_run_with_its_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog\n")
    trainer, _, _ = make_trainer(f"prompts.path={path}", run_dir=tmp_path)
    with pytest.raises(RewardError, match=r"a (cat|dog)"):
        trainer.train(Memory())


def test_the_kl_is_zero_at_the_reference_and_positive_away_from_it(tmp_path: Path) -> None:
    for trainable in ("lora", "full"):
        trainer, _, _ = make_trainer(
            f"trainable={trainable}", "algorithm.objective.kl_weight=0.1", "optimizer.lr=1e-3", run_dir=tmp_path
        )
        _reward_pixels(trainer)
        memory = Memory()
        trainer.train(memory)
        first, second = (row["policy/kl"] for row in memory.training)
        assert first < 1e-9
        assert second > 1e-6


def test_absolute_fusion_rewards_a_group_that_beats_the_level_as_a_whole() -> None:
    rewards, group = torch.tensor([0.8, 0.9]), torch.tensor([0, 0])
    make = {"std": "group", "unbiased": True, "eps": 1e-4, "limit": 5.0, "weight": 1.0}
    official = CrossLevel(**make, mode="official").across(rewards, group, Level(0.2, 0.2))
    absolute = CrossLevel(**make, mode="absolute").across(rewards, group, Level(0.2, 0.2))
    assert abs(float(official.mean())) < 1e-6
    assert float(absolute.mean()) == pytest.approx((3.0 + 3.5) / 2)


def test_the_advantage_against_the_level_is_added_to_that_against_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CrossLevel, "across", lambda self, rewards, group, level: torch.full_like(rewards, 7.0))
    trainer, _, _ = make_trainer("advantage=cross_level", "iterations=1", run_dir=tmp_path)
    _reward_pixels(trainer)
    memory = Memory()
    trainer.train(memory)
    (mean,) = [row["advantage/mean"] for row in memory.rows if "advantage/mean" in row]
    assert mean == pytest.approx(7.0, abs=1e-5)  # those of the groups are 0


def _reward_pixels(trainer) -> None:
    """A reward with spread inside every group, whatever the model draws."""

    class Pixels(ShapesReward):
        def score(self, batch):
            return [dict.fromkeys(self.info.metrics, float(sample.image.mean()) / 255) for sample in batch]

    use_reward(trainer, Pixels())


def _use_sgd(trainer, parts) -> None:
    """Steps proportional to the gradient: AdamW's first step has one size whatever the gradient is."""
    trainer._update._optimizer = torch.optim.SGD(parts.policy.parameters, lr=1.0)
    trainer._update._rates = LambdaLR(trainer._update._optimizer, lambda step: 1.0)


def test_the_learning_rate_rises_and_falls_as_set(tmp_path: Path) -> None:
    """Counted in optimizer steps: 2 per iteration here, so a rise of 2 iterations has 4 steps."""
    settings = ["iterations=6", "inner_epochs=2", "updates_per_iteration=2", "optimizer.lr=1e-3"]
    settings += ["lr_schedule.warmup_iterations=2", "lr_schedule.anneal_iterations=2"]
    trainer, _, _ = make_trainer(*settings, run_dir=tmp_path)
    memory = Memory()
    trainer.train(memory)
    steps = [0, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]
    expected = [1e-3 * (first + second) / 2 for first, second in zip(steps[::2], steps[1::2], strict=True)]
    assert [row["policy/lr"] for row in memory.training] == pytest.approx(expected)


def test_whoever_asks_to_stop_does_not_wait_for_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, _ = make_trainer("iterations=3", "evaluation.every=1", run_dir=tmp_path)
    evaluated: list[int] = []

    def evaluate(iteration: int) -> Verdict:
        evaluated.append(iteration)
        return Verdict()

    monkeypatch.setattr(trainer, "_evaluate", evaluate)
    memory = Memory()
    log = memory.log

    def log_and_ask_to_stop(metrics: dict[str, float], iteration: int) -> None:
        log(metrics, iteration)
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(memory, "log", log_and_ask_to_stop)
    assert trainer.train(memory) == "interrupted"
    assert evaluated == [0, 1]
    resumed, _, _ = make_trainer("iterations=3", "evaluation.every=1", run_dir=tmp_path)
    resumed.restore(checkpoint.load(checkpoint.find(tmp_path)))
    monkeypatch.setattr(resumed, "_evaluate", evaluate)
    assert resumed.train(Memory()) == "completed"
    assert evaluated == [0, 1, 2, 3]
