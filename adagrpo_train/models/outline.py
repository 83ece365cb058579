"""A pipeline on torch's meta device: all shapes, no weights, nothing downloaded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adagrpo_train.errors import ConfigError
from adagrpo_train.models.published import PIPELINES


def outline(pipeline_class: Any, path: str, dtype: torch.dtype, without: Sequence[str]) -> Any:
    """A pipeline of that class whose parts have shapes only.

    A folder is outlined from the configurations in it, and has its tokenizers; a hub id from `published.py`.

    Raises:
        ConfigError: neither knows the model's configurations.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        parts = _parts_of(folder, without)
    elif path in PIPELINES:
        parts = {name: _made(*part) for name, part in PIPELINES[path].items() if name not in without}
    else:
        raise ConfigError(
            f"model.path={path}: without weights only {', '.join(PIPELINES)} and local folders are known; give a "
            "folder with model_index.json and the config.json of each part"
        )
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype)
    texts = (f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    absent = {name: None for name in texts if name in pipeline_class.__init__.__annotations__}
    return pipeline_class(**(absent | parts))


def _parts_of(folder: Path, without: Sequence[str]) -> dict[str, Any]:
    import transformers

    parts: dict[str, Any] = {}
    for name, entry in json.loads((folder / "model_index.json").read_text(encoding="utf-8")).items():
        if not isinstance(entry, list) or entry[0] is None or name in without:
            continue
        if name.startswith("tokenizer"):
            parts[name] = getattr(transformers, entry[1]).from_pretrained(str(folder / name))
            continue
        file = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.path={folder}: {file} cannot be read ({error}); download it again") from error
        parts[name] = _made(entry[1], {key: value for key, value in config.items() if not key.startswith("_")})
    return parts


def _made(class_name: str, config: Any) -> Any:
    """A part of diffusers or transformers on the meta device."""
    import diffusers
    import transformers

    with torch.device("meta"):
        if hasattr(diffusers, class_name):
            return getattr(diffusers, class_name).from_config(dict(config))
        kind = getattr(transformers, class_name)
        return kind(kind.config_class(**config))
