"""PickScore, aesthetic and ImageReward; they need transformers only and run in the trainer's environment too."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import GOLDEN, ROOT, put_seeded, samples, values
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from rewards.aesthetic import Aesthetic, linear_head
from rewards.contract import Sample
from rewards.image_reward import ImageReward
from rewards.pickscore import PickScore
from rewards.vision.pixels import crop_to_square
from rewards.vision.weights import WeightsError
from scripts.goldens.hps_seeded import PROMPTS, SIZES, SMALL_BLIP, WORD_PIECES, picture, seeded

TOKENIZER = ROOT / "adagrpo_train" / "assets" / "tiny_sd3" / "full" / "tokenizer"
CAPTIONS = ["a red circle", "", "two blue squares and a red circle", "three red triangles " * 9]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 32,
    "projection_dim": 24,
}
TEXT = VISION | {"vocab_size": 200, "max_position_embeddings": 13, "bos_token_id": 0, "eos_token_id": 1}


def every_pair(prompts: list[str]) -> list[Sample]:
    return [
        Sample(f"{number}/{column}", prompt, picture(number, size))
        for number, size in enumerate(SIZES)
        for column, prompt in enumerate(prompts)
    ]


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24))
    put_seeded(model, 3)
    model.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_pickscore_is_the_logit_of_transformers(clip_folder: Path) -> None:
    reward = PickScore(model=str(clip_folder), tokenizer=str(TOKENIZER), divisor=1)
    reward.load("cpu")
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    words = tokenizer(CAPTIONS, padding=True, truncation=True, max_length=13, return_tensors="pt")
    pixels = torch.stack([crop_to_square(picture(n, size), 224, centre="floored") for n, size in enumerate(SIZES)])
    with torch.no_grad():
        expected = model(**words, pixel_values=pixels).logits_per_image.numpy().ravel()
    found = values(reward.score(every_pair(CAPTIONS)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.ptp(found) > 0.1

    divided = PickScore(model=str(clip_folder), tokenizer=str(TOKENIZER))  # 26
    divided.load("cpu")
    np.testing.assert_allclose(values(divided.score(every_pair(CAPTIONS))), expected / 26, rtol=0, atol=1e-6)
    assert divided.fingerprint() != reward.fingerprint()
    assert divided.info.value_range == pytest.approx((-100 / 26, 100 / 26))


def test_pickscore_refuses_a_model_that_would_be_partly_random(clip_folder: Path) -> None:
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))
    tower.save_pretrained(clip_folder)
    CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24).save_pretrained(clip_folder)
    with pytest.raises(WeightsError, match=r"lacks \d+ weights of another model than CLIPModel"):
        PickScore(model=str(clip_folder), tokenizer=str(TOKENIZER)).load("cpu")


def test_pickscore_and_aesthetic_refuse_a_model_that_would_be_left_out(clip_folder: Path, predictor: Path) -> None:
    """Its config says one layer of two."""
    config = json.loads((clip_folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 1
    (clip_folder / "config.json").write_text(json.dumps(config))
    pickscore = PickScore(model=str(clip_folder), tokenizer=str(TOKENIZER))
    for reward in (pickscore, Aesthetic(model=str(clip_folder), predictor=str(predictor))):
        with pytest.raises(WeightsError, match=r"has besides \d+ weights of another model.*encoder\.layers\.1\."):
            reward.load("cpu")


def test_a_tokenizer_without_a_vocabulary_is_refused(clip_folder: Path, image_reward_settings: dict) -> None:
    """transformers makes an empty one from a folder without its files, and all prompts become alike."""
    with pytest.raises(WeightsError, match=r"tokenizer=.*holds no vocabulary"):
        PickScore(model=str(clip_folder), tokenizer=str(clip_folder)).load("cpu")
    with pytest.raises(WeightsError, match=r"tokenizer=.*holds no vocabulary"):
        ImageReward(**image_reward_settings | {"tokenizer": str(clip_folder)}).load("cpu")


def test_configs_and_tokenizers_are_part_of_the_fingerprint(clip_folder: Path, tmp_path: Path) -> None:
    def fingerprint(tokenizer: Path) -> str:
        reward = PickScore(model=str(clip_folder), tokenizer=str(tokenizer))
        reward.load("cpu")
        return reward.fingerprint()

    copied = tmp_path / "copied"
    shutil.copytree(TOKENIZER, copied)
    prints = [fingerprint(TOKENIZER), fingerprint(copied)]
    assert prints[0] == prints[1], "where a folder lies does not count"
    content = json.loads((copied / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    words = [word for word in vocabulary if word.startswith(("red", "blue"))]
    vocabulary[words[0]], vocabulary[words[1]] = vocabulary[words[1]], vocabulary[words[0]]
    (copied / "tokenizer.json").write_text(json.dumps(content))
    prints.append(fingerprint(copied))
    config = json.loads((clip_folder / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (clip_folder / "config.json").write_text(json.dumps(config))
    prints.append(fingerprint(TOKENIZER))
    assert len(set(prints)) == 3
    assert all(f"{name} {version(name)}" in prints[0] for name in ("torch", "pillow", "transformers"))
    assert "/preprocessing 1/" in prints[0]


def test_damaged_weights_are_named_with_their_setting(clip_folder: Path) -> None:
    (clip_folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=r"model=.*cannot be read as CLIPModel"):
        PickScore(model=str(clip_folder), tokenizer=str(TOKENIZER)).load("cpu")


def test_a_closed_reward_keeps_nothing(clip_folder: Path) -> None:
    reward = PickScore(model=str(clip_folder), tokenizer=str(TOKENIZER))
    reward.load("cpu")
    reward.score(samples(["a red circle"]))
    reward.close()
    assert reward._model is None
    assert not reward._texts


def test_the_head_of_aesthetic_stays_in_float32(clip_folder: Path, predictor: Path) -> None:
    reward = Aesthetic(predictor=str(predictor), model=str(clip_folder), dtype="bfloat16")
    reward.load("cpu")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert reward._values(torch.zeros(2, 3, 224, 224), ["", ""]).dtype == torch.float32


def test_a_model_out_of_reach_is_named_with_its_setting() -> None:
    with pytest.raises(WeightsError, match=r"hf download yuvalkirstain/PickScore_v1.*set model to a local copy"):
        PickScore().load("cpu")


def test_a_folder_that_is_missing_is_named_with_its_setting() -> None:
    with pytest.raises(WeightsError, match="model=/nowhere/clip: no such folder"):
        PickScore(model="/nowhere/clip").load("cpu")


@pytest.fixture
def predictor(tmp_path: Path) -> Path:
    head = linear_head(24)
    put_seeded(head, 5)
    torch.save(head.state_dict(), tmp_path / "predictor.pth")
    return tmp_path / "predictor.pth"


def test_aesthetic_is_the_chain_of_its_layers(clip_folder: Path, predictor: Path) -> None:
    reward = Aesthetic(predictor=str(predictor), model=str(clip_folder))
    reward.load("cpu")
    state = torch.load(predictor, weights_only=True)
    assert sorted(state) == sorted(f"layers.{n}.{kind}" for n in (0, 2, 4, 6, 7) for kind in ("weight", "bias"))
    tower = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    pixels = torch.stack([crop_to_square(picture(n, size), 224, centre="rounded") for n, size in enumerate(SIZES)])
    with torch.no_grad():
        features = tower(pixel_values=pixels).image_embeds.double().numpy()
    value = features / np.linalg.norm(features, axis=1, keepdims=True)
    for n in (0, 2, 4, 6, 7):
        value = value @ state[f"layers.{n}.weight"].double().numpy().T + state[f"layers.{n}.bias"].double().numpy()
    found = values(reward.score(every_pair(["ignored"])))
    np.testing.assert_allclose(found, value[:, 0], rtol=0, atol=1e-5)
    assert np.ptp(found) > 0.01


def test_aesthetic_says_where_its_predictor_comes_from(clip_folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"predictor=.*no such file.*github.com/christophschuhmann"):
        Aesthetic(model=str(clip_folder)).load("cpu")


RECORDED = json.loads((GOLDEN / "image_reward.json").read_text())


@pytest.fixture
def image_reward_settings(tmp_path: Path) -> dict[str, object]:
    shapes = {name: np.empty(shape) for name, shape in RECORDED["weights"].items()}
    state = {name: torch.from_numpy(value) for name, value in seeded(shapes, RECORDED["seed"]).items()}
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(WORD_PIECES) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (tmp_path / "bert" / "tokenizer_config.json").write_text(json.dumps(config))
    return {"weights": str(tmp_path / "ImageReward.pt"), "tokenizer": str(tmp_path / "bert"), "sizes": SMALL_BLIP}


def test_image_reward_scores_equal_the_packages(image_reward_settings: dict) -> None:
    reward = ImageReward(**image_reward_settings)
    reward.load("cpu")
    found = values(reward.score(every_pair(list(PROMPTS))))
    np.testing.assert_allclose(found, np.ravel(RECORDED["scores"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_image_reward_pixels_equal_the_packages(number: int) -> None:
    stride = RECORDED["stride"]
    pixels = crop_to_square(picture(number, SIZES[number]), 224, centre="rounded")[:, ::stride, ::stride].flatten()
    np.testing.assert_allclose(pixels, RECORDED["pixels"][number], rtol=0, atol=1e-6)


def test_image_reward_refuses_a_file_of_more_layers(image_reward_settings: dict) -> None:
    path = Path(image_reward_settings["weights"])
    state = torch.load(path, weights_only=True)
    state["blip.text_encoder.encoder.layer.9.output.dense.bias"] = torch.zeros(4)
    torch.save(state | {"blip.text_decoder.bias": torch.zeros(4), "blip.x.position_ids": torch.zeros(4)}, path)
    with pytest.raises(WeightsError, match=r"1 unknown \(text\.encoder\.layer\.9\."):
        ImageReward(**image_reward_settings).load("cpu")


def test_image_reward_refuses_a_file_that_lacks_a_weight(image_reward_settings: dict) -> None:
    state = torch.load(str(image_reward_settings["weights"]), weights_only=True)
    del state["blip.text_encoder.encoder.layer.1.crossattention.self.query.weight"]
    torch.save(state, str(image_reward_settings["weights"]))
    with pytest.raises(WeightsError, match=r"1 missing \(text.encoder.layer.1.crossattention"):
        ImageReward(**image_reward_settings).load("cpu")


@pytest.mark.parametrize("name", ["pickscore", "aesthetic", "image_reward"])
def test_a_batch_of_one_scores_as_in_a_batch(
    name: str, clip_folder: Path, predictor: Path, image_reward_settings: dict
) -> None:
    reward = {
        "pickscore": lambda: PickScore(model=str(clip_folder), tokenizer=str(TOKENIZER)),
        "aesthetic": lambda: Aesthetic(predictor=str(predictor), model=str(clip_folder), max_batch=3),
        "image_reward": lambda: ImageReward(**image_reward_settings),
    }[name]()
    reward.load("cpu")
    batch = samples(["a photo", "of a cat", "", "a photo"], (300, 200))
    alone = np.concatenate([values(reward.score([sample])) for sample in batch])
    np.testing.assert_allclose(values(reward.score(batch)), alone, rtol=0, atol=reward.info.tolerance)
    assert len(np.unique(alone)) == len(batch)
