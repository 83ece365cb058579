"""A record gives the run's advantages and losses again, bit for bit; under another configuration what that asks for."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from adagrpo_train.cli.replay import main
from adagrpo_train.errors import ConfigError
from adagrpo_train.recording.record import Record, read_records
from adagrpo_train.replay.again import Replay
from adagrpo_train.replay.changes import changed
from adagrpo_train.replay.run import replay
from adagrpo_train.scoring.collector import Source
from adagrpo_train.settings import read_settings
from rewards.client.inproc import InprocClient
from rewards.contract import ItemError, Sample
from rewards.shapes.reward import ShapesReward
from tests.support import Memory, make_trainer

RECORDED = ["record.every=1", "record.latents=false", "optimizer.lr=1e-3", "model.num_steps=4", "evaluation.images=2"]
RECORDED += ["evaluation.grid_images=1"]
ADAGRPO = ["adagrpo=on", "curriculum.candidates=4"]
STEPS = ["micro_batch=2", "updates_per_iteration=2"]


class Pixels(ShapesReward):
    """Spread inside every group; every seventh score is missing."""

    def __init__(self) -> None:
        self._number = 0

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        self._number += len(batch)
        if len(batch) == 1 and self._number % 7 == 0:
            raise ItemError("not this one")
        if len(batch) > 1:
            raise ItemError("one at a time")
        return [dict.fromkeys(self.info.metrics, float(sample.image.mean()) / 255) for sample in batch]


def record(*settings: str, run_dir: Path, reward: ShapesReward | None = None) -> list[Record]:
    trainer, _, _ = make_trainer(*RECORDED, *settings, run_dir=run_dir)
    if reward:
        first, *others = trainer._scorer._sources
        trainer._scorer._sources = (Source(first.entry, InprocClient(reward, device="cpu")), *others)
    trainer.train(Memory())
    return read_records(run_dir)


CASES = {
    "flow_grpo, several updates in parts, with a reference": [
        *ADAGRPO, *STEPS, "update_micro_batch=1", "algorithm.objective.kl_weight=0.1",
    ],
    "dance_grpo, another pass over the samples": [
        "algorithm=dance_grpo", "advantage=group_global_std", "inner_epochs=2", "updates_per_iteration=2",
    ],
    "flow_cps, branches": [
        "algorithm=flow_cps", "plan=branch", "plan.at=[0,2]", *ADAGRPO, "advantage.mode=absolute", "curriculum=median",
    ],
    "two rewards on one scale, compared one by one": [
        "reward=[shapes,jpeg_size]", "scoring.scale=calibrated", "scoring.level=advantage", *ADAGRPO, *STEPS,
        "evaluation.images=7",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_record_gives_advantages_and_losses_again_bit_for_bit(name: str, tmp_path: Path) -> None:
    records = record(*CASES[name], run_dir=tmp_path)
    found = replay(tmp_path, [])
    assert found["reproduced"]["exact"], found["reproduced"]
    assert [own["iteration"] for own in found["records"]] == [1, 2]
    assert float(records[1].tensors["batch.loss"].abs().sum()) > 0


def test_samples_without_a_score_are_left_out_again_and_have_no_loss_where_they_would_count(tmp_path: Path) -> None:
    settings = [*ADAGRPO, *STEPS, "reward=[shapes,jpeg_size]", "scoring.level=advantage", "group_size=4"]
    settings += ["reward.shapes.max_bad_fraction=0.6", "iterations=1"]
    (one,) = record(*settings, run_dir=tmp_path, reward=Pixels())
    usable = one.tensors["sample.usable"]
    assert 0 < int(usable.sum()) < len(usable)
    found = replay(tmp_path, ["reward.shapes.required=false"])
    assert found["reproduced"]["exact"]
    (own,) = found["records"]
    assert own["samples_without_log_prob"] == int((~usable).sum())
    assert own["advantage"]["usable"] == {"recorded": int(usable.sum()), "replayed": len(usable)}
    assert any("samples count now that the run left out" in note for note in found["notes"])
    assert all(step["transitions"]["recorded"] == step["transitions"]["replayed"] for step in own["updates"])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three recorded iterations of AdaGRPO, two optimizer steps each; not to be changed."""
    folder = tmp_path_factory.mktemp("recorded")
    record(*ADAGRPO, *STEPS, "iterations=3", "group_size=3", run_dir=folder)
    return folder


