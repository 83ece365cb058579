"""Gaussian noise that depends on what it is for and on nothing else: not on batch split, rank or call order."""

import hashlib
import struct
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SHARED = -1
"""Sample number of noise that all samples of a prompt share, such as that of its noise-free trunk."""

INITIAL = -1
"""Step number of the initial noise."""


class NoiseKey(NamedTuple):
    """Identity of one latent's worth of noise."""

    seed: int
    iteration: int
    prompt_id: int
    sample: int
    step: int


def keyed_noise(keys: Iterable[NoiseKey], latent_shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [len(keys), *latent_shape] on the CPU, each row a function of its key alone.

    The 128-bit key of a counter-based generator is a hash of the five numbers: torch's CPU generator would
    keep only 32 bits of a seed, so distinct samples of a long run could share their noise.
    """
    rows = []
    for key in keys:
        digest = hashlib.blake2b(struct.pack("<5q", *key), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        rows.append(generator.standard_normal(latent_shape, dtype=np.float32))
    return torch.from_numpy(np.stack(rows))
