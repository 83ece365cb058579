"""PickScore: which of two pictures for a prompt people would pick (arXiv:2305.01569), through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rewards.contract import RewardInfo
from rewards.vision import pixels as pixel_maths
from rewards.vision import weights as weight_files
from rewards.vision.base import ROUNDING, CosineReward
from rewards.vision.torchvision_shim import mend_torchvision

if TYPE_CHECKING:
    from torch import Tensor, nn


class PickScore(CosineReward):
    """Cosine times the logit scale of a finetuned CLIP ViT-H-14; pictures score 18 to 24, differences are logits.

    Checkpoint: yuvalkirstain/PickScore_v1 with the tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, MIT (that of the
    repository; the model card states none). Range [-100, 100] / divisor. Preprocessing: CLIP's square of 224 pixels
    from the middle (`crop_to_square`, as in transformers); prompts are cut to 77 tokens. Reference implementation: the
    example of yuvalkirstain/PickScore's README; Flow-GRPO (flow_grpo/pickscore_scorer.py) divides by 26 on top, as is
    done here unless told otherwise.

    Args:
        model: folder or hub name of the `CLIPModel`.
        tokenizer: folder or hub name of its tokenizer.
        divisor: what the score is divided by.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        max_batch: most pictures in one pass.
    """

    libraries = (*CosineReward.libraries, "transformers")

    def __init__(
        self,
        *,
        model: str = "yuvalkirstain/PickScore_v1",
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        divisor: float = 26.0,
        dtype: str = "float32",
        max_batch: int = 32,
    ) -> None:
        super().__init__(dtype=dtype, max_batch=max_batch)
        if divisor <= 0:
            raise ValueError(f"divisor={divisor}: must be positive")
        self._source, self._tokenizer_source, self._divisor = model, tokenizer, divisor

    @property
    def info(self) -> RewardInfo:
        greatest = 100.0 / self._divisor
        return RewardInfo(
            name="pickscore",
            metrics=("pickscore",),
            value_range=(-greatest, greatest),
            max_batch=self._max_batch,
            tolerance=ROUNDING[self._dtype] * greatest,
            source=f"{self._source}, github.com/yuvalkirstain/PickScore",
            licence="MIT",
        )

    @property
    def _identity(self) -> str:
        return f"pickscore /{self._divisor:g}"

    def _build(self) -> nn.Module:
        mend_torchvision()
        from transformers import CLIPModel, CLIPTokenizer

        model = weight_files.pretrained(CLIPModel, self._source, setting="model")
        self._tokenizer = weight_files.tokenizer(
            CLIPTokenizer,
            self._tokenizer_source,
            setting="tokenizer",
            vocabulary=model.config.text_config.vocab_size,
        )
        self._size = model.config.vision_config.image_size
        self._context = model.config.text_config.max_position_embeddings
        self._scale = model.logit_scale.exp().item() / self._divisor
        return model

    def _details(self) -> Sequence[str]:
        return weight_files.described(self._model.config), weight_files.spelled(self._tokenizer)

    def _prepare(self, image: np.ndarray) -> Tensor:
        return pixel_maths.crop_to_square(image, self._size, centre="floored")

    def _image_features(self, pixels: Tensor) -> Tensor:
        # Not get_image_features: it returns a tensor in transformers 4 and a record in 5.
        return self._model.visual_projection(self._model.vision_model(pixel_values=pixels).pooler_output)

    def _text_features(self, prompt: str) -> Tensor:
        ids = self._tokenizer([prompt], truncation=True, max_length=self._context, return_tensors="pt").input_ids
        return self._model.text_projection(self._model.text_model(input_ids=ids.to(self._device)).pooler_output)
