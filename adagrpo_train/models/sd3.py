"""Stable Diffusion 3 and 3.5, and small models of the same classes. Nothing about RL."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adagrpo_train.errors import ConfigError
from adagrpo_train.functional import schedules
from adagrpo_train.types import Conditions

_LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
_FEED_FORWARD_TARGETS = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


class SD3Model:
    """A diffusers StableDiffusion3Pipeline as a flow model: encode, velocity, decode.

    Args:
        path: folder in diffusers' layout, or a hub id.
        dtype: "float32", "bfloat16" or "float16"; of all weights and of the latents the network sees.
        device: where everything lives.
        resolution: image height and width in pixels.
        num_steps: T, sampling steps of rollouts and of evaluation.
        schedule: "sd3" is the pipeline's own default grid (its scheduler config's shift); "uniform" is
            linspace(1, 0, T + 1) under the same shift, without the tiny last step of the former.
        guidance_scale: classifier-free guidance in rollouts, training and evaluation; 1 is none.
        text_encoder_3: whether to load the T5 encoder.
        max_sequence_length: T5 tokens; 0 without T5. diffusers pads with that many zero tokens when T5 is absent.
        decode_batch: most images decoded at once.

    Raises:
        ConfigError: the folder is missing or incomplete, or a setting is out of range.
    """

    def __init__(
        self,
        *,
        path: str,
        dtype: str,
        device: torch.device,
        resolution: int,
        num_steps: int,
        schedule: str,
        guidance_scale: float,
        text_encoder_3: bool,
        max_sequence_length: int,
        decode_batch: int,
    ) -> None:
        if num_steps < 2:
            raise ConfigError(f"model.num_steps={num_steps}: need at least 2, one of them stochastic")
        if schedule not in ("sd3", "uniform"):
            raise ConfigError(f"model.schedule={schedule}: choose sd3 or uniform")
        if decode_batch < 1:
            raise ConfigError(f"model.decode_batch={decode_batch}: must be >= 1")
        if guidance_scale < 1:
            raise ConfigError(f"model.guidance_scale={guidance_scale}: must be >= 1; 1 switches guidance off")
        self.dtype, self.device = _dtype(dtype), device
        self.pipeline = _load(path, self.dtype, text_encoder_3).to(device)
        self.num_steps, self._schedule, self.guidance_scale = num_steps, schedule, guidance_scale
        self._max_sequence_length, self._decode_batch = max_sequence_length, decode_batch
        if resolution % (self.pipeline.vae_scale_factor * self.pipeline.patch_size):
            step = self.pipeline.vae_scale_factor * self.pipeline.patch_size
            raise ConfigError(f"model.resolution={resolution}: must be a multiple of {step}")
        self._resolution = resolution
        for part in (self.pipeline.vae, self.pipeline.transformer, *self._text_encoders()):
            part.requires_grad_(False)
            part.eval()

    @property
    def transformer(self) -> nn.Module:
        return self.pipeline.transformer

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self._resolution // self.pipeline.vae_scale_factor
        return (self.pipeline.transformer.config.in_channels, side, side)

    @property
    def sigmas(self) -> Tensor:
        """Time grid float32 [T + 1] from 1 to 0."""
        shift = self.pipeline.scheduler.config.shift
        if self._schedule == "sd3":
            return schedules.sd3_sigmas(self.num_steps, shift=shift)
        return schedules.shifted_sigmas(self.num_steps, shift=shift)

    @property
    def evaluations_per_velocity(self) -> int:
        """Network rows per state: 2 with classifier-free guidance, else 1."""
        return 2 if self.guidance_scale > 1 else 1

    def lora_targets(self, scope: str) -> list[str]:
        """Module suffixes for adapters: "attention", or "all" for attention and feed-forward layers."""
        if scope not in ("attention", "all"):
            raise ConfigError(f"trainable.targets={scope}: choose attention or all")
        return list(_LORA_TARGETS if scope == "attention" else _LORA_TARGETS + _FEED_FORWARD_TARGETS)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Conditions:
        """Prompt embeddings of each text, by the pipeline's own encoders."""
        guided = self.guidance_scale > 1
        embeds, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt=list(texts),
            prompt_2=list(texts),
            prompt_3=list(texts),
            device=self.device,
            do_classifier_free_guidance=guided,
            max_sequence_length=self._max_sequence_length,
        )
        return Conditions(embeds, pooled, negative if guided else None, negative_pooled if guided else None)

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Guided velocity [R, *latent] in the network's dtype.

        Args:
            network: the transformer, possibly wrapped for distributed training.
            x: [R, *latent] in the network's dtype.
            sigma: [R] float32.
            conditions: R rows.
        """
        embeds, pooled = conditions.prompt_embeds, conditions.pooled_prompt_embeds
        timestep = sigma * self.pipeline.scheduler.config.num_train_timesteps
        if conditions.negative_prompt_embeds is not None and conditions.negative_pooled_prompt_embeds is not None:
            x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
            embeds = torch.cat([conditions.negative_prompt_embeds, embeds])
            pooled = torch.cat([conditions.negative_pooled_prompt_embeds, pooled])
        (prediction,) = network(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )
        if conditions.negative_prompt_embeds is None:
            return prediction
        unconditional, conditional = prediction.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

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
        """Write the whole pipeline for `StableDiffusion3Pipeline.from_pretrained(folder, ...)`."""
        self.pipeline.save_pretrained(str(folder))

    def _text_encoders(self) -> Iterator[nn.Module]:
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            encoder = getattr(self.pipeline, name)
            if encoder is not None:
                yield encoder


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"model.dtype={name}: choose one of {', '.join(known)}")
    return known[name]


def _load(path: str, dtype: torch.dtype, text_encoder_3: bool) -> Any:
    from diffusers import StableDiffusion3Pipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    looks_local = path.startswith((".", "/", "~")) or Path(path).exists()
    if looks_local and not (Path(path).expanduser() / "model_index.json").is_file():
        raise ConfigError(f"model.path={path}: no diffusers pipeline there (model_index.json is missing)")
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    without_t5 = {} if text_encoder_3 else {"text_encoder_3": None, "tokenizer_3": None}
    try:
        return StableDiffusion3Pipeline.from_pretrained(
            str(Path(path).expanduser()) if looks_local else path, dtype=dtype, **without_t5
        )
    except OSError as error:
        raise ConfigError(
            f"model.path={path}: cannot load the pipeline ({error}). A gated model needs its licence accepted on the "
            "hub and `hf auth login`; without network give a local folder"
        ) from error
