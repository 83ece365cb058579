"""What a record holds, that it is what happened, and that it changes nothing."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adagrpo_train.errors import ConfigError
from adagrpo_train.preflight.outline import Outline
from adagrpo_train.recording.record import drop_later, order, read_records
from adagrpo_train.runtime import checkpoint
from adagrpo_train.settings import read_settings
from tests.support import SMALL, Memory, make_trainer

SETTINGS = ["adagrpo=on", "curriculum.candidates=4", "optimizer.lr=1e-3", "micro_batch=2", "updates_per_iteration=2"]
SETTINGS += ["model.num_steps=3", "evaluation.images=1", "evaluation.grid_images=1"]


def test_a_record_is_what_happened(tmp_path: Path) -> None:
    """The advantages that the update was given, the losses it computed, the latents that became the images."""
    settings = [*SETTINGS, "iterations=1", "record.every=1", "record.images=true"]
    trainer, parts, _ = make_trainer(*settings, run_dir=tmp_path)
    seen: dict[str, Any] = {"losses": []}
    make, loss_of = trainer._update.make, trainer._update._objective.loss

    def watch_update(batches: Any, conditions: Any, advantages: Any, *others: Any) -> Any:
        seen["advantages"] = advantages.clone()
        return make(batches, conditions, advantages, *others)

    def watch_loss(*arguments: Any) -> Any:
        loss = loss_of(*arguments)
        seen["losses"].append(loss.value.detach())
        return loss

    trainer._update.make = watch_update  # type: ignore[method-assign]
    object.__setattr__(trainer._update._objective, "loss", watch_loss)
    memory = Memory()
    trainer.train(memory)
    (record,) = read_records(tmp_path)
    tensors, (row,) = record.tensors, memory.training
    assert torch.equal(tensors["sample.fused"], seen["advantages"])
    assert torch.equal(tensors["sample.fused"], tensors["sample.local"] + tensors["sample.across"])
    assert torch.equal(tensors["batch.loss"], torch.stack(seen["losses"]))
    assert tensors["batch.update"].tolist() == [0, 0, 1, 1]
    assert record.head["metrics"]["policy/loss"] == row["policy/loss"]
    assert record.head["versions"]["torch"] == version("torch")
    assert row["policy/loss"] == pytest.approx(float(tensors["batch.loss"].double().mean()))
    assert [prompt.chosen for prompt in memory.prompts[0]] == [n in record.head["selection"]["rows"] for n in range(4)]
    assert [prompt.score for prompt in memory.prompts[0]] == tensors["candidate.total"].tolist()
    lines = [json.loads(line) for line in (tmp_path / "record/000001/prompts.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [prompt.text for prompt in memory.prompts[0]]
    pictures = load_file(tmp_path / "record/000001/images.safetensors")
    latents = load_file(tmp_path / "record/000001/latents.safetensors")["sample.x0"]
    assert torch.equal(torch.from_numpy(parts.policy.decode(latents)), pictures["sample.image"])
    assert pictures["candidate.image"].shape == (4, 32, 32, 3)
    planned = Outline(read_settings([*SMALL, *settings, "iterations=7", "record.every=2"]), processes=1).written()
    assert planned.records == 3 * (latents.nbytes + sum(image.nbytes for image in pictures.values()))


def test_a_record_changes_no_number_and_off_leaves_nothing(tmp_path: Path) -> None:
    found = []
    for name, extra in (("off", []), ("on", ["record.every=2", "record.images=true"])):
        trainer, parts, _ = make_trainer(*SETTINGS, *extra, run_dir=tmp_path / name)
        memory = Memory()
        trainer.train(memory)
        rows = [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in memory.rows]
        found.append((rows, [p.detach().clone() for p in parts.policy.parameters]))
    (rows, weights), (recorded_rows, recorded_weights) = found
    assert rows == recorded_rows
    assert all(torch.equal(a, b) for a, b in zip(weights, recorded_weights, strict=True))
    assert not (tmp_path / "off/record").exists()
    assert [path.name for path in (tmp_path / "on/record").iterdir()] == ["000002"]


def test_a_run_that_goes_on_drops_later_records_and_records_them_again(tmp_path: Path) -> None:
    """Record 2 is of an iteration after the checkpoint, and one was cut short by a kill."""
    settings = [*SETTINGS, "checkpoint.every=1"]
    trainer, _, _ = make_trainer(*settings, "iterations=1", "record.every=1", run_dir=tmp_path)
    trainer.train(Memory())
    (tmp_path / "record/000001").rename(tmp_path / "kept")
    for leftover in ("000002", ".draft_000003"):
        (tmp_path / "record" / leftover).mkdir()
    (tmp_path / "kept").rename(tmp_path / "record/000001")
    resumed, _, _ = make_trainer(*settings, "iterations=1", run_dir=tmp_path)
    resumed.restore(checkpoint.load(checkpoint.find(tmp_path)))
    resumed.train(Memory())
    assert [path.name for path in (tmp_path / "record").iterdir()] == ["000001"]
    drop_later(tmp_path / "record", 0)
    assert not list((tmp_path / "record").iterdir())


def test_transitions_are_ordered_by_sample_and_along_the_trajectory() -> None:
    """However the batches of however many processes held them."""
    sample, sigma = torch.tensor([1, 0, 1, 0]), torch.tensor([0.5, 1.0, 1.0, 0.5])
    assert order(sample, sigma).tolist() == [1, 3, 2, 0]


def test_a_skipped_iteration_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, _ = make_trainer("record.every=1", run_dir=tmp_path)
    monkeypatch.setattr(trainer._scorer, "excess", lambda scores: "too few")
    memory = Memory()
    trainer.train(memory)
    assert [row["reward/skipped"] for row in memory.rows if "reward/skipped" in row] == [1.0, 1.0]
    assert not (tmp_path / "record").exists()


def test_what_is_no_record_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no record; a run with record\.every=1"):
        read_records(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        read_records(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"record\.every=-1"):
        make_trainer("record.every=-1", run_dir=tmp_path)