def outcomes(run_dir: Path, *overrides: str) -> list[tuple[Record, Any]]:
    records = read_records(run_dir)
    again = Replay(changed(records[0].head["config"], overrides))
    return [(one, again.of(one)) for one in records]


def test_another_weight_scales_the_global_part_and_is_shown(run_dir: Path) -> None:
    for one, outcome in outcomes(run_dir, "advantage.weight=0.25"):
        expected = one.tensors["sample.local"] + 0.25 * one.tensors["sample.across"]
        torch.testing.assert_close(outcome.fused, expected, rtol=0, atol=1e-6)
    found = replay(run_dir, ["advantage.weight=0.25"])
    assert found["changes"] == {"advantage.weight": (1.0, 0.25)}
    assert found["reproduced"]["exact"]
    assert max(own["advantage"]["largest_change"] for own in found["records"]) > 0.01
    losses = [step["loss"] for own in found["records"] for step in own["updates"]]
    assert any(loss["recorded"] != loss["replayed"] for loss in losses)
    assert all(own["level"]["recorded"] == own["level"]["replayed"] for own in found["records"])


def test_the_level_follows_from_iteration_to_iteration_under_another_alpha(run_dir: Path) -> None:
    mean = None
    for one, outcome in outcomes(run_dir, "curriculum.alpha=0.25"):
        batch = float(one.tensors["candidate.total"].double().mean())
        mean = batch if mean is None else 0.25 * mean + 0.75 * batch
        assert outcome.levels[0].mean == pytest.approx(mean, rel=1e-12)
    assert mean != pytest.approx(one.head["levels"][0]["mean"], rel=1e-6)


