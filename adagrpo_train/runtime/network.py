"""How the network is computed: its arithmetic, compiled blocks, and what is kept for the backward pass."""

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adagrpo_train.errors import ConfigError
from adagrpo_train.types import Conditions

_MARGIN = 1.2
"""Of what is kept for the backward pass: it needs room for its own results, too."""
_STATE_BYTES = 8
"""Of a weight's optimizer state: two float32 numbers, as Adam has them."""
_RECOMPILE_LIMIT = 64
"""Programs of one block: by kind of block, with and without gradient, with and without adapters, by batch size."""

_log = logging.getLogger(__name__)


class ComputedModel(Protocol):
    """What the network's computation asks of a flow model."""

    dtype: torch.dtype

    @property
    def transformer(self) -> nn.Module: ...
    @property
    def latent_shape(self) -> tuple[int, ...]: ...
    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor: ...


class Computation:
    """Sets how a model's transformer is computed. What is trained stays the same.

    Args:
        model: its adapters attached, not yet wrapped for several processes.
        device: where it lives.
        autocast: "bfloat16" makes matrix products in bfloat16 while the weights stay float32, so that small updates
            are not rounded away; None computes in the weights' dtype.
        gradient_checkpointing: "always" keeps only what enters each block for the backward pass and computes the block
            once more there, bit for bit; "never" keeps everything; "auto" measures whether everything fits into the
            free memory of the GPU, is "always" where weights are divided among processes, and "never" on a CPU.
        compile: whether the blocks of the transformer go through torch.compile.

    Raises:
        ConfigError: a setting is unknown or does not fit the model.
    """

    def __init__(
        self,
        model: ComputedModel,
        device: torch.device,
        *,
        autocast: str | None,
        gradient_checkpointing: str,
        compile: bool,
    ) -> None:
        if gradient_checkpointing not in ("auto", "always", "never"):
            raise ConfigError(f"network.gradient_checkpointing={gradient_checkpointing}: choose auto, always or never")
        if autocast not in (None, "bfloat16"):
            raise ConfigError(
                f"network.autocast={autocast}: choose bfloat16 or null; gradients in float16 would vanish without a "
                "loss scale"
            )
        if autocast and model.dtype != torch.float32:
            raise ConfigError(
                f"network.autocast={autocast}: needs model.dtype=float32; weights in another type are computed in it"
            )
        self._model, self._device, self._checkpointing = model, device, gradient_checkpointing
        network = model.transformer
        if autocast:
            _compute_in_bfloat16(network, device)
        if compile:
            torch._dynamo.config.recompile_limit = max(_RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
            for block in repeated_blocks(network):
                block.compile()
        if gradient_checkpointing == "always":
            self._checkpoint()

    def prepare_training(
        self, conditions: Callable[[], Conditions], states: int, anyone: Callable[[bool], bool], *, divided: bool
    ) -> None:
        """Decide what is kept for the backward pass; called once all else lies in memory.

        Args:
            conditions: gives one row, any.
            states: most states per network call of the update.
            anyone: whether any process says so; all of them do the same.
            divided: whether processes hold shares of the weights. A process that ran out of memory while measuring
                would leave the others waiting for its share, so that "auto" is "always" there.

        Raises:
            ConfigError: the weights' dtype cannot be trained in.
        """
        if self._model.dtype == torch.float16:
            raise ConfigError(
                "model.dtype=float16: gradients in float16 vanish without a loss scale, which this version does not "
                "have; train with model.dtype=bfloat16, or model.dtype=float32 network.autocast=bfloat16"
            )
        if self._checkpointing != "auto":
            return
        on_gpu = self._device.type == "cuda"
        if (on_gpu and divided) or anyone(on_gpu and not self._fits(conditions(), states)):
            self._checkpoint()

    def _fits(self, conditions: Conditions, states: int) -> bool:
        trained = [p for p in self._model.transformer.parameters() if p.requires_grad]
        own = sum(p.numel() * (p.element_size() + _STATE_BYTES) for p in trained)
        free, total = torch.cuda.mem_get_info(self._device)
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        try:
            kept = self.kept_bytes(conditions, states)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            kept = total
        fits = _MARGIN * kept + own < free
        _log.info(
            "gradient checkpointing %s: an update of %d states keeps %.1f GB, its weights' gradients and state take "
            "%.1f GB, %.1f GB are free", "off" if fits else "on", states, kept / 1e9, own / 1e9, free / 1e9,
        )  # fmt: skip
        return fits

    def kept_bytes(self, conditions: Conditions, states: int) -> int:
        """Bytes that a network call of so many states keeps for its backward pass, from calls of one and of two."""
        one = self._kept_bytes(conditions, 1)
        return one + (states - 1) * (self._kept_bytes(conditions, 2) - one) if states > 1 else one

    def _kept_bytes(self, conditions: Conditions, states: int) -> int:
        model = self._model
        x = torch.zeros((states, *model.latent_shape), dtype=model.dtype, device=self._device)
        sigma = torch.full((states,), 0.5, device=self._device)
        rows = conditions[torch.zeros(states, dtype=torch.long, device=self._device)]
        # Programs for batches that nobody needs would not only take minutes: a second size makes torch compile for any.
        with torch.compiler.set_stance("force_eager"):
            return saved_bytes(model.transformer, lambda: model.velocity(model.transformer, x, sigma, rows))

    def _checkpoint(self) -> None:
        network: Any = self._model.transformer
        network.enable_gradient_checkpointing()


def repeated_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a transformer: the members of the lists it holds."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from child


def saved_bytes(network: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct tensors that a call of a network keeps for its backward pass, its weights aside."""
    # Not by address: on the meta device all have the same.
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor.detach()  # itself it would hold the graph that holds it

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()  # until it goes, what is kept keeps its place
    del output
    return sum(kept.values())


def _compute_in_bfloat16(network: nn.Module, device: torch.device) -> None:
    """Inside the module, where no wrapper for several processes can switch it off again."""
    # The weights of norms stay float32, as they should; torch says that its fused kernel does not take that.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight", category=UserWarning)
    forward = network.forward

    def autocast_forward(*arguments: Any, **named: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return forward(*arguments, **named)

    network.forward = autocast_forward
