"""What can be known of a run without weights: its model on torch's meta device, where tensors have shapes only."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from adagrpo_train import build
from adagrpo_train.preflight import counts, sizes
from adagrpo_train.preflight.counts import Counts
from adagrpo_train.runtime.network import repeated_blocks, saved_bytes
from adagrpo_train.settings import Settings
from adagrpo_train.trainer import batches_of_each
from adagrpo_train.update import check_batches

META = torch.device("meta")


@dataclass(frozen=True)
class Work:
    """What a call of the network, and decoding an image, take. A multiplication and an addition are two operations."""

    forward: float  # operations of a state
    backward: float  # operations of a state, what checkpointing computes again aside
    decode: float  # operations of an image
    kept: float  # bytes that a call of the update keeps for its backward pass
    checkpointed: float  # the same with gradient checkpointing


class Outline:
    """A run without weights, engine or rewards, as one of so many processes would hold it.

    Raises:
        ConfigError: the model's shapes are not known, or counts that cannot work.
    """

    def __init__(self, settings: Settings, *, processes: int) -> None:
        values = settings.values
        self._settings, self.processes = settings, processes
        self.model: Any = build.make(values["model"], "model", device=META)
        choices = build.make_choices(values)
        curriculum = choices.curriculum
        sampler = build.make_sampler(settings, self.model, META)
        check_batches(batches_of_each(curriculum, sampler, processes), choices.visits, processes)
        trainable = build.make(values["trainable"], "trainable")
        trainable.attach(self.model, seed=values["seed"], reference=False)
        self.trained = [parameter for parameter in self.model.transformer.parameters() if parameter.requires_grad]
        self.counts: Counts = counts.count(
            values,
            sampler=sampler,
            curriculum=curriculum,
            schedule=choices.schedule,
            visits=choices.visits,
            evaluations_per_state=self.model.evaluations_per_velocity,
            processes=processes,
        )
        self._states = min(values["update_micro_batch"], max(sampler.batch_sizes(curriculum.chosen // processes)))

    def written(self) -> sizes.Written:
        """Bytes of checkpoints, export and records."""
        trained = [parameter.numel() for parameter in self.trained]
        return sizes.written(self._settings.values, self.model, trained, self.counts)

    def held(self) -> dict[str, float]:
        """Bytes of one process by what they are for; see sizes.held()."""
        return sizes.held(
            self._settings.values,
            self.model,
            self.trained,
            engine=self._settings.choices["engine"],
            processes=self.processes,
            text_encoders=self._settings.values["prompt_cache"] is None,
        )

    def work(self) -> Work:
        """Of the network and of the decoder. Text encoders and rewards are not counted."""
        with self._computing():
            one, two = self._call(1, work=True), self._call(2, work=False)
            with FlopCounterMode(display=False) as decode, torch.no_grad():
                latents = torch.zeros((1, *self.model.latent_shape), dtype=self.model.dtype, device=META)
                self.model.pipeline.vae.decode(latents, return_dict=False)
        more = self._states - 1
        return Work(
            one.forward,
            one.backward,
            decode.get_total_flops(),
            one.kept + more * (two.kept - one.kept),
            one.checkpointed + more * (two.checkpointed - one.checkpointed),
        )

    def _call(self, states: int, *, work: bool) -> Work:
        """Of a velocity call of so many states, nothing decoded; without `work` what is kept alone."""
        network, meter = self.model.transformer, BlockMeter(work=work)
        with meter.installed(network):
            with FlopCounterMode(display=False) as outside:
                kept = saved_bytes(network, lambda: self._velocity(states))
            around = outside.get_total_flops() - meter.counted
        blocks = meter.blocks
        return Work(
            around + sum(block.forward for block in blocks),
            2 * around + sum(block.backward for block in blocks),
            0.0,
            kept + sum(block.kept for block in blocks),
            kept + sum(block.checkpointed for block in blocks) + max(block.kept for block in blocks),
        )

    def _velocity(self, states: int) -> Tensor:
        x = torch.zeros((states, *self.model.latent_shape), dtype=self.model.dtype, device=META)
        sigma = torch.zeros(states, device=META)
        return self.model.velocity(self.model.transformer, x, sigma, self.model.blank_conditions(states))

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Attention as GPUs compute it, and the arithmetic that the run asks for."""
        autocast = self._settings.values["network"]["autocast"] is not None
        with _FusedAttention(), _Autocast() if autocast else nullcontext(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight", category=UserWarning)
            yield


class BlockMeter:
    """Measures one block of each kind in a call of a network; those like it have the same, and are passed over.

    Args:
        work: whether operations are counted, too.

    Attributes:
        blocks: of every block, in the order they are called; of `Work` the decoding aside.
        counted: operations that a counter around the call has counted inside of blocks.
    """

    def __init__(self, *, work: bool) -> None:
        self._work = work
        self.blocks: list[Work] = []
        self.counted = 0.0
        self._known: dict[Any, tuple[Work, Any]] = {}

    @contextmanager
    def installed(self, network: nn.Module) -> Iterator[None]:
        """Inside, calls of the network are measured; their output has the right shape and comes from nowhere."""
        blocks = list(repeated_blocks(network))
        for block in blocks:
            block.forward = partial(self._call, block, block.forward)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def _call(self, block: nn.Module, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        tensors = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor)]
        weights = ((name, p.shape, p.requires_grad) for name, p in block.named_parameters())
        kind = (type(block), *(tensor.requires_grad for tensor in tensors), *weights)
        if kind not in self._known:
            self._known[kind] = self._measured(block, partial(forward, *_entered(arguments), **_entered(named)))
        work, outputs = self._known[kind]
        self.blocks.append(replace(work, checkpointed=sizes.nbytes(tensors)))
        return tree_map(lambda output: output if output is None else torch.zeros_like(output).requires_grad_(), outputs)

    def _measured(self, block: nn.Module, call: Callable[[], Any]) -> tuple[Work, Any]:
        """What a block takes, and what it returns."""
        outputs: list[Any] = []

        def first() -> Tensor:
            outputs.append(call())
            return _tensors(outputs[0])[0]

        kept = saved_bytes(block, first)
        if not self._work:
            return Work(0.0, 0.0, 0.0, kept, 0.0), _entered(outputs[0])
        with FlopCounterMode(display=False) as ahead, torch.no_grad():
            call()
        unseen = torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept)  # by whoever looks on
        with FlopCounterMode(display=False) as both, torch.enable_grad(), unseen:
            torch.stack([output.float().mean() for output in _tensors(call())]).sum().backward()
        forward = float(ahead.get_total_flops())
        self.counted += 2 * forward + both.get_total_flops()  # once above, where what is kept was noted
        return Work(forward, both.get_total_flops() - forward, 0.0, kept, 0.0), _entered(outputs[0])


def _entered(values: Any) -> Any:
    """The same values without their past; what comes from a trained layer still wants a gradient."""
    return tree_map(
        lambda value: value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value,
        values,
    )


def _tensors(outputs: Any) -> list[Tensor]:
    return [output for output in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(output, Tensor)]


class _FusedAttention(TorchFunctionMode):
    """On the meta device torch falls back to attention that keeps every weight of every token to every other, which no
    GPU does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (named[name] for name in ("query", "key", "value"))
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return func(*args, **kwargs)


class _Autocast(TorchFunctionMode):
    """Matrix products in bfloat16, as torch.autocast makes them."""

    _PRODUCTS = (functional.linear, functional.scaled_dot_product_attention, torch.matmul, torch.bmm)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._PRODUCTS:
            args = tuple(_bfloat16(value) for value in args)
            kwargs = {name: _bfloat16(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _bfloat16(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.dtype == torch.float32 else value
