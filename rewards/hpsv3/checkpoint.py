"""Files of an HPSv3 checkpoint: found, read tensor by tensor, and given the names of current transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.vision.weights import WeightsError, find

if TYPE_CHECKING:
    from torch import Tensor

FILE = "HPSv3.safetensors"
_TORCH_SUFFIXES = (".pth", ".pt", ".bin")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: From the names of transformers 4.45, which the published file has, to those of `Qwen2VLModel` since 4.52.
_NAMES = (
    (r"visual\.", "model.visual."),
    (r"model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"rm_head\.", "rm_head."),
)


def is_hub_id(source: str) -> bool:
    """Whether a setting names a repository of the hub: ``owner/name``, and nothing on this disk."""
    names_file = source.endswith((FILE, *_TORCH_SUFFIXES, ".safetensors", ".json"))
    return _HUB_ID.fullmatch(source) is not None and not names_file and not Path(source).exists()


def weight_files(source: str) -> list[Path]:
    """The files that a setting names.

    Args:
        source: a file, the index of a sharded checkpoint, a folder with either, or a repository of the hub, of which
            `FILE` is taken. Only the last may use the network.

    Raises:
        WeightsError: there is no such file, or it is not clear which one is meant.
    """
    if is_hub_id(source):
        return [find("weights", None, repo=source, filename=FILE)]
    path = Path(source).expanduser()
    if path.is_dir():
        path = _only_one_of(path)
    if not path.is_file():
        raise WeightsError(
            f"weights={source}: no such file; give {FILE}, its folder, or a hub id such as MizzenAI/HPSv3"
        )
    if path.name.endswith(".index.json"):
        shards = json.loads(path.read_text(encoding="utf-8")).get("weight_map", {}).values()
        files = sorted({path.parent / Path(shard).name for shard in shards})
        absent = [file.name for file in files if not file.is_file()]
        if absent or not files:
            raise WeightsError(f"weights={source}: {path.name} lists {len(files)} files, of which {absent} are missing")
        return files
    return [path]


def tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor, under the names of the files; safetensors are read one tensor at a time.

    Raises:
        WeightsError: a file is damaged or holds something else.
    """
    for file in files:
        try:
            yield from _torch_file(file) if file.suffix in _TORCH_SUFFIXES else _safetensors(file)
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            raise WeightsError(f"weights: {file} cannot be read as weights: {error}") from error


def rename(name: str) -> str | None:
    """The name of current transformers, or None for what the reward has no use for.

    Raises:
        WeightsError: no HPSv3 has a tensor of that name.
    """
    if name == "lm_head.weight":
        return None
    for pattern, replacement in _NAMES:
        renamed, matches = re.subn(f"^{pattern}", replacement, name)
        if matches:
            return renamed
    raise WeightsError(f"weights: these are weights of another model: nothing in HPSv3 is called {name}")


def _only_one_of(folder: Path) -> Path:
    for pattern in ("*.index.json", "*.safetensors", *(f"*{suffix}" for suffix in _TORCH_SUFFIXES)):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise WeightsError(f"weights={folder}: holds several checkpoints ({names}); name the file")
        if found:
            return found[0]
    raise WeightsError(f"weights={folder}: no .safetensors or .pth in this folder; it should hold {FILE}")


def _safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - no mapping
            yield name, opened.get_tensor(name)


def _torch_file(file: Path) -> Iterator[tuple[str, Tensor]]:
    import torch

    content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError("no state dict")
    yield from state.items()
