"""What rewards with an image tower have in common: batches, precision, cached text features, fingerprints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rewards.contract import API_VERSION, RewardInfo, Sample
from rewards.vision.weights import digest, short_digest

if TYPE_CHECKING:
    from torch import Tensor, nn

#: By precision: how much an image's score may change with its batch, relative to a score of 1.
ROUNDING = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
_KEPT_PROMPTS = 4096


class VisionReward(ABC):
    """A reward that scores stacks of pictures with a network.

    Args:
        dtype: ``"float32"``, also on GPUs without rounding to TF32 (`rewards.vision.exact`), or what `torch.autocast`
            computes in: ``"bfloat16"`` or ``"float16"``. Weights stay in float32.
        max_batch: most pictures in one pass; more are split.
    """

    api_version: ClassVar[int] = API_VERSION
    libraries: tuple[str, ...] = ("torch", "pillow")
    preprocessing: ClassVar[int] = 1  # raise it whenever the same picture would give other pixels

    def __init__(self, *, dtype: str = "float32", max_batch: int = 32) -> None:
        if dtype not in ROUNDING:
            raise ValueError(f"dtype={dtype}: must be one of {', '.join(ROUNDING)}")
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}: must be at least 1")
        self._dtype, self._max_batch = dtype, max_batch
        self._device, self._fingerprint = "cpu", ""
        self._model: Any = None

    @property
    @abstractmethod
    def info(self) -> RewardInfo: ...

    @abstractmethod
    def _build(self) -> nn.Module:
        """The network with its weights, on the CPU."""

    @abstractmethod
    def _prepare(self, image: np.ndarray) -> Tensor:
        """A picture, uint8 ``[H, W, 3]``, as float32 ``[3, S, S]``."""

    @abstractmethod
    def _values(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores, float32 ``[B]``, of pictures ``[B, 3, S, S]``."""

    @property
    def _identity(self) -> str:
        """What the fingerprint says besides weights, precision and versions."""
        return self.info.name

    def _details(self) -> Sequence[str]:
        """What scores depend on besides: configs and tokenizers, as texts. Asked once the network is built."""
        return ()

    def load(self, device: str) -> None:
        """Build the network, move it to the device and take its fingerprint.

        Raises:
            WeightsError: weights are missing or wrong; the message names the setting and the remedy.
            ImportError: a library is missing; the message says which environment has it.
        """
        model = self._build().eval().requires_grad_(False)
        versions = "/".join(f"{name} {version(name)}" for name in self.libraries)
        self._model = model
        self._fingerprint = (
            f"{self._identity}@{digest(model)}/{short_digest(self._details())}/preprocessing {self.preprocessing}/"
            f"{self._dtype}/{versions}"
        )
        if self._exact(device):
            from rewards.vision.exact import as_products

            as_products(model)
        self._model, self._device = model.to(device), device

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        """The one metric of every sample.

        Raises:
            LostError: with ``dtype="float32"`` on a GPU, if this process lets it round float32 matrix products.
        """
        import torch

        if self._exact(self._device):
            from rewards.vision.exact import require_exact_products

            require_exact_products()
        kind = torch.device(self._device).type
        lower = torch.autocast(kind, getattr(torch, self._dtype), enabled=self._dtype != "float32")
        values: list[float] = []
        with torch.inference_mode(), lower:
            for start in range(0, len(batch), self._max_batch):
                part = batch[start : start + self._max_batch]
                pixels = torch.stack([self._prepare(sample.image) for sample in part]).to(self._device)
                values += self._values(pixels, [sample.prompt for sample in part]).tolist()
        return [{self.info.metrics[0]: value} for value in values]

    def _exact(self, device: str) -> bool:
        """Whether float32 has to be defended against a GPU."""
        return self._dtype == "float32" and device != "cpu"

    def fingerprint(self) -> str:
        """Name, sha256 of weights, of configs and tokenizers, version of the preprocessing, precision, libraries.

        Raises:
            RuntimeError: nothing is loaded yet.
        """
        if not self._fingerprint:
            raise RuntimeError(f"{self.info.name} has no fingerprint before its weights are loaded")
        return self._fingerprint

    def close(self) -> None:
        """Drop the network."""
        self._model = None
        if self._device != "cpu":
            import torch

            torch.cuda.empty_cache()


class CosineReward(VisionReward):
    """A reward that compares features of the picture with features of the prompt, as CLIP does.

    Features of a prompt are computed once, each prompt in a pass of its own, and the latest 4096 are kept: a score
    does not depend on which prompts came before or along.
    """

    def __init__(self, *, dtype: str = "float32", max_batch: int = 32) -> None:
        super().__init__(dtype=dtype, max_batch=max_batch)
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self._scale = 1.0

    @abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor:
        """``[B, D]`` of pictures ``[B, 3, S, S]``."""

    @abstractmethod
    def _text_features(self, prompt: str) -> Tensor:
        """``[1, D]`` of one prompt."""

    def close(self) -> None:
        """Drop the network and the kept features."""
        self._texts.clear()
        super().close()

    def _values(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        import torch

        texts = torch.cat([self._text(prompt) for prompt in prompts])
        images = _unit(self._image_features(pixels))
        return self._scale * (images * texts).sum(-1)

    def _text(self, prompt: str) -> Tensor:
        if prompt not in self._texts:
            self._texts[prompt] = _unit(self._text_features(prompt))
            if len(self._texts) > _KEPT_PROMPTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(prompt)
        return self._texts[prompt]


def _unit(features: Tensor) -> Tensor:
    return features.float() / features.float().norm(dim=-1, keepdim=True)
