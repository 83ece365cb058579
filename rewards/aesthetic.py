"""LAION's aesthetic predictor (improved-aesthetic-predictor): how good a picture looks, whatever the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rewards.contract import RewardInfo
from rewards.vision import pixels as pixel_maths
from rewards.vision import weights as weight_files
from rewards.vision.base import ROUNDING, VisionReward
from rewards.vision.torchvision_shim import mend_torchvision

if TYPE_CHECKING:
    from torch import Tensor, nn

PREDICTOR = "sac+logos+ava1-l14-linearMSE.pth"
URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
_WIDTHS = (1024, 128, 64, 16, 1)


class Aesthetic(VisionReward):
    """A linear map in five layers of normalised CLIP features, fitted to ratings from 1 to 10. Ignores the prompt.

    Checkpoint: openai/clip-vit-large-patch14 (MIT) and the predictor sac+logos+ava1-l14-linearMSE.pth (Apache-2.0),
    which is not on the hub: copy it from the repository `URL`. Range: unbounded, mostly 4 to 7. Preprocessing: CLIP's
    square of 224 pixels from the middle (`crop_to_square`, as in OpenAI's CLIP). Reference implementation:
    simple_inference.py of `URL`; it runs the image tower in float16 on GPUs (here ``dtype=float16``). The predictor
    always computes in float32.

    Args:
        predictor: path of the local copy of the predictor.
        model: folder or hub name of the `CLIPVisionModelWithProjection`; the predictor was fitted to the default.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        max_batch: most pictures in one pass.
    """

    libraries = (*VisionReward.libraries, "transformers")

    def __init__(
        self,
        *,
        predictor: str = PREDICTOR,
        model: str = "openai/clip-vit-large-patch14",
        dtype: str = "float32",
        max_batch: int = 64,
    ) -> None:
        super().__init__(dtype=dtype, max_batch=max_batch)
        self._source, self._predictor = model, predictor

    @property
    def info(self) -> RewardInfo:
        return RewardInfo(
            name="aesthetic",
            metrics=("aesthetic",),
            value_range=None,
            max_batch=self._max_batch,
            tolerance=10 * ROUNDING[self._dtype],
            source=f"{self._source}, {URL}",
            licence="Apache-2.0 (predictor), MIT (CLIP)",
        )

    def _build(self) -> nn.Module:
        mend_torchvision()
        from pathlib import Path

        from torch import nn
        from transformers import CLIPVisionModelWithProjection

        path = Path(self._predictor).expanduser()
        if not path.is_file():
            raise weight_files.WeightsError(
                f"predictor={self._predictor}: no such file. The hub has no copy: download {PREDICTOR} from {URL} and "
                "set predictor to its path"
            )
        tower = weight_files.pretrained(
            CLIPVisionModelWithProjection, self._source, setting="model", others=("text_", "logit_scale")
        )
        head = linear_head(tower.config.projection_dim)
        weight_files.fill(head, weight_files.read(path, setting="predictor"), setting=f"predictor={path}")
        self._size = tower.config.image_size
        return nn.ModuleDict({"tower": tower, "head": head})

    def _details(self) -> Sequence[str]:
        return (weight_files.described(self._model["tower"].config),)

    def _prepare(self, image: np.ndarray) -> Tensor:
        return pixel_maths.crop_to_square(image, self._size, centre="rounded")

    def _values(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        import torch

        features = self._model["tower"](pixel_values=pixels).image_embeds.float()
        with torch.autocast(torch.device(self._device).type, enabled=False):
            return self._model["head"].layers(features / features.norm(dim=-1, keepdim=True)).squeeze(-1)


def linear_head(width: int) -> Any:
    """The layers ``width``-1024-128-64-16-1 without activations, under the names that published heads use.

    ImageReward's head has the same layers. Between them stand places of dropout, which only counts in training.
    """
    from torch import nn

    layers: list[nn.Module] = []
    for number, (wide, narrow) in enumerate(zip((width, *_WIDTHS), _WIDTHS, strict=False)):
        layers += [nn.Linear(wide, narrow)] + [nn.Identity()] * (number < 3)
    head = nn.Module()
    head.layers = nn.Sequential(*layers)
    return head
