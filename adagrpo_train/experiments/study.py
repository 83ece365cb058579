"""What a study is: factors, their levels, seeds, and so its runs."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adagrpo_train.errors import ConfigError
from adagrpo_train.settings import config_dir, nearest

FOLDER = "study"
"""Where studies are, beside the config groups."""


@dataclass(frozen=True)
class Analysis:
    """One thing to be said about the runs; which fields count, its kind decides.

    Attributes:
        kind: "final" compares held-out scores at the end, "curve" draws one over `x`, "equal" compares it where every
            run has spent the same `x`, "training" compares figures of the training itself.
        scores: parts of held-out evaluations, such as total or strict.
        x: iteration, evaluations (of the network, candidates included) or seconds (of training).
        metrics: names in metrics.jsonl, averaged over a run.
        pairs: pairs of such names, compared within the same runs.
        title: a heading.
    """

    kind: str
    title: str = ""
    scores: list[str] = field(default_factory=list)
    x: str = "iteration"
    metrics: list[str] = field(default_factory=list)
    pairs: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """A question, and the runs that are to answer it.

    Attributes:
        question: in words.
        published: what others have found, in words.
        overrides: settings of every run, as on the command line of training.
        factors: factor -> level -> its settings. Every combination of levels is an arm.
        compare: the factor whose levels are compared, within each combination of the other ones.
        against: the level of that factor which the other ones are compared with.
        seeds: runs of each arm, with seed=0, 1, ...
        analyses: what is made of them.
    """

    question: str
    overrides: list[str]
    factors: dict[str, dict[str, list[str]]]
    compare: str
    against: str
    seeds: int
    analyses: list[Analysis]
    published: str = ""


@dataclass(frozen=True)
class Arm:
    """One combination of levels."""

    levels: tuple[tuple[str, str], ...]  # (factor, level), in the order of the factors
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return "-".join(level for _, level in self.levels)

    def level(self, factor: str) -> str:
        return dict(self.levels)[factor]

    def without(self, factor: str) -> tuple[str, ...]:
        """Its levels of the other factors."""
        return tuple(level for name, level in self.levels if name != factor)


@dataclass(frozen=True)
class Run:
    """One training of a study."""

    arm: Arm
    seed: int
    folder: Path

    @property
    def overrides(self) -> list[str]:
        return [*self.arm.overrides, f"seed={self.seed}"]

    @property
    def name(self) -> str:
        return f"{self.arm.name}/seed{self.seed}"


def built_in() -> list[str]:
    """Names of the studies that are shipped."""
    return sorted(path.stem for path in (config_dir() / FOLDER).glob("*.yaml"))


def read_study(name: str, *, overrides: list[str], seeds: int | None) -> Study:
    """A study by its name, or from a YAML file of its form.

    Args:
        overrides: settings of every run, after those of the study and of its levels' factors.
        seeds: instead of the study's own number.

    Raises:
        ConfigError: no such study, an unknown key, or levels that cannot be compared.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else config_dir() / FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{name}: no such study{nearest(name, built_in())}; there are {', '.join(built_in())}, or give a YAML file"
        )
    try:
        loaded = OmegaConf.merge(OmegaConf.structured(Study), OmegaConf.load(path))
        values: Any = OmegaConf.to_object(loaded)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    study = Study(
        **{
            **vars(values),
            "overrides": [*values.overrides, *overrides],
            "seeds": values.seeds if seeds is None else seeds,
        }
    )
    _check(study, path)
    return study


def _check(study: Study, path: Path) -> None:
    if study.seeds < 1:
        raise ConfigError(f"{path}: seeds={study.seeds} must be >= 1")
    if study.compare not in study.factors:
        raise ConfigError(f"{path}: compare={study.compare} is no factor; choose one of {', '.join(study.factors)}")
    levels = list(study.factors[study.compare])
    if study.against not in levels:
        raise ConfigError(f"{path}: against={study.against} is no level of {study.compare}: {', '.join(levels)}")
    _check_names(study, path)
    for analysis in study.analyses:
        if analysis.kind not in ("final", "curve", "equal", "training"):
            raise ConfigError(f"{path}: kind={analysis.kind}: choose final, curve, equal or training")
        if any(len(pair) != 2 for pair in analysis.pairs):
            raise ConfigError(f"{path}: pairs={analysis.pairs}: each needs two names of metrics")
        if analysis.x not in ("iteration", "evaluations", "seconds"):
            raise ConfigError(f"{path}: x={analysis.x}: choose iteration, evaluations or seconds")


def _check_names(study: Study, path: Path) -> None:
    """Levels name folders, and two arms in one folder would be taken for the same runs."""
    for factor, levels in study.factors.items():
        odd = [level for level in levels if not re.fullmatch(r"\w[\w.+-]*", level)]
        if odd:
            raise ConfigError(f"{path}: level {odd[0]!r} of {factor} names a folder; use letters, digits and _ . + -")
    count = Counter(arm.name for arm in arms(study))
    if max(count.values(), default=0) > 1:
        raise ConfigError(f"{path}: two arms are called {max(count, key=lambda name: count[name])}; rename a level")


def arms(study: Study) -> list[Arm]:
    """Every combination of levels; the first factor varies slowest."""
    combinations = product(*(levels.items() for levels in study.factors.values()))
    return [
        Arm(
            levels=tuple((factor, level) for factor, (level, _) in zip(study.factors, combination, strict=True)),
            overrides=(*study.overrides, *(text for _, texts in combination for text in texts)),
        )
        for combination in combinations
    ]


def runs(study: Study, folder: Path) -> list[Run]:
    """All runs of a study, seed by seed, so that a study that is not finished is balanced."""
    return [
        Run(arm, seed, folder / "runs" / arm.name / f"seed{seed}") for seed in range(study.seeds) for arm in arms(study)
    ]


def as_values(study: Study) -> Mapping[str, Any]:
    """Plain containers, to be written down and compared."""
    container: Any = OmegaConf.to_container(OmegaConf.structured(study))
    return container
