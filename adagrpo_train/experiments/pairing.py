"""Whether the arms that a study compares are looked at on the same images and in the same units."""

from collections.abc import Mapping
from typing import Any

from adagrpo_train.errors import ConfigError
from adagrpo_train.experiments.study import Arm, Study

_IMAGES = ("prompts.evaluation_path", "evaluation.images", "evaluation.seed", "model.resolution")
"""Keys that decide which prompts and which noise the held-out images are drawn from."""


def check_pairs(study: Study, values: Mapping[Arm, Mapping[str, Any]]) -> None:
    """Refuse a study that would compare scores of other images, or totals of other rewards.

    Args:
        values: the resolved settings of each arm.

    Raises:
        ConfigError: names two arms and what differs.
    """
    scores = {score for analysis in study.analyses for score in analysis.scores}
    if not scores:
        return
    first: dict[tuple[str, ...], Arm] = {}
    for arm, own in values.items():
        other = first.setdefault(arm.without(study.compare), arm)
        differing = [key for key in _IMAGES if _value(own, key) != _value(values[other], key)]
        if differing:
            raise ConfigError(
                f"arms {other.name} and {arm.name} differ in {differing[0]}: their held-out images cannot be paired; "
                f"make it a factor of its own beside {study.compare}"
            )
        if "total" in scores and _total(own) != _total(values[other]):
            raise ConfigError(
                f"arms {other.name} and {arm.name} have other rewards, weights or scales in their total, which says "
                "nothing when it is compared; leave total out of scores and name parts that both have"
            )


def _value(values: Mapping[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return values[section][name]


def _total(values: Mapping[str, Any]) -> Any:
    """What the total is made of."""
    trained = {
        name: (own["weights"], own["required"]) for name, own in values["reward"].items() if own["role"] == "train"
    }
    return trained, values["scoring"]["scale"]
