"""Files and folders that are wholly there or not at all, and fingerprints of what they hold."""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WHOLE_BYTES, _END_BYTES = 16 * 2**20, 2**20


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A draft beside `target` to write into; on leaving it is flushed to disk and takes the target's place.

    After an exception, or a kill, the target is what it was; between the two renames it lies under the name
    ``.replaced_<name>``, from where the next call takes it back.
    """
    draft, replaced = target.with_name(f".draft_{target.name}"), target.with_name(f".replaced_{target.name}")
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    for path in (*draft.rglob("*"), draft):
        _flush(path)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        draft.rename(target)
        shutil.rmtree(replaced)
    else:
        draft.rename(target)
    _flush(target.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 text file; a kill leaves the old one or the new one."""
    draft = path.with_name(f".draft_{path.name}")
    draft.write_text(text, encoding="utf-8")
    _flush(draft)
    os.replace(draft, path)


def without_nan(value: Any) -> Any:
    """The same numbers, texts and containers for JSON, which has no nan: a figure that does not exist is null."""
    if isinstance(value, dict):
        return {key: without_nan(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """Identity of the contents of a file or folder, wherever it lies; 64 hexadecimal digits.

    Hidden files do not count. Of a file above 16 MiB the size and one MiB at either end stand for the whole: weights of
    20 GB take no minute.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
    digest = hashlib.sha256()
    for file in files:
        name = "" if file == path else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        digest.update(_sample(file))
    return digest.hexdigest()


def _hidden(file: Path, folder: Path) -> bool:
    """Whether a file belongs to the bookkeeping of git or of a download."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _sample(file: Path) -> bytes:
    if file.stat().st_size <= _WHOLE_BYTES:
        return file.read_bytes()
    with file.open("rb") as content:
        start = content.read(_END_BYTES)
        content.seek(-_END_BYTES, os.SEEK_END)
        return start + content.read()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
