"""Reference curves: held-out reward at some iterations with the band in which a new seed is expected to lie.

One JSON file per shipped experiment that has one, `references/<experiment>.json`. What it holds:

- `experiment`, `metric`: what was run, and which figure of metrics.jsonl the curve is.
- `points`: for each iteration `mean`, `low`, `high` and the `values` of the seeds.
- `seeds`, `confidence`, `rounding`, `band`: the runs behind it, and how the band comes from them.
- `hardware`, `versions`, `commit`, `date`: where the numbers come from.
- `settings`: dotted keys and values for which it holds.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from adagrpo_train.errors import ConfigError
from adagrpo_train.reports.costs import machine
from adagrpo_train.reports.rows import Records, points, read_records
from adagrpo_train.reports.settings_held import differences, held_settings, read_config

FOLDER = Path(__file__).parent / "references"
METRIC = "eval/total"
FEWEST_RUNS = 3
_KEYS = ("experiment", "metric", "points", "seeds", "confidence", "band", "hardware", "commit", "date", "settings")
Outcome = Literal["passed", "failed", "unfinished", "incomparable", "no reference"]


@dataclass(frozen=True)
class Point:
    """One iteration of a reference curve, and what a run has there; None where it has nothing yet."""

    iteration: int
    mean: float
    low: float
    high: float
    value: float | None

    @property
    def side(self) -> str:
        """Where the run lies: inside, below, above, or not recorded."""
        if self.value is None:
            return "not recorded"
        return "inside" if self.low <= self.value <= self.high else "below" if self.value < self.low else "above"


@dataclass(frozen=True)
class Verdict:
    """Whether a run follows a reference. Only "passed" is a pass.

    Attributes:
        text: the outcome in a sentence.
        points: empty where there is nothing to compare.
        differing: settings that make the run another one.
        reference: the file's content; {} without one.
    """

    outcome: Outcome
    text: str
    points: Sequence[Point]
    differing: Sequence[str]
    reference: dict[str, Any]


def judge(records: Records, reference: Path | None = None) -> Verdict:
    """Compare a run with a reference file, or with the one shipped for its experiment.

    Raises:
        ConfigError: there is no such file, it is no reference, or the folder is not that of a run.
    """
    if reference is None:
        name = records.choices.get("experiment", "None")
        reference = FOLDER / f"{name}.json"
        if name == "None" or not reference.is_file():
            return _without(name)
    known = read_reference(reference)
    differing = differences(known["settings"], read_config(records.run_dir))
    if differing:
        count = "one setting is" if len(differing) == 1 else f"{len(differing)} settings are"
        text = f"Not comparable: {count} not as in the reference for {known['experiment']}."
        return Verdict("incomparable", text, [], differing, known)
    values = {int(x): y for x, y in points(records.evaluations, known["metric"])}
    compared = [
        Point(point["iteration"], point["mean"], point["low"], point["high"], values.get(point["iteration"]))
        for point in known["points"]
    ]
    return _verdict(compared, known)


def _without(name: str) -> Verdict:
    what = "a run without a shipped experiment" if name == "None" else f"experiment={name}"
    return Verdict("no reference", f"No reference recorded for {what}.", [], [], {})


def _verdict(compared: Sequence[Point], known: dict[str, Any]) -> Verdict:
    outside = [point for point in compared if point.side in ("below", "above")]
    absent = [point for point in compared if point.value is None]
    where = f"the band of {known['experiment']} ({len(known['seeds'])} seeds)"
    if outside:
        places = ", ".join(f"{point.side} at iteration {point.iteration}" for point in outside)
        return Verdict("failed", f"The run leaves {where}: {places}.", compared, [], known)
    if absent:
        places = ", ".join(str(point.iteration) for point in absent)
        text = f"Not decided: the run has no held-out reward at iteration {places} yet."
        return Verdict("unfinished", text, compared, [], known)
    return Verdict("passed", f"The run lies inside {where} at all {len(compared)} points.", compared, [], known)


def read_reference(path: Path) -> dict[str, Any]:
    """What a reference file holds.

    Raises:
        ConfigError: there is no such file, or it is no reference.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    missing = [key for key in _KEYS if key not in known] if isinstance(known, dict) else list(_KEYS)
    if missing:
        raise ConfigError(f"{path}: not a reference; it lacks {', '.join(missing)}")
    if not known["points"]:
        raise ConfigError(f"{path}: not a reference; without a point every run would pass")
    _check_points(known["points"], path)
    return known


