"""Packing of latents into tokens against a picture by hand and diffusers."""

import pytest
import torch
from diffusers import FluxPipeline

from adagrpo_train.functional.latents import pack, position_ids, unpack


def test_a_token_holds_the_patch_of_each_channel_row_by_row():
    first = torch.arange(8.0).reshape(2, 4)  # one channel, two patches side by side
    x = torch.stack([first, first + 100])[None]
    expected = [[0, 1, 4, 5, 100, 101, 104, 105], [2, 3, 6, 7, 102, 103, 106, 107]]
    assert pack(x)[0].tolist() == expected


@pytest.mark.parametrize(("height", "width"), [(4, 4), (6, 10)])
def test_packing_is_that_of_diffusers_and_is_undone(height: int, width: int):
    x = torch.randn(3, 16, height, width)
    tokens = pack(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 3, 16, height, width))
    assert torch.equal(unpack(tokens, height=height, width=width), x)
    ids = FluxPipeline._prepare_latent_image_ids(3, height // 2, width // 2, torch.device("cpu"), torch.float32)
    assert torch.equal(position_ids(height, width, device=torch.device("cpu")), ids)


def test_an_odd_latent_is_refused():
    with pytest.raises(ValueError, match="multiples of 2"):
        pack(torch.zeros(1, 4, 3, 4))
    with pytest.raises(RuntimeError):
        unpack(torch.zeros(1, 5, 16), height=4, width=4)
