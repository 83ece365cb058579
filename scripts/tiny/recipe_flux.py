"""Architecture and tokenizer of the bundled `tiny_flux` model; `recipe` has what it shares with `tiny_sd3`."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

from rewards.shapes.grammar import WORDS
from scripts.tiny import recipe

T5_LENGTH = 12  # the 11 words of the longest caption + end
PATCHES = recipe.LATENT_SIZE // 2  # patches a side: FLUX packs 2 x 2 latent pixels into one
VAE_FACTOR = recipe.IMAGE_SIZE // recipe.LATENT_SIZE
PACKED_CHANNELS = 4 * recipe.LATENT_CHANNELS
DOUBLE_LAYERS = 2
SINGLE_LAYERS = 5
AXES_DIMS = (4, 14, 14)  # rotary entries of a head for: nothing (always 0), row, column
POSITION_SCALE = 1.5  # deviation of T5's initial biases of relative position
GUIDANCE = (1.0, 5.0)  # range of the embedded guidance in training
SAMPLING = {"height": recipe.IMAGE_SIZE, "width": recipe.IMAGE_SIZE, "max_sequence_length": T5_LENGTH}
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def word_ids(text: str) -> list[int]:
    """Returns the ids of a caption as both tokenizers of the pipeline pad them: 13 for CLIP, then 12 for T5."""
    ids = [*(WORDS.index(word) + 3 for word in text.split()), 1]
    return recipe.word_ids(text) + ids + [0] * (T5_LENGTH - len(ids))


def build_t5_tokenizer() -> T5TokenizerFast:
    """Builds the T5 tokenizer by hand: ids 0 to 2 are padding, end and unknown text, then come the words."""
    pieces = [(marker, 0.0) for marker in (PAD, END, UNKNOWN)] + [("▁" + word, 0.0) for word in WORDS]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)
    for word in WORDS:
        ids = tokenizer(word).input_ids
        if ids != [WORDS.index(word) + 3, 1]:
            raise ValueError(f"the tokenizer splits {word!r} into {ids}")
    return tokenizer


def build_clip(vocabulary_size: int) -> CLIPTextModel:
    """Builds the untrained text encoder whose pooled output modulates the transformer."""
    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=recipe.TEXT_WIDTH,
        intermediate_size=2 * recipe.TEXT_WIDTH,
        projection_dim=recipe.TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=recipe.MAX_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_act="gelu",
    )
    encoder = CLIPTextModel(config)
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=recipe.WORD_SCALE)
    return encoder


def build_t5(vocabulary_size: int) -> T5EncoderModel:
    """Builds the untrained text encoder whose tokens the transformer attends to.

    FLUX gives all text tokens the same rotary position, so that the order of words reaches the transformer through the
    relative positions of T5 alone. They start with `POSITION_SCALE` instead of T5's 1/8, at which every word sees its
    neighbours and the far end of the caption alike; word embeddings start with T5's own deviation of 1, well apart.
    """
    config = T5Config(
        vocab_size=vocabulary_size,
        d_model=recipe.TEXT_WIDTH,
        d_kv=recipe.TEXT_WIDTH // 4,
        d_ff=2 * recipe.TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        relative_attention_max_distance=16,  # a bucket of its own for every distance within a caption
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        use_cache=False,
        is_encoder_decoder=False,
    )
    encoder = T5EncoderModel(config)
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    torch.nn.init.normal_(bias.weight, std=POSITION_SCALE)
    return encoder


def build_transformer() -> FluxTransformer2DModel:
    """Builds the untrained velocity model over 16 packed patches and `T5_LENGTH` text tokens.

    A rotary axis turns its pairs of entries by 1, 10000^(-1/7), 10000^(-2/7), ... radians per patch. Over four patches
    the first pair makes half a turn and the second an eighth: enough to tell rows and columns apart, without any two of
    them looking the same. The embedded guidance starts without effect.
    """
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=PACKED_CHANNELS,
        num_layers=DOUBLE_LAYERS,
        num_single_layers=SINGLE_LAYERS,
        attention_head_dim=recipe.HIDDEN // recipe.HEADS,
        num_attention_heads=recipe.HEADS,
        joint_attention_dim=recipe.TEXT_WIDTH,
        pooled_projection_dim=recipe.TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=AXES_DIMS,
    )
    last = transformer.time_text_embed.guidance_embedder.linear_2
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    return transformer


class FlowModel(torch.nn.Module):
    """The three networks that are trained together on latents."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = build_transformer()
        self.text_encoder = build_clip(len(recipe.build_tokenizer()))
        self.text_encoder_2 = build_t5(len(build_t5_tokenizer()))
        grid = FluxPipeline._prepare_latent_image_ids(1, PATCHES, PATCHES, "cpu", torch.float32)
        self.register_buffer("image_ids", grid, persistent=False)
        self.register_buffer("text_ids", torch.zeros(T5_LENGTH, 3), persistent=False)

    def encode_text(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes captions exactly as `FluxPipeline` does with ``max_sequence_length=12``.

        Args:
            ids: Token ids of `word_ids`, of shape ``[B, 25]``.

        Returns:
            Text tokens of shape ``[B, 12, 64]`` and pooled text of shape ``[B, 64]``.
        """
        clip, t5 = ids.split([recipe.MAX_LENGTH, T5_LENGTH], dim=1)
        return self.text_encoder_2(t5).last_hidden_state, self.text_encoder(clip).pooler_output

    def velocity(
        self, latents: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        """Predicts the velocity (noise minus data), with a random embedded guidance that the targets do not depend on.

        Args:
            latents: Noisy latents of shape ``[B, 4, 8, 8]``.
            sigma: Noise levels of shape ``[B]`` in ``[0, 1]``.
            tokens: Text tokens of shape ``[B, 12, 64]``.
            pooled: Pooled text of shape ``[B, 64]``.

        Returns:
            Velocity of shape ``[B, 4, 8, 8]``.
        """
        low, high = GUIDANCE
        packed = self.transformer(
            hidden_states=_pack(latents),
            timestep=sigma,
            guidance=low + (high - low) * torch.rand(len(sigma)),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(packed, recipe.IMAGE_SIZE, recipe.IMAGE_SIZE, VAE_FACTOR)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Builds a scheduler that shifts sigma by the number of patches as FLUX.1-dev's does, but from 16 patches up.

    FLUX.1-dev interpolates the logarithm of the shift from 0.5 at 256 patches to 1.15 at 4096.
    """
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,  # as in FLUX.1-dev; without effect where the shift is dynamic
        use_dynamic_shifting=True,
        base_image_seq_len=PATCHES**2,
        max_image_seq_len=16 * PATCHES**2,
        base_shift=0.5,
        max_shift=1.15,
    )


def assemble(model: FlowModel, vae: AutoencoderKL) -> FluxPipeline:
    """Puts the trained parts together as a stock pipeline."""
    return FluxPipeline(
        transformer=model.transformer,
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=recipe.build_tokenizer(),
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=build_t5_tokenizer(),
    )


def load_pipeline(folder: Path) -> FluxPipeline:
    """Loads an exported pipeline in float32."""
    return FluxPipeline.from_pretrained(folder, dtype=torch.float32)


def _pack(latents: torch.Tensor) -> torch.Tensor:
    size = recipe.LATENT_SIZE
    return FluxPipeline._pack_latents(latents, len(latents), recipe.LATENT_CHANNELS, size, size)
