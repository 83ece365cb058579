"""Weights: found, read without running code from them, loaded completely, and named by what is in them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_COUNTED = "position_ids"
_LAYER = r"\.(layers?|blocks|resblocks)\.\d+\."  # regular expression
_NO_MATTER = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


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
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repo, filename))
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
        raise unreachable(setting, f"{repo}/{filename}", error) from error


def unreachable(setting: str, source: str, error: Exception) -> WeightsError:
    """What to raise when the hub does not give a file: which, why, and what to do."""
    if source.startswith(("/", ".", "~")) or Path(source).exists():
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
        ignore_others: accept tensors that the model does not have, but no more layers than it has.

    Raises:
        WeightsError: a weight is missing, has another shape, or (unless ignored) is not the model's.
    """
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    # Places of tokens, which older files hold as well, are counted and not learnt.
    others = {name for name in state.keys() - own.keys() if not name.endswith(_COUNTED)}
    foreign = sorted(name for name in others if not ignore_others or re.search(_LAYER, name))
    reshaped = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    faults = [f"{len(names)} {what} ({names[0]}, ...)" for what, names in
              (("missing", missing), ("unknown", foreign), ("of another shape", reshaped)) if names]  # fmt: skip
    if faults:
        raise WeightsError(f"{setting}: these are weights of another model: {'; '.join(faults)}")
    model.load_state_dict({name: state[name] for name in own})


def pretrained(model_class: Any, source: str, *, setting: str, others: tuple[str, ...] = ()) -> Any:
    """A transformers model from a folder or the hub, in float32, refusing one that would be partly random or left out.

    Args:
        others: what names of weights begin with that the file may have besides.

    Raises:
        WeightsError: it cannot be had, is damaged, lacks weights that the class needs, or has others.
    """
    import torch

    place = _place(source)
    try:
        model, report = model_class.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise unreachable(setting, source, error) from error
    except Exception as error:  # what a damaged file or one of another model raises depends on where it differs
        raise WeightsError(
            f"{setting}={source}: cannot be read as {model_class.__name__} ({type(error).__name__}: {error})"
        ) from error
    unknown = [name for name in report["unexpected_keys"] if not name.startswith(others) and _COUNTED not in name]
    for what, names in (("lacks", list(report["missing_keys"])), ("has besides", unknown)):
        if names:
            raise WeightsError(
                f"{setting}={source}: {what} {len(names)} weights of another model than {model_class.__name__} "
                f"({min(map(str, names))}, ...)"
            )
    return model


def tokenizer(tokenizer_class: Any, source: str, *, setting: str, vocabulary: int, **options: Any) -> Any:
    """A transformers tokenizer from a folder or the hub that knows words, and none that the model does not.

    From a folder without its files transformers 5 makes an empty tokenizer, in which all prompts are alike.

    Args:
        vocabulary: tokens of the model.
        options: of the tokenizer.

    Raises:
        WeightsError: it cannot be had, is empty, or belongs to a larger model.
    """
    try:
        made = tokenizer_class.from_pretrained(_place(source), **options)
    except (OSError, ValueError) as error:
        raise unreachable(setting, source, error) from error
    words = made("a photo of a cat", add_special_tokens=False).input_ids
    known = [token for token in words if token not in made.all_special_ids]
    if not known or max(words) >= vocabulary:
        raise WeightsError(
            f"{setting}={source}: holds no vocabulary of this model; give a folder with its tokenizer.json or "
            "vocabulary files"
        )
    return made


def described(config: Any) -> str:
    """A transformers config as text, without what does not change scores: where it came from, and precision."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(child) for key, child in value.items() if key not in _NO_MATTER}
        return value

    return json.dumps(plain(config.to_dict()), sort_keys=True, default=str)


def spelled(tokenizer: Any) -> str:
    """A transformers tokenizer as text: everything that makes ids of words."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(
            [sorted(tokenizer.get_vocab().items()), sorted(map(str, getattr(tokenizer, "bpe_ranks", {})))]
        )
    content = json.loads(backend.to_str())
    return json.dumps({key: value for key, value in content.items() if key not in ("truncation", "padding")})


def digest(model: nn.Module) -> str:
    """sha256 of the names, types, shapes and bytes of all weights, in hexadecimal."""
    import torch

    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def short_digest(texts: Sequence[str]) -> str:
    """The first 16 hexadecimal digits of the sha256 of some texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _place(source: str) -> str:
    return str(Path(source).expanduser()) if source.startswith("~") else source
