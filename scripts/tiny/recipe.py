"""Architecture and tokenizer of the bundled `tiny_sd3` model, and small functions shared by all scripts."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from rewards.shapes.grammar import CLASSES, WORDS, Scene, caption, difficulty_class, enumerate_scenes
from rewards.shapes.verifier import score

MAX_LENGTH = 13  # start + the 11 words of the longest caption + end
IMAGE_SIZE = 32
LATENT_CHANNELS = 4
LATENT_SIZE = 8
HIDDEN = 128
HEADS = 4
LAYERS = 5
TEXT_WIDTH = 64
WORD_SCALE = 0.3  # deviation of the initial word embeddings; with CLIP's own 0.02 all words start nearly alike
START, END = "<|startoftext|>", "<|endoftext|>"
SAMPLING = {"max_sequence_length": 0}  # arguments that every call of the pipeline needs


def setup(*, seed: int, threads: int) -> None:
    """Seeds torch, fixes the number of threads and turns on logging to the standard error stream."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)


def word_ids(text: str) -> list[int]:
    """Returns the ids of a caption as the pipeline's tokenizer pads them: start, one id per word, end, end, ..."""
    ids = [0, *(WORDS.index(word) + 2 for word in text.split()), 1]
    return ids + [1] * (MAX_LENGTH - len(ids))


def build_tokenizer() -> CLIPTokenizer:
    """Builds the tokenizer by hand, so that its ids depend on nothing but the word list.

    Ids 0 and 1 are the start and the end marker (the end marker also pads and stands for unknown text), ids from 2 on
    are the words of the grammar; then come single letters and the prefixes that the merges go through.
    """
    vocabulary = {START: 0, END: 1}
    for word in WORDS:
        vocabulary[word + "</w>"] = len(vocabulary)
    for letter in "abcdefghijklmnopqrstuvwxyz":
        for entry in (letter, letter + "</w>"):
            vocabulary.setdefault(entry, len(vocabulary))
    merges: list[tuple[str, str]] = []
    for word in sorted(WORDS, key=lambda word: (-len(word), word)):
        symbols = [*word[:-1], word[-1] + "</w>"]
        prefix = symbols[0]
        for symbol in symbols[1:]:
            if (prefix, symbol) not in merges:
                merges.append((prefix, symbol))
                vocabulary.setdefault(prefix + symbol, len(vocabulary))
            prefix += symbol
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH, unk_token=END)
    for word in WORDS:
        ids = tokenizer(word).input_ids
        if ids != [0, WORDS.index(word) + 2, 1]:
            raise ValueError(f"the tokenizer splits {word!r} into {ids}")
    return tokenizer


def build_vae() -> AutoencoderKL:
    """Builds the untrained autoencoder: 32 x 32 x 3 pixels to 8 x 8 x 4 latents."""
    channels = (16, 32, 32)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_text_encoder(vocabulary_size: int) -> CLIPTextModelWithProjection:
    """Builds one untrained text encoder of two layers."""
    config = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_act="gelu",
    )
    encoder = CLIPTextModelWithProjection(config)
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=WORD_SCALE)
    return encoder


def build_transformer() -> SD3Transformer2DModel:
    """Builds the untrained velocity model over 16 latent patches and `MAX_LENGTH` text tokens.

    The table of patch positions, which is a part of the saved weights, is replaced by `position_table`.
    """
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HIDDEN // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=HIDDEN,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE // 2,
        qk_norm="rms_norm",
    )
    transformer.pos_embed.pos_embed.copy_(position_table())
    return transformer


