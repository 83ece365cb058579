"""What a study's folder says that it holds: a later call goes on with the same study or is refused."""

import json
from pathlib import Path
from typing import Any

from adagrpo_train.errors import ConfigError
from adagrpo_train.experiments.provenance import provenance
from adagrpo_train.experiments.study import Study, as_values
from adagrpo_train.runtime.files import write_whole

_FREE = ("seeds", "analyses", "question", "published")
"""What may change: how many runs there are, and what is said about them."""


def open_study(folder: Path, study: Study) -> None:
    """Write down a new study, or check that the folder holds this one.

    Raises:
        ConfigError: it holds runs with other settings; names the differing keys.
    """
    path = folder / "study.json"
    present = dict(as_values(study))
    if path.is_file():
        saved = _read(path)["study"]
        differing = [key for key in present if key not in _FREE and present[key] != saved.get(key)]
        if differing:
            key = differing[0]
            raise ConfigError(
                f"{folder} holds a study with other {', '.join(differing)} ({saved.get(key)} there, {present[key]} "
                "now); give the same, or another folder by --out"
            )
    _write(path, present, origins_of(folder))


def note_origin(folder: Path) -> None:
    """Write down that runs are made now, by this code on this machine."""
    path, now = folder / "study.json", provenance()
    saved = _read(path)
    if now not in saved["origins"]:
        _write(path, saved["study"], [*saved["origins"], now])


def origins_of(folder: Path) -> list[dict[str, Any]]:
    """Provenance of each call that made runs of the study, where they differ; the oldest first."""
    path = folder / "study.json"
    return _read(path)["origins"] if path.is_file() else []


def _write(path: Path, study: dict[str, Any], origins: list[dict[str, Any]]) -> None:
    write_whole(path, json.dumps({"study": study, "origins": origins}, indent=1))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it to take the runs beside it as they are") from error
