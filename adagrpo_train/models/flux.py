"""FLUX.1-dev and FLUX.1-schnell, and small models of the same classes. Nothing about RL."""

import torch
from torch import Tensor, nn

from adagrpo_train.errors import ConfigError
from adagrpo_train.functional import latents, schedules
from adagrpo_train.models.pipeline import PipelineModel
from adagrpo_train.types import Conditions


class FluxModel(PipelineModel):
    """A diffusers FluxPipeline as a flow model. Latents are [channels, height, width] like any other; the
    transformer sees them packed into tokens.

    Args:
        path, dtype, device, resolution, num_steps, decode_batch: as in PipelineModel.
        schedule: "flux" is the pipeline's own default grid: its scheduler's shift, which for FLUX.1-dev grows with the
            number of image tokens; "uniform" is linspace(1, 0, T + 1) under the scheduler config's fixed `shift`.
        guidance_scale: what the network is told the guidance scale is, where it was distilled with one; 0 for a model
            without that input, such as FLUX.1-schnell.
        max_sequence_length: T5 tokens, 1 to 512.

    Raises:
        ConfigError: the folder is missing or incomplete, or a setting is out of range.
    """

    evaluations_per_velocity = 1
    """Network rows per state: the guidance is inside the network."""

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
        max_sequence_length: int,
        decode_batch: int,
    ) -> None:
        from diffusers import FluxPipeline

        if schedule not in ("flux", "uniform"):
            raise ConfigError(f"model.schedule={schedule}: choose flux or uniform")
        if not 1 <= max_sequence_length <= 512:
            raise ConfigError(f"model.max_sequence_length={max_sequence_length}: must be 1 to 512 T5 tokens")
        super().__init__(
            pipeline_class=FluxPipeline,
            path=path,
            without=(),
            dtype=dtype,
            device=device,
            resolution=resolution,
            num_steps=num_steps,
            decode_batch=decode_batch,
        )
        self._schedule, self._max_sequence_length = schedule, max_sequence_length
        self.guidance_scale, self._guided = guidance_scale, bool(self.pipeline.transformer.config.guidance_embeds)
        if self._guided and guidance_scale < 0:
            raise ConfigError(f"model.guidance_scale={guidance_scale}: must be >= 0")
        if not self._guided and guidance_scale:
            raise ConfigError(
                f"model.guidance_scale={guidance_scale}: {path} has no guidance input, so the scale would do nothing; "
                "set model.guidance_scale=0.0"
            )

    @property
    def patch_size(self) -> int:
        return latents.PATCH

    @property
    def latent_channels(self) -> int:
        return self.pipeline.transformer.config.in_channels // latents.PATCH**2

    @property
    def sigmas(self) -> Tensor:
        """Time grid float32 [T + 1] from 1 to 0."""
        config = self.pipeline.scheduler.config
        if self._schedule == "uniform" or not config.use_dynamic_shifting:
            return schedules.shifted_sigmas(self.num_steps, shift=config.shift)
        return schedules.flux_sigmas(
            self.num_steps,
            image_seq_len=(self.latent_shape[-1] // latents.PATCH) ** 2,
            base_shift=config.base_shift,
            max_shift=config.max_shift,
            base_image_seq_len=config.base_image_seq_len,
            max_image_seq_len=config.max_image_seq_len,
        )

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Conditions:
        """Prompt embeddings of each text: T5's tokens, and CLIP's pooled one."""
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(texts),
            prompt_2=list(texts),
            device=self.device,
            max_sequence_length=self._max_sequence_length,
        )
        return Conditions(embeds, pooled)

    def blank_conditions(self, rows: int) -> Conditions:
        """Zeros of the shapes that encode() gives for so many texts; no text encoder is asked."""
        config = self.pipeline.transformer.config
        return Conditions(
            torch.zeros(
                (rows, self._max_sequence_length, config.joint_attention_dim), dtype=self.dtype, device=self.device
            ),
            torch.zeros((rows, config.pooled_projection_dim), dtype=self.dtype, device=self.device),
        )

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Velocity [R, *latent] in the network's dtype.

        The network's time is sigma in float32: in half precision the stock pipeline rounds 1000 sigma first, which
        moves some steps' time by up to a 256th.

        Args:
            network: the transformer, possibly wrapped for distributed training.
            x: [R, *latent] in the network's dtype.
            sigma: [R] float32.
            conditions: R rows.
        """
        height, width = x.shape[-2:]
        (prediction,) = network(
            hidden_states=latents.pack(x),
            timestep=sigma,
            guidance=torch.full_like(sigma, self.guidance_scale) if self._guided else None,
            pooled_projections=conditions.pooled_prompt_embeds,
            encoder_hidden_states=conditions.prompt_embeds,
            txt_ids=torch.zeros(conditions.prompt_embeds.shape[1], 3, device=x.device),
            img_ids=latents.position_ids(height, width, device=x.device),
            return_dict=False,
        )
        return latents.unpack(prediction, height=height, width=width)
