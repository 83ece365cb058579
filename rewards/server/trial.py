"""A reward is loaded, and tried before anybody waits for its scores."""

import math

import numpy as np

from rewards.contract import ItemError, Reward, Sample

_SIDE = 64  # pixels


def load_and_try(reward: Reward, device: str) -> str:
    """Load a reward and let it score a grey picture: one that fails on every image is found here. Returns its
    fingerprint.

    Raises:
        RuntimeError: the picture got no score, or none that is a finite number. Besides, whatever the reward raises.
    """
    reward.load(device)
    info = reward.info
    picture = np.full((_SIDE, _SIDE, 3), 127, np.uint8)
    try:
        scores = reward.score([Sample("trial", next(iter(info.example_prompts), ""), picture)])
    except ItemError:  # it wants another picture, and says so properly
        return reward.fingerprint()
    if len(scores) != 1:
        raise RuntimeError(f"the reward {info.name} gives {len(scores)} scores for one picture")
    if not all(math.isfinite(scores[0][metric]) for metric in info.metrics):
        raise RuntimeError(f"the reward {info.name} cannot score a grey picture: {dict(scores[0])}")
    return reward.fingerprint()
