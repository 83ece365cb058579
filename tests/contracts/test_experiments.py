"""Every preset composes, holds the published numbers, and builds its whole trainer at the real size without weights."""

from pathlib import Path
from typing import Any

import pytest

from adagrpo_train import build
from adagrpo_train.settings import Settings, config_dir, group_options, read_settings
from tests.support import ASSETS

FLOW_GRPO = {  # yifan123/flow_grpo config/grpo.py pickscore_sd3, config/base.py, scripts/train_sd3.py
    "model.path": "stabilityai/stable-diffusion-3.5-medium",
    "model.resolution": 512,
    "model.num_steps": 10,
    "model.schedule": "sd3",
    "model.guidance_scale": 4.5,
    "model.guidance_gradient": True,
    "model.max_sequence_length": 128,
    "group_size": 24,
    "curriculum.chosen": 48,
    "micro_batch": 9,
    "inner_epochs": 1,
    "updates_per_iteration": 2,
    "plan.shared_noise": False,
    "algorithm.transition.noise_level": 0.7,
    "algorithm.objective.clip_range": 1e-4,
    "algorithm.objective.kl_weight": 0.01,
    "algorithm.objective.kl": "flow_grpo",
    "advantage.std": "global",
    "advantage.unbiased": False,
    "advantage.eps": 1e-4,
    "advantage.limit": 5.0,
    "trainable.rank": 32,
    "trainable.alpha": 64,
    "trainable.targets": "attention",
    "optimizer.lr": 3e-4,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "weight_average.decay": 0.9,
    "weight_average.interval": 8,
    "reward.pickscore.settings.divisor": 26.0,
    "reward.pickscore.weights": {"pickscore": 1.0},
    "seed": 42,
}
DANCE_GRPO = {  # XueZeyue/DanceGRPO@15cc71d scripts/finetune/finetune_flux_grpo.sh, fastvideo/train_grpo_flux.py
    "model.path": "black-forest-labs/FLUX.1-dev",
    "model.resolution": 720,
    "model.num_steps": 16,
    "model.schedule": "uniform",
    "model.guidance_scale": 3.5,
    "model.max_sequence_length": 512,
    "group_size": 12,
    "curriculum.chosen": 16,
    "micro_batch": 1,
    "updates_per_iteration": 3,
    "iterations": 300,
    "plan.fraction": 0.6,
    "plan.shared_noise": True,
    "algorithm.transition.eta": 0.3,
    "algorithm.objective.clip_range": 1e-4,
    "algorithm.objective.kl_weight": 0.0,
    "advantage.std": "group",
    "advantage.unbiased": True,
    "advantage.eps": 1e-8,
    "advantage.limit": 5.0,
    "trainable._target_": "adagrpo_train.runtime.trainable.Full",
    "optimizer.lr": 1e-5,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "weight_average.decay": 0.0,
    "reward.hpsv2.settings.version": "v2.1",
    "seed": 42,
}
ADAGRPO = {  # Bujiazi/GRPO-Series@c4028f9 scripts/train_adagrpo.sh, train.py, src/method_adagrpo.py
    "model.path": "black-forest-labs/FLUX.1-dev",
    "model.resolution": 512,
    "model.num_steps": 16,
    "model.schedule": "uniform",
    "model.guidance_scale": 3.5,
    "model.max_sequence_length": 256,
    "group_size": 12,
    "curriculum._target_": "adagrpo_train.curriculum.scored.Boundary",
    "curriculum.candidates": 80,
    "curriculum.chosen": 8,
    "curriculum.alpha": 0.8,
    "curriculum.per_rank": True,
    "iterations": 300,
    "updates_per_iteration": 1,
    "plan.at": [0, 2, 4, 6],
    "algorithm.transition._target_": "adagrpo_train.algorithms.transitions.FlowSDE",
    "algorithm.transition.noise_level": 0.7,
    "algorithm.objective.kl_weight": 0.0,
    "advantage._target_": "adagrpo_train.algorithms.advantages.CrossLevel",
    "advantage.mode": "official",
    "advantage.unbiased": True,
    "advantage.eps": 1e-8,
    "advantage.limit": 5.0,
    "advantage.weight": 1.0,
    "trainable._target_": "adagrpo_train.runtime.trainable.Full",
    "optimizer.lr": 2e-6,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "weight_average.decay": 0.0,
    "seed": 42,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "flow_grpo_sd35": FLOW_GRPO,
    # IamCreateAI/FlowCPS@b402c7a: the same configuration under another step, KL without a variance.
    "flow_cps_sd35": FLOW_GRPO
    | {
        "algorithm.transition._target_": "adagrpo_train.algorithms.transitions.CPS",
        "algorithm.objective.kl": "unscaled",
    },
    "dance_grpo_flux": DANCE_GRPO,
    "adagrpo_flux_hpsv2": ADAGRPO | {"reward.hpsv2.weights": {"hpsv2": 1.0}},
    "adagrpo_flux_hpsv3": ADAGRPO | {"reward.hpsv3.weights": {"hpsv3": 1.0}},
    "adagrpo_flux_hpsv3_clip": ADAGRPO
    | {"reward.hpsv3.weights": {"hpsv3": 1.0}, "reward.clip.weights": {"clip": 1.0}, "scoring.scale": "calibrated"},
}
PROCESSES = {"flow_grpo_sd35": 24, "flow_cps_sd35": 24, "dance_grpo_flux": 16}  # of the launch command; else 8
TRAINED = {  # what math of the papers gives: transitions each sample, or each branch, is trained on
    "flow_grpo_sd35": 9,  # floor(10 * 0.99)
    "flow_cps_sd35": 9,
    "dance_grpo_flux": 9,  # floor((16 - 1) * 0.6)
    "adagrpo_flux_hpsv2": 4,
    "adagrpo_flux_hpsv3": 4,
    "adagrpo_flux_hpsv3_clip": 4,
}


