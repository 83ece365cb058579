"""From the command line to a checked configuration: every mistake is named before any work is done."""

import difflib
import inspect
import pkgutil
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adagrpo_train.errors import ConfigError

_PACKAGE = Path(__file__).parent
_OPEN = re.compile(r"reward\.[^.=]+\.(weights|settings)")
"""Sections whose keys are the reward's own: more may be given than a config names."""
_WHOLE = re.compile(r"(reward\.[^.=]+\.(?:weights|settings\.[^.=]+))=\s*\{")
"""What a mapping replaces, where Hydra would merge it: weights={a: 1.0} means no other weight."""

_NO_GROUPS = ("accelerate", "study")
"""Folders beside the groups: files for `accelerate launch`, and studies."""


@dataclass(frozen=True)
class Settings:
    """A resolved configuration.

    Attributes:
        values: plain containers, without Hydra's own section.
        run_dir: folder of the run.
        run_dir_given: whether the command line named it.
        choices: group -> chosen option.
    """

    values: dict[str, Any]
    run_dir: Path
    run_dir_given: bool
    choices: dict[str, str]


def config_dir() -> Path:
    """The folder `configs`: beside the package in a checkout, inside it when installed from a wheel."""
    for candidate in (_PACKAGE.parent / "configs", _PACKAGE / "configs"):
        if (candidate / "train.yaml").is_file():
            return candidate
    raise ConfigError(f"no configs/train.yaml beside or inside {_PACKAGE}; reinstall adagrpo-train")


def read_settings(overrides: list[str]) -> Settings:
    """Compose `configs/train.yaml` with command-line overrides and check every key, value type and target.

    Raises:
        ConfigError: an unknown or misspelt key, group option or constructor argument (with the nearest known
            name), a value of the wrong type, or an override that cannot be parsed.
    """
    OmegaConf.register_new_resolver("asset", _asset, replace=True)
    defaults = _defaults()
    known_groups = sorted(key for key in defaults.hydra.runtime.choices if not key.startswith("hydra/"))
    chosen = _compose(_group_overrides(overrides, known_groups), groups=known_groups)
    opened = [part for text in overrides for part in _opened(text, chosen)]
    composed = _compose(opened, known=_leaves(chosen), groups=known_groups)
    resolved, plain = _plain(composed, resolve=True), _with_numbers(_plain(chosen, resolve=False), chosen)
    _check_keys(resolved, {str(key) for key in defaults if key != "hydra"})
    _check_values(resolved, plain, optional=_nulls(_plain(defaults, resolve=False)))
    _check_served_settings(resolved["reward"], plain["reward"])
    _check_targets(resolved)
    # Of a group with several options Hydra keeps no record; the rewards are the keys of their section.
    several = {"reward": "+".join(resolved["reward"])}
    choices = {group: str((several | dict(composed.hydra.runtime.choices))[group]) for group in known_groups}
    given = any(override.lstrip("+").startswith("hydra.run.dir=") for override in overrides)
    return Settings(resolved, Path(composed.hydra.run.dir), given, choices)


def check_like(values: dict[str, Any], before: dict[str, Any]) -> None:
    """Refuse a resolved configuration with other keys, or other types of values, than a sound one has.

    Raises:
        ConfigError: names the key, and the nearest known one.
    """
    _check_values(values, before, optional=set())
    _check_targets(values)


def group_options() -> dict[str, list[str]]:
    """Config groups and their options, for --help."""
    folder = config_dir()
    groups = sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in _NO_GROUPS)
    return {group.name: sorted(path.stem for path in group.glob("[!_]*.yaml")) for group in groups}


def nearest(word: str, known: list[str]) -> str:
    """A "did you mean" clause, "" when nothing is near."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


@cache
def _defaults() -> DictConfig:
    return _compose([])


def _compose(overrides: list[str], *, known: list[str] | None = None, groups: list[str] | None = None) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            return hydra.compose("train", overrides=overrides, return_hydra_config=True)
    except HydraException as error:
        raise ConfigError(_explain(error, known or [], groups or [])) from error
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{' '.join(overrides)}: {error}") from error


def _plain(config: DictConfig, *, resolve: bool) -> dict[str, Any]:
    """Containers without Hydra's own section, parts of which exist only inside its launcher."""
    try:
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        container: Any = OmegaConf.to_container(own, resolve=resolve)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from error
    return container


def _with_numbers(plain: dict[str, Any], config: DictConfig) -> dict[str, Any]:
    """The same with the numbers that references to numbers stand for: such a key takes a number, too."""
    resolved = _plain(config, resolve=True)
    numbers = (int, float)
    return {key: resolved[key] if isinstance(resolved[key], numbers) else value for key, value in plain.items()}


