"""Prompt embeddings encoded once and kept on disk, so that the text encoders need not stay in memory."""

import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adagrpo_train.errors import ConfigError, PromptError
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.files import fingerprint
from adagrpo_train.types import Conditions

_WHOLE_BYTES = 2**17
"""Of a larger weight the two ends of half that size are compared, as of large files."""
_BATCH = 8
"""Prompts encoded at once without a folder."""
_LIBRARIES = ("torch", "transformers", "diffusers")
_UNCONDITIONAL = "negative"
"""Fields of Conditions whose names start so belong to no text: they are the same for every prompt."""

_log = logging.getLogger(__name__)


class TextModel(Protocol):
    """What encoding prompts asks of a flow model."""

    device: torch.device

    def encode(self, texts: list[str]) -> Conditions: ...
    def text_components(self) -> Mapping[str, Any]: ...
    def release_text_encoders(self) -> None: ...


class PromptEncoder:
    """Embeddings of prompts: by the model's text encoders, or from a folder that they have filled.

    With a folder each prompt is encoded by itself, so that its embedding depends neither on the prompts beside it nor
    on the number of processes. A file holds one prompt; it is written under another name and renamed, so that
    processes and runs share a folder, and carries the hash of its contents. Files of other encoders, tokenizers,
    lengths, dtypes or library versions lie in other sub-folders.

    Args:
        model: its text encoders are loaded.
        folder: of the cache; None keeps the encoders in memory and encodes in batches of one size.
        engine: its processes share the work.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    def __init__(self, model: TextModel, *, folder: str | None, engine: Engine) -> None:
        self._model, self._engine = model, engine
        self._folder = None if folder is None else _open(Path(folder).expanduser(), model)

    def prepare(self, texts: Iterable[str]) -> None:
        """See to it that the folder holds these texts, then free the text encoders. Nothing happens without a folder.

        Raises:
            ConfigError: on every process, when the disk cannot take what is missing.
        """
        if self._folder is None:
            return
        distinct = sorted(set(texts) | {""})
        own = distinct[self._engine.rank :: self._engine.world_size]
        missing = [text for text in own if self._missing(text)]
        count = sum(self._engine.gather_objects(len(missing)))
        self._engine.together(lambda: self._require_space(count))
        self._encode(missing, of=len(distinct))
        self._engine.wait()
        # Nodes that do not share the folder have not seen what the others wrote.
        self._encode([text for text in distinct if not self._path(text).exists()], of=len(distinct))
        self._model.release_text_encoders()

    def encode(self, texts: list[str]) -> Conditions:
        """Embeddings of texts, one row each, on the model's device.

        Raises:
            PromptError: a file of the cache is missing or damaged, after the encoders are gone.
        """
        if self._folder is None:
            return self._in_batches(texts)
        rows = {text: self._read(text) for text in {*texts, ""}}
        columns: dict[str, Any] = {field.name: self._column(field.name, texts, rows) for field in fields(Conditions)}
        return Conditions(**columns)

    def _in_batches(self, texts: list[str]) -> Conditions:
        """Batches of one size, filled up: matrix products of other sizes round otherwise, so that an embedding would
        depend on how many prompts are encoded beside it, and with them on the number of processes."""
        filled = texts + texts[-1:] * (-len(texts) % _BATCH)
        parts = [self._model.encode(filled[start : start + _BATCH]) for start in range(0, len(filled), _BATCH)]
        columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Conditions)}
        whole: dict[str, Any] = {
            name: None if column[0] is None else torch.cat(column) for name, column in columns.items()
        }
        return Conditions(**whole)[torch.arange(len(texts), device=self._model.device)]

    def _column(self, name: str, texts: Sequence[str], rows: Mapping[str, Mapping[str, Tensor]]) -> Tensor | None:
        if name not in rows[""]:
            return None
        if name.startswith(_UNCONDITIONAL):
            row = rows[""][name].to(self._model.device)
            return row.expand(len(texts), *row.shape[1:])
        return torch.cat([rows[text][name] for text in texts]).to(self._model.device)

    def _path(self, text: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def _require_space(self, count: int) -> None:
        folder, example = self._path("").parent, _tensors(self._model.encode(["a"]), "a")
        needed, free = count * sum(t.nbytes for t in example.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise ConfigError(
                f"prompt_cache={folder.parent}: the {count} prompts that it lacks take {needed / 1e9:.1f} GB, "
                f"{free / 1e9:.1f} GB are free; name another folder, or fewer iterations"
            )

    def _encode(self, texts: Sequence[str], *, of: int) -> None:
        from rich.console import Console
        from rich.progress import track

        if not texts:
            return
        _log.info("encoding %d of %d prompts into %s", len(texts), of, self._folder)
        console = Console(stderr=True, quiet=not self._engine.is_main)
        for text in track(texts, description="prompts", console=console, transient=True):
            self._write(text, _tensors(self._model.encode([text]), text))

    def _write(self, text: str, tensors: dict[str, Tensor]) -> None:
        path = self._path(text)
        draft = _draft(path)
        save_file(tensors, draft, metadata={"text": text, "sha256": _digest(tensors)})
        os.replace(draft, path)

    def _missing(self, text: str) -> bool:
        """Whether a text has no whole file; of a damaged one a warning is given."""
        if not self._path(text).exists():
            return True
        found = self._load(text)
        if isinstance(found, str):
            _log.warning("prompt cache: %s %s; its prompt is encoded again", self._path(text), found)
        return isinstance(found, str)

    def _read(self, text: str) -> dict[str, Tensor]:
        found = self._load(text)
        if isinstance(found, str):
            raise PromptError(
                f"prompt_cache: {self._path(text)} {found}, and the text encoders are no longer in memory; its prompt "
                f"is {text!r}. Start again, or resume: what is missing is encoded then"
            )
        return found

    def _load(self, text: str) -> dict[str, Tensor] | str:
        """Tensors of a file, or what is wrong with it."""
        try:
            with safe_open(self._path(text), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            return f"cannot be read ({error})"
        whole = metadata.get("text") == text and metadata.get("sha256") == _digest(tensors)
        return tensors if whole else "is not what was written"


def _open(folder: Path, model: TextModel) -> Path:
    """The sub-folder for what this model makes of texts."""
    identity = json.dumps(_identity(model), indent=1, sort_keys=True)
    own = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
    draft = _draft(own / "identity.json")
    try:
        own.mkdir(parents=True, exist_ok=True)
        draft.write_text(identity, encoding="utf-8")
        os.replace(draft, own / "identity.json")
    except OSError as error:
        raise ConfigError(f"prompt_cache={folder}: cannot be written to ({error}); name another folder") from error
    return own


def _tensors(conditions: Conditions, text: str) -> dict[str, Tensor]:
    """What the file of one text holds: its own rows, and with the empty text those that belong to none."""
    rows = {field.name: getattr(conditions, field.name) for field in fields(conditions)}
    return {
        name: row.detach().cpu().contiguous()
        for name, row in rows.items()
        if row is not None and (not text or not name.startswith(_UNCONDITIONAL))
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _identity(model: TextModel) -> dict[str, Any]:
    """What an embedding depends on beside its text."""
    rows = _tensors(model.encode([""]), "")
    return {
        "model": type(model).__name__,
        "device": model.device.type,
        "rows": {name: [list(row.shape), str(row.dtype)] for name, row in rows.items()},
        "components": {name: _component(part) for name, part in model.text_components().items()},
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


def _component(part: Any) -> str:
    """Identity of a text encoder or a tokenizer."""
    if not isinstance(part, nn.Module):
        with tempfile.TemporaryDirectory() as folder:
            part.save_pretrained(folder)
            return fingerprint(Path(folder))
    digest = hashlib.sha256(type(part).__name__.encode())
    for name, weight in part.state_dict().items():
        digest.update(f"{name}\0{weight.dtype}\0{list(weight.shape)}\0".encode())
        flat = weight.detach().reshape(-1)
        half = _WHOLE_BYTES // 2 // flat.element_size()
        for end in (flat,) if flat.nbytes <= _WHOLE_BYTES else (flat[:half], flat[-half:]):
            digest.update(_bytes(end.cpu()))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _draft(path: Path) -> Path:
    """A name beside a file that no other process uses."""
    return path.with_name(f".draft_{secrets.token_hex(8)}_{path.name}")
