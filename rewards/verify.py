"""`adagrpo-rewards verify NAME...`: does a reward score here as where its scores were recorded?

Scores four bundled pictures with the checkpoint that the settings name. Recorded scores come with this package for the
rewards that its authors had the weights of. The others are unrecorded: the first scores on this machine are recorded
then, and later ones compared with them, which tells of changes and not whether the first were right.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rewards import registry
from rewards.contract import ItemError, Reward, RewardInfo, Sample

_ASSETS = Path(__file__).parent / "assets" / "verify"
_SHIPPED = _ASSETS / "recorded.json"
_LIBRARIES = ("torch", "transformers", "open_clip_torch", "torchvision", "numpy", "pillow", "scipy")
_ROUNDING = 1e-4  # of other processors and library versions, relative for scores above 1


def main(arguments: list[str] | None = None) -> int:
    """Print what was found. Returns 1 if scores differ from the recorded ones, 2 if there are none to compare."""
    options = _parse(arguments)
    try:
        return max(_verify(name, options) for name in options.names)
    except (OSError, ValueError, TypeError, LookupError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def record_of(reward: Reward, device: str) -> dict[str, Any]:
    """What to record of a loaded reward: scores of the bundled pictures, or why it refuses one, and what gave them.

    Raises:
        ValueError: it refuses all, or a score is no finite number.
    """
    scores: list[dict[str, float] | str] = []
    for sample in samples(reward.info):
        try:
            (score,) = reward.score([sample])
            scores.append(_finite({metric: float(score[metric]) for metric in reward.info.metrics}))
        except ItemError as error:
            scores.append(str(error))
    if not any(isinstance(score, dict) for score in scores):
        raise ValueError(f"it refuses every picture: {scores[0]}")
    libraries = {name: found for name in _LIBRARIES if (found := _version(name))}
    return {"scores": scores, "fingerprint": reward.fingerprint(), "device": device, "libraries": libraries}


def samples(info: RewardInfo) -> list[Sample]:
    """The bundled pictures, each with a prompt that the reward accepts."""
    made = []
    for number, file in enumerate(sorted(_ASSETS.glob("*.png"))):
        with Image.open(file) as picture:
            image = np.asarray(picture.convert("RGB"))
        made.append(Sample(file.stem, info.example_prompts[number % len(info.example_prompts)], image))
    return made


def recorded(name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What this package has recorded of a reward with these settings, or with defaults that say the same."""
    defaults = registry.default_settings(name)
    for key, record in _read(_SHIPPED).items():
        other, _, text = key.partition(" ")
        if other == name and defaults | json.loads(text) == {**defaults, **settings}:
            return record
    return None


def differences(recorded: list[Any], found: list[Any], tolerance: float) -> list[str]:
    """Where scores are not the recorded ones, in words."""
    if len(recorded) != len(found):
        return [f"{len(found)} pictures, recorded were {len(recorded)}"]
    texts = []
    for number, (old, new) in enumerate(zip(recorded, found, strict=True)):
        if isinstance(old, str) or isinstance(new, str):
            same = old == new
        else:
            # Written so that NaN is different from everything.
            same = old.keys() == new.keys() and all(
                abs(new[name] - value) <= max(tolerance, _ROUNDING * max(1.0, abs(value)))
                for name, value in old.items()
            )
        if not same:
            texts.append(f"picture {number}: {new}, recorded {old}")
    return texts


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="adagrpo-rewards verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help=f"of {', '.join(registry.names())}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--settings", type=registry.json_object, default={}, metavar="JSON", help="of every NAME")
    parser.add_argument(
        "--record",
        action="store_true",
        help="replace scores recorded here, not the package's",
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument(
        "--file", type=Path, default=cache / "adagrpo-rewards" / "recorded.json", help="of what is recorded here"
    )
    return parser.parse_args(arguments)


def _verify(name: str, options: argparse.Namespace) -> int:
    key = f"{name} {json.dumps(options.settings, sort_keys=True)}"
    shipped, own = _read(_SHIPPED), _read(options.file)
    reward = registry.make(name, options.settings)
    try:
        reward.load(options.device)
        found, tolerance = record_of(reward, options.device), reward.info.tolerance
    except Exception as error:  # noqa: BLE001 - whatever a plug-in raises is told to whoever asked
        known = "recorded" if key in shipped | own else "UNRECORDED"
        sys.stderr.write(f"{name}: {known}, and not to be had here: {type(error).__name__}: {error}\n")
        return 2
    reward.close()
    if key not in shipped and (options.record or key not in own):
        _write(options.file, own | {key: found})
        what = "recorded anew:" if key in own else "UNRECORDED so far: no scores of this checkpoint to compare with"
        sys.stdout.write(
            f"{name}: {what} {found['scores']}\n"
            f"  {found['fingerprint']}\n"
            f"  Now recorded in {options.file}, for later runs. Whether they are right, nothing here can tell.\n"
        )
        return 0
    recorded, place = (shipped[key], "this package") if key in shipped else (own[key], options.file)
    wrong = differences(recorded["scores"], found["scores"], tolerance)
    sys.stdout.write(f"{name}: {'DIFFERENT from' if wrong else 'as'} recorded in {place}: {found['scores']}\n")
    sys.stdout.write("".join(f"  {text}\n" for text in wrong))
    for what in ("fingerprint", "device", "libraries"):
        if recorded[what] != found[what]:
            sys.stdout.write(f"  {what} here: {found[what]}\n  {what} recorded: {recorded[what]}\n")
    return int(bool(wrong))


def _finite(score: dict[str, float]) -> dict[str, float]:
    if not all(math.isfinite(value) for value in score.values()):
        raise ValueError(f"a score is no finite number: {score}")
    return score


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"--file {file}: cannot be read ({error}); delete it to record anew") from error


def _write(file: Path, records: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(".new")
    half.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    half.replace(file)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
