"""A diffusers pipeline from a folder or the hub; whatever is wrong with it is named, with the remedy."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adagrpo_train.errors import ConfigError
from adagrpo_train.models.outline import outline

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(pipeline_class: Any, path: str, dtype: torch.dtype, without: Sequence[str], *, device: torch.device) -> Any:
    """A pipeline from a folder or the hub, without the named components.

    Args:
        device: where it will live; on torch's meta device it has shapes and no weights, and no file of weights is read.

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
    if device.type == "meta":
        return outline(pipeline_class, path, dtype, without)
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
    if not index.is_file() and list(folder.glob("*lora*.safetensors")):
        raise ConfigError(
            f"model.path={path}: holds adapters, not a pipeline. Those of a run here are evaluated by "
            "adagrpo-eval resume=RUN; of others make a pipeline with diffusers: load_lora_weights, fuse_lora, "
            "unload_lora_weights, save_pretrained"
        )
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