def _check_points(held: Any, path: Path) -> None:
    if not isinstance(held, list):
        raise ConfigError(f"{path}: not a reference; its points are no list")
    for number, point in enumerate(held, start=1):
        own = point if isinstance(point, dict) else {}
        faults = [key for key in ("iteration", "mean", "low", "high") if not isinstance(own.get(key), int | float)]
        if faults:
            raise ConfigError(f"{path}: not a reference; its point {number} has no number as {', '.join(faults)}")


def make_reference(run_dirs: Sequence[Path], *, confidence: float, rounding: float) -> dict[str, Any]:
    """A reference from finished runs of one experiment that differ in their seed alone.

    Args:
        confidence: with which a new seed lies inside the band at all points together.
        rounding: added on either side for other processors and library versions, in units of the reward.

    Raises:
        ConfigError: too few runs, an unfinished one, equal seeds, or settings that differ.
    """
    if len(run_dirs) < FEWEST_RUNS:
        raise ConfigError(f"{len(run_dirs)} runs: a band takes {FEWEST_RUNS} seeds at least")
    runs = [read_records(run_dir) for run_dir in run_dirs]
    configs = [read_config(run_dir) for run_dir in run_dirs]
    held = held_settings(configs[0])
    for run, config in zip(runs, configs, strict=True):
        _check(run, differences(held, config))
    seeds = [config["seed"] for config in configs]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds {seeds}: each must be another one")
    curves = [dict(points(run.evaluations, METRIC)) for run in runs]
    if any(curve.keys() != curves[0].keys() for curve in curves):
        raise ConfigError(f"the runs have {METRIC} at different iterations")
    if not curves[0]:
        raise ConfigError(f"no run has {METRIC} in its metrics.jsonl: there is nothing to make a band of")
    environments = [run.environment for run in runs]
    return {
        "experiment": runs[0].choices.get("experiment", "None"),
        "metric": METRIC,
        "points": [
            _point(int(iteration), [curve[iteration] for curve in curves], confidence, rounding, len(curves[0]))
            for iteration in curves[0]
        ],
        "seeds": seeds,
        "confidence": confidence,
        "rounding": rounding,
        "band": _band_in_words(len(seeds), len(curves[0]), confidence, rounding),
        "hardware": {name: _each(environments, name) for name, _ in machine(environments[0])},
        "versions": {name: _each(environments, name) for name in ("torch", "diffusers", "adagrpo-train")},
        "commit": _each(environments, "commit"),
        "date": datetime.now(UTC).date().isoformat(),
        "settings": held,
    }


def _each(environments: Sequence[dict[str, Any]], name: str) -> str:
    """What the runs say under a name; several values stand beside each other."""
    return ", ".join(dict.fromkeys(own.get(name, "unknown") for own in environments))


def _band_in_words(seeds: int, count: int, confidence: float, rounding: float) -> str:
    return (
        f"mean over {seeds} seeds, plus and minus a prediction interval for one new seed (Student's t with {seeds - 1} "
        f"degrees of freedom, times the standard deviation and sqrt(1 + 1/{seeds})) that holds with {confidence:.0%} "
        f"at all {count} points together (Bonferroni), plus {rounding:g} for rounding on other processors and library "
        "versions"
    )


def _check(run: Records, differing: Sequence[str]) -> None:
    if not run.summary:
        raise ConfigError(f"{run.run_dir}: no summary.json, the run has not come to its end")
    if differing:
        raise ConfigError(f"{run.run_dir} differs from the first run: {'; '.join(differing)}")


def _point(iteration: int, values: Sequence[float], confidence: float, rounding: float, count: int) -> dict[str, Any]:
    """Mean and prediction interval of one of `count` points.

    The interval for one more draw of a normal sample is mean +- t s sqrt(1 + 1/n).
    """
    from scipy.special import stdtrit

    seeds = len(values)
    quantile = float(stdtrit(seeds - 1, 1 - (1 - confidence) / count / 2))
    half = quantile * stdev(values) * math.sqrt(1 + 1 / seeds) + rounding
    middle = fmean(values)
    numbers = {"mean": middle, "low": middle - half, "high": middle + half}
    return {"iteration": iteration} | {k: round(v, 6) for k, v in numbers.items()} | {"values": list(values)}
