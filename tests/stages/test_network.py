"""How the network is computed changes neither what is trained nor the first ratio."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adagrpo_train.errors import ConfigError
from adagrpo_train.runtime.network import Computation, repeated_blocks, saved_bytes
from adagrpo_train.runtime.trainable import Full, LoRA
from rewards.shapes.reward import ShapesReward
from tests.small_flux import flux_model, save_flux
from tests.support import PROMPTS, Memory, make_trainer, tiny_model, use_reward

CPU = torch.device("cpu")
ONE_IMAGE = ("evaluation.images=1", "evaluation.grid_images=1", "iterations=1")


class Pixels(ShapesReward):
    """Spread inside every group."""

    def score(self, batch: Any) -> Any:
        return [dict.fromkeys(self.info.metrics, float(sample.image.mean()) / 255) for sample in batch]


def computation(model: Any, **changes: Any) -> Computation:
    settings: dict[str, Any] = {"autocast": None, "gradient_checkpointing": "never", "compile": False}
    return Computation(model, CPU, **(settings | changes))


def attach(model: Any, trainable: str) -> None:
    made = LoRA(rank=4, alpha=8, targets="all") if trainable == "lora" else Full()
    made.attach(model, seed=0, reference=False)
    with torch.no_grad():  # B starts as 0, and then A has no gradient
        for parameter in model.transformer.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape)


def gradients(model: Any) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(3)
    x = torch.randn((3, *model.latent_shape)).to(model.dtype)
    velocity = model.velocity(model.transformer, x, torch.tensor([0.9, 0.5, 0.1]), model.encode(list(PROMPTS.texts)))
    parameters = [p for p in model.transformer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(velocity.float().square().sum(), parameters, allow_unused=True)
    return velocity.detach(), [grad for grad in grads if grad is not None]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("flux") / "model", guidance=True)


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_gradient_checkpointing_changes_no_bit(family: str, trainable: str, autocast: str | None, flux: Path) -> None:
    outcomes = []
    for checkpointing in ("never", "always"):
        torch.manual_seed(0)
        model = tiny_model(guidance_scale=2.0) if family == "sd3" else flux_model(flux)
        attach(model, trainable)
        computation(model, autocast=autocast, gradient_checkpointing=checkpointing)
        assert model.transformer.gradient_checkpointing is (checkpointing == "always")
        outcomes.append(gradients(model))
    (kept, grads), (again, others) = outcomes
    assert torch.equal(kept, again)
    assert kept.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert len(grads) == len(others) > 50
    assert all(torch.equal(one, other) for one, other in zip(grads, others, strict=True))


def test_each_block_is_computed_once_more_for_its_gradient() -> None:
    model, calls = tiny_model(), {}
    attach(model, "lora")
    for number, block in enumerate(repeated_blocks(model.transformer)):
        block.register_forward_pre_hook(lambda *_, n=number: calls.update({n: calls.get(n, 0) + 1}))
    computation(model, gradient_checkpointing="always")
    gradients(model)
    assert calls == dict.fromkeys(range(5), 2)


def test_what_a_call_keeps_is_measured() -> None:
    """Of x -> relu(x W) the backward pass needs x and the relu's result, not the product between them."""
    layer = torch.nn.Linear(64, 32, bias=False)
    for rows in (1, 10):
        x = torch.randn(rows, 64)
        assert saved_bytes(layer, lambda x=x: layer(x).relu()) == rows * (64 + 32) * 4


def test_what_an_update_keeps_is_predicted_from_small_calls() -> None:
    model = tiny_model()
    attach(model, "full")
    made, conditions = computation(model), model.encode(["a red circle"])
    predicted, kept = made.kept_bytes(conditions, 7), made._kept_bytes(conditions, 7)
    assert predicted == pytest.approx(kept, rel=0.01)
    assert kept > 7 * 1e6


