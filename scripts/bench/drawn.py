"""Stable Diffusion 3.5 medium and FLUX.1-dev at their real sizes, with random weights: nothing is downloaded.

Inside `models_drawn()` the project's model classes take such a pipeline where they would load one: `model.path` is the
name of a `Size`. Text encoders are left out; prompt embeddings are random numbers of the right shape, which depend on
the text alone. What it costs to compute does not depend on the values of the weights.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adagrpo_train.models import pipeline
from adagrpo_train.models.published import PIPELINES


@dataclass(frozen=True)
class Size:
    """Configurations of a pipeline's parts.

    Attributes:
        transformer_class: name in diffusers.
        transformer, vae, scheduler: keyword arguments of the parts' classes.
        parameters: of the transformer; 0 where none are published.
        clip_tokens: rows of the prompt embeddings before T5's.
    """

    transformer_class: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    parameters: int
    clip_tokens: int


_SD35_PARTS = PIPELINES["stabilityai/stable-diffusion-3.5-medium"]
_FLUX_PARTS = PIPELINES["black-forest-labs/FLUX.1-dev"]
_SD35, _SD35_VAE, _SD35_SCHEDULER = (dict(_SD35_PARTS[part][1]) for part in ("transformer", "vae", "scheduler"))
_FLUX, _FLUX_VAE, _FLUX_SCHEDULER = (dict(_FLUX_PARTS[part][1]) for part in ("transformer", "vae", "scheduler"))
_TINY_VAE: dict[str, Any] = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}

SIZES = {
    "sd35_medium": Size("SD3Transformer2DModel", _SD35, _SD35_VAE, _SD35_SCHEDULER, 2_243_171_520, 77),
    "flux_dev": Size("FluxTransformer2DModel", _FLUX, _FLUX_VAE, _FLUX_SCHEDULER, 11_901_408_320, 0),
    "sd35_medium_tiny": Size(
        "SD3Transformer2DModel",
        _SD35
        | {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
        | {"joint_attention_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 16, "sample_size": 8}
        | {"dual_attention_layers": (0,)},
        _SD35_VAE | _TINY_VAE,
        _SD35_SCHEDULER,
        0,
        77,
    ),
    "flux_dev_tiny": Size(
        "FluxTransformer2DModel",
        _FLUX
        | {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
        | {"joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4)},
        _FLUX_VAE | _TINY_VAE,
        _FLUX_SCHEDULER,
        0,
        0,
    ),
}


@contextmanager
def models_drawn(device: torch.device) -> Iterator[None]:
    """Inside, `model.path=NAME` of a `Size` gives random weights, drawn on the device in the model's own dtype."""
    load = pipeline.load

    def drawn(pipeline_class: Any, path: str, dtype: torch.dtype, without: Sequence[str], **_: Any) -> Any:
        return _pipeline(pipeline_class, SIZES[path], dtype, device)

    pipeline.load = drawn
    try:
        yield
    finally:
        pipeline.load = load


def transformer(size: Size, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The network alone, its weights as its class initialises them; on the device "meta" it has shapes only."""
    import diffusers

    return _drawn(lambda: getattr(diffusers, size.transformer_class)(**size.transformer), dtype, device)


def _pipeline(pipeline_class: Any, size: Size, dtype: torch.dtype, device: torch.device) -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    network = transformer(size, dtype, device)
    if size.parameters and (count := sum(p.numel() for p in network.parameters())) != size.parameters:
        raise ValueError(f"{size.transformer_class}: {count} parameters, the published model has {size.parameters}")
    vae = _drawn(lambda: AutoencoderKL(**size.vae), dtype, device)
    encoders = [f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
    absent = {name: None for name in encoders if name in pipeline_class.__init__.__annotations__}
    made = pipeline_class(
        transformer=network, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(**size.scheduler), **absent
    )
    made.encode_prompt = _Encoder(size, dtype, device)
    return made


def _drawn(make: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A module whose weights are drawn where they will live: through the CPU FLUX.1 would take minutes."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = make()
    finally:
        torch.set_default_dtype(default)
    # Position tables are made by numpy. diffusers' own `to` warns about modules that none of these have.
    return nn.Module.to(module, device, dtype)


@dataclass(frozen=True)
class _Encoder:
    """Stands for a pipeline's encode_prompt."""

    size: Size
    dtype: torch.dtype
    device: torch.device

    def __call__(self, prompt: list[str], max_sequence_length: int, **others: Any) -> tuple[Tensor, ...]:
        tokens = self.size.clip_tokens + max_sequence_length
        embeds = self._random(prompt, tokens, self.size.transformer["joint_attention_dim"])
        pooled = self._random(prompt, self.size.transformer["pooled_projection_dim"])
        if "do_classifier_free_guidance" in others:  # Stable Diffusion 3 gives the negative ones too
            return embeds, torch.zeros_like(embeds), pooled, torch.zeros_like(pooled)
        return embeds, pooled, torch.zeros(tokens, 3, device=self.device)

    def _random(self, texts: list[str], *shape: int) -> Tensor:
        generators = (torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts)
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device, self.dtype)
