"""ImageReward: how much people would like a picture for a prompt (arXiv:2304.05977), through transformers' BLIP."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rewards.aesthetic import linear_head
from rewards.contract import RewardInfo
from rewards.vision import pixels as pixel_maths
from rewards.vision import weights as weight_files
from rewards.vision.base import ROUNDING, VisionReward
from rewards.vision.torchvision_shim import mend_torchvision

if TYPE_CHECKING:
    from torch import Tensor, nn

REPO, FILE = "THUDM/ImageReward", "ImageReward.pt"
#: Mean and standard deviation of the raw output over the authors' training data (ImageReward.py).
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
#: BLIP ViT-L/16 and its image-grounded text encoder (image-reward 1.5: models/BLIP/vit.py, med_config.json).
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 30524,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
}

#: Names in the published file, and in transformers. The text encoder kept its names.
_NAMES = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.", r"vision.encoder.layers.\1.self_attn."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.", r"vision.encoder.layers.\1."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.", "head."),
)


class ImageReward(VisionReward):
    """Output of a linear head on BLIP's text encoder that looks at the picture; standardised, mostly -2 to 2.

    Checkpoint: ImageReward.pt of THUDM/ImageReward on the hub, Apache-2.0. Range: unbounded. Preprocessing: CLIP's
    square of 224 pixels from the middle (`crop_to_square`, as in torchvision); prompts as lower-case BERT word pieces,
    cut and padded to 35. Reference implementation: image-reward 1.5 (ImageReward.py), which current transformers cannot
    run. Picture and prompt meet in every layer, so nothing of a prompt can be kept.

    Args:
        weights: path of a local copy of the checkpoint; None takes it from the hub.
        tokenizer: folder or hub name of the BERT tokenizer.
        sizes: other sizes than `VISION` and `TEXT`, as ``{"vision": {...}, "text": {...}}``; only tests need it.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        max_batch: most pictures in one pass.
    """

    libraries = (*VisionReward.libraries, "transformers")

    def __init__(
        self,
        *,
        weights: str | None = None,
        tokenizer: str = "bert-base-uncased",
        sizes: Mapping[str, Mapping[str, Any]] | None = None,
        dtype: str = "float32",
        max_batch: int = 32,
    ) -> None:
        super().__init__(dtype=dtype, max_batch=max_batch)
        self._weights, self._tokenizer_source, self._sizes = weights, tokenizer, sizes or {}

    @property
    def info(self) -> RewardInfo:
        return RewardInfo(
            name="image_reward",
            metrics=("image_reward",),
            value_range=None,
            max_batch=self._max_batch,
            tolerance=10 * ROUNDING[self._dtype],
            source=f"{REPO}/{FILE}, pypi.org/project/image-reward 1.5",
            licence="Apache-2.0",
        )

    def _build(self) -> nn.Module:
        mend_torchvision()
        from torch import nn
        from transformers import BertTokenizer
        from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        path = weight_files.find("weights", self._weights, repo=REPO, filename=FILE)
        state = weight_files.read(path, setting="weights")
        vision = BlipVisionConfig(**{**VISION, **self._sizes.get("vision", {})})
        text = BlipTextConfig(
            **{**TEXT, **self._sizes.get("text", {})}, encoder_hidden_size=vision.hidden_size, is_decoder=True
        )
        self._tokenizer = weight_files.tokenizer(
            BertTokenizer, self._tokenizer_source, setting="tokenizer", vocabulary=text.vocab_size
        )
        self._configs = [weight_files.described(vision), weight_files.described(text)]
        model = nn.ModuleDict(
            {
                "vision": BlipVisionModel(vision),
                "text": BlipTextModel(text, add_pooling_layer=False),
                "head": linear_head(text.hidden_size),
            }
        )
        # The file also holds parts of BLIP's pretraining; the reference leaves them aside in the same way.
        weight_files.fill(model, rename(state), setting=f"weights={path}", ignore_others=True)
        self._size = int(vision.image_size)  # type: ignore[arg-type]
        return model

    def _details(self) -> Sequence[str]:
        return *self._configs, weight_files.spelled(self._tokenizer)

    def _prepare(self, image: np.ndarray) -> Tensor:
        return pixel_maths.crop_to_square(image, self._size, centre="rounded")

    def _values(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        import torch

        words = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self._device)
        seen = self._model["vision"](pixel_values=pixels).last_hidden_state
        read = self._model["text"](
            words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=seen.new_ones(seen.shape[:2], dtype=torch.long),
            is_decoder=False,
        ).last_hidden_state
        with torch.autocast(torch.device(self._device).type, enabled=False):
            return (self._model["head"].layers(read[:, 0].float()).squeeze(-1) - MEAN) / STD


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published state dict under the names of transformers' classes; unknown names stay as they are."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in _NAMES:
            name, matches = re.subn(pattern, replacement, name)
            if matches:
                break
        renamed[name] = value
    return renamed
