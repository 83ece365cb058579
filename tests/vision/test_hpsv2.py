"""HPS-v2 against what the package hpsv2 computed with the same weights (scripts/goldens/hpsv2.py)."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from small_models import GOLDEN, samples, values, write_small_clip

from rewards.contract import Sample
from rewards.hpsv2 import HPSv2
from rewards.vision.pixels import pad_to_square
from rewards.vision.weights import WeightsError
from scripts.goldens.hps_seeded import PROMPTS, SIZES, picture

#: Another recording can be compared with, such as one of ViT-B-32, which is too large for every run.
RECORDED = json.loads(Path(os.environ.get("ADAGRPO_HPSV2_GOLDEN", GOLDEN / "hpsv2.json")).read_text())


@pytest.fixture
def reward(open_clip: ModuleType, tmp_path: Path) -> HPSv2:
    config = None if RECORDED["architecture"] == "small" else open_clip.get_model_config(RECORDED["architecture"])
    architecture, weights = write_small_clip(tmp_path, RECORDED["seed"], config)
    reward = HPSv2(weights=str(weights), architecture=architecture)
    reward.load("cpu")
    return reward


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_pixels_equal_the_packages(number: int) -> None:
    stride = RECORDED["stride"]
    pixels = pad_to_square(picture(number, SIZES[number]), 224)[:, ::stride, ::stride].flatten()
    # Equal bit for bit where recorded; a processor that fuses other multiplications and additions is 8.3e-7 away.
    np.testing.assert_allclose(pixels, RECORDED["pixels"][number], rtol=0, atol=4e-6)


def test_scores_equal_the_packages(reward: HPSv2) -> None:
    batch = [
        Sample(f"{number}/{column}", prompt, picture(number, size))
        for number, size in enumerate(SIZES)
        for column, prompt in enumerate(PROMPTS)
    ]
    np.testing.assert_allclose(values(reward.score(batch)), np.ravel(RECORDED["scores"]), rtol=0, atol=1e-6)


def test_vit_h_14_has_the_weights_of_the_published_file(open_clip: ModuleType) -> None:
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items())
    assert len(lines) == RECORDED["vit_h_14"]["weights"]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == RECORDED["vit_h_14"]["sha256"]


def test_a_side_of_224_is_padded_where_the_package_crashes() -> None:
    pixels = pad_to_square(np.full((224, 100, 3), 255, np.uint8), 224)
    black = pad_to_square(np.zeros((224, 224, 3), np.uint8), 224)
    assert pixels.shape == (3, 224, 224)
    assert torch.equal(pixels[:, :, :62], black[:, :, :62]) and torch.equal(pixels[:, :, 162:], black[:, :, 162:])
    assert (pixels[:, :, 62:162] > black[:, :, 62:162]).all()


def test_a_line_of_pixels_is_scored(reward: HPSv2) -> None:
    assert np.isfinite(values(reward.score([Sample("0", "a", np.zeros((1, 900, 3), np.uint8))]))).all()


def test_each_prompt_goes_through_the_text_tower_once(reward: HPSv2, counted: Callable[[Any, str], list[Any]]) -> None:
    calls = counted(reward, "_text_features")
    first = reward.score(samples(["a", "b", "a", "a"]))
    assert calls == ["a", "b"]
    assert reward.score(samples(["a", "b", "a", "a"])) == first
    assert calls == ["a", "b"]


def test_pictures_go_through_the_image_tower_together(reward: HPSv2, counted: Callable[[Any, str], list[Any]]) -> None:
    calls = counted(reward, "_image_features")
    reward.score(samples(["a"] * 40))
    assert [len(pixels) for pixels in calls] == [32, 8]


def test_the_oldest_prompt_is_forgotten(reward: HPSv2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.vision.base._KEPT_PROMPTS", 2)
    reward.score(samples(["a", "b", "a", "c"]))
    assert list(reward._texts) == ["a", "c"]


def test_the_fingerprint_tells_weights_precision_and_version_apart(small_clip: tuple[str, Path]) -> None:
    architecture, weights = small_clip
    prints = set()
    for settings in ({}, {"dtype": "bfloat16"}, {"version": "v2.0"}):
        reward = HPSv2(weights=str(weights), architecture=architecture, **settings)  # type: ignore[arg-type]
        reward.load("cpu")
        prints.add(reward.fingerprint())
    state = torch.load(weights, weights_only=True)
    state["state_dict"]["ln_final.bias"][0] += 1e-3
    torch.save(state, weights)
    reward = HPSv2(weights=str(weights), architecture=architecture)
    with pytest.raises(RuntimeError, match="before its weights are loaded"):
        reward.fingerprint()
    reward.load("cpu")
    prints.add(reward.fingerprint())
    assert len(prints) == 4


def test_each_version_is_its_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(repo: str, filename: str) -> str:
        asked.append((repo, filename))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for version in ("v2.1", "v2.0"):
        with pytest.raises(WeightsError):
            HPSv2(version=version).load("cpu")
    assert asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt"), ("xswu/HPSv2", "HPS_v2_compressed.pt")]


def test_lower_precision_stays_near(reward: HPSv2, small_clip: tuple[str, Path]) -> None:
    lower = HPSv2(weights=str(small_clip[1]), architecture=small_clip[0], dtype="bfloat16")
    lower.load("cpu")
    batch = samples(["a photo of a cat"] * 3)
    difference = np.abs(values(lower.score(batch)) - values(reward.score(batch)))
    assert (difference > 0).all() and (difference < lower.info.tolerance).all()


def test_a_missing_file_is_named_with_its_setting() -> None:
    with pytest.raises(WeightsError, match=r"weights=/nowhere/x\.pt: no such file"):
        HPSv2(weights="/nowhere/x.pt").load("cpu")


def test_without_a_network_the_message_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"hf download xswu/HPSv2.*set weights to a local copy"):
        HPSv2().load("cpu")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("visual.proj"), "1 missing \\(visual.proj"),
        (lambda state: state.update(score_predictor=torch.zeros(1)), "1 unknown \\(score_predictor"),
        (lambda state: state.update({"visual.proj": torch.zeros(3, 3)}), "1 of another shape \\(visual.proj"),
    ],
)
def test_weights_of_another_model_are_refused(
    spoil: Callable[[dict[str, Any]], Any], message: str, small_clip: tuple[str, Path]
) -> None:
    content = torch.load(small_clip[1], weights_only=True)
    spoil(content["state_dict"])
    torch.save(content, small_clip[1])
    with pytest.raises(WeightsError, match=message):
        HPSv2(weights=str(small_clip[1]), architecture=small_clip[0]).load("cpu")


def test_a_file_that_would_run_code_is_refused(small_clip: tuple[str, Path], tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Trap()}, small_clip[1])
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        HPSv2(weights=str(small_clip[1]), architecture=small_clip[0]).load("cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("settings", [{"version": "v3"}, {"dtype": "int8"}, {"max_batch": 0}])
def test_settings_out_of_range_are_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        HPSv2(**settings)
