"""Stable Diffusion 3 and 3.5, and small models of the same classes. Nothing about RL."""

import torch
from torch import Tensor, nn

from adagrpo_train.errors import ConfigError
from adagrpo_train.functional import schedules
from adagrpo_train.models.pipeline import PipelineModel
from adagrpo_train.types import Conditions


class SD3Model(PipelineModel):
    """A diffusers StableDiffusion3Pipeline as a flow model.

    Args:
        path, dtype, device, resolution, num_steps, decode_batch: as in PipelineModel.
        schedule: "sd3" is the pipeline's own default grid (its scheduler config's shift); "uniform" is
            linspace(1, 0, T + 1) under the same shift, without the tiny last step of the former.
        guidance_scale: classifier-free guidance in rollouts, training and evaluation; 1 is none.
        guidance_gradient: whether training also differentiates the unconditional half of the guided velocity. Both
            halves are then one network call; without it they are two, the unconditional one without gradient. A
            rollout makes the same calls as training, so that the first ratio is exactly 1 either way.
        text_encoder_3: whether to load the T5 encoder.
        max_sequence_length: T5 tokens; 0 without T5. diffusers pads with that many zero tokens when T5 is absent.

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
        guidance_gradient: bool,
        text_encoder_3: bool,
        max_sequence_length: int,
        decode_batch: int,
    ) -> None:
        from diffusers import StableDiffusion3Pipeline

        if schedule not in ("sd3", "uniform"):
            raise ConfigError(f"model.schedule={schedule}: choose sd3 or uniform")
        if guidance_scale < 1:
            raise ConfigError(f"model.guidance_scale={guidance_scale}: must be >= 1; 1 switches guidance off")
        if not int(text_encoder_3) <= max_sequence_length <= 512:
            raise ConfigError(
                f"model.max_sequence_length={max_sequence_length}: must be 1 to 512 T5 tokens, or 0 with "
                "model.text_encoder_3=false"
            )
        self._schedule, self.guidance_scale, self._guidance_gradient = schedule, guidance_scale, guidance_gradient
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
        if self.pipeline.scheduler.config.use_dynamic_shifting:
            raise ConfigError(f"model.path={path}: use_dynamic_shifting of its scheduler is not supported for SD3")
        config = self.pipeline.transformer.config
        most = config.pos_embed_max_size * config.patch_size * self.pipeline.vae_scale_factor
        if resolution > most:
            raise ConfigError(f"model.resolution={resolution}: the model has positions for {most} pixels at most")

    @property
    def patch_size(self) -> int:
        return self.pipeline.transformer.config.patch_size

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

    def blank_conditions(self, rows: int) -> Conditions:
        """Zeros of the shapes that encode() gives for so many texts; no text encoder is asked."""
        config = self.pipeline.transformer.config
        tokens = self.pipeline.tokenizer_max_length + self._max_sequence_length
        embeds = torch.zeros((rows, tokens, config.joint_attention_dim), dtype=self.dtype, device=self.device)
        pooled = torch.zeros((rows, config.pooled_projection_dim), dtype=self.dtype, device=self.device)
        return Conditions(embeds, pooled, embeds, pooled) if self.guidance_scale > 1 else Conditions(embeds, pooled)

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Guided velocity [R, *latent] in the network's dtype.

        Args:
            network: the transformer, possibly wrapped for distributed training.
            x: [R, *latent] in the network's dtype.
            sigma: [R] float32.
            conditions: R rows.
        """
        timestep = sigma * self.pipeline.scheduler.config.num_train_timesteps

        def evaluate(x: Tensor, timestep: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
            (prediction,) = network(
                hidden_states=x,
                timestep=timestep,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                return_dict=False,
            )
            return prediction

        embeds, pooled = conditions.prompt_embeds, conditions.pooled_prompt_embeds
        negative, negative_pooled = conditions.negative_prompt_embeds, conditions.negative_pooled_prompt_embeds
        if negative is None or negative_pooled is None:
            return evaluate(x, timestep, embeds, pooled)
        if self._guidance_gradient:
            both = evaluate(
                torch.cat([x, x]),
                torch.cat([timestep, timestep]),
                torch.cat([negative, embeds]),
                torch.cat([negative_pooled, pooled]),
            )
            unconditional, conditional = both.chunk(2)
        else:
            with torch.no_grad():
                unconditional = evaluate(x, timestep, negative, negative_pooled)
            conditional = evaluate(x, timestep, embeds, pooled)
        return unconditional + self.guidance_scale * (conditional - unconditional)
