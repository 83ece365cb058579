"""HPSv3 behind the contract (arXiv:2508.03789), through current transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from rewards.contract import API_VERSION, ItemError, RewardInfo, Sample
from rewards.hpsv3.checkpoint import is_hub_id, tensors, weight_files
from rewards.hpsv3.patches import MERGE, patchify
from rewards.hpsv3.prompt import IMAGE_TOKEN, REWARD_TOKEN, conversation
from rewards.vision import weights as vision_weights
from rewards.vision.torchvision_shim import mend_torchvision

#: By precision: how much a score may change with its batch. A small random model on a CPU stays below 7e-6 in both;
#: bfloat16 leaves room for kernels of a GPU that sum in another order for another shape.
_TOLERANCE = {"bfloat16": 0.1, "float32": 1e-4}
_BASE_FILES = ("config.json", "tokenizer.json")
_PREPROCESSING = 1  # raise it whenever the same picture or prompt would reach the model differently
_LIBRARIES = ("torch", "transformers", "pillow")


class HPSv3:
    """Human preference for a picture given its prompt, by Qwen2-VL-7B with a regression head.

    Metrics: ``hpsv3``, the score (mu), unbounded, and ``hpsv3_log_sigma``, the logarithm of the standard deviation that
    the model itself expects of it: its two outputs, as the package's `reward` returns them.

    Checkpoint: HPSv3.safetensors of MizzenAI/HPSv3 on the hub, MIT; config and tokenizer of Qwen/Qwen2-VL-7B-Instruct,
    Apache-2.0. About 16 GB of memory in bfloat16.

    Preprocessing: Pillow's bicubic resize to multiples of 28 whose area is about 256 x 28 x 28 (`target_size`: 512 x
    512 and 1024 x 1024 become 448 x 448), CLIP's mean and deviation, patches of 14; the instruction of the package
    around the prompt (`conversation`), padded on the right.

    Reference implementation: hpsv3 1.0.0 on PyPI, hpsv3/inference.py, with transformers 4.45.2; tests compare with
    numbers that it computed. Unlike there, a prompt that contains a control token such as ``<|im_end|>`` is refused:
    it would be read as control, not as text.

    Args:
        weights: file, folder or hub id of the checkpoint, in safetensors (also sharded) or a torch file. The network
            is used for hub ids only.
        base: folder or hub id with config and tokenizer of the Qwen2-VL.
        dtype: ``"bfloat16"`` as published, or ``"float32"``: the same model with less rounding, twice the memory.
        max_batch: most pictures in one pass; each takes about 850 tokens and its prompt.
    """

    api_version: ClassVar[int] = API_VERSION

    def __init__(
        self,
        *,
        weights: str = "MizzenAI/HPSv3",
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        dtype: str = "bfloat16",
        max_batch: int = 8,
    ) -> None:
        if dtype not in _TOLERANCE:
            raise ValueError(f"dtype={dtype}: must be one of {', '.join(_TOLERANCE)}")
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}: must be at least 1")
        self._weights, self._dtype, self._max_batch = weights, dtype, max_batch
        self._base = base if is_hub_id(base) else str(Path(base).expanduser())
        self._device, self._fingerprint, self._exact = "cpu", "", False
        self._model: Any = None

    @property
    def info(self) -> RewardInfo:
        return RewardInfo(
            name="hpsv3",
            metrics=("hpsv3", "hpsv3_log_sigma"),
            value_range=None,
            max_batch=self._max_batch,
            tolerance=_TOLERANCE[self._dtype],
            source=f"{self._weights} on {self._base}, pypi.org/project/hpsv3 1.0.0",
            licence="MIT, on Qwen2-VL-7B under Apache-2.0",
        )

    def load(self, device: str) -> None:
        """Read tokenizer, config and weights, and move the network to the device.

        Raises:
            WeightsError: something is missing, out of reach or of another model; the message names the setting and
                the remedy.
        """
        mend_torchvision()
        import torch

        from rewards.hpsv3.model import build, read_config
        from rewards.vision.exact import as_products

        files = weight_files(self._weights)  # first, since nothing else is as likely to be missing
        try:
            tokenizer = self._read_tokenizer()
            config = read_config(self._base, len(tokenizer))
        except (OSError, ValueError) as error:
            raise vision_weights.unreachable("base", self._base, error) from error
        details = vision_weights.short_digest([vision_weights.described(config), vision_weights.spelled(tokenizer)])
        ids = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, REWARD_TOKEN])
        if ids[0] != config.image_token_id:
            raise vision_weights.WeightsError(
                f"base={self._base}: its tokenizer and its config are of different models: {IMAGE_TOKEN} is token "
                f"{ids[0]} there and {config.image_token_id} here"
            )
        model = build(config, tensors(files), getattr(torch, self._dtype))
        versions = "/".join(f"{name} {version(name)}" for name in _LIBRARIES)
        self._fingerprint = (
            f"hpsv3@{vision_weights.digest(model)}/{details}/preprocessing {_PREPROCESSING}/{self._dtype}/{versions}"
        )
        self._tokenizer, self._reward_id = tokenizer, ids[1]
        self._control_tokens = tuple(tokenizer.get_added_vocab())
        self._exact = self._dtype == "float32" and device != "cpu"
        if self._exact:
            as_products(model)
        self._model, self._device = model.to(device), device

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        """Both outputs for every sample.

        Raises:
            ItemError: a picture is far too elongated, or a prompt contains a control token.
            LostError: with ``dtype="float32"`` on a GPU, if this process lets it round float32 matrix products.
        """
        import torch

        if self._exact:
            from rewards.vision.exact import require_exact_products

            require_exact_products()
        scores: list[dict[str, float]] = []
        with torch.inference_mode():
            for start in range(0, len(batch), self._max_batch):
                inputs = [value.to(self._device) for value in self._collate(batch[start : start + self._max_batch])]
                outputs = self._model(*inputs, self._reward_id).tolist()
                scores += [dict(zip(self.info.metrics, pair, strict=True)) for pair in outputs]
        return scores

    def fingerprint(self) -> str:
        """Name, sha256 of the weights, version of the preprocessing, precision and libraries.

        Raises:
            RuntimeError: nothing is loaded yet.
        """
        if not self._fingerprint:
            raise RuntimeError("hpsv3 has no fingerprint before its weights are loaded")
        return self._fingerprint

    def close(self) -> None:
        """Drop the network."""
        self._model = None
        if self._device != "cpu":
            import torch

            torch.cuda.empty_cache()

    def _read_tokenizer(self) -> Any:
        """The tokenizer of `base`, with the token that asks for a score.

        Raises:
            WeightsError: `base` is a folder that lacks files; transformers would make up what is missing.
        """
        # Not Qwen2VLProcessor: it needs torchvision for videos that no reward looks at.
        from transformers import AutoTokenizer

        if not is_hub_id(self._base) and not Path(self._base).is_dir():
            raise vision_weights.WeightsError(
                f"base={self._base}: no such folder; give one with config.json and tokenizer.json of Qwen2-VL-7B, "
                "or the hub id Qwen/Qwen2-VL-7B-Instruct"
            )
        absent = [name for name in _BASE_FILES if Path(self._base).is_dir() and not (Path(self._base) / name).is_file()]
        if absent:
            raise vision_weights.WeightsError(f"base={self._base}: lacks {' and '.join(absent)} of Qwen2-VL-7B")
        tokenizer = AutoTokenizer.from_pretrained(self._base, padding_side="right")
        tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        return tokenizer

    def _collate(self, batch: Sequence[Sample]) -> tuple[Any, Any, Any, Any]:
        """Token ids and mask ``[B, L]``, patches ``[P, 1176]`` and grids ``[B, 3]`` of the samples."""
        import torch

        pictures, grids, texts = [], [], []
        for sample in batch:
            held = next((token for token in self._control_tokens if token in sample.prompt), None)
            if held is not None:
                raise ItemError(f"the prompt contains the control token {held}")
            try:
                patches, grid = patchify(sample.image)
            except ValueError as error:
                raise ItemError(str(error)) from error
            pictures.append(patches)
            grids.append(grid)
            texts.append(conversation(sample.prompt, math.prod(grid) // MERGE**2))
        words = self._tokenizer(texts, padding=True, return_tensors="pt")
        return words.input_ids, words.attention_mask, torch.cat(pictures), torch.tensor(grids)
