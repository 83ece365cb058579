"""Rewards by name: the ones shipped here, and those that installed packages announce."""

import difflib
import inspect
import json
import math
import pkgutil
import sys
from collections.abc import Callable, Mapping
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
    """No reward of that name can be had: the message lists the known ones, or says why its package is of no use."""


def names() -> list[str]:
    """Every name that `make` knows."""
    return sorted({*SHIPPED, *(entry.name for entry in entry_points(group=GROUP))})


def make(name: str, settings: Mapping[str, Any] | None = None) -> Reward:
    """A reward that is not loaded yet.

    Only names of shipped or installed rewards count: a configuration cannot make this process import anything else.

    Raises:
        UnknownRewardError: the name is not known, or what it stands for cannot be imported.
        TypeError: what the name stands for is no reward of this version of the contract, or a setting is not one
            of its own.
        ValueError: a setting is no finite number, or has no sense to the reward.
    """
    _check_finite("settings", settings or {})
    factory = _factory(name)
    reward = factory(**(settings or {}))
    version = getattr(reward, "api_version", None)
    if not isinstance(reward, Reward) or version != API_VERSION:
        raise TypeError(f"reward {name}: {factory!r} makes no reward of api_version {API_VERSION} (it says {version})")
    return reward


def default_settings(name: str) -> dict[str, Any]:
    """What a reward takes for the settings that it is not given; of one without defaults nothing.

    Raises:
        UnknownRewardError: as make().
    """
    parameters = inspect.signature(_factory(name)).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def json_object(text: str) -> dict[str, Any]:
    """A command-line argument that is a JSON object, for argparse's `type`."""
    value = json.loads(text, parse_constant=_no_number)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _check_finite(key: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}={value}: must be a finite number")
    children = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for child, content in children:
        _check_finite(f"{key}.{child}", content)


def _factory(name: str) -> Any:
    if name in SHIPPED:
        return _imported(name, "its package", lambda: pkgutil.resolve_name(SHIPPED[name]))
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return _imported(name, entry.dist.name if entry.dist is not None else entry.value, entry.load)
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UnknownRewardError(f"no reward {name!r}{hint} (known: {', '.join(names())})")


def _imported(name: str, package: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # a plug-in may raise anything when it is imported
        raise UnknownRewardError(
            f"reward {name!r}: {package} cannot be imported ({type(error).__name__}: {error}) by {sys.executable}; "
            "install what it needs there, or run it with mode=local and the python of its own environment"
        ) from error
