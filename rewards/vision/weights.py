"""Weights: found, read without running code from them, loaded completely, and named by what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


class WeightsError(RuntimeError):
    """Weights are missing, out of reach or of another model; the message names the setting and the remedy."""


def find(setting: str, value: str | None, *, repo: str, filename: str) -> Path:
    """The file that a setting names, or the published one, from the Hugging Face hub or its cache.

    Args:
        setting: name of the setting, for messages.
        value: path of a local file; None means the published one.
        repo: where the published file lies on the hub.
        filename: its name there.

    Raises:
        WeightsError: there is no such file, or the hub does not give it.
    """
    if value is not None:
        path = Path(value).expanduser()
        if not path.is_file():
            raise WeightsError(f"{setting}={value}: no such file; give the path of a {filename}, or null for the hub's")
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(repo, filename))
    except (HfHubHTTPError, EntryNotFoundError, OSError) as error:
        raise unreachable(setting, f"{repo}/{filename}", error) from error


def unreachable(setting: str, source: str, error: Exception) -> WeightsError:
    """What to raise when the hub does not give a file: which, why, and what to do."""
    if source.startswith(("/", ".", "~")):
        return WeightsError(f"{setting}={source}: no such folder, or not what this reward needs ({error})")
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return WeightsError(
        f"cannot get {source} ({type(error).__name__}: {reason}). Fetch it where there is a network "
        f"(`hf download {'/'.join(source.split('/')[:2])}`; accept its terms and `hf auth login` first if it is gated) "
        f"or set {setting} to a local copy"
    )


def read(path: Path, *, setting: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a torch file, on the CPU.

    A training checkpoint is looked into under ``state_dict``. Only tensors and plain containers are unpickled.

    Raises:
        WeightsError: the file is damaged or holds something else.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise WeightsError(f"{setting}: {path} cannot be read as weights: {error}") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{setting}: {path} holds no state dict")
    return dict(state)


def fill(model: nn.Module, state: Mapping[str, Tensor], *, setting: str, ignore_others: bool = False) -> None:
    """Load every weight of a model, in the model's own precision.

    Args:
        model: what to load into.
        state: tensors by name.
        setting: where the weights came from, for messages.
        ignore_others: accept tensors that the model does not have.

    Raises:
        WeightsError: a weight is missing, has another shape, or (unless ignored) is not the model's.
    """
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    foreign = [] if ignore_others else sorted(state.keys() - own.keys())
    reshaped = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    faults = [f"{len(names)} {what} ({names[0]}, ...)" for what, names in
              (("missing", missing), ("unknown", foreign), ("of another shape", reshaped)) if names]  # fmt: skip
    if faults:
        raise WeightsError(f"{setting}: these are weights of another model: {'; '.join(faults)}")
    model.load_state_dict({name: state[name] for name in own})


def pretrained(model_class: Any, source: str, *, setting: str) -> Any:
    """A transformers model from a folder or the hub, in float32, refusing one that would be partly random.

    Raises:
        WeightsError: it cannot be had, or lacks weights that the class needs.
    """
    import torch

    try:
        model, report = model_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise unreachable(setting, source, error) from error
    absent = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
    if absent:
        raise WeightsError(
            f"{setting}={source}: lacks {len(absent)} weights of {model_class.__name__} ({absent[0]}, ...)"
        )
    return model


def digest(model: nn.Module) -> str:
    """sha256 of the names, types, shapes and bytes of all weights, in hexadecimal."""
    import torch

    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
