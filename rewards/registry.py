"""Rewards by name: the ones shipped here, and those that installed packages announce."""

import difflib
import json
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from rewards.contract import API_VERSION, Reward

GROUP = "adagrpo.rewards"
SHIPPED = {
    "shapes": "rewards.shapes.reward:ShapesReward",
    "jpeg_size": "rewards.jpeg_size:JpegSize",
    "hpsv2": "rewards.hpsv2:HPSv2",
    "clip": "rewards.clip_score:ClipScore",
    "pickscore": "rewards.pickscore:PickScore",
    "aesthetic": "rewards.aesthetic:Aesthetic",
    "image_reward": "rewards.image_reward:ImageReward",
    "hpsv3": "rewards.hpsv3.reward:HPSv3",
    "unified_reward": "rewards.judge.reward:UnifiedReward",
    "vlm_judge": "rewards.judge.reward:VLMJudge",
    "tiny_clip": "rewards.tiny_clip:TinyClip",
}


class UnknownRewardError(LookupError):
    """No reward of that name; the message lists the known ones."""


def names() -> list[str]:
    """Every name that `make` knows."""
    return sorted({*SHIPPED, *(entry.name for entry in entry_points(group=GROUP))})


def make(name: str, settings: Mapping[str, Any] | None = None) -> Reward:
    """A reward that is not loaded yet.

    Only names of shipped or installed rewards count: a configuration cannot make this process import anything else.

    Raises:
        UnknownRewardError: the name is not known.
        TypeError: what the name stands for is no reward of this version of the contract, or a setting is not one
            of its own.
    """
    factory = _factory(name)
    reward = factory(**(settings or {}))
    version = getattr(reward, "api_version", None)
    if not isinstance(reward, Reward) or version != API_VERSION:
        raise TypeError(f"reward {name}: {factory!r} makes no reward of api_version {API_VERSION} (it says {version})")
    return reward


def json_object(text: str) -> dict[str, Any]:
    """A command-line argument that is a JSON object, for argparse's `type`."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _factory(name: str) -> Any:
    if name in SHIPPED:
        return pkgutil.resolve_name(SHIPPED[name])
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return entry.load()
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UnknownRewardError(f"no reward {name!r}{hint} (known: {', '.join(names())})")
