"""Convolutions as matrix products, and what keeps those exact."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_models import ROOT, put_seeded, samples
from torch import nn
from transformers import CLIPConfig, CLIPModel

from rewards.contract import LostError
from rewards.pickscore import PickScore
from rewards.vision.exact import as_products, require_exact_products


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 8, 4, stride=4, bias=False), (2, 3, 16, 12)),  # patches
        (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(2, 1), groups=2), (2, 4, 11, 9)),
        (nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"), (1, 4, 7, 8)),
        (nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4), bias=False), (5, 3, 2, 4, 4)),
    ],
)
def test_a_convolution_as_a_matrix_product_is_the_same(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, picture = layer.double(), torch.randn(shape, dtype=torch.float64)
    names = list(layer.state_dict())
    expected = layer(picture)
    as_products(nn.Sequential(layer))
    torch.testing.assert_close(layer(picture), expected, rtol=0, atol=1e-13)
    assert list(layer.state_dict()) == names
    with torch.profiler.profile() as profile:
        layer(picture)
    assert not [event.key for event in profile.key_averages() if "conv" in event.key]


def test_a_convolution_that_cannot_be_one_is_refused() -> None:
    class Own(nn.Conv2d):
        pass

    with pytest.raises(ValueError, match=r"dtype=float32: 1 is a Own"):
        as_products(nn.Sequential(nn.ReLU(), Own(3, 3, 3)))


@pytest.fixture
def rounding() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def test_products_that_the_process_rounds_are_refused(rounding: None) -> None:
    with pytest.raises(LostError, match=r"TF32.*mode=local"):
        require_exact_products()
    torch.set_float32_matmul_precision("highest")
    require_exact_products()


def test_rewards_defend_float32_on_a_gpu_and_only_there(tmp_path: Path, rounding: None) -> None:
    """The device ``meta`` stands for one: it is not the CPU, and computes nothing."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(text_config=vision | {"vocab_size": 200}, vision_config=vision, projection_dim=4)
    model = CLIPModel(config)
    put_seeded(model, 3)
    model.save_pretrained(tmp_path)
    tokenizer = str(ROOT / "adagrpo_train" / "assets" / "tiny_sd3" / "full" / "tokenizer")
    for device, dtype, exact in (("meta", "float32", True), ("meta", "bfloat16", False), ("cpu", "float32", False)):
        reward = PickScore(model=str(tmp_path), tokenizer=tokenizer, dtype=dtype)
        reward.load(device)
        kinds = {type(module).__name__ for module in reward._model.modules() if isinstance(module, nn.Conv2d)}
        assert kinds == {"_ProductConv2d" if exact else "Conv2d"}
        if exact:
            with pytest.raises(LostError):
                reward.score(samples(["a"]))
