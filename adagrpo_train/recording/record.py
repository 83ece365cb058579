"""The record of one iteration on disk: README.md in this folder describes every name."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adagrpo_train.errors import ConfigError
from adagrpo_train.runtime.files import sha256, whole_folder, without_nan
from adagrpo_train.types import Prompts

_FORMAT = 1
_MANIFEST, _HEAD, _TENSORS, _PROMPTS = "manifest.json", "record.json", "tensors.safetensors", "prompts.jsonl"


@dataclass(frozen=True)
class Record:
    """One iteration of a run.

    Attributes:
        head: record.json.
        prompts: the candidates, of all processes.
        tensors: tensors.safetensors, on the CPU.
    """

    head: dict[str, Any]
    prompts: Prompts
    tensors: dict[str, Tensor]

    @property
    def iteration(self) -> int:
        return self.head["iteration"]

    def parts(self, owner: str) -> dict[str, Tensor]:
        """The parts of the scores of "candidate" or "sample", by name."""
        start = f"{owner}.part."
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}


def write_record(folder: Path, record: Record, pictures: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write the folder of one iteration, wholly or not at all.

    Args:
        folder: of all records of the run.
        pictures: name of a file -> tensors in it; files without any are left out.
    """
    target = folder / f"{record.iteration:06d}"
    with whole_folder(target) as draft:
        (draft / _HEAD).write_text(json.dumps(without_nan(record.head), allow_nan=False, indent=1), encoding="utf-8")
        (draft / _PROMPTS).write_text("".join(_lines(record)), encoding="utf-8")
        for name, tensors in {_TENSORS: record.tensors, **pictures}.items():
            if tensors:
                save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, draft / name)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(draft.iterdir())}
        (draft / _MANIFEST).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1), encoding="utf-8")
    return target


def read_records(path: Path) -> list[Record]:
    """The records of a run, of a folder of records, or the one that is given, in the order of their iterations.

    Raises:
        ConfigError: nothing is there, or something that cannot be read.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; give a run or one of its records")
    if (path / _MANIFEST).is_file() or re.fullmatch(r"\d{6,}", path.name):
        return [_read(path)]
    folders = _numbered(path / "record" if (path / "record").is_dir() else path)
    if not folders:
        raise ConfigError(f"{path}: holds no record; a run with record.every=1 makes one of every iteration")
    return [_read(folder) for _, folder in folders]


def drop_later(folder: Path, iteration: int) -> None:
    """Drop the records after an iteration, and what a kill cut short; a new run (iteration 0) starts empty."""
    if folder.is_dir():
        for leftover in (*folder.glob(".draft_*"), *folder.glob(".replaced_*")):
            shutil.rmtree(leftover)
    for number, path in _numbered(folder):
        if number > iteration:
            shutil.rmtree(path)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(path.name), path) for path in found if re.fullmatch(r"\d{6,}", path.name))


def _read(folder: Path) -> Record:
    if not (folder / _MANIFEST).is_file():
        raise ConfigError(f"{folder}: {_MANIFEST} is missing, so this is no record")
    manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != _FORMAT:
        raise ConfigError(f"{folder}: format {manifest['format']} is not {_FORMAT}; read it with the version it is of")
    for name in (_HEAD, _PROMPTS, _TENSORS):  # pictures may be deleted for the sake of space
        path = folder / name
        if not path.is_file() or sha256(path) != manifest["files"][name]["sha256"]:
            raise ConfigError(f"{path} is not what was written; delete {folder} to do without this record")
    rows = [json.loads(line) for line in (folder / _PROMPTS).read_text(encoding="utf-8").splitlines()]
    prompts = Prompts(*(tuple(row[key] for row in rows) for key in ("prompt_id", "text", "class")))
    return Record(json.loads((folder / _HEAD).read_text(encoding="utf-8")), prompts, load_file(folder / _TENSORS))


def _lines(record: Record) -> list[str]:
    """One JSON line per candidate; the scores are there to be read, the tensors hold them exactly."""
    ranks = {row: rank for rank, row in enumerate(record.head["selection"]["rows"])}
    total, parts = record.tensors.get("candidate.total"), record.parts("candidate")
    lines = []
    prompts = record.prompts
    for row, (prompt_id, text, label) in enumerate(zip(prompts.ids, prompts.texts, prompts.classes, strict=True)):
        line = {"row": row, "prompt_id": prompt_id, "text": text, "class": label, "chosen": ranks.get(row)}
        line |= {"score": None if total is None else float(total[row])}
        line |= {"parts": {name: float(values[row]) for name, values in parts.items()}}
        lines.append(json.dumps(without_nan(line), allow_nan=False, ensure_ascii=False) + "\n")
    return lines


def order(sample: Tensor, sigma: Tensor) -> Tensor:
    """Rows [K] in the order of a record: by sample, and along its trajectory from noise to image."""
    along = torch.argsort(sigma, descending=True, stable=True)
    return along[torch.argsort(sample[along], stable=True)]
