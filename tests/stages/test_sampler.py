"""The bookkeeping of a rollout: noise, groups, credit, and what it costs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adagrpo_train.algorithms.plans import Branch, EveryStep, FixedSteps, RandomSteps, Window
from adagrpo_train.algorithms.transitions import CPS, ConstantSDE, FlowSDE
from adagrpo_train.errors import ConfigError
from adagrpo_train.functional.schedules import shifted_sigmas
from adagrpo_train.interfaces import Plan
from adagrpo_train.rollout.sampler import FlowSampler
from adagrpo_train.runtime.noise import NoiseKey, keyed_noise
from adagrpo_train.types import Conditions, Prompts, Rollout

SHAPE = (2, 3)
PROMPTS = Prompts((7, 3, 5), ("seven", "three", "five"), ("", "", ""))
CONDITIONS = Conditions(torch.tensor(PROMPTS.ids)[:, None, None].float(), torch.zeros(3, 1))
PLANS: list[Plan] = [
    EveryStep(shared_noise=False),
    RandomSteps(fraction=0.6, shared_noise=True),
    FixedSteps(noisy=[1, 3], shared_noise=False),
    Window(size=2, low=0, high=4, shared_noise=False),
    Branch(at=[0, 2]),
]


def velocity(x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
    """Differs by state, time and prompt, and treats every row alike whatever else is in the batch."""
    column = sigma.view(-1, 1, 1)
    return 0.3 * x - column * x + 0.1 * conditions.prompt_embeds


def sampler(plan: Plan, **changes: Any) -> FlowSampler:
    arguments: dict[str, Any] = {
        "transition": FlowSDE(noise_level=0.7),
        "plan": plan,
        "sigmas": shifted_sigmas(6, shift=1.0),
        "latent_shape": SHAPE,
        "latent_dtype": torch.float32,
        "group_size": 4,
        "micro_batch": 64,
        "seed": 0,
        "device": torch.device("cpu"),
    }
    return FlowSampler(**(arguments | changes))


def roll_out(plan: Plan, iteration: int = 2, **changes: Any) -> Rollout:
    return sampler(plan, **changes).roll_out(velocity, CONDITIONS, PROMPTS, None, iteration)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: type(plan).__name__)
def test_results_do_not_depend_on_how_samples_are_split_into_batches(plan: Plan) -> None:
    whole, split = roll_out(plan), roll_out(plan, micro_batch=5)
    torch.testing.assert_close(whole.x0, split.x0, rtol=0, atol=0)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: type(plan).__name__)
def test_results_of_a_prompt_do_not_depend_on_the_other_prompts(plan: Plan) -> None:
    together = roll_out(plan)
    rows = [2]
    alone = sampler(plan).roll_out(velocity, CONDITIONS[torch.tensor(rows)], PROMPTS[rows], None, 2)
    torch.testing.assert_close(together.x0[together.prompt == 2], alone.x0, rtol=0, atol=0)


def test_every_part_of_a_noise_key_matters_and_equal_keys_give_equal_noise() -> None:
    base = NoiseKey(seed=1, iteration=2, prompt_id=3, sample=4, step=5)
    keys = [base, base, *(base._replace(**{field: 99}) for field in NoiseKey._fields)]
    noise = keyed_noise(keys, (16,))
    assert torch.equal(noise[0], noise[1])
    assert len({tuple(row.tolist()) for row in noise}) == 1 + len(NoiseKey._fields)


def test_keyed_noise_is_standard_normal() -> None:
    noise = keyed_noise([NoiseKey(0, 0, n, 0, 0) for n in range(400)], (50,))
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.02
    assert abs(float((noise[:-1] * noise[1:]).mean())) < 0.03  # neighbouring keys are unrelated


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: type(plan).__name__)
def test_groups_have_the_configured_size_and_one_prompt_each(plan: Plan) -> None:
    rollout = roll_out(plan)
    groups, sizes = rollout.group.unique(return_counts=True)
    assert sizes.tolist() == [4] * len(groups)
    assert all(len(rollout.prompt[rollout.group == g].unique()) == 1 for g in groups)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: type(plan).__name__)
def test_every_transition_leads_from_its_state_to_its_sample(plan: Plan) -> None:
    """Following the ODE or the recorded successors from each transition ends in the sample it is credited to."""
    rollout = roll_out(plan)
    for batch in rollout.transitions:
        assert torch.equal(rollout.prompt[batch.sample], batch.prompt[batch.state])
        assert (batch.sigma_next < batch.sigma).all()
        assert torch.isfinite(batch.log_prob).all()


def test_the_last_trained_step_leads_to_the_credited_sample() -> None:
    plan = FixedSteps(noisy=[3], shared_noise=False)
    rollout = roll_out(plan)
    (batch,) = rollout.transitions
    made = sampler(plan)
    x = batch.x_next
    for i in (4, 5):
        sigma = made._sigmas[i].expand(len(x))
        x = x + (made._sigmas[i + 1] - made._sigmas[i]) * velocity(x, sigma, CONDITIONS[batch.prompt[batch.state]])
    torch.testing.assert_close(x, rollout.x0[batch.sample])


def test_branches_of_one_group_share_one_state_and_differ_after_it() -> None:
    rollout = roll_out(Branch(at=[0, 2]))
    (batch,) = rollout.transitions
    assert (len(batch.x), len(batch.x_next)) == (2 * 3, 2 * 3 * 4)
    assert batch.state.bincount().tolist() == [4] * 6
    assert len({tuple(row.flatten().tolist()) for row in batch.x_next}) == 24


def test_branches_start_from_the_trunk_that_scored_the_candidate() -> None:
    plan = Branch(at=[0, 2])
    made = sampler(plan)
    trunks = made.trunks(velocity, CONDITIONS, PROMPTS, 2)
    (batch,) = made.roll_out(velocity, CONDITIONS, PROMPTS, trunks, 2).transitions
    torch.testing.assert_close(batch.x, trunks.anchors.flatten(0, 1), rtol=0, atol=0)


def test_shared_noise_starts_a_group_from_one_state_and_independent_noise_from_many() -> None:
    for shared, states in ((True, 3), (False, 12)):
        rollout = roll_out(FixedSteps(noisy=[0], shared_noise=shared))
        assert len({tuple(row.flatten().tolist()) for row in rollout.transitions[0].x}) == states


@pytest.mark.parametrize(
    "transition", [FlowSDE(noise_level=0.7), ConstantSDE(eta=0.3), CPS(noise_level=0.8)], ids=lambda t: type(t).__name__
)
def test_log_probs_are_those_of_the_rounded_state(transition: Any) -> None:
    """In bfloat16 the density of the unrounded state would be off by far more than a clip range."""
    made = sampler(EveryStep(shared_noise=False), transition=transition, latent_dtype=torch.bfloat16)
    half: Callable[..., Tensor] = lambda x, s, c: velocity(x, s, c).to(torch.bfloat16)  # noqa: E731
    for batch in made.roll_out(half, CONDITIONS, PROMPTS, None, 0).transitions:
        assert batch.x_next.dtype == torch.bfloat16
        v = half(batch.x, batch.sigma, CONDITIONS[batch.prompt])
        step = transition.step(batch.x, v, batch.sigma, batch.sigma_next, made.sigma_max)
        assert torch.equal(transition.log_prob(batch.x_next, step), batch.log_prob)


def test_random_steps_are_a_fresh_fraction_each_iteration() -> None:
    plan = RandomSteps(fraction=0.6, shared_noise=True)
    drawn = [plan.steps(iteration, 16, seed=0) for iteration in range(20)]
    assert {len(p.trained) for p in drawn} == {9}  # floor(0.6 * 15), as DanceGRPO at 16 steps
    assert all(p.noisy == tuple(range(15)) for p in drawn)
    assert len({p.trained for p in drawn}) > 10
    assert {step for p in drawn for step in p.trained} == set(range(15))


def test_windows_stay_inside_their_bounds_and_reach_all_of_them() -> None:
    drawn = [Window(size=2, low=1, high=5, shared_noise=False).steps(i, 8, seed=0).trained for i in range(60)]
    assert set(drawn) == {(1, 2), (2, 3), (3, 4)}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (FixedSteps(noisy=[], shared_noise=False), "plan.noisy is empty"),
        (FixedSteps(noisy=[5], shared_noise=False), r"steps \[5\] are outside 0 .. 4"),
        (Branch(at=[-1]), r"steps \[-1\] are outside"),
        (Window(size=2, low=0, high=9, shared_noise=False), "outside 0 .. 4"),
        (Window(size=5, low=0, high=3, shared_noise=False), "plan.size=5"),
    ],
)
def test_steps_outside_the_schedule_are_refused_at_construction(plan: Plan, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampler(plan)


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="group_size=1"):
        sampler(PLANS[0], group_size=1)
