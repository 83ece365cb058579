"""From records and changes to a report of what would have been different."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adagrpo_train.errors import ConfigError
from adagrpo_train.recording.record import Record, read_records
from adagrpo_train.replay.again import Replay, recorded
from adagrpo_train.replay.changes import changed, differing
from adagrpo_train.replay.difference import difference, reproduced

_OF_THE_SCALE = ("reward.", "scoring.scale")
_WHETHER = ("exact", "choice")


def replay(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Replay the records of a run, as they were and under a changed configuration.

    Args:
        path: a run, a folder of records, or a record.
        overrides: `key=value`.

    Returns:
        What JSON can hold: the changes, whether the record was reproduced, notes, and the differences per iteration.

    Raises:
        ConfigError: there is no sound record, or a change that no record can answer for.
    """
    records = read_records(path)
    config = records[0].head["config"]
    _check_alike(records)
    values = changed(config, overrides)
    changes = differing(config, values)
    again, other = Replay(config), Replay(values)
    sound, found = [], []
    for record in records:
        before = recorded(record)
        sound.append(reproduced(before, again.of(record)))
        found.append(difference(record, before, other.of(record)))
    worst = {key: max(each[key] or 0.0 for each in sound) for key in sound[0] if key not in _WHETHER}
    return {
        "changes": changes,
        "reproduced": {key: all(each[key] for each in sound) for key in _WHETHER} | worst,
        "notes": _notes(records, values, list(changes), found) + other.notes,
        "records": found,
    }


def _check_alike(records: Sequence[Record]) -> None:
    """Refuse records of several runs: there is no path from one to the next."""
    for record in records:
        for key in ("curriculum", "advantage", "algorithm", "group_size"):
            if record.head["config"][key] != records[0].head["config"][key]:
                raise ConfigError(
                    f"iteration {record.iteration} was recorded with another {key} than {records[0].iteration}; "
                    "replay them one by one"
                )


def _notes(
    records: Sequence[Record], values: dict[str, Any], changes: Sequence[str], found: Sequence[dict[str, Any]]
) -> list[str]:
    """What a reader should know before believing the tables."""
    notes = []
    if any(record["selection"]["only_replayed"] for record in found):
        notes.append("other prompts would have been chosen; advantages and losses are those of the recorded samples")
    state = records[0].head["curriculum"]["before"][0]
    if state and any(key.startswith(_OF_THE_SCALE) for key in changes):
        notes.append(
            f"{', '.join(changes)}: the level starts with what the run had before iteration {records[0].iteration}, "
            "which it measured in the rewards of that run"
        )
    if "candidates" in records[0].head["config"]["curriculum"] and "candidates" not in values["curriculum"]:
        notes.append("curriculum: a run without a scored curriculum would have drawn fewer prompts, the first of these")
    unknown = sum(record["samples_without_log_prob"] for record in found)
    if unknown:
        notes.append(f"{unknown} samples count now that the run left out: they have no log-probabilities and no loss")
    return notes
