"""What a study's folder says that it holds: a later call goes on with the same study or is refused."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adagrpo_train.continuation import INPUTS
from adagrpo_train.errors import ConfigError
from adagrpo_train.experiments.provenance import provenance
from adagrpo_train.experiments.study import Study, as_values
from adagrpo_train.runtime.files import fingerprint, write_whole

_FREE = ("seeds", "analyses", "question", "published")
"""What may change: how many runs there are, and what is said about them."""


def contents(values: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Fingerprints of the files that settings name, `key=path` -> fingerprint; of a hub id nothing is known."""
    named = {(key, own[key.partition(".")[0]][key.partition(".")[2]]) for own in values for key in INPUTS}
    paths = {f"{key}={value}": Path(value).expanduser() for key, value in sorted(named)}
    return {name: fingerprint(path) for name, path in paths.items() if path.exists()}


def open_study(folder: Path, study: Study, inputs: Mapping[str, str]) -> None:
    """Write down a new study, or check that the folder holds this one.

    Args:
        inputs: contents() of the settings of its arms.

    Raises:
        ConfigError: it holds runs with other settings, or of other files; names what differs.
    """
    path = folder / "study.json"
    present, known = dict(as_values(study)), dict[str, str]()
    if path.is_file():
        ledger = _read(path)
        saved, known = ledger["study"], ledger.get("inputs", {})
        differing = [key for key in present if key not in _FREE and present[key] != saved.get(key)]
        if differing:
            key = differing[0]
            raise ConfigError(
                f"{folder} holds a study with other {', '.join(differing)} ({saved.get(key)} there, {present[key]} "
                "now); give the same, or another folder by --out"
            )
        changed = [name for name in inputs.keys() & known.keys() if inputs[name] != known[name]]
        if changed:
            raise ConfigError(
                f"{changed[0]}: its content is not what the runs in {folder} were made with; put it back, or give "
                "another folder by --out"
            )
    _write(path, present, known | dict(inputs), origins_of(folder))


def note_origin(folder: Path) -> None:
    """Write down that runs are made now, by this code on this machine."""
    path, now = folder / "study.json", provenance()
    saved = _read(path)
    if now not in saved["origins"]:
        _write(path, saved["study"], saved.get("inputs", {}), [*saved["origins"], now])


def origins_of(folder: Path) -> list[dict[str, Any]]:
    """Provenance of each call that made runs of the study, where they differ; the oldest first."""
    path = folder / "study.json"
    return _read(path)["origins"] if path.is_file() else []


def _write(path: Path, study: dict[str, Any], inputs: dict[str, str], origins: list[dict[str, Any]]) -> None:
    write_whole(path, json.dumps({"study": study, "inputs": inputs, "origins": origins}, indent=1))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it to take the runs beside it as they are") from error
