"""For which settings a reference curve holds, and where those of a run differ."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adagrpo_train.errors import ConfigError
from adagrpo_train.scoring.entry import SERVING

_FREE = (
    "seed",
    "name",
    "resume",
    "tracker",
    "engine",
    "checkpoint",
    "record",
    "against",
    "health",
    "prompt_cache",
    "micro_batch",
    "update_micro_batch",
    "network.gradient_checkpointing",
    "model.decode_batch",
    "evaluation.grid_images",
    "evaluation.samples",
    "scoring.max_skipped",
    "scoring.accept_changed_rewards",
)
"""Keys, or sections, that change a run's curve by rounding at most; the seed is what its band is for."""

_ASSETS = "/adagrpo_train/assets/"


def read_config(run_dir: Path) -> dict[str, Any]:
    """The settings that a run recorded.

    Raises:
        ConfigError: the folder holds none.
    """
    from omegaconf import OmegaConf

    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; {run_dir} is not the folder of a run")
    config: Any = OmegaConf.to_container(OmegaConf.load(path))
    return config


def held_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and values that a reference holds for. Files of the package count by name, wherever it lies."""
    return {key: _placeless(value) for key, value in _flat(config, "").items() if not _is_free(key)}


def differences(held: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Where the settings of a run are not those of the reference, in words."""
    own, nothing = held_settings(config), "absent"
    return [
        f"{key}={own.get(key, nothing)}, the reference has {held.get(key, nothing)}"
        for key in sorted(held.keys() | own.keys())
        if own.get(key, nothing) != held.get(key, nothing)
    ]


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _is_free(key: str) -> bool:
    if key.startswith("reward.") and key.rsplit(".", 1)[1] in SERVING and key.count(".") == 2:
        return True
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _placeless(value: Any) -> Any:
    if isinstance(value, str) and _ASSETS in value:
        return "assets/" + value.partition(_ASSETS)[2]
    return value