def _explain(error: HydraException, known: list[str], groups: list[str]) -> str:
    """Hydra's message, with the nearest known name in front of it."""
    text = str(error) if error.__cause__ is None else f"{error}\n{error.__cause__}"
    missing = re.search(r"Could not override '([^']+)'", text)
    if missing:
        key = missing.group(1)
        return f"unknown key {key!r}{nearest(key, known + groups)}"
    option = re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text)
    if option:
        group, name = option.groups()
        options = group_options().get(group, [])
        return f"{group}={name}: no such option{nearest(name, options)}; choose one of {', '.join(options)}"
    return text


def _group_overrides(overrides: list[str], groups: list[str]) -> list[str]:
    parser = OverridesParser.create()
    chosen = []
    for text in overrides:
        try:
            key = parser.parse_override(text).key_or_group
        except HydraException as error:
            raise ConfigError(f"{text}: {error}") from error
        if key in groups:
            chosen.append(text)
    return chosen


def _opened(text: str, chosen: DictConfig) -> list[str]:
    """An override of an open section as Hydra takes it."""
    whole = _WHOLE.match(text)
    there = whole and OmegaConf.select(chosen, whole.group(1)) is not None
    return [*([f"~{whole.group(1)}"] if whole and there else []), f"++{text}" if _OPEN.match(text) else text]


def _leaves(config: DictConfig) -> list[str]:
    """Every dotted key of a configuration, sections included."""
    keys = ["hydra.run.dir"]

    def walk(value: Any, prefix: str) -> None:
        for key, child in value.items() if isinstance(value, dict) else ():
            keys.append(f"{prefix}{key}")
            walk(child, f"{prefix}{key}.")

    walk(_plain(config, resolve=False), "")
    return keys


def _check_keys(values: dict[str, Any], known: set[str]) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {key!r}{nearest(key, sorted(known))}")


def _nulls(values: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted keys without a value."""
    below = (_nulls(value, f"{prefix}{key}.") for key, value in values.items() if isinstance(value, dict))
    return {f"{prefix}{key}" for key, value in values.items() if value is None}.union(*below)


def _check_values(values: Any, plain: Any, prefix: str = "", *, optional: set[str]) -> None:
    """Compare with the same groups without overrides: keys added by `+key=` and values of another type.

    Args:
        optional: keys that may be null although an experiment gives them a value.
    """
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in plain:
            raise ConfigError(f"unknown key {name!r}{nearest(name, [f'{prefix}{known}' for known in plain])}")
        default = plain[key]
        if isinstance(default, dict) and isinstance(value, dict):
            if not _OPEN.fullmatch(name):
                _check_values(value, default, f"{name}.", optional=optional)
        elif not _fits(value, default) and not (value is None and name in optional):
            shown = "null" if value is None else value
            raise ConfigError(f"{name}={shown}: expected {_kind(default)}, as in the default {default}")
    missing = [f"{prefix}{key}" for key in plain if key not in values and prefix != "tracker."]
    if missing:
        raise ConfigError(f"{missing[0]} was deleted; every setting is needed")


def _check_served_settings(rewards: dict[str, Any], plain: dict[str, Any]) -> None:
    """Settings on the command line would have no effect on a server elsewhere."""
    for name, section in rewards.items():
        if section.get("mode") == "remote" and section["settings"] != plain[name].get("settings"):
            raise ConfigError(
                f"reward.{name}.settings={section['settings']}: with mode=remote they are those of the server; "
                "give them to it, python -m rewards.serve ... --settings"
            )


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, str) and default.startswith("${algorithm"):
        return isinstance(value, dict)
    if default is None:
        return value is None or isinstance(value, str)
    if isinstance(default, list) and isinstance(value, list):
        return all(_fits(item, default[0] if default else "") for item in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, type(default))


def _kind(default: Any) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        type(None): "text or null",
    }
    return names.get(type(default), type(default).__name__)


def _check_targets(values: Any, prefix: str = "") -> None:
    """Bind every section with a `_target_` to the signature of that class."""
    if not isinstance(values, dict):
        return
    if "_target_" in values:
        where = prefix.rstrip(".")
        try:
            target = pkgutil.resolve_name(values["_target_"])
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{where}._target_={values['_target_']}: cannot be imported ({error})") from error
        arguments = list(inspect.signature(target).parameters)
        for key in values:
            if not key.startswith("_") and key not in arguments:
                raise ConfigError(f"unknown key '{prefix}{key}'{nearest(key, arguments)}")
    for key, child in values.items():
        _check_targets(child, f"{prefix}{key}.")


def _asset(name: str) -> str:
    """Absolute path of a file or folder shipped with the package."""
    return str(_PACKAGE / "assets" / name)