def test_the_level_starts_anew_behind_a_gap(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/record/000002")
    found = replay(tmp_path / "run", ["curriculum.alpha=0.25"])
    assert any("iteration 3: the record before it is of iteration 1" in note for note in found["notes"])
    last = read_records(tmp_path / "run")[-1]
    before = last.head["curriculum"]["before"][0]["mean"]
    expected = 0.25 * before + 0.75 * float(last.tensors["candidate.total"].double().mean())
    assert found["records"][-1]["level"]["replayed"][0]["mean"] == pytest.approx(expected, rel=1e-12)


def test_another_curriculum_chooses_other_prompts(run_dir: Path) -> None:
    for one, outcome in outcomes(run_dir, "curriculum=hardest"):
        total = one.tensors["candidate.total"]
        assert sorted(total[list(outcome.rows)].tolist()) == sorted(total.tolist())[:2]
    found = replay(run_dir, ["curriculum=easiest", "curriculum.chosen=1"])
    assert any(own["selection"]["only_recorded"] for own in found["records"])
    assert all(len(own["selection"]["replayed"]) == 1 for own in found["records"])
    assert found["changes"].keys() == {"curriculum._target_", "curriculum.chosen"}


def test_another_clip_range_clips_the_recorded_ratios(run_dir: Path) -> None:
    one = outcomes(run_dir)[1][0]
    ratio = (one.tensors["visit.log_prob"] - one.tensors["visit.old_log_prob"]).exp()
    second = one.tensors["batch.update"][one.tensors["visit.batch"]] == 1
    middle = float((ratio - 1).abs()[second].median()) * 1.0001
    step = replay(run_dir, [f"algorithm.objective.clip_range={middle}"])["records"][1]["updates"][1]
    expected = ((ratio - 1).abs() > middle)[second].float().mean()
    assert step["clip_fraction"]["replayed"] == pytest.approx(float(expected))
    assert step["clip_fraction"]["recorded"] != step["clip_fraction"]["replayed"]


def test_other_weights_make_another_reward_of_the_recorded_parts(run_dir: Path) -> None:
    for one, outcome in outcomes(run_dir, "reward.shapes.weights={smooth: 2.0}"):
        assert torch.equal(outcome.total, 2 * one.tensors["sample.part.smooth"])
    notes = replay(run_dir / "record/000002", ["reward.shapes.weights.smooth=2"])["notes"]
    assert any("the level starts with what the run had before iteration 2" in note for note in notes)


def test_false_positives_and_negatives_are_counted_as_published(run_dir: Path) -> None:
    """Above the own group's mean and below the level, and the other way round."""
    for own, one in zip(replay(run_dir, [])["records"], read_records(run_dir), strict=True):
        total, group = one.tensors["sample.total"], one.tensors["sample.group"]
        means = torch.stack([total[group == number].mean() for number in group.tolist()])
        level = one.head["levels"][0]["mean"]
        spread = torch.stack([total[group == number].std() > 1e-6 for number in group.tolist()])
        false, logged = own["advantage"]["misjudged"]["recorded"], one.head["metrics"]
        below, above = total < level, total > level
        if below.any():
            positive = ((total > means) & below & spread).sum() / below.sum()
            assert false["local_false_positive"] == pytest.approx(float(positive))
        if above.any():
            negative = ((total < means) & above & spread).sum() / above.sum()
            assert false["local_false_negative"] == pytest.approx(float(negative))
        assert false == {name: logged.get(f"advantage/{name}_rate") for name in false}


def test_a_change_of_one_recorded_number_is_seen(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    """Or nothing above could fail: first the file is refused, then, with a fitting manifest, the numbers differ."""
    from safetensors.torch import load_file, save_file

    from adagrpo_train.runtime.files import sha256

    folder = tmp_path / "run/record/000002"
    shutil.copytree(run_dir, tmp_path / "run")
    tensors = load_file(folder / "tensors.safetensors")
    tensors["visit.log_prob"][0] += 1e-6
    save_file(tensors, folder / "tensors.safetensors")
    with pytest.raises(ConfigError, match=r"tensors\.safetensors is not what was written"):
        replay(tmp_path / "run", [])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["tensors.safetensors"]["sha256"] = sha256(folder / "tensors.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = replay(tmp_path / "run", [])["reproduced"]
    assert not found["exact"]
    assert found["losses"] > 0
    assert found["fused"] == 0
    assert main([str(tmp_path / "run")]) == 1
    assert "losses by" in capsys.readouterr().out
    tensors["sample.part.smooth"][0] = torch.nan  # a sample the less
    save_file(tensors, folder / "tensors.safetensors")
    manifest["files"]["tensors.safetensors"]["sha256"] = sha256(folder / "tensors.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main([str(folder)]) == 1
    assert "other prompts, levels or samples than recorded" in capsys.readouterr().out


def test_the_command_prints_tables_and_writes_json(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "found.json"
    assert main([str(run_dir), "advantage.weight=0", "curriculum=hardest", "--json", str(target)]) == 0
    shown = capsys.readouterr().out
    assert "advantage.weight: 1.0 -> 0" in shown
    assert "bit for bit" in shown
    assert "prompts chosen otherwise" in shown
    assert json.loads(target.read_text())["changes"]["advantage.weight"] == [1.0, 0]
    assert main([str(run_dir), "seed=3"]) == 2
    assert "seed=3: seed cannot be replayed" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0


CONFIG = read_settings([*ADAGRPO]).values


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("group_size=4", "group_size cannot be replayed: prompts and samples that were never drawn"),
        ("model=tiny_flux", "model cannot be replayed: no network is there"),
        ("algorithm=dance_grpo", "algorithm cannot be replayed: the log-probabilities are those of the steps"),
        ("curriculum.candidates=8", "curriculum.candidates cannot be replayed"),
        ("algorithm.objective.kl_weight=0.1", r"kl_weight=0\.1: cannot be replayed: the run had no KL"),
        ("curriculum.chosen=17", "curriculum.chosen=17: the record has only 4 candidates"),
        ("advantage.wieght=2", "did you mean advantage.weight"),
        ("advantage.weight=much", "advantage.weight=much: expected a number"),
        ("+advantage.weight=2", "changes are written key=value"),
        ("curriculum=hardst", "did you mean hardest"),
        ("tracker=local", "nothing that was recorded depends on it"),
    ],
)
def test_what_no_record_can_answer_is_refused_by_its_key(change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        changed(CONFIG, [change])


def test_prompts_that_nobody_scored_cannot_be_chosen_by_score() -> None:
    with pytest.raises(ConfigError, match="no candidate was scored"):
        changed(read_settings([]).values, ["adagrpo=on"])


def test_a_curriculum_by_name_keeps_the_numbers_of_the_record_and_an_advantage_is_as_its_file() -> None:
    config = read_settings([*ADAGRPO, "curriculum.alpha=0.5", "advantage.eps=1e-3"]).values
    values = changed(config, ["curriculum.chosen=3", "curriculum=hardest", "advantage=group_global_std"])
    assert (values["curriculum"]["alpha"], values["curriculum"]["chosen"]) == (0.5, 3)
    assert values["curriculum"]["_target_"].endswith("Hardest")
    assert values["advantage"] == read_settings(["advantage=group_global_std"]).values["advantage"]
    assert config["curriculum"]["chosen"] == 8
