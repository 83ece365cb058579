"""HPS-v2: how much people would like a picture for a prompt (arXiv:2306.09341), through open_clip."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewards.contract import RewardInfo
from rewards.vision import pixels as pixel_maths
from rewards.vision import weights as weight_files
from rewards.vision.base import ROUNDING, CosineReward
from rewards.vision.torchvision_shim import import_open_clip

if TYPE_CHECKING:
    from torch import Tensor, nn

REPO = "xswu/HPSv2"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


class HPSv2(CosineReward):
    """Cosine of a finetuned CLIP ViT-H-14; good pictures score near 0.3, bad ones near 0.2.

    Checkpoint: HPS_v2.1_compressed.pt or HPS_v2_compressed.pt of xswu/HPSv2 on the hub, Apache-2.0. Range [-1, 1].
    Preprocessing: the whole picture on a black square of 224 pixels (`pad_to_square`); prompts are cut to 77 tokens, no
    template. Reference implementation: the package hpsv2 1.2.0 (img_score.py), whose scores it gives with the same
    weights and precision. That package runs float16 on GPUs (here ``dtype=float16``), uses v2.0 unless told
    otherwise, and prints scores times 100 in its benchmark; here a score is the plain cosine, without logit scale.

    Args:
        version: of the weights, ``"v2.1"`` or ``"v2.0"``.
        weights: path of a local copy of the checkpoint; None takes it from the hub.
        architecture: a model name of open_clip or the path of a config in its format; only tests need another one.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        max_batch: most pictures in one pass.
    """

    libraries = (*CosineReward.libraries, "open_clip_torch", "ftfy")

    def __init__(
        self,
        *,
        version: str = "v2.1",
        weights: str | None = None,
        architecture: str = "ViT-H-14",
        dtype: str = "float32",
        max_batch: int = 32,
    ) -> None:
        super().__init__(dtype=dtype, max_batch=max_batch)
        if version not in FILES:
            raise ValueError(f"version={version}: must be one of {', '.join(FILES)}")
        self._version, self._weights, self._architecture = version, weights, architecture

    @property
    def info(self) -> RewardInfo:
        return RewardInfo(
            name="hpsv2",
            metrics=("hpsv2",),
            value_range=(-1.0, 1.0),
            max_batch=self._max_batch,
            tolerance=ROUNDING[self._dtype],
            source=f"{REPO}/{FILES[self._version]}, pypi.org/project/hpsv2 1.2.0",
            licence="Apache-2.0",
        )

    @property
    def _identity(self) -> str:
        return f"hpsv2 {self._version}"

    def _build(self) -> nn.Module:
        path = weight_files.find("weights", self._weights, repo=REPO, filename=FILES[self._version])
        open_clip = import_open_clip()
        self._architecture_config = self._config(open_clip)
        model = open_clip.CLIP(**self._architecture_config)
        weight_files.fill(model, weight_files.read(path, setting="weights"), setting=f"weights={path}")
        self._tokenize = open_clip.SimpleTokenizer(context_length=model.context_length)
        self._size = model.visual.image_size[0]
        return model

    def _details(self) -> Sequence[str]:
        return (json.dumps(self._architecture_config, sort_keys=True),)

    def _config(self, open_clip: Any) -> dict[str, Any]:
        config = open_clip.get_model_config(self._architecture)
        if config is None:
            if not Path(self._architecture).is_file():
                raise weight_files.WeightsError(
                    f"architecture={self._architecture}: neither a model of open_clip nor a config file"
                )
            config = json.loads(Path(self._architecture).read_text())
        return config

    def _prepare(self, image: np.ndarray) -> Tensor:
        return pixel_maths.pad_to_square(image, self._size)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self._model.encode_image(pixels)

    def _text_features(self, prompt: str) -> Tensor:
        return self._model.encode_text(self._tokenize([prompt]).to(self._device))