def test_every_preset_but_the_demo_is_compared_with_its_publication() -> None:
    assert set(group_options()["experiment"]) == {*PUBLISHED, "tiny_demo"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_holds_the_published_numbers(name: str) -> None:
    values = read_settings([f"experiment={name}"]).values
    found = {key: _value(values, key) for key in PUBLISHED[name]}
    assert found == PUBLISHED[name]
    for reward, section in values["reward"].items():
        assert build.make_entry(reward, section).name == reward


@pytest.mark.parametrize("name", ["flow_grpo_sd35", "flow_cps_sd35", "dance_grpo_flux"])
def test_adagrpo_is_laid_over_a_preset_of_a_base_algorithm(name: str) -> None:
    """A preset that chose curriculum and advantage by itself would win, and adagrpo=on would do nothing."""
    plain = read_settings([f"experiment={name}"]).values
    laid = read_settings([f"experiment={name}", "adagrpo=on", f"curriculum.candidates={2 * 48}"])
    assert (laid.choices["curriculum"], laid.choices["advantage"]) == ("boundary", "cross_level")
    for key in ("std", "unbiased", "eps", "limit"):
        assert laid.values["advantage"][key] == plain["advantage"][key]
    assert laid.values["curriculum"]["chosen"] == plain["curriculum"]["chosen"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_command_in_the_header_launches_the_engine_of_the_preset(name: str) -> None:
    header = (config_dir() / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    engine = read_settings([f"experiment={name}"]).choices["engine"]
    launcher = "--multi_gpu" if engine == "ddp" else f"--config_file configs/accelerate/{engine}.yaml"
    assert f"accelerate launch {launcher} --num_processes {PROCESSES.get(name, 8)} " in header


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_builds_its_trainer_at_the_real_size(name: str, own_pipelines: None, tmp_path: Path) -> None:
    """All but weights and reward models; the prompts are those of the shapes."""
    settings = _buildable(name)
    engine = build.make_engine(settings)
    trainer, parts = build.make_trainer(settings, engine, tmp_path, None)

    assert len(parts.sampler.steps(0).trained) == TRAINED[name]
    for key in ("candidates", "chosen"):
        assert getattr(trainer._curriculum, key) % PROCESSES.get(name, 8) == 0
    share = trainer._curriculum.chosen // PROCESSES.get(name, 8)
    assert len(parts.sampler.batch_sizes(share)) % settings.values["updates_per_iteration"] == 0
    full = settings.values["trainable"]["_target_"].endswith("Full")
    weights = sum(parameter.numel() for parameter in parts.policy.parameters)
    assert weights == (11_901_408_320 if full else 18_776_064)


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=adagrpo_flux_hpsv3", "algorithm=dance_grpo", "plan=branch"],
        ["experiment=adagrpo_flux_hpsv3_clip", "algorithm=flow_cps", "plan=branch"],
        ["experiment=flow_cps_sd35", "plan=window", "plan.size=3", "plan.high=5"],
        ["experiment=adagrpo_flux_hpsv3", "network.autocast=null"],
    ],
)
def test_what_a_header_recommends_composes(overrides: list[str]) -> None:
    read_settings(overrides)


def _buildable(name: str) -> Settings:
    prompts = ASSETS / "prompts"
    return read_settings(
        [
            f"experiment={name}",
            "reward=jpeg_size",
            f"prompts.path={prompts / 'shapes_train.jsonl'}",
            f"prompts.evaluation_path={prompts / 'shapes_heldout.jsonl'}",
            "evaluation.images=1",
            "engine=single",
        ]
    )


def _value(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values
