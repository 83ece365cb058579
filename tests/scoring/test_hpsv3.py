"""HPSv3 against numbers that the published package computed with the same random weights (scripts/goldens/hpsv3.py)."""

import hashlib
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2VLConfig

from rewards import registry
from rewards.check import check
from rewards.contract import ItemError, Sample
from rewards.hpsv3.checkpoint import weight_files
from rewards.hpsv3.model import HPSv3Model, build, read_config
from rewards.hpsv3.patches import patchify, target_size
from rewards.hpsv3.prompt import conversation, instruction
from rewards.hpsv3.reward import HPSv3
from rewards.vision.weights import WeightsError
from scripts.goldens import hpsv3 as recipe
from scripts.goldens.hps_seeded import picture

RECORDED = Path(__file__).parents[1] / "golden/rewards"
GOLDEN: dict[str, Any] = json.loads((RECORDED / "hpsv3.json").read_text())
SAMPLES = [
    Sample(str(n), prompt, picture(n, size))
    for n, (prompt, size) in enumerate(zip(recipe.PROMPTS, recipe.SIZES, strict=True))
]
REWARD_ID = recipe.VOCABULARY


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def published_state() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in recipe.tiny_weights(GOLDEN["shapes"]).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the form of the published one, and its base model."""
    folder = tmp_path_factory.mktemp("hpsv3")
    recipe.write_base(folder / "base", RECORDED / "hpsv3_tokenizer.json", GOLDEN["config"])
    save_file(published_state(), folder / "HPSv3.safetensors")
    return folder


def make(folder: Path, **settings: Any) -> HPSv3:
    return HPSv3(**{"weights": str(folder / "HPSv3.safetensors"), "base": str(folder / "base")} | settings)


def loaded(folder: Path, **settings: Any) -> HPSv3:
    torch.set_num_threads(1)
    reward = make(folder, **settings)
    reward.load("cpu")
    return reward


@pytest.fixture(scope="module")
def exact(folder: Path) -> HPSv3:
    return loaded(folder, dtype="float32")


@pytest.fixture(scope="module")
def scores(exact: HPSv3) -> list[dict[str, float]]:
    return [dict(score) for score in exact.score(SAMPLES)]


def test_instruction_is_the_published_text_to_the_letter() -> None:
    assert len(instruction()) == 2523
    assert sha256(instruction().encode()) == "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a"
    text = conversation("a cat", 1)
    assert sha256(text.encode()) == "975a95bb63e18e35b43c8547ae8f97f5e90544d534ee586207557dcef9cda6ca"


def test_same_tokens_as_the_package_padded_on_the_right(exact: HPSv3) -> None:
    ids, mask, _, _ = exact._collate(SAMPLES)
    rows = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    assert [len(row) for row in rows] == GOLDEN["ids"]["lengths"]
    assert sha256(str(rows).encode()) == GOLDEN["ids"]["sha256"]
    assert all((row[length:] == 0).all() for row, length in zip(mask, GOLDEN["ids"]["lengths"], strict=True))
    assert (ids == REWARD_ID).sum(1).tolist() == [1] * len(SAMPLES)


def test_same_pixels_as_the_package() -> None:
    """Bit for bit: resize, order of the patches and of the values within one."""
    patches, grids = zip(*(patchify(sample.image) for sample in SAMPLES), strict=True)
    assert [list(grid) for grid in grids] == GOLDEN["grids"]
    kept = torch.cat(patches)[:: recipe.STRIDES[0], :: recipe.STRIDES[1]].flatten()
    torch.testing.assert_close(kept, torch.tensor(GOLDEN["pixels"]), rtol=0, atol=0)
    assert sha256(torch.cat(patches).numpy().tobytes()) == GOLDEN["pixels_sha256"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (448, 448)),
        ((1024, 1024), (448, 448)),
        ((768, 512), (532, 364)),
        ((300, 431), (392, 560)),  # rounded up on both sides, beyond 256 tokens
        ((448, 448), (448, 448)),
        ((14, 14), (448, 448)),
    ],
)
def test_target_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert target_size(*size) == expected


@pytest.mark.parametrize("size", [(10, 2001), (40, 7960)])  # too long as it is, and once it is resized
def test_far_too_long_pictures_are_refused(exact: HPSv3, size: tuple[int, int]) -> None:
    with pytest.raises(ItemError, match="200 times"):
        exact.score([Sample("a", "a cat", np.zeros((*size, 3), np.uint8))])


@pytest.mark.parametrize(("recorded", "round_rotary"), [("float64", False), ("float64_rounded_rotary", True)])
def test_outputs_equal_the_package_in_float64(folder: Path, exact: HPSv3, recorded: str, round_rotary: bool) -> None:
    """5.4e-7 seen; norms and rotary tables are float32 on both sides, so that another CPU can add 2e-6."""
    config = read_config(folder / "base", REWARD_ID + 1)
    network = build(config, published_state().items(), torch.float64, round_rotary=round_rotary)
    network.rm_head.double().register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    with torch.inference_mode():
        outputs = network(*exact._collate(SAMPLES), REWARD_ID)
    expected = torch.tensor(GOLDEN["outputs"][recorded], dtype=torch.float64)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-5)


def test_float32_scores_keep_the_rounded_rotary_frequencies(scores: list[dict[str, float]]) -> None:
    """Exact frequencies move the score by 1.0 here.

    Rounding to float32 moves it by up to 2.5e-5, and the package's own by 2.9e-5: how far depends on the CPU.
    """
    expected = np.array(GOLDEN["outputs"]["float64_rounded_rotary"])
    np.testing.assert_allclose([score["hpsv3"] for score in scores], expected[:, 0], rtol=0, atol=1.5e-4)
    np.testing.assert_allclose([s["hpsv3_log_sigma"] for s in scores], expected[:, 1], rtol=0, atol=1.5e-4)
    exact = np.array(GOLDEN["outputs"]["float64"])
    assert np.abs(exact - expected).max() > 1.0, "rounding would not be noticed"


def test_bfloat16_scores_are_as_near_as_rounding_allows(folder: Path) -> None:
    """0.03 to 0.06 from the package in bfloat16, as the CPU will have it, and the package's own differ as much.

    In float64 the package is 0.36 away from itself in bfloat16, and 1.5 with exact frequencies.
    """
    reward = loaded(folder, dtype="bfloat16")
    found = [(score["hpsv3"], score["hpsv3_log_sigma"]) for score in reward.score(SAMPLES)]
    np.testing.assert_allclose(found, GOLDEN["outputs"]["bfloat16"], rtol=0, atol=0.2)
    buffers = {name: buffer for name, buffer in reward._model.named_buffers() if name.endswith("inv_freq")}
    assert len(buffers) >= 2
    assert {buffer.dtype for buffer in buffers.values()} == {torch.bfloat16}
    assert {p.dtype for p in reward._model.rm_head.parameters()} == {torch.float32}


def test_a_batch_changes_nothing(exact: HPSv3, scores: list[dict[str, float]]) -> None:
    """6.7e-6 seen: a CPU may sum in another order for another shape."""
    order = [3, 0, 5]
    alone = [exact.score([SAMPLES[n]])[0]["hpsv3"] for n in order[:2]]
    np.testing.assert_allclose(alone, [scores[n]["hpsv3"] for n in order[:2]], rtol=0, atol=4e-5)
    np.testing.assert_allclose(
        [score["hpsv3"] for score in exact.score([SAMPLES[n] for n in order])],
        [scores[n]["hpsv3"] for n in order],
        rtol=0,
        atol=4e-5,
    )


def test_weights_of_the_7b_model_have_the_published_names() -> None:
    values = {name: value for name, value in recipe.SEVEN_B.items() if name != "rope_scaling"}
    with torch.device("meta"):
        model = HPSv3Model(Qwen2VLConfig(**values))
    names = {name.replace("model.visual.", "visual.").replace("language_model.", ""): tuple(value.shape)
             for name, value in model.state_dict().items()}  # fmt: skip
    names["lm_head.weight"] = (151658, 3584)
    lines = sorted(f"{name} {shape}" for name, shape in names.items())
    assert len(lines) == GOLDEN["seven_b"]["weights"]
    assert sha256("\n".join(lines).encode()) == GOLDEN["seven_b"]["sha256"]


def test_every_form_of_checkpoint_gives_the_same_fingerprint(
    folder: Path, exact: HPSv3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a socket: nothing but hub ids may ask the network."""

    def no_socket(*_: object, **__: object) -> None:
        raise AssertionError("a local checkpoint needs no network")

    monkeypatch.setattr(socket, "socket", no_socket)
    state = published_state()
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    (tmp_path / "sharded").mkdir()
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, tmp_path / "sharded" / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "sharded/model.safetensors.index.json").write_text(json.dumps(index))
    torch.save({"model": state}, tmp_path / "nested.pth")
    (tmp_path / "flat").mkdir()
    torch.save(state, tmp_path / "flat/HPSv3.pth")
    for weights in (folder, tmp_path / "sharded", tmp_path / "nested.pth", tmp_path / "flat"):
        assert loaded(folder, weights=str(weights), dtype="float32").fingerprint() == exact.fingerprint()
    assert "/float32/torch 2" in exact.fingerprint()
    assert loaded(folder).fingerprint() != exact.fingerprint()


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-3}, {"rope_theta": 5e5}])
def test_the_config_is_part_of_the_fingerprint(
    folder: Path, exact: HPSv3, tmp_path: Path, change: dict[str, float]
) -> None:
    recipe.write_base(tmp_path / "base", RECORDED / "hpsv3_tokenizer.json", GOLDEN["config"] | change)
    changed = loaded(folder, base=str(tmp_path / "base"), dtype="float32")
    assert changed.fingerprint() != exact.fingerprint()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_base_that_lacks_a_file_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    recipe.write_base(tmp_path / "base", RECORDED / "hpsv3_tokenizer.json", GOLDEN["config"])
    (tmp_path / "base" / name).unlink()
    with pytest.raises(WeightsError, match=rf"base=.*: lacks {name}"):
        loaded(folder, base=str(tmp_path / "base"))


