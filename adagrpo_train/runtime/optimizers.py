"""Optimizers of optional libraries."""

from collections.abc import Iterable
from importlib import import_module

import torch
from torch import nn

from adagrpo_train.errors import ConfigError


def adamw_8bit(
    params: Iterable[nn.Parameter],
    *,
    lr: float,
    betas: list[float],
    eps: float,
    weight_decay: float,
    min_8bit_size: int,
) -> torch.optim.Optimizer:
    """AdamW whose two moments take a byte per weight each instead of four, quantised in blocks (arXiv:2110.02861).

    Args:
        min_8bit_size: weights of smaller tensors keep float32 moments.

    Raises:
        ConfigError: bitsandbytes is not installed, or too old.
    """
    try:
        made = import_module("bitsandbytes.optim").AdamW8bit
    except ImportError as error:
        raise ConfigError("optimizer=adamw_8bit needs bitsandbytes: pip install 'adagrpo-train[adamw-8bit]'") from error
    first, second = betas
    return made(
        list(params), lr=lr, betas=(first, second), eps=eps, weight_decay=weight_decay, min_8bit_size=min_8bit_size
    )
