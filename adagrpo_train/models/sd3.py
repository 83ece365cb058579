"""Stable Diffusion 3 and 3.5, and small models of the same classes. Nothing about RL."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from adagrpo_train.errors import ConfigError
from adagrpo_train.functional import schedules
from adagrpo_train.models.pipeline import PipelineModel
from adagrpo_train.types import Conditions

_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


class SD3Model(PipelineModel):
    """A diffusers StableDiffusion3Pipeline as a flow model.

    Args:
        path, dtype, device, resolution, num_steps, decode_batch: as in PipelineModel.
        schedule: "sd3" is the pipeline's own default grid (its scheduler config's shift); "uniform" is
            linspace(1, 0, T + 1) under the same shift, without the tiny last step of the former.
        guidance_scale: classifier-free guidance in rollouts, training and evaluation; 1 is none.
        text_encoder_3: whether to load the T5 encoder.
        max_sequence_length: T5 tokens; 0 without T5. diffusers pads with that many zero tokens when T5 is absent.

    Raises:
        ConfigError: the folder is missing or incomplete, or a setting is out of range.
    """

    lora_scopes: ClassVar = {"attention": _ATTENTION, "all": _ATTENTION + _FEED_FORWARD}

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
        from diffusers import StableDiffusion3Pipeline

        if schedule not in ("sd3", "uniform"):
            raise ConfigError(f"model.schedule={schedule}: choose sd3 or uniform")
        if guidance_scale < 1:
            raise ConfigError(f"model.guidance_scale={guidance_scale}: must be >= 1; 1 switches guidance off")
        self._schedule, self.guidance_scale = schedule, guidance_scale
        self._max_sequence_length = max_sequence_length
        super().__init__(
            pipeline_class=StableDiffusion3Pipeline,
            path=path,
            without=() if text_encoder_3 else ("text_encoder_3", "tokenizer_3"),
            dtype=dtype,
            device=device,
            resolution=resolution,
            num_steps=num_steps,
            decode_batch=decode_batch,
        )

    @property
    def patch_size(self) -> int:
        return self.pipeline.patch_size

    @property
    def latent_channels(self) -> int:
        return self.pipeline.transformer.config.in_channels

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
