"""The CLIP score against open_clip's own transform, tokenizer and towers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import samples, values

from rewards.clip_score import ClipScore
from rewards.contract import Sample
from rewards.vision.pixels import crop_to_square
from rewards.vision.weights import WeightsError
from scripts.goldens.hps_seeded import PROMPTS, SIZES, picture


def own_folder(small_clip: tuple[str, Path]) -> str:
    return f"local-dir:{small_clip[1].parent}"


@pytest.fixture
def expected(open_clip: ModuleType, small_clip: tuple[str, Path]) -> np.ndarray:
    """Cosines of every picture of `SIZES` with every prompt of `PROMPTS`, in open_clip's own way."""
    model, _, transform = open_clip.create_model_and_transforms(own_folder(small_clip))
    pixels = torch.stack([transform(Image.fromarray(picture(number, size))) for number, size in enumerate(SIZES)])
    with torch.no_grad():
        images, texts, _ = model.eval()(pixels, open_clip.get_tokenizer(own_folder(small_clip))(list(PROMPTS)))
    return (images @ texts.T).numpy().ravel()


BATCH = [
    Sample(f"{number}/{column}", prompt, picture(number, size))
    for number, size in enumerate(SIZES)
    for column, prompt in enumerate(PROMPTS)
]


@pytest.mark.parametrize(("scale", "factor"), [("cosine", 1.0), ("x100", 100.0)])
def test_scores_equal_open_clips(
    scale: str, factor: float, expected: np.ndarray, small_clip: tuple[str, Path], tmp_path: Path
) -> None:
    reward = ClipScore(architecture=own_folder(small_clip), weights=None, scale=scale)
    reward.load("cpu")
    np.testing.assert_allclose(values(reward.score(BATCH)), factor * expected, rtol=0, atol=1e-6 * factor)
    assert reward.info.value_range == (-factor, factor)


def test_a_folder_without_weights_is_refused(small_clip: tuple[str, Path]) -> None:
    small_clip[1].unlink()
    with pytest.raises(WeightsError, match="could not be loaded"):
        ClipScore(architecture=own_folder(small_clip), weights=None).load("cpu")


def test_an_unknown_tag_is_refused(open_clip: ModuleType) -> None:
    with pytest.raises(WeightsError, match=r"weights=nosuchtag.*not a known tag.*list_pretrained"):
        ClipScore(architecture="ViT-B-32", weights="nosuchtag").load("cpu")


def test_the_wrong_activation_is_refused(
    open_clip: ModuleType, monkeypatch: pytest.MonkeyPatch, small_clip: tuple[str, Path]
) -> None:
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(small_clip[1]))
    with pytest.raises(WeightsError, match="ends in -quickgelu"):
        ClipScore(architecture="ViT-L-14", weights="openai").load("cpu")


def test_the_fingerprint_knows_scale_and_preprocessing_but_not_where_the_folder_lies(
    small_clip: tuple[str, Path], tmp_path: Path
) -> None:
    def fingerprint(folder: Path, **settings: str) -> str:
        reward = ClipScore(architecture=f"local-dir:{folder}", weights=None, **settings)
        reward.load("cpu")
        return reward.fingerprint()

    folder, copied = small_clip[1].parent, tmp_path / "copied"
    shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("copied"))
    assert fingerprint(folder) == fingerprint(copied)
    config = json.loads((copied / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (copied / "open_clip_config.json").write_text(json.dumps(config))
    assert len({fingerprint(folder), fingerprint(copied), fingerprint(folder, scale="x100")}) == 3


def test_the_default_is_openais_model_with_its_own_activation() -> None:
    assert ClipScore()._architecture == "ViT-L-14-quickgelu"


@pytest.mark.parametrize("content", [b"damaged", b""])
def test_a_file_that_holds_no_weights_is_named(content: bytes, open_clip: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"architecture=ViT-B-32, weights="):
        ClipScore(architecture="ViT-B-32", weights=str(tmp_path / "weights.pt")).load("cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(extra=torch.zeros(1)), r"1 unknown \(extra"),
        (lambda state: state.pop("visual.proj"), r"1 missing \(visual.proj"),
        (
            lambda state: state.update({"visual.positional_embedding": torch.zeros(101, 64)}),
            r"of another shape \(visual.positional_embedding",
        ),
    ],
)
def test_weights_of_another_model_are_refused_and_not_stretched(
    change: Callable[[dict[str, torch.Tensor]], Any],
    message: str,
    open_clip: ModuleType,
    small_clip: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = small_clip[1].parent
    (folder / "small.json").write_text(Path(small_clip[0]).read_text())
    open_clip.add_model_config(folder / "small.json")
    good = ClipScore(architecture="small", weights=str(small_clip[1]))
    good.load("cpu")
    same = ClipScore(architecture=f"local-dir:{folder}", weights=None)
    same.load("cpu")
    scored = samples(["a red circle"])
    assert good.score(scored) == same.score(scored)
    content = torch.load(small_clip[1], weights_only=True)
    change(content["state_dict"])
    torch.save(content, small_clip[1])
    with pytest.raises(WeightsError, match=message):
        good.load("cpu")


def test_weights_beside_an_architecture_that_has_its_own_are_refused() -> None:
    with pytest.raises(ValueError, match="set weights to null"):
        ClipScore(architecture="hf-hub:org/name")


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_our_crop_equals_open_clips(number: int, open_clip: ModuleType) -> None:
    image = picture(number, SIZES[number])
    transform = open_clip.image_transform(224, is_train=False)
    assert torch.equal(crop_to_square(image, 224, centre="rounded"), transform(Image.fromarray(image)))


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_our_other_crop_equals_transformers(number: int) -> None:
    processor = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    image = picture(number, SIZES[number])
    pixels = processor.CLIPImageProcessorPil()(Image.fromarray(image), return_tensors="pt").pixel_values[0]
    # transformers multiplies by 1/255, which rounds differently from dividing
    torch.testing.assert_close(crop_to_square(image, 224, centre="floored"), pixels, rtol=0, atol=1e-6)