def test_a_file_that_is_not_there_is_no_hub_id(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"weights=weights/HPSv3\.safetensors: no such file"):
        loaded(folder, weights="weights/HPSv3.safetensors")


def test_other_weights_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    state = published_state()
    changes: dict[str, dict[str, Any]] = {
        "are missing (model.language_model.norm.weight": {"model.norm.weight": None},
        "nothing in HPSv3 is called blip.norm": {"blip.norm": torch.zeros(2)},
        "no such weight": {"model.layers.7.mlp.up_proj.weight": torch.zeros(2)},
        r"model.norm.weight is (3,), expected (256,)": {"model.norm.weight": torch.zeros(3)},
    }
    for number, (message, change) in enumerate(changes.items()):
        changed = {name: value for name, value in (state | change).items() if value is not None}
        save_file(changed, tmp_path / f"{number}.safetensors")
        with pytest.raises(WeightsError) as caught:
            loaded(folder, weights=str(tmp_path / f"{number}.safetensors"))
        assert message in str(caught.value)


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/hpsv3_payload"),))


def test_faulty_places_name_the_setting_and_the_remedy(folder: Path, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"damaged")
    torch.save({"model": Payload()}, tmp_path / "code.pth")
    (tmp_path / "empty").mkdir()
    (tmp_path / "index").mkdir()
    (tmp_path / "index/x.index.json").write_text('{"weight_map": {"w": "../../gone.safetensors"}}')
    for weights, message in {
        "/no/such/file.safetensors": "no such file; give HPSv3.safetensors",
        str(tmp_path): "several checkpoints",
        str(tmp_path / "empty"): "no .safetensors or .pth",
        str(tmp_path / "index"): "missing",
        str(tmp_path / "a.safetensors"): "cannot be read as weights",
        str(tmp_path / "code.pth"): "cannot be read as weights",
        "MizzenAI/HPSv3": "hf download MizzenAI/HPSv3",
    }.items():
        with pytest.raises(WeightsError, match="weights") as caught:
            loaded(folder, weights=weights)
        assert message in str(caught.value)
    assert not Path("/tmp/hpsv3_payload").exists()
    for base, message in {"/no/such/folder": "no such folder", "Qwen/Qwen2-VL-7B-Instruct": "hf download Qwen"}.items():
        with pytest.raises(WeightsError, match="base") as caught:
            loaded(folder, base=base)
        assert message in str(caught.value)
    recipe.write_base(tmp_path / "base", RECORDED / "hpsv3_tokenizer.json", GOLDEN["config"] | {"image_token_id": 5})
    with pytest.raises(WeightsError, match="different models"):
        loaded(folder, base=str(tmp_path / "base"))


