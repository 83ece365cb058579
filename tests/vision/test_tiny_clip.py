"""The bundled CLIP: it tells pictures apart, alike through both libraries, and one by one."""

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from small_models import ROOT, values

from rewards.check import check
from rewards.contract import Sample
from rewards.shapes.draw import draw
from rewards.shapes.grammar import caption, parse_caption, split
from rewards.tiny_clip import ASSETS, TinyClip, tokenize


@pytest.fixture(scope="module")
def reward() -> TinyClip:
    reward = TinyClip()
    reward.load("cpu")
    return reward


def test_it_fits_its_budget() -> None:
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) < 2_000_000


def test_it_keeps_the_contract(reward: TinyClip) -> None:
    assert not any(check(reward).values())


def test_open_clip_and_transformers_give_the_same_scores(reward: TinyClip, open_clip: ModuleType) -> None:
    other = TinyClip(library="open_clip")
    other.load("cpu")
    rng = np.random.default_rng(0)
    scenes = [split().heldout[n] for n in rng.integers(len(split().heldout), size=24)]
    batch = [Sample(str(n), caption(s), draw(scenes[n // 2], rng)) for n, s in enumerate(scenes)]
    np.testing.assert_allclose(values(other.score(batch)), values(reward.score(batch)), rtol=0, atol=1e-6)
    assert other.fingerprint() != reward.fingerprint()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("a red circle", "a blue circle"),
        ("a green square", "a green triangle"),
        ("two cyan squares", "three cyan squares"),
        ("a large yellow circle", "a small yellow circle"),
        ("a red circle above a blue square", "a red circle above a cyan square"),
        ("a red circle and two green squares", "a green circle and two red squares"),
    ],
)
def test_the_right_caption_scores_above_a_wrong_one(right: str, wrong: str, reward: TinyClip) -> None:
    rng = np.random.default_rng(0)
    pictures = [draw(parse_caption(right), rng) for _ in range(20)]
    scores = {text: values(reward.score([Sample("", text, p) for p in pictures])) for text in (right, wrong)}
    assert (scores[right] > scores[wrong]).mean() >= 0.8


def test_a_score_does_not_change_by_a_bit_with_its_batch(reward: TinyClip) -> None:
    rng = np.random.default_rng(1)
    batch = [Sample(str(n), caption(s), draw(s, rng)) for n, s in enumerate(split().heldout[:600:40])]
    fresh = TinyClip()
    fresh.load("cpu")
    assert list(reward.score(batch)) == [fresh.score([sample])[0] for sample in reversed(batch)][::-1]


def test_each_caption_goes_through_the_text_tower_once(
    reward: TinyClip, counted: Callable[[Any, str], list[Any]]
) -> None:
    fresh = TinyClip()
    fresh.load("cpu")
    calls = counted(fresh, "_text_features")
    picture = draw(parse_caption("a red circle"), np.random.default_rng(0))
    fresh.score([Sample(str(n), f"a {'red' if n % 2 else 'blue'} circle", picture) for n in range(10)])
    assert calls == ["a blue circle", "a red circle"]


def test_captions_become_one_token_per_word() -> None:
    assert tokenize(["a Red circle", "", "a cat"], 6) == [
        [1, 2, 7, 13, 26, 0],
        [1, 26, 0, 0, 0, 0],
        [1, 2, 25, 26, 0, 0],
    ]
    assert tokenize(["a " * 30], 6) == [[1, 2, 2, 2, 2, 26]]


@pytest.mark.slow
def test_open_clip_runs_in_a_process_of_its_own(open_clip: ModuleType) -> None:
    """Nothing but the reward itself mends torchvision there."""
    command = [sys.executable, "-m", "rewards.check", "tiny_clip", "--settings", '{"library": "open_clip"}']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
