"""Save and load everything that has state; atomic to write, checked when read."""

import json
import logging
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adagrpo_train.errors import CheckpointError, ConfigError
from adagrpo_train.runtime.files import sha256, whole_folder, write_whole

_FORMAT = 2
_MANIFEST = "manifest.json"
_BEST = "best"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The state of a run between two iterations.

    Attributes:
        iteration: the next iteration to run.
        tensors: named weight sets, such as "trainable" and "average".
        optimizer: optimizer.state_dict().
        state: JSON state of the parts: prompts, tracker and the like.
        per_rank: JSON state that differs between ranks, one entry per rank.
        config: resolved configuration of the run.
    """

    iteration: int
    tensors: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    per_rank: list[dict[str, Any]]
    config: dict[str, Any]


class Checkpoints:
    """Checkpoints of one run: `<folder>/iteration_000040`, the newest `keep` of them and the best one.

    A checkpoint is written beside its place, flushed to disk, and renamed; its manifest holds the size and
    SHA-256 of each file, so one that was cut short or altered is recognised. The file `<folder>/best` holds the name
    of the best one: unlike a link it is the same after any copy, and copies nothing.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        if keep < 1:
            raise ConfigError(f"checkpoint.keep={keep}: must be >= 1")
        self._folder, self._keep = folder, keep

    def save(self, snapshot: Snapshot, *, best: int | None = None) -> Path:
        """Write a checkpoint and drop the oldest ones beyond `keep`.

        Args:
            best: iteration of the best checkpoint, this or an older one, which is not dropped; None if there is none.
        """
        target = self._path(snapshot.iteration)
        with whole_folder(target) as draft:
            for name, tensors in snapshot.tensors.items():
                if tensors:
                    contiguous = {key: value.detach().contiguous() for key, value in tensors.items()}
                    save_file(contiguous, draft / f"{name}.safetensors")
            torch.save(snapshot.optimizer, draft / "optimizer.pt")
            state = {"iteration": snapshot.iteration, "state": snapshot.state, "per_rank": snapshot.per_rank}
            (draft / "state.json").write_text(json.dumps(state), encoding="utf-8")
            (draft / "config.json").write_text(json.dumps(snapshot.config), encoding="utf-8")
            files = {path.name: _identity(path) for path in sorted(draft.iterdir())}
            (draft / _MANIFEST).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1), encoding="utf-8")
        # Named before any is dropped: after a kill the name is that of a checkpoint which is there.
        self.mark_best(best)
        older = [path for path in sorted(self._folder.glob("iteration_*")) if path.name < target.name]
        for path in older[: max(0, len(older) + 1 - self._keep)]:
            if best is None or path != self._path(best):
                shutil.rmtree(path)
        return target

    def holds(self, iteration: int) -> bool:
        """Whether the checkpoint of an iteration is there and intact."""
        return not fault_of(self._path(iteration))

    def mark_best(self, iteration: int | None) -> None:
        """Name the best checkpoint, or none."""
        if iteration is None:
            (self._folder / _BEST).unlink(missing_ok=True)
        else:
            write_whole(self._folder / _BEST, f"{self._path(iteration).name}\n")

    def _path(self, iteration: int) -> Path:
        return self._folder / f"iteration_{iteration:06d}"


def find(path: Path, *, key: str = "resume") -> Path:
    """The newest intact checkpoint of a run folder or a checkpoints folder, a checkpoint, or the one that `best` names.

    In a folder a damaged one is passed over with a warning that names it.

    Args:
        key: the configuration key that names the path, for messages.

    Raises:
        CheckpointError: nothing is there, or nothing intact.
    """
    if not path.exists():
        raise CheckpointError(f"{key}={path}: no such folder; give a run folder or one of its checkpoints")
    if path.is_file() and path.name == _BEST:
        path = path.with_name(path.read_text(encoding="utf-8").strip())
    if (path / _MANIFEST).is_file() or path.name.startswith("iteration_"):
        fault = fault_of(path)
        if fault:
            raise CheckpointError(f"{key}={path}: {fault}; give the run folder to use the newest intact checkpoint")
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for candidate in sorted(folder.glob("iteration_*"), reverse=True):
        fault = fault_of(candidate)
        if not fault:
            return candidate
        _log.warning("checkpoint %s is damaged (%s); using the one before", candidate, fault)
    raise CheckpointError(f"{key}={path}: no intact checkpoint in {folder}")


def fault_of(path: Path) -> str:
    """What is wrong with a checkpoint, "" if it is intact."""
    manifest = path / _MANIFEST
    if not manifest.is_file():
        return "manifest.json is missing, so writing it was cut short"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        expected = content["files"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        return "manifest.json cannot be read"
    if content.get("format") != _FORMAT:
        return f"format {content.get('format')} is not {_FORMAT}"
    for name, identity in expected.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _identity(path / name) != identity:
            return f"{name} is not what was written"
    return ""


def later_than(path: Path) -> list[Path]:
    """Intact checkpoints of the same run that come after this one."""
    later = (other for other in sorted(path.parent.glob("iteration_*")) if other.name > path.name)
    return [other for other in later if not fault_of(other)]


def load(path: Path) -> Snapshot:
    """Read an intact checkpoint. Nothing is unpickled beyond plain tensors and containers."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Snapshot(
        iteration=state["iteration"],
        tensors={file.stem: load_file(file) for file in path.glob("*.safetensors")},
        optimizer=torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"),
        state=state["state"],
        per_rank=state["per_rank"],
        config=json.loads((path / "config.json").read_text(encoding="utf-8")),
    )


def check_compatible(saved: dict[str, Any], present: dict[str, Any], *, free: tuple[str, ...]) -> None:
    """Refuse to continue a run under settings that would silently change it.

    Args:
        saved, present: resolved configurations.
        free: dotted keys (with all below them) that may differ.

    Raises:
        CheckpointError: names every key that differs, with both values.
    """
    old, new = _flatten(saved), _flatten(present)
    differing = [
        f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == f or key.startswith(f + ".") for f in free)
    ]
    if differing:
        raise CheckpointError(
            "the checkpoint was made with another configuration:\n  "
            + "\n  ".join(differing)
            + "\nresume with the saved values, or start a new run"
        )


def random_state() -> dict[str, Any]:
    """State of the global generators of python, numpy and torch, as JSON."""
    version, keys, *rest = random.getstate()
    numpy_state: Any = np.random.get_state()
    return {
        "python": [version, list(keys), *rest],
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "torch": torch.get_rng_state().tolist(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo random_state()."""
    version, keys, rest = state["python"]
    random.setstate((version, tuple(keys), rest))
    name, keys, *others = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *others))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, child in value.items():
        flat |= _flatten(child, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _identity(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
