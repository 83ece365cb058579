"""What every diffusers text-to-image pipeline shares as a flow model: loading, decoding, export. Nothing about RL."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from adagrpo_train.errors import ConfigError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""The attention of image and text together, in diffusers' names. Flow-GRPO adapts these in Stable Diffusion 3.5
(yifan123/flow_grpo@ac4c86e scripts/train_sd3.py)."""
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
"""Flow-GRPO and AdaGRPO adapt these too in FLUX.1 (Bujiazi/GRPO-Series@c4028f9 train.py)."""


class PipelineModel:
    """A diffusers pipeline with a transformer, a VAE and text encoders. A family adds its `encode`, its time grid
    `sigmas`, its `velocity`, the channels of a latent and the modules that adapters attach to.

    Args:
        pipeline_class: the diffusers class to load with.
        path: folder in diffusers' layout, or a hub id.
        without: components that are not loaded.
        dtype: "float32", "bfloat16" or "float16"; of all weights and of the latents the network sees.
        device: where everything lives.
        resolution: image height and width in pixels.
        num_steps: T, sampling steps of rollouts and of evaluation.
        decode_batch: most images decoded at once.

    Raises:
        ConfigError: the pipeline cannot be loaded, or a setting is out of range.
    """

    lora_scopes: ClassVar[Mapping[str, tuple[str, ...]]] = {"attention": ATTENTION, "all": ATTENTION + FEED_FORWARD}
    """Scope -> suffixes of the modules that adapters of that scope attach to."""

    def __init__(
        self,
        *,
        pipeline_class: type,
        path: str,
        without: Sequence[str],
        dtype: str,
        device: torch.device,
        resolution: int,
        num_steps: int,
        decode_batch: int,
    ) -> None:
        if num_steps < 2:
            raise ConfigError(f"model.num_steps={num_steps}: need at least 2, one of them stochastic")
        if decode_batch < 1:
            raise ConfigError(f"model.decode_batch={decode_batch}: must be >= 1")
        self.dtype, self.device = _dtype(dtype), device
        self.pipeline = load(pipeline_class, path, self.dtype, without).to(device)
        self.num_steps, self._decode_batch = num_steps, decode_batch
        step = self.pipeline.vae_scale_factor * self.patch_size
        if resolution < step or resolution % step:
            raise ConfigError(f"model.resolution={resolution}: must be a multiple of {step}")
        self._resolution = resolution
        for part in (self.pipeline.vae, self.pipeline.transformer, *self.text_encoders()):
            part.requires_grad_(False)
            part.eval()

    @property
    def transformer(self) -> nn.Module:
        return self.pipeline.transformer

    @property
    def patch_size(self) -> int:
        """Latent pixels, in height and in width, of one token of the transformer."""
        raise NotImplementedError

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        raise NotImplementedError

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self._resolution // self.pipeline.vae_scale_factor
        return (self.latent_channels, side, side)

    def lora_targets(self, scope: str) -> list[str]:
        """Module suffixes for adapters: "attention", or "all" for attention and feed-forward layers."""
        if scope not in self.lora_scopes:
            raise ConfigError(f"trainable.targets={scope}: choose {' or '.join(self.lora_scopes)}")
        return list(self.lora_scopes[scope])

    def text_encoders(self) -> Iterator[nn.Module]:
        """The text encoders that are loaded."""
        for name, component in self.pipeline.components.items():
            if name.startswith("text_encoder") and component is not None:
                yield component

    @torch.no_grad()
    def decode(self, x0: Tensor) -> np.ndarray:
        """Images uint8 [N, H, W, 3] of clean latents [N, *latent], as the stock pipeline makes them."""
        vae = self.pipeline.vae
        parts = []
        for latents in x0.split(self._decode_batch):
            scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
            images = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
            parts.append(self.pipeline.image_processor.postprocess(images, output_type="np"))
        return (np.concatenate(parts) * 255).round().astype(np.uint8)

    def export_lora(self, folder: Path, weights: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write adapters for `pipe.load_lora_weights(folder)`. The metadata carries alpha, without which stock
        diffusers would assume alpha = rank and scale them wrongly."""
        self.pipeline.save_lora_weights(
            str(folder), transformer_lora_layers=dict(weights), transformer_lora_adapter_metadata=metadata
        )

    def export_full(self, folder: Path) -> None:
        """Write the whole pipeline for `from_pretrained(folder, ...)` of its class."""
        self.pipeline.save_pretrained(str(folder))


def load(pipeline_class: Any, path: str, dtype: torch.dtype, without: Sequence[str]) -> Any:
    """A pipeline from a folder or the hub, without the named components.

    Raises:
        ConfigError: says why it cannot be loaded, and the remedy.
    """
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.errors import HTTPError
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    folder = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or folder.exists()
    if looks_local:
        _check_folder(path, folder, pipeline_class, without)
    elif not _HUB_ID.fullmatch(path):
        raise ConfigError(f"model.path={path}: no such folder, and no id of a model on the hub, OWNER/NAME")
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    source = str(folder) if looks_local else path
    try:
        # Without safetensors a missing file would be sought as a pickle, which may run anything.
        pipeline = pipeline_class.from_pretrained(source, dtype=dtype, use_safetensors=True, **dict.fromkeys(without))
    except (OSError, ValueError, SafetensorError, HTTPError) as error:  # the hub's time-outs are no OSError
        reason = _incomplete(folder) if looks_local else _refused(path, error)
        raise ConfigError(f"model.path={path}: {reason} ({str(error).strip()})") from error
    _check_tokenizers(path, pipeline)
    _check_scheduler(path, pipeline.scheduler)
    return pipeline


def _check_folder(path: str, folder: Path, pipeline_class: Any, without: Sequence[str]) -> None:
    """Refuse a folder that is not, or not wholly, a pipeline of that class."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ConfigError(f"model.path={path}: no diffusers pipeline there (model_index.json is missing)")
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.path={path}: {index.name} is damaged ({error}); download it again") from error
    found, name = entries.get("_class_name"), pipeline_class.__name__
    if found != name:
        raise ConfigError(f"model.path={path}: holds a {found}, this model is a {name}; choose another model=")
    for component, library in entries.items():
        if component in (*without, *pipeline_class._optional_components) or not isinstance(library, list):
            continue
        if library[0] is None:
            raise ConfigError(f"model.path={path}: has no {component}")
        if not (folder / component).is_dir():
            raise ConfigError(f"model.path={path}: the folder {component} is missing; download it again")


def _check_tokenizers(path: str, pipeline: Any) -> None:
    """Refuse a tokenizer without its vocabulary, which transformers makes up where the file is missing."""
    for name, encoder in pipeline.components.items():
        if name.startswith("text_encoder") and encoder is not None:
            tokenizer = name.replace("text_encoder", "tokenizer")
            known, embedded = len(getattr(pipeline, tokenizer)), encoder.config.vocab_size
            if known < 0.9 * embedded:
                raise ConfigError(
                    f"model.path={path}: {tokenizer} knows {known} tokens, {name} has {embedded}: a file of the folder "
                    f"{tokenizer} is missing or damaged; download it again"
                )


def _check_scheduler(path: str, scheduler: Any) -> None:
    """Refuse a grid of sigmas that functional/schedules.py does not make: evaluation must draw what the stock pipeline
    draws."""
    name, config = type(scheduler).__name__, scheduler.config
    if name != "FlowMatchEulerDiscreteScheduler":
        raise ConfigError(f"model.path={path}: its scheduler is a {name}; FlowMatchEulerDiscreteScheduler is needed")
    plain = {
        "invert_sigmas": False,
        "shift_terminal": None,
        "stochastic_sampling": False,
        "time_shift_type": "exponential",
        "use_beta_sigmas": False,
        "use_exponential_sigmas": False,
        "use_karras_sigmas": False,
    }
    for key, value in plain.items():
        if config[key] != value:
            raise ConfigError(f"model.path={path}: {key}={config[key]} of its scheduler is not supported, only {value}")


def _incomplete(folder: Path) -> str:
    """What is wrong with a folder whose parts are there but cannot be loaded."""
    return f"a file in {folder} is missing or damaged; download the folder again"


def _refused(path: str, error: BaseException) -> str:
    """Why a model of the hub cannot be loaded, and the remedy."""
    from huggingface_hub import errors

    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    remedies: dict[tuple[type[BaseException], ...], str] = {
        (
            errors.GatedRepoError,
        ): f"gated: accept its licence at https://huggingface.co/{path}, then `hf auth login` or set HF_TOKEN",
        (errors.RepositoryNotFoundError,): "no such model on the hub, or a private one: check it, or `hf auth login`",
        (errors.RemoteEntryNotFoundError,): "the hub's model lacks a file of a diffusers pipeline",
        (
            errors.HTTPError,
            errors.OfflineModeIsEnabled,
            errors.LocalEntryNotFoundError,
        ): f"the hub cannot be reached; `hf download {path}` beforehand, or give a folder",
    }
    for kinds, remedy in remedies.items():
        if any(isinstance(cause, kinds) for cause in causes):
            return remedy
    return "cannot be loaded"


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"model.dtype={name}: choose one of {', '.join(known)}")
    return known[name]
