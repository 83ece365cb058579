"""The configuration of a record, changed: what a record can answer for, and why not the rest."""

import copy
import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException

from adagrpo_train.errors import ConfigError
from adagrpo_train.settings import check_like, nearest, read_settings

_GROUPS = {"curriculum": ("curriculum",), "advantage": ("advantage",), "adagrpo": ("curriculum", "advantage")}
"""Groups of options -> the sections they choose."""

_SECTIONS = ("curriculum", "advantage", "algorithm", "reward", "scoring")
"""Sections that may change."""

_KEPT = ("candidates", "chosen", "alpha", "per_rank")
"""What a curriculum chosen by name takes from the record: every curriculum has the same."""

_FREE = re.compile(
    r"curriculum\.(alpha|chosen)|advantage\.(?!_).+|algorithm\.objective\.(clip_range|kl_weight)"
    r"|reward\.[^.]+\.(weights(\..+)?|required)|scoring\.(level|scale)"
)
_SHOWN = (
    "curriculum, curriculum.alpha, curriculum.chosen, advantage, advantage.*, adagrpo, algorithm.objective.clip_range, "
    "algorithm.objective.kl_weight, reward.*.weights, reward.*.required, scoring.level, scoring.scale"
)

_REASONS = (
    (r"group_size|curriculum\.candidates", "prompts and samples that were never drawn have no score"),
    (r"seed|prompts.*|iterations", "the record holds the prompts and samples that were drawn, and no others"),
    (r"curriculum\.per_rank", "the record holds the levels as the processes kept them"),
    (r"algorithm\.objective\.kl", "the KL was recorded as the run computed it"),
    (r"algorithm(\..*)?|plan(\..*)?", "the log-probabilities are those of the steps that were taken"),
    (r"(model|trainable|optimizer|network|lr_schedule)(\..*)?|max_grad_norm", "no network is there to ask again"),
    (r"inner_epochs|updates_per_iteration|(update_)?micro_batch", "the optimizer steps were made as they were"),
    (r"reward(\..*)?", "images are not scored again"),
)


def changed(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of a record with `key=value` overrides; the record's stays as it is.

    A curriculum chosen by name keeps the record's numbers of prompts and alpha; an advantage is as its file has it.

    Raises:
        ConfigError: an unknown key, a value that does not fit, or one that no record can answer for.
    """
    groups, keys = [], []
    for text in overrides:
        key, value = _parsed(text)
        if key in _GROUPS and isinstance(value, str):
            groups.append((key, text))
        else:
            keys.append((key, value, text))
    chosen = copy.deepcopy(config)
    for group, text in groups:  # before the keys, wherever they stand, as on the command line of a run
        _choose(chosen, group, text)
    values = copy.deepcopy(chosen)
    for key, value, text in keys:
        _refuse(values, key, text)
        _put(values, key.split("."), value)
    check_like(*({name: own[name] for name in _SECTIONS} for own in (values, _widened(chosen))))
    _check_recorded(config, values)
    return values


def differing(before: Any, after: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ: (before, after), None where one side lacks the key."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in before | after:
            found |= differing(before.get(key), after.get(key), f"{prefix}{key}.")
        return found
    return {} if before == after else {prefix.removesuffix("."): (before, after)}


def _parsed(text: str) -> tuple[str, Any]:
    try:
        parsed = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(f"{text}: {error}") from error
    if parsed.type is not OverrideType.CHANGE or parsed.package is not None or parsed.is_sweep_override():
        raise ConfigError(f"{text}: changes are written key=value")
    return parsed.key_or_group, parsed.value()


def _choose(values: dict[str, Any], group: str, text: str) -> None:
    option = read_settings([text]).values
    for section in _GROUPS[group]:
        kept = {key: values[section][key] for key in _KEPT if key in option[section] and key in values[section]}
        values[section] = option[section] | (kept if section == "curriculum" else {})


def _refuse(values: dict[str, Any], key: str, text: str) -> None:
    known = [*_GROUPS, *_dotted(values)]
    if key not in known and not re.fullmatch(r"reward\.[^.]+\.weights\..+", key):
        raise ConfigError(f"unknown key {key!r}{nearest(key, known)}")
    if not _FREE.fullmatch(key):
        reasons = (why for pattern, why in _REASONS if re.fullmatch(pattern, key))
        reason = next(reasons, "nothing that was recorded depends on it")
        raise ConfigError(f"{text}: {key} cannot be replayed: {reason}. What can be changed: {_SHOWN}")


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        values = values[name]
    values[path[-1]] = value


def _check_recorded(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Refuse what needs more than was recorded."""
    own, other = (values["algorithm"]["objective"]["kl_weight"] for values in (before, after))
    if not own and other:
        raise ConfigError(
            f"algorithm.objective.kl_weight={other}: cannot be replayed: the run had no KL to record, its weight was 0"
        )
    chosen, candidates = after["curriculum"]["chosen"], before["curriculum"].get("candidates")
    if chosen > (candidates or before["curriculum"]["chosen"]):
        raise ConfigError(f"curriculum.chosen={chosen}: the record has only {candidates} candidates")
    if candidates is None and "candidates" in after["curriculum"]:
        raise ConfigError(
            "curriculum: cannot be replayed: the run took its prompts as they came, so no candidate was scored; "
            "record a run with a curriculum that scores them"
        )


def _dotted(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Every dotted key, sections included."""
    keys = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        keys += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return keys


def _widened(values: Any) -> Any:
    """The same with numbers where 1 may have been written for 1.0, so that 0.5 fits there, too."""
    if isinstance(values, dict):
        return {key: child if key in ("candidates", "chosen") else _widened(child) for key, child in values.items()}
    return float(values) if isinstance(values, int) and not isinstance(values, bool) else values
