"""While samples are drawn, and between two optimizer steps, the host never waits for the device.

The sampler runs the real tiny transformer on torch's meta device, whose tensors have no values: what asks for one fails
by itself. A dispatch mode refuses what would only be slow on a GPU: copies in either direction that make the host wait,
and an index on the host into a tensor on the device, which is copied over in the same way.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adagrpo_train.algorithms.plans import Branch, EveryStep, FixedSteps
from adagrpo_train.algorithms.transitions import CPS, ConstantSDE, FlowSDE
from adagrpo_train.interfaces import Plan
from adagrpo_train.models.pipeline import PipelineModel
from adagrpo_train.runtime.figures import Figures
from adagrpo_train.runtime.transfer import to_device
from adagrpo_train.types import Conditions
from tests.small_flux import flux_model, save_flux
from tests.support import PROMPTS, make_sampler, make_trainer, own_velocity, tiny_model

DEVICE = torch.device("meta")
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select")


class HostWaitsError(AssertionError):
    """The host would wait for the device."""


class NoHostSync(TorchDispatchMode):
    """Refuses operators after which, on a GPU, the host knows something of the device's values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in inputs if tensor.device == DEVICE]
        if on_device and name in READS:
            raise HostWaitsError(name)
        if name == "aten::_to_copy" and kwargs.get("device", inputs[0].device) != inputs[0].device:
            if on_device or not kwargs.get("non_blocking"):
                raise HostWaitsError(f"{name} from {inputs[0].device} to {kwargs['device']}")
        elif on_device and any(tensor.device != DEVICE and tensor.ndim for tensor in inputs):
            raise HostWaitsError(f"{name} of tensors on two devices")
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PipelineModel]:
    flux = save_flux(tmp_path_factory.mktemp("flux") / "model", guidance=True)
    made: dict[str, PipelineModel] = {
        "sd3": tiny_model(guidance_scale=2.0, num_steps=3), "flux": flux_model(flux, num_steps=3)
    }  # fmt: skip
    for model in made.values():
        model.transformer.to(DEVICE)
    return made


def on_device(conditions: Conditions) -> Conditions:
    rows = (getattr(conditions, field.name) for field in fields(conditions))
    return Conditions(*(None if row is None else row.to(DEVICE) for row in rows))


@pytest.mark.parametrize(
    ("family", "plan", "transition"),
    [
        ("sd3", EveryStep(shared_noise=False), FlowSDE(noise_level=0.7)),
        ("sd3", FixedSteps(noisy=[1], shared_noise=True), ConstantSDE(eta=0.3)),
        ("sd3", FixedSteps(noisy=[1], shared_noise=True), CPS(noise_level=0.8)),
        ("sd3", Branch(at=[0, 1]), FlowSDE(noise_level=0.7)),
        ("flux", Branch(at=[0, 1]), FlowSDE(noise_level=0.7)),
    ],
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)
def test_the_host_never_waits_for_the_device_while_samples_are_drawn(
    family: str, plan: Plan, transition: Any, models: dict[str, Any]
) -> None:
    model = models[family]
    sampler = make_sampler(model, transition, plan=plan, micro_batch=3, device=DEVICE)
    velocity = own_velocity(model)
    prompts = PROMPTS[[0, 1]]
    encoded = on_device(model.encode(list(prompts.texts)))
    with NoHostSync():
        trunks = sampler.trunks(velocity, encoded, prompts, 0)
        rollout = sampler.roll_out(velocity, encoded, prompts, trunks, 0)
        sampler.render(velocity, encoded, torch.zeros((2, *model.latent_shape)))
    assert rollout.x0.device == DEVICE


def test_the_host_never_waits_for_the_device_between_two_optimizer_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches in parts, log-probabilities before the first step and the reference; the norms are read."""
    settings = ["micro_batch=2", "update_micro_batch=1", "updates_per_iteration=2", "weight_average.decay=0"]
    settings += ["model.num_steps=3", "algorithm.objective.kl_weight=0.1"]
    trainer, parts, engine = make_trainer(*settings, run_dir=tmp_path)
    prompts = PROMPTS[[0, 1]]
    conditions = on_device(parts.policy.encode(list(prompts.texts)))
    parts.policy.network.to(DEVICE)
    monkeypatch.setattr(type(engine), "device", DEVICE)
    monkeypatch.setattr(parts.sampler, "_device", DEVICE)
    monkeypatch.setattr(parts.sampler, "_sigmas", parts.sampler._sigmas.to(DEVICE))
    norms = []
    monkeypatch.setattr(engine, "step", lambda *_, **__: norms.append(1.0) or 1.0)
    monkeypatch.setattr(trainer._update._rates, "step", lambda: None)
    monkeypatch.setattr(Figures, "reduced", lambda *_: {})  # read when all steps are made
    with NoHostSync():
        rollout = parts.sampler.roll_out(parts.policy.velocity, conditions, prompts, None, 0)
        trainer._update.make(rollout.transitions, conditions, torch.ones(4), torch.ones(4, dtype=torch.bool), 0)
    assert len(norms) == 2


def test_what_makes_the_host_wait_is_seen() -> None:
    """Or the test above could not fail."""
    values, host = torch.zeros(3, device=DEVICE), torch.tensor([0, 2])
    for waits in (
        lambda: values.sum().item(),
        lambda: values.nonzero(),
        lambda: values.cpu(),
        lambda: host.to(DEVICE),
        lambda: values[host],
    ):
        with NoHostSync(), pytest.raises((HostWaitsError, RuntimeError, NotImplementedError)):
            waits()
    with NoHostSync():
        assert values[to_device(host, DEVICE)].shape == (2,)
