"""`python -m rewards.check NAME`: does a reward keep the contract?

Runs on random pictures and says of every rule whether it holds.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from rewards import registry
from rewards.contract import ItemError, Reward, Sample

Scores = list[dict[str, float]]


class BrokenRuleError(AssertionError):
    """A rule of the contract does not hold; the message says how."""


def scores_every_image(reward: Reward, batch: list[Sample]) -> None:
    """As many scores as images, each with every metric, each a finite number."""
    _score(reward, batch)
    _score(reward, batch[:1])


def is_deterministic(reward: Reward, batch: list[Sample]) -> None:
    """The same batch twice gives the same scores."""
    _compare(_score(reward, batch), _score(reward, batch), 0.0, "the second time")


def does_not_mind_the_batch(reward: Reward, batch: list[Sample]) -> None:
    """An image alone scores as in a batch, within the stated tolerance."""
    alone = [_score(reward, [sample])[0] for sample in batch]
    _compare(_score(reward, batch), alone, reward.info.tolerance, "alone")


def does_not_mind_the_order(reward: Reward, batch: list[Sample]) -> None:
    """A permuted batch gives the permuted scores, within the stated tolerance."""
    order = np.random.default_rng(1).permutation(len(batch))
    permuted = _score(reward, [batch[n] for n in order])
    back = [permuted[int(np.argwhere(order == n)[0, 0])] for n in range(len(batch))]
    _compare(_score(reward, batch), back, reward.info.tolerance, "in another order")


def takes_or_refuses_odd_sizes(reward: Reward, batch: list[Sample]) -> None:
    """Pictures that are neither square nor a multiple of anything are scored, or refused by ItemError."""
    for size in ((33, 47), (64, 17), (224, 224), (224, 100)):
        with suppress(ItemError):
            _score(reward, [_picture(0, batch[0].prompt, size)])


def takes_or_refuses_an_empty_prompt(reward: Reward, batch: list[Sample]) -> None:
    """An empty prompt is scored, or refused by ItemError."""
    with suppress(ItemError):
        _score(reward, [_picture(0, "", batch[0].image.shape[:2])])


def stays_in_its_range(reward: Reward, batch: list[Sample]) -> None:
    """The first metric lies in the range that the reward states."""
    if reward.info.value_range is None:
        return
    low, high = reward.info.value_range
    for score in _score(reward, batch):
        value = score[reward.info.metrics[0]]
        if not low <= value <= high:
            raise BrokenRuleError(f"{value} is not in [{low}, {high}]")


def leaves_the_images_alone(reward: Reward, batch: list[Sample]) -> None:
    """Scoring does not write into the images."""
    before = [sample.image.copy() for sample in batch]
    _score(reward, batch)
    if not all(np.array_equal(old, sample.image) for old, sample in zip(before, batch, strict=True)):
        raise BrokenRuleError("an image was changed")


def has_a_fingerprint(reward: Reward, batch: list[Sample]) -> None:
    """The fingerprint is a text that stays the same."""
    text = reward.fingerprint()
    if not isinstance(text, str) or not text or text != reward.fingerprint():
        raise BrokenRuleError(f"the fingerprint is {text!r}, then {reward.fingerprint()!r}")


RULES: tuple[Callable[[Reward, list[Sample]], None], ...] = (
    scores_every_image,
    is_deterministic,
    does_not_mind_the_batch,
    does_not_mind_the_order,
    takes_or_refuses_odd_sizes,
    takes_or_refuses_an_empty_prompt,
    stays_in_its_range,
    leaves_the_images_alone,
    has_a_fingerprint,
)


def check(reward: Reward) -> dict[str, str]:
    """The fault of every rule of `RULES`, "" where it holds. The reward is loaded already."""
    prompts = reward.info.example_prompts
    batch = [_picture(n, prompts[n % len(prompts)], (64, 64)) for n in range(2 * len(prompts) + 1)]
    faults = {}
    for rule in RULES:
        if reward.info.groupwise and rule is does_not_mind_the_batch:
            continue  # it compares the images of a group: alone, one scores differently
        try:
            rule(reward, batch)
        except Exception as error:  # noqa: BLE001 - the plug-in under test may raise anything
            faults[rule.__name__] = f"{type(error).__name__}: {error}"
        else:
            faults[rule.__name__] = ""
    return faults


def main(arguments: list[str] | None = None) -> int:
    """Print a line per rule. Returns 0 if all hold, 1 if not, 2 if the reward cannot be made or loaded."""
    parser = argparse.ArgumentParser(
        prog="python -m rewards.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(registry.names())}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--settings", type=registry.json_object, default={}, metavar="JSON", help="of the reward, as a JSON object"
    )
    options = parser.parse_args(arguments)
    try:
        reward = registry.make(options.name, options.settings)
    except (ValueError, TypeError, LookupError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    try:
        reward.load(options.device)
    except Exception as error:  # noqa: BLE001 - whatever loading raises is told to whoever asked
        sys.stderr.write(f"error: {options.name} cannot be loaded: {type(error).__name__}: {error}\n")
        return 2
    faults = check(reward)
    reward.close()
    for rule, fault in faults.items():
        sys.stdout.write(f"{'FAILED' if fault else 'ok    '}  {rule.replace('_', ' ')}{': ' if fault else ''}{fault}\n")
    return 1 if any(faults.values()) else 0


def _picture(number: int, prompt: str, size: Sequence[int]) -> Sample:
    """Soft random blobs: unlike noise, they survive resizing."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    rows, columns = np.arange(size[0]) * 4 // size[0], np.arange(size[1]) * 4 // size[1]
    return Sample(str(number), prompt, coarse[rows][:, columns], group=prompt)


def _score(reward: Reward, batch: list[Sample]) -> Scores:
    scores = [dict(score) for score in reward.score(batch)]
    if len(scores) != len(batch):
        raise BrokenRuleError(f"{len(scores)} scores for {len(batch)} images")
    for score in scores:
        if set(score) != set(reward.info.metrics):
            raise BrokenRuleError(f"a score has the metrics {sorted(score)}, stated are {sorted(reward.info.metrics)}")
        if not all(isinstance(value, float) and math.isfinite(value) for value in score.values()):
            raise BrokenRuleError(f"a score is not of finite floats: {score}")
    return scores


def _compare(expected: Scores, found: Scores, tolerance: float, how: str) -> None:
    for number, (first, second) in enumerate(zip(expected, found, strict=True)):
        for name, value in first.items():
            if abs(value - second[name]) > tolerance:
                raise BrokenRuleError(f"image {number} scores {name}={value}, {how} {second[name]}")


if __name__ == "__main__":
    sys.exit(main())
