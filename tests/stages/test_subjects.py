"""What `adagrpo-eval` takes its `resume` and `against` for."""

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from adagrpo_train import continuation
from adagrpo_train.cli.subjects import find_subject
from adagrpo_train.errors import CheckpointError, ConfigError
from adagrpo_train.runtime.checkpoint import Snapshot
from adagrpo_train.runtime.files import fingerprint
from adagrpo_train.settings import Settings, read_settings
from tests.support import MID, alone


@cache
def _defaults() -> Settings:
    return read_settings([])  # takes a third of a second


def _settings(**changes: Any) -> Settings:
    """The defaults with other values; a mapping changes those of its section."""
    values = _defaults().values
    merged = {key: values[key] | value if isinstance(value, dict) else value for key, value in changes.items()}
    return replace(_defaults(), values=values | merged)


def _found(key: str, value: Path | str) -> Any:
    return find_subject(_settings(**{key: str(value)}), alone(), key)


def _snapshot(*, inputs: dict[str, str], **changes: Any) -> Snapshot:
    return Snapshot(2, {}, {}, {"inputs": inputs}, [], _settings(**changes).values)


def test_without_a_value_and_as_base_it_is_the_model_of_the_settings() -> None:
    for subject in (find_subject(_settings(), alone(), "resume"), _found("against", "base")):
        assert (subject.snapshot, subject.scores) == (None, None)
        assert subject.settings.values["model"]["path"] == str(MID)


def test_a_pipeline_takes_the_place_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert _found("against", tmp_path).settings.values["model"]["path"] == str(tmp_path)


def test_an_evaluation_is_known_by_its_lines(tmp_path: Path) -> None:
    (tmp_path / "evaluation.jsonl").write_text("")
    assert _found("against", tmp_path).scores == tmp_path
    assert _found("against", tmp_path / "evaluation.jsonl").scores == tmp_path


def test_what_cannot_be_evaluated_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"against=.*nowhere: no such folder; give a run"):
        _found("against", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"resume=.*: neither a run.*model_index\.json"):
        _found("resume", tmp_path)
    with pytest.raises(CheckpointError, match=r"against=.*no intact checkpoint"):
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        _found("against", tmp_path / "run")
    export = tmp_path / "run" / "export"
    export.mkdir()
    (export / "pytorch_lora_weights.safetensors").write_text("")
    with pytest.raises(ConfigError, match=f"adapters without their model; give the run .* {tmp_path / 'run'}"):
        _found("against", export)


def test_another_run_brings_its_trained_weights_and_the_model_it_started_from(tmp_path: Path) -> None:
    moved = shutil.copytree(MID, tmp_path / "moved")
    settings = _settings(against="run", model={"path": str(moved)}, trainable={"rank": 8})
    snapshot = _snapshot(trainable={"rank": 4}, weight_average={"decay": 0.5}, inputs={"model.path": fingerprint(MID)})
    own = continuation.with_weights_of(settings, snapshot, key="against").values
    assert own["trainable"]["rank"] == 4
    assert own["weight_average"]["decay"] == 0.5
    assert own["model"]["path"] == str(moved)  # the same contents
    (moved / "model_index.json").write_text("{}")
    own = continuation.with_weights_of(settings, snapshot, key="against").values
    assert own["model"]["path"] == str(MID)  # where the run found it


def test_a_run_whose_images_cannot_be_paired_or_whose_model_is_gone_is_refused() -> None:
    settings = _settings(against="run", model={"num_steps": 5})
    with pytest.raises(CheckpointError, match=r"against=run: .*\n.*model\.num_steps: 6 -> 5"):
        continuation.with_weights_of(settings, _snapshot(inputs={"model.path": fingerprint(MID)}), key="against")
    settings = _settings(against="run")
    with pytest.raises(CheckpointError, match="the model that it started from is neither at"):
        continuation.with_weights_of(settings, _snapshot(inputs={"model.path": "other"}), key="against")


def test_the_average_of_the_weights_that_a_run_was_evaluated_with_is_that_of_its_evaluation() -> None:
    inputs = {"model.path": fingerprint(MID)}
    continuation.check_same_model(_settings(resume="run"), _snapshot(inputs=inputs))
    with pytest.raises(CheckpointError, match=r"weight_average\.decay: 0\.9 -> 0\.0"):
        continuation.check_same_model(_settings(weight_average={"decay": 0.0}), _snapshot(inputs=inputs))


def test_training_refuses_what_only_an_evaluation_takes() -> None:
    continuation.check_trains(_settings())
    with pytest.raises(ConfigError, match=r"against=base: training compares with nothing"):
        continuation.check_trains(_settings(against="base"))
