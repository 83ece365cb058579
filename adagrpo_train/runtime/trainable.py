"""What of a network is trained, and what its frozen reference is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adagrpo_train.errors import ConfigError
from adagrpo_train.runtime.weights import Weights


class ExportableModel(Protocol):
    """What exporting and attaching adapters asks of a flow model."""

    @property
    def transformer(self) -> nn.Module: ...
    def lora_targets(self, scope: str) -> list[str]: ...
    def export_lora(self, folder: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None: ...
    def export_full(self, folder: Path) -> None: ...


class LoRA:
    """Low-rank adapters through peft (arXiv:2106.09685); the reference is the network with adapters off.

    Args:
        rank: of each adapter.
        alpha: adapters are scaled by alpha / rank.
        targets: "attention", or "all" for attention and feed-forward layers.
    """

    def __init__(self, *, rank: int, alpha: int, targets: str) -> None:
        if rank < 1:
            raise ConfigError(f"trainable.rank={rank}: must be >= 1")
        if alpha <= 0:
            raise ConfigError(f"trainable.alpha={alpha}: must be > 0, or the adapters do nothing")
        self._rank, self._alpha, self._targets = rank, alpha, targets

    def attach(self, model: ExportableModel, *, seed: int, reference: bool) -> None:
        """Add float32 adapters with seeded Gaussian A and zero B: the policy starts as the reference.

        In half precision most updates of a small learning rate would be rounded away.
        """
        from peft import LoraConfig

        network: Any = model.transformer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network.add_adapter(
                LoraConfig(
                    r=self._rank,
                    lora_alpha=self._alpha,
                    init_lora_weights="gaussian",
                    target_modules=model.lora_targets(self._targets),
                )
            )
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        network.eval()
        self._model = model

    def hold(self, weights: Weights) -> None:
        """Nothing: the reference needs no copy."""

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the network is the frozen reference."""
        network: Any = self._model.transformer
        network.disable_adapters()
        try:
            yield
        finally:
            network.enable_adapters()

    def export(self, folder: Path) -> None:
        """Write the adapters so that stock diffusers loads them."""
        from peft.utils import get_peft_model_state_dict

        network: Any = self._model.transformer
        metadata = network.peft_config["default"].to_dict()
        self._model.export_lora(folder, get_peft_model_state_dict(network), metadata)


@dataclass
class Full:
    """Every weight of the network; the reference is a copy made before training, kept only when it is needed."""

    def attach(self, model: ExportableModel, *, seed: int, reference: bool) -> None:
        """Make every weight trainable.

        Raises:
            ConfigError: the weights are in half precision, which rounds most updates away.
        """
        dtypes = {parameter.dtype for parameter in model.transformer.parameters()}
        if dtypes != {torch.float32}:
            raise ConfigError(
                "trainable=full needs model.dtype=float32: in half precision most updates would be rounded away. For "
                "arithmetic in bfloat16 add network.autocast=bfloat16, or train adapters: trainable=lora"
            )
        model.transformer.requires_grad_(True)
        self._model, self._wants_reference = model, reference

    def hold(self, weights: Weights) -> None:
        """Copy the reference from the weights as an engine has divided them."""
        self._weights = weights
        self._reference = [value.clone() for value in weights.local()] if self._wants_reference else []

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the network is the frozen reference."""
        if not self._reference:
            raise RuntimeError("attach(reference=False) keeps no reference")
        with self._weights.swapped(self._reference):
            yield

    def export(self, folder: Path) -> None:
        """Write the whole pipeline so that stock diffusers loads it."""
        self._model.export_full(folder)
