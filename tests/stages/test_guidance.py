"""Classifier-free guidance in training: what its two halves contribute to the gradient, and that ratios start at 1."""

import pytest
import torch
from torch import Tensor, nn

from adagrpo_train.algorithms.transitions import FlowSDE
from adagrpo_train.types import Conditions
from tests.support import assert_training_repeats_the_rollout, tiny_model


class Scale(nn.Module):
    """w times the mean of the embeddings times x: gradients can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))
        self.rows: list[int] = []

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object) -> tuple[Tensor]:
        self.rows.append(len(hidden_states))
        return (self.w * encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None] * hidden_states,)


@pytest.mark.parametrize("gradient", [True, False])
def test_the_gradient_is_the_one_written_down_by_hand(gradient: bool) -> None:
    """v = u + g (c - u) with c = 3 w x and u = 0.5 w x, so dv/dw = (1 - g) 0.5 x + g 3 x, or g 3 x without u."""
    model, network, g = tiny_model(guidance_scale=4.0, guidance_gradient=gradient), Scale(), 4.0
    x = torch.ones(2, 4, 8, 8)
    conditions = Conditions(
        torch.full((2, 1, 1), 3.0), torch.zeros(2, 1), torch.full((2, 1, 1), 0.5), torch.zeros(2, 1)
    )
    velocity = model.velocity(network, x, torch.tensor([0.5, 0.5]), conditions)
    assert torch.equal(velocity, torch.full_like(x, 2 * 0.5 + g * 2 * (3 - 0.5)))  # the same value either way
    velocity.mean().backward()
    expected = (1 - g) * 0.5 + g * 3 if gradient else g * 3
    assert network.w.grad is not None
    assert float(network.w.grad) == pytest.approx(expected, rel=1e-6)
    assert network.rows == ([4] if gradient else [2, 2])
    assert model.evaluations_per_velocity == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gradient", [True, False])
def test_training_gives_the_rollouts_log_probability_bit_for_bit(gradient: bool, dtype: str) -> None:
    model = tiny_model(guidance_scale=3.5, guidance_gradient=gradient, dtype=dtype)
    assert_training_repeats_the_rollout(model, FlowSDE(noise_level=0.7))
