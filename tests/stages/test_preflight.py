"""What the plan of a run is made of, against closed forms, published sizes and the real trainer."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adagrpo_train import build
from adagrpo_train.algorithms.transitions import CPS, ConstantSDE, FlowSDE
from adagrpo_train.errors import PreflightError, RewardError
from adagrpo_train.functional.transitions import ode_step
from adagrpo_train.preflight import counts, plan
from adagrpo_train.preflight.findings import Findings
from adagrpo_train.preflight.outline import META, Outline
from adagrpo_train.preflight.sizes import optimizer_bytes
from adagrpo_train.preflight.words import duration, size
from adagrpo_train.runtime.network import Computation, saved_bytes
from adagrpo_train.settings import read_settings
from rewards import verify
from tests.support import make_trainer


@pytest.mark.parametrize("transition", [FlowSDE(noise_level=0.7), ConstantSDE(eta=0.3), CPS(noise_level=0.9)])
def test_a_published_step_without_noise_is_the_noise_free_step(transition: FlowSDE | ConstantSDE | CPS) -> None:
    x, velocity = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    sigma, sigma_next = torch.tensor([1.0, 0.5]), torch.tensor([0.8, 0.25])
    step = transition.noiseless().step(x, velocity, sigma, sigma_next, 0.8)
    torch.testing.assert_close(step.mean, ode_step(x, velocity, sigma, sigma_next), rtol=1e-5, atol=1e-6)
    assert not step.std.any()
    assert transition.step(x, velocity, sigma, sigma_next, 0.8).std.all()  # the noisy one is another


def test_operations_of_like_blocks_are_those_of_the_whole_network() -> None:
    """One block of a kind stands for all: the sum is what a counter around a whole call finds."""
    outline = Outline(read_settings(["trainable=full"]), processes=1)
    with FlopCounterMode(display=False) as counter, outline._computing(), torch.no_grad():
        outline._velocity(1)
    whole = float(counter.get_total_flops())
    work = outline.work()
    assert work.forward == pytest.approx(whole, rel=1e-6)
    assert work.backward == pytest.approx(2 * whole, rel=0.05)  # of inputs and weights, a product each
    with outline._computing():
        one, two = (outline._call(states, work=work) for states, work in ((1, True), (2, False)))
        plain = saved_bytes(outline.model.transformer, lambda: outline._velocity(1))
    assert plain == pytest.approx(one.kept, rel=0.1)
    assert two.kept == pytest.approx(2 * one.kept, rel=0.01)
    assert 0 < work.checkpointed < work.kept


def test_bytes_kept_without_weights_are_those_of_the_real_tensors() -> None:
    layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    kept = [
        saved_bytes(network, lambda network=network, device=device: network(torch.zeros(3, 8, device=device)))
        for network, device in ((layers, torch.device("cpu")), (deepcopy(layers).to(META), META))
    ]
    assert kept[0] == kept[1] > 0


@pytest.mark.parametrize("overrides", [["trainable=full"], [], ["model=tiny_flux"]])
def test_what_an_update_keeps_is_known_without_weights(overrides: list[str]) -> None:
    """Against the tensors that the real network keeps."""
    settings = read_settings(overrides)
    model = build.make(settings.values["model"], "model", device=torch.device("cpu"))
    build.make(settings.values["trainable"], "trainable").attach(model, seed=0, reference=False)
    computation = Computation(model, model.device, **settings.values["network"])
    kept = computation.kept_bytes(model.encode(["a red circle"]), settings.values["update_micro_batch"])
    assert Outline(settings, processes=1).work().kept == pytest.approx(kept, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "processes", "gigabytes"),
    [
        # Weights, gradients and Adam's two moments: 2 or 4, 4 and 8 bytes each; under ZeRO 4 more of master weights.
        (["model=sd35_medium", "trainable.rank=32", "trainable.targets=attention"], 1, 2.243 * 2 + 0.0188 * 16),
        (["model=sd35_medium", "model.dtype=float32", "trainable=full", "engine=zero2"], 8, 2.243 * (4 + 16 / 8)),
        (["model=flux_dev", "model.dtype=float32", "trainable=full"], 1, 11.901 * 16),
        (["model=flux_dev", "model.dtype=float32", "trainable=full", "engine=zero3"], 8, 11.901 * 20 / 8),
        (["model=flux_dev", "model.dtype=float32", "trainable=full", "engine=fsdp2"], 8, 11.901 * 16 / 8),
    ],
)
def test_what_a_process_holds_follows_from_sizes_and_engine(
    overrides: list[str], processes: int, gigabytes: float
) -> None:
    settings = read_settings([*overrides, "curriculum.chosen=8", "weight_average.decay=0.0"])
    held = Outline(settings, processes=processes).held()
    others = ("VAE", "text encoders")
    assert sum(count for name, count in held.items() if name not in others) / 1e9 == pytest.approx(gigabytes, rel=2e-3)
    published = {"sd35_medium": 11.16, "flux_dev": 9.77}  # of the encoders in bfloat16
    encoders = published[settings.choices["model"]] * (2 if "model.dtype=float32" in overrides else 1)
    assert held["text encoders"] / 1e9 == pytest.approx(encoders, rel=2e-3)


def test_state_of_an_optimizer_is_measured_on_small_tensors() -> None:
    adamw = read_settings([]).values["optimizer"]
    assert optimizer_bytes(adamw, [10, 10, 10**6]) == pytest.approx(2 * (2 * 40 + 4) + 2 * 4 * 10**6, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["adagrpo=on", "curriculum.candidates=4", "plan=branch"],
        ["plan=branch", "algorithm.objective.kl_weight=0.1", "model.guidance_scale=2.0"],
        ["updates_per_iteration=4", "inner_epochs=2", "micro_batch=2", "update_micro_batch=1"],
        ["updates_per_iteration=3", "micro_batch=3", "update_micro_batch=1", "plan=window"],
    ],
)
def test_network_evaluations_are_those_of_the_trainer(overrides: list[str], tmp_path: Path) -> None:
    settings = read_settings(["debug=smoke", "group_size=2", "evaluation.images=7", "curriculum.chosen=2", *overrides])
    trainer, parts, _ = make_trainer(*overrides, run_dir=tmp_path)
    planned = counts.count(
        settings.values,
        sampler=parts.sampler,
        curriculum=trainer._curriculum,
        schedule=trainer._schedule,
        visits=trainer._update._visits,
        evaluations_per_state=parts.model.evaluations_per_velocity,
        processes=1,
    )
    metrics = trainer._train_once(0)
    parts.rewards.close()
    assert {f"nfe/{kind}": float(count) for kind, count in planned.network.items()} == {
        name: value for name, value in metrics.items() if name.startswith("nfe/")
    }


def test_held_out_evaluations_are_before_after_and_at_every_multiple_between() -> None:
    for every, iterations, times in ((0, 10, 2), (5, 10, 3), (4, 10, 4), (20, 10, 2), (1, 3, 4)):
        outline = Outline(read_settings([f"evaluation.every={every}", f"iterations={iterations}"]), processes=1)
        assert outline.counts.held_out_evaluations == times


def test_rewards_that_only_evaluate_are_asked_of_held_out_images_alone() -> None:
    outline = Outline(read_settings(["iterations=10", "evaluation.every=5", "evaluation.images=14"]), processes=1)
    told = plan.counted(outline.counts, {"shapes": True, "clip": False})
    one, whole = told.split("the whole run")
    trained = outline.counts.images * 10 + 3 * 14
    assert "clip" not in one and f"{outline.counts.images:,} scores of shapes" in one
    assert f"{trained:,} of shapes, 42 of clip" in whole


def _refuse(text: str) -> str:
    raise RewardError(text)


def test_a_failed_check_leaves_out_what_builds_on_it_and_nothing_else() -> None:
    lines: list[str] = []
    findings = Findings(None, lines.append)
    findings.check("first", lambda: _refuse("broken\nmend it"))
    findings.check("second", lambda: "fine", needs=["first"])
    findings.check("third", lambda: "fine", needs=["second"])
    findings.check("fourth", lambda: "fine")
    with pytest.raises(PreflightError, match="1 of 2 checks failed: first"):
        findings.conclude()
    assert [line.split()[0] for line in lines] == ["FAILED", "left", "left", "ok"]
    assert "mend it" in lines[0]


def test_a_record_is_found_by_what_the_settings_mean() -> None:
    assert verify.recorded("jpeg_size", {"quality": 95}) == verify.recorded("jpeg_size", {})
    assert verify.recorded("jpeg_size", {}) is not None
    assert verify.recorded("jpeg_size", {"quality": 50}) is None
    assert verify.recorded("clip", {}) is None


def test_figures_are_written_as_people_read_them() -> None:
    assert [size(count) for count in (999, 1.44e6, 300e6, 142.8e9)] == ["1 kB", "1.4 MB", "300 MB", "143 GB"]
    assert [duration(s) for s in (0.5, 14, 600, 4 * 3600, 33 * 86400)] == [
        "0.5 s",
        "14 s",
        "10.0 min",
        "4.0 h",
        "33.0 days",
    ]