def test_auto_keeps_everything_only_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision of a GPU with so much free memory, about what the real network keeps."""
    model = tiny_model()
    attach(model, "full")
    made = computation(model, gradient_checkpointing="auto")
    conditions = model.encode(["a red circle"])
    made.prepare_training(lambda: conditions, 4, lambda said: said, divided=False)
    assert not model.transformer.gradient_checkpointing  # on a CPU
    weights = sum(p.numel() for p in model.transformer.parameters())
    enough = 1.2 * made.kept_bytes(conditions, 4) + weights * (4 + 8)  # with gradients and Adam's state
    for reserved, free, fits in ((0, 1.01 * enough, True), (0, 0.99 * enough, False), (10**9, 0, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (int(free), 10**12))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, reserved=reserved: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        assert made._fits(conditions, 4) is fits
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(made, "kept_bytes", out_of_memory)
    assert not made._fits(conditions, 4)


def out_of_memory(*_: Any) -> int:
    raise torch.OutOfMemoryError


def test_one_process_that_needs_checkpoints_makes_all_of_them() -> None:
    model = tiny_model()
    made = computation(model, gradient_checkpointing="auto")
    made.prepare_training(lambda: model.encode(["a red circle"]), 4, lambda said: True, divided=False)
    assert model.transformer.gradient_checkpointing


def test_where_weights_are_divided_auto_checkpoints_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    made = computation(model, gradient_checkpointing="auto")
    monkeypatch.setattr(made, "_device", torch.device("cuda"))
    monkeypatch.setattr(
        made, "_fits", out_of_memory
    )  # where a forward is a collective, this would leave others waiting
    made.prepare_training(lambda: model.encode(["a red circle"]), 4, lambda said: said, divided=True)
    assert model.transformer.gradient_checkpointing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("overrides", [[], ["algorithm=dance_grpo"], ["algorithm=flow_cps"]])
def test_log_probs_and_losses_are_float32_whatever_the_network_gives(
    overrides: list[str], dtype: str, tmp_path: Path
) -> None:
    """With float32 weights under autocast, and with bfloat16 weights."""
    half = ["network.autocast=bfloat16"] if dtype == "float32" else ["model.dtype=bfloat16"]
    trainer, parts, _ = make_trainer(
        *half, *overrides, *ONE_IMAGE, "algorithm.objective.kl_weight=0.1", "model.num_steps=3", run_dir=tmp_path
    )
    policy, velocity = parts.policy, parts.policy.velocity
    given = set()

    def noted(*arguments: Any) -> Tensor:
        result = velocity(*arguments)
        given.add(result.dtype)
        return result

    policy.velocity = noted  # type: ignore[method-assign]
    prompts = trainer._prompts.next(2)
    conditions = policy.encode(list(prompts.texts))
    rollout = parts.sampler.roll_out(policy.velocity, conditions, prompts, None, 0)
    batch = rollout.transitions[0]
    advantages = torch.randn(len(batch.sample))
    loss = trainer._update._objective.loss(policy, batch, conditions[batch.prompt], advantages, parts.sampler.sigma_max)
    step = trainer._update._objective.transition.step(
        batch.x, velocity(batch.x, batch.sigma, conditions[batch.prompt]), batch.sigma, batch.sigma_next, 0.5
    )
    assert given == {torch.bfloat16}
    assert batch.x.dtype == batch.x_next.dtype == getattr(torch, dtype)
    wide = [batch.log_prob, batch.rollout_log_prob, step.mean, step.std, loss.value, loss.rollout_deviation]
    assert {t.dtype for t in [*wide, *loss.metrics.values()]} == {torch.float32}  # type: ignore[union-attr]
    assert "policy/kl" in loss.metrics


def test_every_weight_is_trained_in_float32_under_bfloat16_arithmetic(tmp_path: Path) -> None:
    """Updates far below the rounding of bfloat16 (1 in 256) arrive."""
    trainer, parts, _ = make_trainer(
        "trainable=full", "network.autocast=bfloat16", "optimizer.lr=1e-6", *ONE_IMAGE, run_dir=tmp_path
    )
    use_reward(trainer, Pixels())
    before = torch.cat([p.detach().flatten() for p in parts.policy.parameters])
    memory = Memory()
    trainer.train(memory)
    after = torch.cat([p.detach().flatten() for p in parts.policy.parameters])
    assert after.dtype == torch.float32
    assert memory.training[0]["policy/first_ratio_deviation"] == 0
    assert ((after - before) != 0).float().mean() > 0.9
    assert ((after - before).abs() / before.abs().clamp(min=1e-2)).max() < 1 / 256


def test_half_precision_that_would_not_train_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.dtype=float16: gradients .* train with model\.dtype=bfloat16"):
        make_trainer("model.dtype=float16", *ONE_IMAGE, run_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"trainable=full needs .* add network\.autocast=bfloat16"):
        make_trainer("model.dtype=bfloat16", "trainable=full", *ONE_IMAGE, run_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"network\.autocast=bfloat16: needs model\.dtype=float32"):
        make_trainer("model.dtype=bfloat16", "network.autocast=bfloat16", *ONE_IMAGE, run_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"network\.autocast=float16: choose bfloat16 or null"):
        make_trainer("network.autocast=float16", *ONE_IMAGE, run_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"gradient_checkpointing=some: choose auto, always or never"):
        make_trainer("network.gradient_checkpointing=some", *ONE_IMAGE, run_dir=tmp_path)


def test_images_do_not_depend_on_how_many_are_decoded_at_once() -> None:
    x0 = torch.randn(5, 4, 8, 8)
    one, other = tiny_model(decode_batch=2).decode(x0), tiny_model().decode(x0)
    # To rounding: a value between two levels may fall to either side.
    assert np.abs(one.astype(int) - other).max() <= 1
    assert (one == other).mean() > 0.99


@pytest.fixture
def one_block(tmp_path: Path) -> Path:
    """The embedded pipeline with a transformer of one block: one kind of block to compile."""
    pipeline = tiny_model().pipeline
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config, num_layers=1)
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
# What torch itself does while it compiles.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_network_trains_as_an_eager_one_and_keeps_the_first_ratio(one_block: Path, tmp_path: Path) -> None:
    """torch.compile with its real backend: programs with and without gradient, and rollouts in other batches."""
    settings = [f"model.path={one_block}", "trainable=full", "model.num_steps=3", "plan=fixed", "plan.noisy=[0,1]"]
    settings += ["micro_batch=4", "updates_per_iteration=2", "optimizer.lr=1e-4", *ONE_IMAGE]
    weights, rows = [], []
    for compiled in ("false", "true"):
        trainer, parts, _ = make_trainer(*settings, f"network.compile={compiled}", run_dir=tmp_path / compiled)
        use_reward(trainer, Pixels())
        start = torch.cat([p.detach().flatten() for p in parts.policy.parameters])
        rows.append(trainer._train_once(0))
        weights.append(torch.cat([p.detach().flatten() for p in parts.policy.parameters]) - start)
    (block,) = repeated_blocks(parts.policy._model.transformer)
    assert block._compiled_call_impl is not None
    assert rows[1]["policy/first_ratio_deviation"] == 0
    assert rows[1]["policy/rollout_deviation"] < 1e-5
    assert rows[1]["policy/ratio_max_deviation"] == pytest.approx(rows[0]["policy/ratio_max_deviation"], rel=1e-2)
    assert rows[1]["nfe/training"] == 1.5 * rows[0]["nfe/training"]  # the second step's half, before the first
    assert float((weights[0] - weights[1]).norm() / weights[0].norm()) < 1e-3
