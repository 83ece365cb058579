"""Recorded scores: those that come with the package, and those of this machine."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rewards import cli, registry, verify
from rewards.contract import ItemError, Sample
from tests.serving.ordered import Ordered

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Ordered]:
    """A shipped reward that nobody has recorded."""
    monkeypatch.setitem(registry.SHIPPED, "toy", "tests.serving.ordered:Ordered")
    return Ordered


def test_the_rewards_that_need_no_download_score_as_recorded(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "recorded.json"
    assert cli.main(["verify", "shapes", "tiny_clip", "--file", str(file)]) == 0
    assert capsys.readouterr().out.count("as recorded in this package") == 2
    assert verify.main(["shapes", "--file", str(file), "--record"]) == 0  # what comes with the package stays
    assert "as recorded in this package" in capsys.readouterr().out
    assert not file.exists()


def test_what_is_unrecorded_is_said_recorded_and_compared_from_then_on(
    toy: type[Ordered], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ["--file", str(tmp_path / "cache" / "recorded.json")]
    assert verify.main(["toy", *own]) == 0
    assert "toy: UNRECORDED so far" in capsys.readouterr().out
    assert verify.main(["toy", *own]) == 0
    assert "toy: as recorded in" in capsys.readouterr().out
    assert verify.main(["toy", *own, "--settings", '{"fingerprint": "ordered@2"}']) == 0
    assert "UNRECORDED" in capsys.readouterr().out  # other settings may be other weights

    real = toy.score

    def changed(reward: Ordered, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        return [{"ordered": score["ordered"] + 0.1} for score in real(reward, batch)]

    monkeypatch.setattr(toy, "score", changed)
    assert verify.main(["toy", *own]) == 1
    said = capsys.readouterr().out
    assert "toy: DIFFERENT from recorded in" in said
    assert said.count("  picture ") == 4
    assert verify.main(["toy", *own, "--record"]) == 0
    assert "toy: recorded anew: [" in capsys.readouterr().out
    assert verify.main(["toy", *own]) == 0


@pytest.mark.parametrize("broken", [True, False])
def test_a_reward_that_cannot_be_had_is_not_verified(
    broken: bool, toy: type[Ordered], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "recorded.json"

    def useless(reward: Ordered, batch: Sequence[Sample]) -> Any:
        return [{"ordered": math.nan}]

    if not broken:
        monkeypatch.setattr(toy, "score", useless)
    assert verify.main(["toy", "--file", str(file), "--settings", json.dumps({"broken": broken})]) == 2
    assert "toy: UNRECORDED, and not to be had here" in capsys.readouterr().err
    assert not file.exists()


def test_a_reward_that_refuses_every_picture_is_not_verified(
    toy: type[Ordered], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(reward: Ordered, batch: Sequence[Sample]) -> Any:
        raise ItemError("not this one")

    monkeypatch.setattr(toy, "score", refuse)
    assert verify.main(["toy", "--file", str(tmp_path / "recorded.json")]) == 2
    assert "it refuses every picture: not this one" in capsys.readouterr().err


def test_mistakes_are_named(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "recorded.json").write_text("{")
    for arguments, said in (
        (["shapes", "--file", str(tmp_path / "recorded.json")], "delete it to record anew"),
        (["shape"], "did you mean shapes?"),
    ):
        assert verify.main(arguments) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recorded", "found", "count"),
    [
        ([{"a": 1.0}], [{"a": 1.0 + 9e-5}], 0),
        ([{"a": 1.0}], [{"a": 1.0 + 2e-4}], 1),
        ([{"a": 200.0}], [{"a": 200.01}], 0),
        ([{"a": 1.0}], [{"b": 1.0}], 1),
        ([{"a": 1.0}], ["refused"], 1),
        (["refused"], ["refused"], 0),
        ([{"a": math.nan}], [{"a": math.nan}], 1),
        ([{"a": 1.0}], [], 1),
    ],
)
def test_scores_differ_beyond_rounding(recorded: list[Any], found: list[Any], count: int) -> None:
    assert len(verify.differences(recorded, found, 1e-5)) == count


def test_the_commands_have_one_name(capsys: Capture) -> None:
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {command} " in said for command in ("verify", "check", "serve", "ping"))
    assert cli.main([]) == cli.main(["train"]) == 2
    assert cli.main(["check", "jpeg_size"]) == 0
