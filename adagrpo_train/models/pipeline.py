"""What every diffusers text-to-image pipeline shares as a flow model: decoding, adapters, export. Nothing about RL."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from adagrpo_train.errors import ConfigError
from adagrpo_train.models.loading import load

ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""The attention of image and text together, in diffusers' names. Flow-GRPO adapts these in Stable Diffusion 3.5
(yifan123/flow_grpo@ac4c86e scripts/train_sd3.py)."""
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
"""Flow-GRPO and AdaGRPO adapt these too in FLUX.1 (Bujiazi/GRPO-Series@c4028f9 train.py)."""


class PipelineModel:
    """A diffusers pipeline with a transformer, a VAE and text encoders. A family adds its `encode`, its time grid
    `sigmas`, its `velocity`, the channels of a latent and the modules that adapters attach to.

    Args:
        pipeline_class: the diffusers class to load with.
        path: folder in diffusers' layout, or a hub id.
        without: components that are not loaded.
        dtype: "float32", "bfloat16" or "float16"; of all weights and of the latents the network sees.
        device: where everything lives.
        resolution: image height and width in pixels.
        num_steps: T, sampling steps of rollouts and of evaluation.
        decode_batch: most images decoded at once.

    Raises:
        ConfigError: the pipeline cannot be loaded, or a setting is out of range.
    """

    lora_scopes: ClassVar[Mapping[str, tuple[str, ...]]] = {"attention": ATTENTION, "all": ATTENTION + FEED_FORWARD}
    """Scope -> suffixes of the modules that adapters of that scope attach to."""

    def __init__(
        self,
        *,
        pipeline_class: type,
        path: str,
        without: Sequence[str],
        dtype: str,
        device: torch.device,
        resolution: int,
        num_steps: int,
        decode_batch: int,
    ) -> None:
        if num_steps < 2:
            raise ConfigError(f"model.num_steps={num_steps}: need at least 2, one of them stochastic")
        if decode_batch < 1:
            raise ConfigError(f"model.decode_batch={decode_batch}: must be >= 1")
        self.dtype, self.device = _dtype(dtype), device
        self.pipeline = load(pipeline_class, path, self.dtype, without, device=device).to(device)
        self.num_steps, self._decode_batch, self._path = num_steps, decode_batch, path
        self._without: tuple[str, ...] = tuple(without)
        self._released: tuple[str, ...] = ()
        step = self.pipeline.vae_scale_factor * self.patch_size
        if resolution < step or resolution % step:
            raise ConfigError(f"model.resolution={resolution}: must be a multiple of {step}")
        self._resolution = resolution
        for part in (self.pipeline.vae, self.pipeline.transformer, *self.text_encoders()):
            part.requires_grad_(False)
            part.eval()

    @property
    def transformer(self) -> nn.Module:
        return self.pipeline.transformer

    @property
    def patch_size(self) -> int:
        """Latent pixels, in height and in width, of one token of the transformer."""
        raise NotImplementedError

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        raise NotImplementedError

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self._resolution // self.pipeline.vae_scale_factor
        return (self.latent_channels, side, side)

    def lora_targets(self, scope: str) -> list[str]:
        """Module suffixes for adapters: "attention", or "all" for attention and feed-forward layers."""
        if scope not in self.lora_scopes:
            raise ConfigError(f"trainable.targets={scope}: choose {' or '.join(self.lora_scopes)}")
        return list(self.lora_scopes[scope])

    def text_components(self) -> dict[str, Any]:
        """The text encoders that are loaded, and the tokenizers, by name."""
        return {
            name: component
            for name, component in self.pipeline.components.items()
            if name.startswith(("text_encoder", "tokenizer")) and component is not None
        }

    def text_encoders(self) -> Iterator[nn.Module]:
        """The text encoders that are loaded."""
        return (part for part in self.text_components().values() if isinstance(part, nn.Module))

    def release_text_encoders(self) -> None:
        """Free the memory of the text encoders; encode() does not work any more."""
        self._released = tuple(name for name, part in self.text_components().items() if isinstance(part, nn.Module))
        self.pipeline.register_modules(**dict.fromkeys(self._released))
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def decode(self, x0: Tensor) -> np.ndarray:
        """Images uint8 [N, H, W, 3] of clean latents [N, *latent], as the stock pipeline makes them."""
        vae = self.pipeline.vae
        parts = []
        for latents in x0.split(self._decode_batch):
            scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
            images = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
            parts.append(self.pipeline.image_processor.postprocess(images, output_type="np"))
        return (np.concatenate(parts) * 255).round().astype(np.uint8)

    def export_lora(self, folder: Path, weights: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write adapters for `pipe.load_lora_weights(folder)`. The metadata carries alpha, without which stock
        diffusers would assume alpha = rank and scale them wrongly."""
        self.pipeline.save_lora_weights(
            str(folder), transformer_lora_layers=dict(weights), transformer_lora_adapter_metadata=metadata
        )

    def export_full(self, folder: Path) -> None:
        """Write the whole pipeline for `from_pretrained(folder, ...)` of its class."""
        released = self._released
        if released:
            again = load(
                type(self.pipeline),
                self._path,
                self.dtype,
                (*self._without, "transformer", "vae"),
                device=self.device,
            )
            self.pipeline.register_modules(**{name: getattr(again, name) for name in released})
        self.pipeline.save_pretrained(str(folder))
        if released:
            self.release_text_encoders()


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"model.dtype={name}: choose one of {', '.join(known)}")
    return known[name]
