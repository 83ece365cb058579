"""The conformance suite: shipped rewards pass it, and every rule catches what it is there for."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from rewards.check import RULES, check, main
from rewards.contract import RewardInfo, Sample
from rewards.jpeg_size import JpegSize


@pytest.mark.parametrize("name", ["shapes", "jpeg_size", "tiny_clip"])
def test_rewards_that_need_no_download_keep_the_contract(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "tiny_clip":
        pytest.importorskip("transformers")
    assert main([name]) == 0
    assert capsys.readouterr().out.count("ok") == len(RULES)


class Breaks(JpegSize):
    """A reward that does one thing wrong."""

    def __init__(self, wrong: Callable[[list[dict[str, float]], Sequence[Sample]], Any]) -> None:
        super().__init__()
        self._wrong = wrong
        self.calls = 0

    def score(self, batch: Sequence[Sample]) -> Any:
        self.calls += 1
        return self._wrong([dict(score) for score in super().score(batch)], batch)


def _count_calls(scores: list[dict[str, float]], batch: Sequence[Sample]) -> list[dict[str, float]]:
    _count_calls.calls += 1  # type: ignore[attr-defined]
    return [{"jpeg_size": score["jpeg_size"] + _count_calls.calls} for score in scores]  # type: ignore[attr-defined]


_count_calls.calls = 0  # type: ignore[attr-defined]


def _write(scores: list[dict[str, float]], batch: Sequence[Sample]) -> list[dict[str, float]]:
    batch[0].image[0, 0] += 1
    return scores


def _square_only(scores: list[dict[str, float]], batch: Sequence[Sample]) -> list[dict[str, float]]:
    np.stack([sample.image for sample in batch]).reshape(len(batch), 64, 64, 3)
    return scores


def _needs_a_prompt(scores: list[dict[str, float]], batch: Sequence[Sample]) -> list[dict[str, float]]:
    return [score for score, sample in zip(scores, batch, strict=True) if sample.prompt[0]]


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (lambda scores, batch: scores[1:], "scores_every_image"),
        (lambda scores, batch: [{"other": 1.0}] * len(batch), "scores_every_image"),
        (lambda scores, batch: [{"jpeg_size": float("nan")}] * len(batch), "scores_every_image"),
        (lambda scores, batch: [{"jpeg_size": 1}] * len(batch), "scores_every_image"),
        (_count_calls, "is_deterministic"),
        (lambda scores, batch: [{"jpeg_size": s["jpeg_size"] / len(batch)} for s in scores], "does_not_mind_the_batch"),
        (lambda scores, batch: [{"jpeg_size": float(n)} for n in range(len(batch))], "does_not_mind_the_order"),
        (_square_only, "takes_or_refuses_odd_sizes"),
        (_needs_a_prompt, "takes_or_refuses_an_empty_prompt"),
        (_write, "leaves_the_images_alone"),
    ],
)
def test_each_rule_catches_its_breach(wrong: Any, rule: str) -> None:
    assert check(Breaks(wrong))[rule]
    assert not any(check(JpegSize()).values())


def test_a_score_outside_the_stated_range_is_caught() -> None:
    class Boastful(JpegSize):
        info = RewardInfo("boastful", ("jpeg_size",), (0.0, 1.0), 8, 0.0, "", "")

    assert check(Boastful())["stays_in_its_range"]


def test_a_changing_fingerprint_is_caught() -> None:
    class Fickle(JpegSize):
        calls = 0

        def fingerprint(self) -> str:
            self.calls += 1
            return str(self.calls)

    assert check(Fickle())["has_a_fingerprint"]


def test_an_unknown_reward_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shape"]) == 2
    assert "did you mean shapes?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        {"metrics": ()},
        {"metrics": ("a", "a")},
        {"max_batch": 0},
        {"tolerance": math.nan},
        {"tolerance": -1.0},
        {"value_range": (1.0, 1.0)},
        {"value_range": (0.0, math.inf)},
    ],
)
def test_what_a_reward_cannot_mean_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(JpegSize.info, **wrong)