def position_table() -> torch.Tensor:
    """Returns one code per latent patch, float32 of shape ``[1, 16, 128]``: 64 entries for its column, 64 for its row.

    The usual table spreads its frequencies over four decades, for grids of any size: on this 4 x 4 grid nearly all of
    its entries are constant. A model pretrained on 500,000 pictures with it, and with CLIP's own scale of word
    embeddings, still ignored "left of" and "above". Here the phase between neighbours is 1/23 to 1/2 turn.
    """
    side, quarter = LATENT_SIZE // 2, HIDDEN // 8
    place = torch.arange(side, dtype=torch.float32)[:, None]
    frequency = torch.linspace(math.pi / 8, math.pi, quarter)
    waves = [f(place * frequency * k + phase) for k, phase in ((1.0, 0.5), (0.7, 0.0)) for f in (torch.sin, torch.cos)]
    axis = torch.cat(waves, 1)
    columns = axis[None].expand(side, side, -1)
    rows = axis[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], -1).reshape(1, side * side, HIDDEN)


class FlowModel(torch.nn.Module):
    """The three networks that are trained together on latents."""

    def __init__(self) -> None:
        super().__init__()
        vocabulary_size = len(build_tokenizer())
        self.transformer = build_transformer()
        self.text_encoder = build_text_encoder(vocabulary_size)
        self.text_encoder_2 = build_text_encoder(vocabulary_size)

    def encode_text(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes captions exactly as `StableDiffusion3Pipeline` does with ``max_sequence_length=0``.

        Args:
            ids: Token ids of shape ``[B, MAX_LENGTH]``.

        Returns:
            Text tokens of shape ``[B, MAX_LENGTH, 128]`` and pooled text of shape ``[B, 128]``.
        """
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return tokens, torch.cat([first.text_embeds, second.text_embeds], -1)

    def velocity(
        self, latents: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        """Predicts the velocity (noise minus data).

        Args:
            latents: Noisy latents of shape ``[B, 4, 8, 8]``.
            sigma: Noise levels of shape ``[B]`` in ``[0, 1]``.
            tokens: Text tokens of shape ``[B, MAX_LENGTH, 128]``.
            pooled: Pooled text of shape ``[B, 128]``.

        Returns:
            Velocity of shape ``[B, 4, 8, 8]``.
        """
        return self.transformer(
            hidden_states=latents,
            timestep=sigma * 1000,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


def assemble(model: FlowModel, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Puts the trained parts together as a stock pipeline without the third text encoder."""
    return StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=build_tokenizer(),
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=build_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """Loads an exported pipeline in float32."""
    return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)


def to_model_range(images: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Maps uint8 pictures ``[B, 32, 32, 3]`` to float32 ``[B, 3, 32, 32]`` in ``[-1, 1]``."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Maps floats ``[B, 3, 32, 32]`` around ``[-1, 1]`` to uint8 pictures ``[B, 32, 32, 3]``."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def load_scenes(path: Path) -> list[Scene]:
    """Loads scene numbers saved by `make_data` and looks them up in the grammar."""
    scenes = enumerate_scenes()
    return [scenes[int(index)] for index in np.load(path)]


def score_by_class(images: npt.NDArray[np.uint8], scenes: list[Scene]) -> dict[str, tuple[float, float, int]]:
    """Returns mean smooth score, mean strict score and count per class, and over all pictures as ``"all"``.

    Args:
        images: uint8 of shape ``[B, 32, 32, 3]``.
        scenes: B scenes.
    """
    results = [score(image, caption(scene)) for image, scene in zip(images, scenes, strict=True)]
    names = [difficulty_class(scene) for scene in scenes]
    table: dict[str, tuple[float, float, int]] = {}
    for name in ("all", *CLASSES):
        chosen = [result for result, member in zip(results, names, strict=True) if name in ("all", member)]
        if chosen:
            smooth = sum(result.smooth for result in chosen) / len(chosen)
            table[name] = (smooth, sum(result.strict for result in chosen) / len(chosen), len(chosen))
    return table


def format_table(table: dict[str, tuple[float, float, int]]) -> str:
    """Formats a table of `score_by_class` on one line as ``class smooth/strict``."""
    return "  ".join(f"{name} {smooth:.3f}/{strict:.3f}" for name, (smooth, strict, _) in table.items())
