"""CLIP score (arXiv:2104.08718 without its factor and its floor at 0): any model that open_clip can load."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from rewards.contract import RewardInfo
from rewards.vision import weights as weight_files
from rewards.vision.base import ROUNDING, CosineReward
from rewards.vision.torchvision_shim import import_open_clip

if TYPE_CHECKING:
    from torch import Tensor, nn

FACTORS = {"cosine": 1.0, "x100": 100.0}


class ClipScore(CosineReward):
    """Cosine of picture and prompt; OpenAI's ViT-L-14 gives matching ones 0.2 to 0.3.

    Checkpoint: by default OpenAI's ViT-L/14 (MIT), as published for open_clip. Range [-1, 1], or [-100, 100].
    Preprocessing: what open_clip states for the tag or the folder, by Pillow, and OpenAI's for a weights file; prompts
    are cut to the model's context.
    Reference implementation: open_clip's own transform, tokenizer and towers, without logit scale.

    Args:
        architecture: as `open_clip.create_model` takes it: a built-in name, ``hf-hub:ORG/NAME`` or
            ``local-dir:FOLDER``. Models by OpenAI need a name that ends in ``-quickgelu``.
        weights: a tag of `open_clip.list_pretrained` or the path of a local file; None for the last two kinds of
            architecture, which bring their own.
        scale: ``"cosine"``, or ``"x100"`` as most papers print it.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        max_batch: most pictures in one pass.
    """

    libraries = (*CosineReward.libraries, "open_clip_torch", "torchvision", "transformers", "ftfy")

    def __init__(
        self,
        *,
        architecture: str = "ViT-L-14-quickgelu",
        weights: str | None = "openai",
        scale: str = "cosine",
        dtype: str = "float32",
        max_batch: int = 64,
    ) -> None:
        super().__init__(dtype=dtype, max_batch=max_batch)
        if scale not in FACTORS:
            raise ValueError(f"scale={scale}: must be one of {', '.join(FACTORS)}")
        if ":" in architecture and weights is not None:
            raise ValueError(f"architecture={architecture} brings its own weights: set weights to null")
        self._architecture, self._weights, self._scale = architecture, weights, FACTORS[scale]

    @property
    def info(self) -> RewardInfo:
        return RewardInfo(
            name="clip",
            metrics=("clip",),
            value_range=(-self._scale, self._scale),
            max_batch=self._max_batch,
            tolerance=ROUNDING[self._dtype] * self._scale,
            source=f"open_clip {self._architecture}, {self._weights or 'its own weights'}",
            licence="MIT" if self._weights == "openai" else "that of the checkpoint",
        )

    @property
    def _identity(self) -> str:
        name = "local-dir" if self._architecture.startswith("local-dir:") else self._architecture  # a folder may move
        return f"clip {name} x{self._scale:g}"

    def _build(self) -> nn.Module:
        open_clip = import_open_clip()
        source = f"architecture={self._architecture}, weights={self._weights}"
        local = self._weights is not None and Path(self._weights).expanduser().is_file()
        if "siglip" in self._architecture.lower() and local:
            raise weight_files.WeightsError(
                f"{source}: a file does not say how SigLIP wants its pictures; name a tag, or "
                "architecture=local-dir:FOLDER"
            )
        try:
            with warnings.catch_warnings():
                # open_clip goes on with the wrong activation, and scores come out subtly wrong.
                warnings.filterwarnings("error", message="QuickGELU mismatch")
                model, _, self._transform = open_clip.create_model_and_transforms(
                    self._architecture, pretrained=None if local else self._weights, require_pretrained=not local
                )
            self._tokenize = open_clip.get_tokenizer(self._architecture)
            self._config = open_clip.get_model_config(self._architecture)
        except UserWarning as warning:
            raise weight_files.WeightsError(
                f"{source}: {warning} Name the architecture that ends in -quickgelu (or the one that does not)"
            ) from warning
        except Exception as error:  # what open_clip raises depends on where a file is damaged or differs
            raise weight_files.WeightsError(
                f"{source}: {error}. Set weights to a local file or a tag that `open_clip.list_pretrained()` has for "
                "this architecture; a tag must have been downloaded once where there is a network"
            ) from error
        if self._weights is not None and local:
            # Not by open_clip: it stretches position embeddings of another size, and scores come out subtly wrong.
            state = weight_files.read(Path(self._weights).expanduser(), setting=source)
            state = {name.removeprefix("module."): value for name, value in state.items()}
            if any(name.startswith("text.") for name in model.state_dict()):
                state = open_clip.model.convert_to_custom_text_state_dict(state)
            weight_files.fill(model, state, setting=source)
        return model

    def _details(self) -> Sequence[str]:
        texts = [
            repr(self._model),
            json.dumps([self._config, getattr(self._model.visual, "preprocess_cfg", None)], default=str),
        ]
        inner = getattr(self._tokenize, "tokenizer", None)  # of transformers; open_clip's own comes with its version
        return [*texts, weight_files.spelled(inner)] if inner is not None else texts

    def _prepare(self, image: np.ndarray) -> Tensor:
        return self._transform(Image.fromarray(image))

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self._model.encode_image(pixels)

    def _text_features(self, prompt: str) -> Tensor:
        return self._model.encode_text(self._tokenize([prompt]).to(self._device))
