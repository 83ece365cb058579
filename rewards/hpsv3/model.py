"""The network of HPSv3 on current transformers: Qwen2-VL without its language head, and a small head for two numbers.

Equals Qwen2VLRewardModelBT of hpsv3 1.0.0 (hpsv3/model/qwen2vl_trainer.py, loss "uncertainty", head "ranknet"), which
needs transformers 4.45.2. Two of its habits are no choices of Qwen2-VL, and the published weights were trained with
them: positions count tokens, also in the picture, and the rotary frequencies are those that survive bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from rewards.hpsv3.checkpoint import rename
from rewards.vision.weights import WeightsError

_HIDDEN = (1024, 16)


class HPSv3Model(nn.Module):
    """Two numbers for a picture and a prompt: mean and logarithm of the standard deviation of the preference.

    Args:
        config: of the Qwen2-VL; its vocabulary includes the reward token.
    """

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.model = Qwen2VLModel(config)
        self.rm_head = nn.Sequential(
            nn.Linear(config.get_text_config().hidden_size, _HIDDEN[0]),
            nn.ReLU(),
            nn.Dropout(0.05),  # holds the place that the names of the weights count
            nn.Linear(_HIDDEN[0], _HIDDEN[1]),
            nn.ReLU(),
            nn.Linear(_HIDDEN[1], 2),
        )

    def forward(self, ids: Tensor, mask: Tensor, patches: Tensor, grids: Tensor, reward_id: int) -> Tensor:
        """Mean and logarithm of the standard deviation, float32 ``[B, 2]``.

        Args:
            ids: int64 ``[B, L]``, padded on the right, each row with one reward token.
            mask: int64 ``[B, L]``, 0 on padding.
            patches: float32 ``[P, 1176]``, of all pictures behind each other.
            grids: int64 ``[B, 3]``, patches in time, height and width.
            reward_id: of the reward token.
        """
        # Without positions transformers would count the picture in rows and columns (M-RoPE), as Qwen2-VL wants it.
        # The reference calls the language model with embeddings, which had it count tokens; so it was trained.
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        hidden = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            pixel_values=patches,
            image_grid_thw=grids,
            use_cache=False,
        ).last_hidden_state
        return self.rm_head(hidden[ids == reward_id].float())


def build(
    config: Qwen2VLConfig, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, *, round_rotary: bool = True
) -> HPSv3Model:
    """The network with its weights, on the CPU, without ever holding a second copy of them.

    Args:
        config: of the Qwen2-VL.
        weights: under the names of the published file.
        dtype: of everything but the head, which stays float32.
        round_rotary: round the rotary frequencies to bfloat16 also where ``dtype`` is float32. The reference does it
            by casting the whole model; with exact frequencies a small random model's outputs move by 1.5, four times as
            far as by all other rounding to bfloat16. False only serves comparisons.

    Raises:
        WeightsError: a weight is missing, unknown or of another shape.
    """
    with init_empty_weights(include_buffers=False):  # buffers are computed here: no file has the rotary frequencies
        network = HPSv3Model(config)
    own = network.state_dict()
    state: dict[str, Tensor] = {}
    for published, value in weights:
        name = rename(published)
        if name is None:
            continue
        if name not in own or own[name].shape != value.shape:
            expected = tuple(own[name].shape) if name in own else "no such weight"
            raise WeightsError(
                f"weights: these are weights of another model: {published} is {tuple(value.shape)}, expected "
                f"{expected}; base must be the model they were trained from"
            )
        state[name] = value.to(torch.float32 if name.startswith("rm_head.") else dtype)
    missing = sorted(own.keys() - state.keys())
    if missing:
        raise WeightsError(f"weights: {len(missing)} weights are missing ({missing[0]}, ...)")
    network.load_state_dict(state, assign=True)
    if round_rotary:
        for name, buffer in network.model.named_buffers():
            if name.endswith("inv_freq"):
                buffer.copy_(buffer.to(torch.bfloat16))
    nn.Module.to(network.model, dtype)
    return network.eval().requires_grad_(False)


def read_config(folder: Any, vocabulary: int) -> Qwen2VLConfig:
    """The config of a Qwen2-VL whose vocabulary ends with the reward token."""
    config = Qwen2VLConfig.from_pretrained(folder)
    config.get_text_config().vocab_size = vocabulary
    return config
