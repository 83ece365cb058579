"""The shapes task: grammar, split, drawing and verifier."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from rewards.shapes.draw import BACKGROUND, RGB, draw, paint
from rewards.shapes.grammar import (
    CLASSES,
    COLOURS,
    MAX_OBJECTS,
    SHAPES,
    WORDS,
    Group,
    Scene,
    all_pairs,
    caption,
    difficulty_class,
    enumerate_scenes,
    parse_caption,
    split,
    subsample,
)
from rewards.shapes.verifier import score

PROMPTS = Path(__file__).parents[2] / "adagrpo_train" / "assets" / "prompts"
PER_CLASS = 60

Image = np.ndarray


@lru_cache(maxsize=1)
def drawings() -> dict[str, list[tuple[str, Image]]]:
    """Returns seeded pictures with their captions for every class."""
    rng = np.random.default_rng(3)
    out: dict[str, list[tuple[str, Image]]] = {}
    for name in CLASSES:
        scenes = [scene for scene in enumerate_scenes() if difficulty_class(scene) == name]
        chosen = [scenes[int(index)] for index in rng.integers(len(scenes), size=PER_CLASS)]
        out[name] = [(caption(scene), draw(scene, rng)) for scene in chosen]
    return out


def picture(text: str, seed: int = 0) -> Image:
    return draw(parse_caption(text), np.random.default_rng(seed))


def means(texts: list[str], images: list[Image]) -> tuple[float, float]:
    results = [score(image, text) for image, text in zip(images, texts, strict=True)]
    smooth = float(np.mean([result.smooth for result in results]))
    return smooth, float(np.mean([result.strict for result in results]))


# ---------------------------------------------------------------- grammar


def test_every_scene_round_trips_and_is_unique() -> None:
    scenes = enumerate_scenes()
    captions = [caption(scene) for scene in scenes]
    assert len(set(captions)) == len(scenes) == 8046
    assert [parse_caption(text) for text in captions] == list(scenes)
    assert set(" ".join(captions).split()) == set(WORDS)
    assert max(sum(group.count for group in scene.groups) for scene in scenes) == MAX_OBJECTS


def test_class_sizes() -> None:
    sizes = Counter(difficulty_class(scene) for scene in enumerate_scenes())
    assert sizes == {
        "one": 18, "count": 36, "size": 36, "pair": 306, "relation": 1224, "mixed": 1530, "three": 4896
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a red circle", "one"),
        ("three blue squares", "count"),
        ("a large red circle", "size"),
        ("a red circle and a green square", "pair"),
        ("a red circle right of a green square", "relation"),
        ("a red circle and three blue squares", "mixed"),
        ("a red circle and a green square and a blue triangle", "three"),
    ],
)
def test_difficulty_class(text: str, name: str) -> None:
    assert difficulty_class(parse_caption(text)) == name


def test_parsing_ignores_case_and_blanks() -> None:
    assert parse_caption("  A Red   CIRCLE ") == Scene((Group(1, "red", "circle"),))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "red circle",
        "a red",
        "a circle",
        "a orange circle",
        "a red hexagon",
        "a red circles",
        "two red circle",
        "four red circles",
        "two small red circles",
        "a small red circle and a blue square",
        "a red circle and a small blue square",
        "a red circle and",
        "a red circle and a red circle",
        "a red circle under a blue square",
        "a red circle left a blue square",
        "two red circles above a blue square",
        "three red circles and two blue squares",
        "a red circle above a blue square and a green square",
        "a red circle and a blue square above a green square",
        "two red circles and a blue square and a green square",
        "a red circle a blue square",
        "a red circle, a blue square",
    ],
)
def test_text_outside_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a shapes caption"):
        parse_caption(text)


@pytest.mark.parametrize(
    "arguments",
    [
        {"groups": ()},
        {"groups": (Group(1, "red", "circle"),), "size": "huge"},
        {"groups": (Group(2, "red", "circle"),), "size": "small"},
        {"groups": (Group(1, "red", "circle"),), "relation": "above"},
        {"groups": (Group(3, "red", "circle"), Group(2, "blue", "circle"))},
    ],
)
def test_invalid_scenes_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError):
        Scene(**arguments)


# ---------------------------------------------------------------- split


def test_split_partitions_the_grammar() -> None:
    parts = split()
    assert set(parts.train).isdisjoint(parts.heldout)
    assert set(parts.train) | set(parts.heldout) == set(enumerate_scenes())
    for scenes in (parts.train, parts.heldout):
        assert {difficulty_class(scene) for scene in scenes} == set(CLASSES)


def test_heldout_pairs_never_occur_together_in_training() -> None:
    parts = split()
    assert len(all_pairs()) == 153
    assert len(parts.heldout_pairs) == 31
    for scene in parts.train:
        kinds = sorted(f"{group.colour} {group.shape}" for group in scene.groups)
        for i, first in enumerate(kinds):
            for second in kinds[i + 1 :]:
                assert frozenset((first, second)) not in parts.heldout_pairs
    for scene in parts.heldout:
        if len(scene.groups) > 1:
            assert scene.pairs & parts.heldout_pairs


def test_every_kind_still_occurs_in_training_and_some_single_captions_are_held_out() -> None:
    parts = split()
    kinds = {kind for scene in parts.train for kind in scene.kinds}
    assert len(kinds) == len(COLOURS) * len(SHAPES)
    held = Counter(difficulty_class(scene) for scene in parts.heldout)
    assert (held["one"], held["count"], held["size"]) == (3, 6, 6)


def test_split_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "import hashlib; from rewards.shapes.grammar import *;"
        "print(hashlib.sha256('|'.join(map(caption, split().train)).encode()).hexdigest())"
    )
    root = Path(__file__).parents[2]
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            cwd=root, capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(digests) == 1


def test_subsample_keeps_small_classes_and_caps_large_ones() -> None:
    chosen = subsample(split().train, per_class=20)
    assert Counter(map(difficulty_class, chosen)) == {name: 15 if name == "one" else 20 for name in CLASSES}
    assert chosen == subsample(split().train, per_class=20)


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_prompt_files_match_the_split(part: str) -> None:
    allowed = set(getattr(split(), part))
    rows = [json.loads(line) for line in (PROMPTS / f"shapes_{part}.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        scene = parse_caption(row["prompt"])
        assert scene in allowed
        assert row["class"] == difficulty_class(scene)
    assert {row["class"] for row in rows} == set(CLASSES)


def test_rewards_import_neither_the_trainer_nor_torch() -> None:
    code = (
        "import sys, rewards.shapes.grammar, rewards.shapes.draw, rewards.shapes.verifier;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'adagrpo_train')))"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, env={"PYTHONPATH": str(root)}, check=True)


# ---------------------------------------------------------------- verifier


@pytest.mark.parametrize("name", CLASSES)
def test_right_drawings_score_high(name: str) -> None:
    texts, images = zip(*drawings()[name], strict=True)
    smooth, strict = means(list(texts), list(images))
    assert smooth > 0.9
    assert strict >= 0.97


@pytest.mark.parametrize("name", CLASSES)
def test_other_captions_of_the_class_score_low(name: str) -> None:
    rng = np.random.default_rng(5)
    pool = [caption(scene) for scene in enumerate_scenes() if difficulty_class(scene) == name]
    texts, images = [], []
    for text, image in drawings()[name]:
        other = pool[int(rng.integers(len(pool)))]
        if parse_caption(other).groups != parse_caption(text).groups and (
            parse_caption(other).kinds != parse_caption(text).kinds
        ):
            texts.append(other)
            images.append(image)
    smooth, strict = means(texts, images)
    assert smooth < 0.4
    assert strict == 0.0


@pytest.mark.parametrize(
    ("drawn", "asked"),
    [
        ("a blue circle", "a red circle"),  # colour
        ("a purple circle", "a blue circle"),  # neighbouring colour
        ("a cyan circle", "a green circle"),
        ("a red square", "a red circle"),  # shape
        ("a red triangle", "a red square"),
        ("two red circles", "three red circles"),  # count
        ("three red circles", "two red circles"),
        ("two red circles", "a red circle"),
        ("a small red circle", "a large red circle"),  # size
        ("a large red circle", "a small red circle"),
        ("a red circle above a blue square", "a red circle below a blue square"),  # relation
        ("a red circle left of a blue square", "a red circle right of a blue square"),
        ("a blue square left of a red circle", "a red circle left of a blue square"),
        ("a red square and a blue circle", "a red circle and a blue square"),  # binding
        ("two red circles and a blue square", "a red circle and two blue squares"),
        ("a red circle and a blue square", "a red circle and a blue square and a green triangle"),  # missing
        ("a red circle and a blue square and a green triangle", "a red circle and a blue square"),  # surplus
    ],
)
def test_one_wrong_property_costs_clearly(drawn: str, asked: str) -> None:
    images = [picture(drawn, seed) for seed in range(12)]
    right, right_strict = means([drawn] * 12, images)
    wrong, wrong_strict = means([asked] * 12, images)
    assert right_strict > 0.9
    assert wrong_strict == 0.0
    assert wrong < right - 0.2


def test_relation_needs_distance_along_its_axis() -> None:
    canvas = np.full((32, 32, 3), BACKGROUND, np.float32)
    paint(canvas, "red", "circle", centre=(8, 16), radius=5)
    paint(canvas, "blue", "square", centre=(24, 16), radius=5)
    image = canvas.round().astype(np.uint8)
    assert score(image, "a red circle left of a blue square").strict == 1.0
    assert score(image, "a red circle above a blue square").strict == 0.0


@pytest.mark.parametrize("fill", [(0, 0, 0), BACKGROUND, (255, 255, 255), (128, 128, 128), *RGB.values()])
def test_uniform_pictures_score_nothing(fill: tuple[int, int, int]) -> None:
    image = np.full((32, 32, 3), fill, np.uint8)
    for scene in enumerate_scenes()[::67]:
        result = score(image, caption(scene))
        assert result.strict == 0.0
        assert result.smooth < 0.1


def test_noise_scores_nothing() -> None:
    rng = np.random.default_rng(0)
    for scene in enumerate_scenes()[::97]:
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        result = score(image, caption(scene))
        assert result.strict == 0.0
        assert result.smooth < 0.2


def test_bright_background_is_refused() -> None:
    image = picture("a large red circle").astype(np.float32)
    tinted = np.where((image == BACKGROUND).all(-1, keepdims=True), np.float32([70, 70, 76]), image)
    assert score(tinted.astype(np.uint8), "a large red circle").strict == 0.0


def test_everything_at_once_does_not_pay() -> None:
    canvas = np.full((32, 32, 3), BACKGROUND, np.float32)
    centres = [(x, y) for y in (5, 16, 27) for x in (4, 12, 20, 28)]
    for index, centre in enumerate(centres):
        paint(canvas, COLOURS[index % 6], SHAPES[index % 3], centre=centre, radius=3.6)
    image = canvas.round().astype(np.uint8)
    for scene in enumerate_scenes()[::67]:
        result = score(image, caption(scene))
        assert result.strict == 0.0
        assert result.smooth < 0.45


@pytest.mark.parametrize("other", ["green", "blue", "yellow", "purple"])
def test_two_coloured_object_costs_and_fails(other: str) -> None:
    text = "a large red circle"
    for seed in range(6):
        clean = picture(text, seed)
        ys, xs = np.nonzero((clean == RGB["red"]).all(-1))
        patched = clean.copy()
        half = xs < xs.mean() - 1
        patched[ys[half], xs[half]] = RGB[other]
        before, after = score(clean, text), score(patched, text)
        assert before.strict == 1.0
        assert after.strict == 0.0
        assert after.smooth < before.smooth - 0.2


def test_a_few_off_colour_pixels_are_tolerated() -> None:
    image = picture("a large red circle")
    ys, xs = np.nonzero((image == RGB["red"]).all(-1))
    image[ys[40:44], xs[40:44]] = RGB["yellow"]
    assert score(image, "a large red circle").strict == 1.0


def test_larger_pictures_are_averaged_down() -> None:
    image = picture("a red circle and a blue square")
    large = image.repeat(4, axis=0).repeat(4, axis=1)
    assert score(large, "a red circle and a blue square") == score(image, "a red circle and a blue square")


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 32, 3), np.float32),
        np.zeros((3, 32, 32), np.uint8),
        np.zeros((32, 64, 3), np.uint8),
        np.zeros((40, 40, 3), np.uint8),
        np.zeros((1, 32, 32, 3), np.uint8),
    ],
)
def test_unusable_pictures_are_refused(image: Image) -> None:
    with pytest.raises(ValueError, match="picture"):
        score(image, "a red circle")


def test_drawing_is_reproducible_and_varies() -> None:
    assert (picture("two red circles", 1) == picture("two red circles", 1)).all()
    assert (picture("two red circles", 1) != picture("two red circles", 2)).any()
