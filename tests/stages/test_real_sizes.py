"""The model configs at their real size, without weights: shapes, grids, adapters and numbers of weights."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from adagrpo_train.runtime.trainable import LoRA
from adagrpo_train.settings import read_settings
from adagrpo_train.types import Conditions
from tests import real_sizes

pytestmark = pytest.mark.slow  # a second or two each
META = torch.device("meta")
WEIGHTS = {  # of the transformer; the model cards round them to 2, 2.5, 8.1 and 12 billion
    "sd3_medium": 2_028_328_000,
    "sd35_medium": 2_243_171_520,
    "sd35_large": 8_056_627_520,
    "flux_dev": 11_901_408_320,
    "flux_schnell": 11_891_178_560,
}
TEXT = {"sd3": (77 + 128, 2048), "flux_dev": (512, 768), "flux_schnell": (256, 768)}  # tokens seen, pooled width


@cache
def settings(name: str) -> dict[str, Any]:
    return read_settings([f"model={name}"]).values["model"]


def make(name: str, **changes: Any) -> Any:
    return instantiate(settings(name) | changes, device=META)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_model_has_its_published_size_and_shapes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real_sizes.serve(monkeypatch)
    model = make(name)
    assert sum(parameter.numel() for parameter in model.transformer.parameters()) == WEIGHTS[name]
    assert {parameter.dtype for parameter in model.transformer.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.transformer.parameters())
    assert model.latent_shape == (16, 64, 64)  # 512 / 8
    assert make(name, resolution=1024).latent_shape == (16, 128, 128)

    tokens, pooled = TEXT[name if name.startswith("flux") else "sd3"]

    def rows(*shape: int) -> torch.Tensor:
        return torch.zeros(2, *shape, dtype=model.dtype, device=META)

    guided = model.evaluations_per_velocity == 2
    assert guided == name.startswith("sd3")
    conditions = Conditions(
        rows(tokens, 4096), rows(pooled), rows(tokens, 4096) if guided else None, rows(pooled) if guided else None
    )
    v = model.velocity(model.transformer, rows(*model.latent_shape), torch.ones(2, device=META), conditions)
    assert v.shape == (2, 16, 64, 64)
    assert v.dtype == torch.bfloat16


def _sd3(u: float) -> float:
    return 3 * u / (1 + 2 * u)


def _flux(u: float, exponent: float) -> float:
    return math.exp(exponent) / (math.exp(exponent) + 1 / u - 1)


def test_time_grids_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    real_sizes.serve(monkeypatch)
    least = _sd3(0.001)  # diffusers shifts it once when it builds the scheduler, and again with the grid
    sd3 = [_sd3(1 - (1 - least) * i / 9) for i in range(10)]
    for name in ("sd3_medium", "sd35_medium", "sd35_large"):
        torch.testing.assert_close(make(name).sigmas, torch.tensor([*sd3, 0]), rtol=1e-6, atol=0)
    for resolution, exponent in ((512, 0.63), (1024, 1.15)):  # 1024 and 4096 tokens
        grid = make("flux_dev", resolution=resolution).sigmas
        flux = [_flux(1 - i / 6, exponent) for i in range(6)]
        torch.testing.assert_close(grid, torch.tensor([*flux, 0]), rtol=1e-6, atol=0)
    # DanceGRPO's and AdaGRPO's, whatever the resolution.
    for resolution in (512, 720):
        grid = make("flux_dev", resolution=resolution, schedule="uniform", num_steps=16).sigmas
        torch.testing.assert_close(grid, torch.tensor([_sd3(1 - i / 16) for i in range(17)]), rtol=1e-6, atol=1e-7)
    assert make("flux_schnell").sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize(
    ("name", "scope", "rank", "adapters", "weights"),
    [
        # Flow-GRPO: 8 in each of 24 blocks, the last of which has no to_add_out; 2 * 1536 * 32 weights each.
        ("sd35_medium", "attention", 32, 24 * 8 - 1, 191 * 2 * 1536 * 32),
        # Flow-GRPO and AdaGRPO on FLUX: 12 in each of 19 double blocks, 3 in each of 38 single ones.
        ("flux_dev", "all", 64, 19 * 12 + 38 * 3, 64 * ((19 * 8 + 38 * 3) * 2 * 3072 + 19 * 4 * 5 * 3072)),
    ],
)
def test_adapters_are_as_many_as_published(
    name: str, scope: str, rank: int, adapters: int, weights: int, own_pipelines: None
) -> None:
    model = make(name)
    modules = [module for module, _ in model.transformer.named_modules()]
    for target in model.lora_targets(scope):
        assert any(module.endswith(f".{target}") for module in modules), target
    LoRA(rank=rank, alpha=2 * rank, targets=scope).attach(model, seed=0, reference=False)
    trained = [p for p in model.transformer.parameters() if p.requires_grad]
    assert len(trained) == 2 * adapters
    assert sum(p.numel() for p in trained) == weights
    assert {p.dtype for p in trained} == {torch.float32}