def test_a_shard_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "outside.safetensors").touch()
    (tmp_path / "in/x.index.json").write_text('{"weight_map": {"w": "../outside.safetensors"}}')
    with pytest.raises(WeightsError, match="missing"):
        weight_files(str(tmp_path / "in"))


@pytest.mark.parametrize("token", ["<|Reward|>", "<|image_pad|>", "<|im_end|>"])
def test_a_prompt_with_a_control_token_is_refused(exact: HPSv3, token: str) -> None:
    with pytest.raises(ItemError, match="control token"):
        exact.score([Sample("a", f"a cat {token}", SAMPLES[0].image)])


@pytest.mark.parametrize("settings", [{"dtype": "float16"}, {"max_batch": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        HPSv3(**settings)


def test_nothing_heavy_is_imported_and_nothing_looked_up_before_loading() -> None:
    code = (
        "import sys; from rewards.registry import make; r = make('hpsv3'); r.info\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    with pytest.raises(RuntimeError, match="before its weights"):
        HPSv3().fingerprint()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_keeps_the_contract(folder: Path, dtype: str) -> None:
    settings = {"weights": str(folder), "base": str(folder / "base"), "max_batch": 3, "dtype": dtype}
    reward = registry.make("hpsv3", settings)
    reward.load("cpu")
    assert not any(check(reward).values()), check(reward)
    reward.close()
