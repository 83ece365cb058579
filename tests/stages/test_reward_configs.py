"""Every reward that a run can choose: its file fits the plug-in it names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adagrpo_train import build
from adagrpo_train.errors import ConfigError
from adagrpo_train.scoring import connect
from adagrpo_train.scoring.entry import RewardEntry
from adagrpo_train.settings import group_options, read_settings
from rewards import registry
from rewards.client.inproc import InprocClient
from rewards.contract import Sample
from rewards.jpeg_size import JpegSize
from tests.support import alone

CHOSEN = {
    "custom": ["reward.custom.reward=jpeg_size", "reward.custom.weights.jpeg_size=1.0"],
}


@pytest.mark.parametrize("name", group_options()["reward"])
def test_its_settings_and_weights_are_those_of_the_plug_in(name: str) -> None:
    section: Mapping[str, Any] = read_settings([f"reward={name}", *CHOSEN.get(name, [])]).values["reward"][name]
    reward = registry.make(section["reward"], section["settings"])
    assert set(section["weights"]) <= set(reward.info.metrics)
    assert any(section["weights"].values())
    assert name == "custom" or section["reward"] == name


def test_every_shipped_reward_can_be_chosen() -> None:
    assert set(registry.SHIPPED) == set(group_options()["reward"]) - {"custom"}


def test_several_rewards_are_chosen_by_a_list() -> None:
    settings = read_settings(["reward=[shapes,jpeg_size]", "reward.jpeg_size.weights.jpeg_size=0.5"])
    assert list(settings.values["reward"]) == ["shapes", "jpeg_size"]
    assert settings.choices["reward"] == "shapes+jpeg_size"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward=custom"], r"reward\.custom\.reward=: name the plug-in"),
        (["reward=jpeg_size", "experiment=tiny_demo"], r"reward\.shapes: has settings but is not chosen"),
        (["reward.shapes.mode=lokal"], r"reward\.shapes\.mode=lokal: choose one of inproc, local, remote"),
        (["reward=[shapes,shape]"], r"reward=shape: no such option; did you mean shapes\?"),
        (["reward.shapes.urls=[3]"], r"reward\.shapes\.urls=\[3\]: expected a list"),
        (["reward.shapes.mode=remote"], r"reward\.shapes\.urls=\[\]: mode=remote needs"),
        (["reward.shapes.urls=[http://a:1]"], r"reward\.shapes\.urls=.*belongs to reward\.shapes\.mode=remote"),
        (
            ["reward=hpsv2", "reward.hpsv2.mode=remote", "reward.hpsv2.settings.version=v2.0"],
            r"reward\.hpsv2\.settings=.*those of the server",
        ),
        (["reward.shapes.wait=3"], r"unknown key 'reward\.shapes\.wait'"),
        (["reward=tiny_clip", "reward.tiny_clip.seting=3"], r"did you mean reward\.tiny_clip\.settings\?"),
        (["reward.shapez.weights.smooth=1"], r"unknown key 'reward\.shapez'"),
        (["a b=="], r"^a b==: "),
        (["reward.shapes.settings.size=3"], r"reward\.shapes\.settings=.*size"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings = read_settings(overrides)
        for name, section in settings.values["reward"].items():
            entry = build.make_entry(name, section)
            connect.make(entry)


def test_a_mapping_of_weights_is_all_the_weights() -> None:
    section = read_settings(["reward.shapes.weights={smooth: 2.0}"]).values["reward"]["shapes"]
    assert section["weights"] == {"smooth": 2.0}
    overrides = ["reward=unified_reward", "reward.unified_reward.settings.version=1"]
    section = read_settings([*overrides, "reward.unified_reward.weights={score: 1.0}"]).values["reward"]
    assert section["unified_reward"]["weights"] == {"score": 1.0}
    assert section["unified_reward"]["settings"]["version"] == 1
    section = read_settings(["reward.shapes.weights={smooth: 2.0}", "reward.shapes.weights.strict=1"]).values["reward"]
    assert section["shapes"]["weights"] == {"smooth": 2.0, "strict": 1}


def test_the_weights_of_a_reward_for_evaluation_do_not_count() -> None:
    settings = read_settings(["reward=[shapes,jpeg_size]", "reward.jpeg_size.role=evaluation"])
    entry = build.make_entry("jpeg_size", settings.values["reward"]["jpeg_size"])
    assert entry.weights == {}


def test_a_reward_that_hangs_in_process_is_given_up_after_its_own_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.SHIPPED, "ordered", "tests.serving.ordered:Ordered")
    entry = RewardEntry(name="slow", reward="ordered", settings={}, weights={"ordered": 1.0}, deadline_seconds=0.3)
    rewards = connect.Rewards([entry], engine=alone(), log_dir=Path())
    batch = rewards.sources[0].client.submit([Sample("0", "hang", np.zeros((8, 8, 3), np.uint8))]).result(20)
    rewards.close()
    assert np.isnan(batch.scores["ordered"]).all()
    assert "deadline_seconds=0.3" in (batch.reasons[0] or "")


def test_servers_of_another_reward_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metric has the same name, so that nothing else would tell."""
    monkeypatch.setattr(connect, "_remote", lambda *_: InprocClient(JpegSize(), device="cpu"))
    settings: dict[str, Any] = {"settings": {}, "weights": {"jpeg_size": 1.0}, "mode": "remote", "urls": ["http://h:1"]}
    engine = alone()
    connect.Rewards([RewardEntry(name="r", reward="jpeg_size", **settings)], engine=engine, log_dir=Path()).close()
    with pytest.raises(ConfigError, match=r"reward\.r\.urls=.*h:1.*the reward served there is jpeg_size, not other"):
        connect.Rewards([RewardEntry(name="r", reward="other", **settings)], engine=engine, log_dir=Path())


def test_nobody_reads_the_password_of_an_address() -> None:
    for mode in ("inproc", "remote"):
        section = read_settings(["reward.shapes.urls=['http://me:secret@host:1']", f"reward.shapes.mode={mode}"])
        with pytest.raises(ConfigError, match=r"reward\.shapes\.urls=.*host:1") as refused:
            entry = build.make_entry("shapes", section.values["reward"]["shapes"])
            connect.Rewards([entry], engine=alone(), log_dir=Path())
        assert "secret" not in str(refused.value)
