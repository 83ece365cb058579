"""A CLIP of 0.7 million weights for the shapes grammar: a learned reward without a download."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewards.contract import RewardInfo
from rewards.shapes.grammar import WORDS
from rewards.vision import pixels as pixel_maths
from rewards.vision import weights as weight_files
from rewards.vision.base import CosineReward
from rewards.vision.torchvision_shim import import_open_clip, mend_torchvision

if TYPE_CHECKING:
    from torch import Tensor, nn

ASSETS = Path(__file__).parent / "assets" / "tiny_clip"
MEAN = STD = (0.5, 0.5, 0.5)
LIBRARIES = {"transformers": "transformers", "open_clip": "open_clip_torch"}
_PAD, _START, _FIRST_WORD = 0, 1, 2
_UNKNOWN, _END = _FIRST_WORD + len(WORDS), _FIRST_WORD + len(WORDS) + 1


class TinyClip(CosineReward):
    """Cosine of picture and caption, by an open_clip model trained here (scripts/tiny/train_clip.py).

    Checkpoint: rewards/assets/tiny_clip, Apache-2.0, half precision, in open_clip's format. Range [-1, 1].
    Preprocessing: CLIP's square from the middle, 32 pixels; one token per word of the grammar, other words are
    unknown, captions are cut to 14 words. Reference implementation: `open_clip.CLIP` with config.json. transformers'
    `CLIPModel` gives the same scores but for rounding, and is in the trainer's own environment.

    Pictures are scored one by one: a score is the same bit for bit whatever batch the picture came in, so that a run
    may be interrupted, or its reward moved behind a server, without changing it.

    It tells colours, counts, shapes and sizes apart, mostly also which colour goes with which shape, and is blind to
    relations ("left of"); the figures stand in the training script.

    Args:
        library: what computes, ``"transformers"`` or ``"open_clip"``.
    """

    def __init__(self, *, library: str = "transformers") -> None:
        super().__init__(max_batch=1)
        if library not in LIBRARIES:
            raise ValueError(f"library={library}: must be one of {', '.join(LIBRARIES)}")
        self._library = library
        self.libraries = (*CosineReward.libraries, LIBRARIES[library])

    @property
    def info(self) -> RewardInfo:
        return RewardInfo(
            name="tiny_clip",
            metrics=("tiny_clip",),
            value_range=(-1.0, 1.0),
            max_batch=64,
            tolerance=0.0,
            source="rewards/assets/tiny_clip, scripts/tiny/train_clip.py",
            licence="Apache-2.0",
            example_prompts=("a red circle", "two blue squares", "a red circle left of a green square", "a cat"),
        )

    def _build(self) -> nn.Module:
        config = json.loads((ASSETS / "config.json").read_text())
        state = weight_files.read(ASSETS / "model.safetensors", setting="rewards/assets/tiny_clip")
        self._size = config["vision_cfg"]["image_size"]
        if self._library == "open_clip":
            model = import_open_clip().CLIP(**config)
        else:
            mend_torchvision()
            from transformers import CLIPConfig, CLIPModel

            model = CLIPModel(CLIPConfig(**transformers_config(config)))
            state = transformers_names(state)
        weight_files.fill(model, state, setting="rewards/assets/tiny_clip")
        return model

    def _prepare(self, image: np.ndarray) -> Tensor:
        return pixel_maths.crop_to_square(image, self._size, centre="rounded", mean=MEAN, std=STD)

    def _image_features(self, pixels: Tensor) -> Tensor:
        if self._library == "open_clip":
            return self._model.encode_image(pixels)
        return self._model.visual_projection(self._model.vision_model(pixel_values=pixels).pooler_output)

    def _text_features(self, prompt: str) -> Tensor:
        import torch

        ids = torch.tensor(tokenize([prompt]), device=self._device)
        if self._library == "open_clip":
            return self._model.encode_text(ids)
        return self._model.text_projection(self._model.text_model(input_ids=ids).pooler_output)


def tokenize(captions: Sequence[str], length: int = 16) -> list[list[int]]:
    """Token ids of captions, each of ``length``: start, words, end, padding.

    The end has the greatest id, because that is how CLIP's text tower finds it.
    """
    numbers = {word: _FIRST_WORD + place for place, word in enumerate(WORDS)}
    rows = []
    for caption in captions:
        words = [numbers.get(word, _UNKNOWN) for word in caption.lower().split()]
        row = [_START, *words[: length - 2], _END]
        rows.append(row + [_PAD] * (length - len(row)))
    return rows


def transformers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """An open_clip config in the words of transformers' `CLIPConfig`."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    common = {"hidden_act": "gelu", "projection_dim": config["embed_dim"]}
    return {
        "projection_dim": config["embed_dim"],
        "vision_config": common
        | {
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        "text_config": common
        | {
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text["mlp_ratio"]),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": _START,
            "eos_token_id": text["vocab_size"] - 1,
            "pad_token_id": _PAD,
        },
    }


def transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state dict under the names of transformers' `CLIPModel`, attention cut into its three parts."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in ("visual.proj", "text_projection"):
            renamed["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = value.T
            continue
        name = _renamed(name)
        if ".in_proj_" in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace("in_proj_", f"{part}_proj.")] = piece
        else:
            renamed[name] = value
    return renamed


def _renamed(name: str) -> str:
    tower = "vision_model." if name.startswith("visual.") else "text_model."
    name = name.removeprefix("visual.")
    if name == "logit_scale":
        return name
    if tower == "vision_model.":
        own = {
            "class_embedding": "embeddings.class_embedding",
            "positional_embedding": "embeddings.position_embedding.weight",
            "conv1.weight": "embeddings.patch_embedding.weight",
        }
    else:
        own = {
            "token_embedding.weight": "embeddings.token_embedding.weight",
            "positional_embedding": "embeddings.position_embedding.weight",
        }
    for old, new in (
        *own.items(),
        ("transformer.resblocks.", "encoder.layers."),
        (".attn.", ".self_attn."),
        (".ln_1.", ".layer_norm1."),
        (".ln_2.", ".layer_norm2."),
        (".mlp.c_fc.", ".mlp.fc1."),
        (".mlp.c_proj.", ".mlp.fc2."),
        ("ln_pre.", "pre_layrnorm."),
        ("ln_post.", "post_layernorm."),
        ("ln_final.", "final_layer_norm."),
    ):
        name = name.replace(old, new)
    return tower + name
