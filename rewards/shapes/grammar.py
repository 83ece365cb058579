"""Caption grammar of the shapes task: captions, scenes, difficulty classes and the train / held-out split.

A caption names one to three groups of identical objects. Seven classes of captions exist::

    one       a red circle
    count     two blue squares
    size      a small red circle
    pair      a red circle and a green square
    relation  a red circle left of a green square
    mixed     two red circles and a blue square          (at most four objects)
    three     a red circle and a green square and a blue triangle

Everything is deterministic and independent of Python's hash seed and of any random generator's version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations, product

COLOURS: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
NUMBERS: tuple[str, ...] = ("a", "two", "three")
SIZES: tuple[str, ...] = ("small", "large")
RELATIONS: tuple[str, ...] = ("above", "below", "left of", "right of")
CLASSES: tuple[str, ...] = ("one", "count", "size", "pair", "relation", "mixed", "three")
MAX_OBJECTS = 4

#: Every word of the grammar, in the order used to number the tokens of the bundled model.
WORDS: tuple[str, ...] = (
    *NUMBERS,
    *SIZES,
    *COLOURS,
    *(word for shape in SHAPES for word in (shape, shape + "s")),
    "above",
    "below",
    "left",
    "right",
    "of",
    "and",
)

_SPLIT_SALT = "shapes-split-1"
_PAIR_FRACTION = 0.20
_CAPTION_FRACTION = 0.17
_NOUNS: dict[str, tuple[str, bool]] = {shape: (shape, False) for shape in SHAPES} | {
    shape + "s": (shape, True) for shape in SHAPES
}


@dataclass(frozen=True)
class Group:
    """A group of identical objects.

    Attributes:
        count: Number of objects, 1 to 3.
        colour: One of `COLOURS`.
        shape: One of `SHAPES`.
    """

    count: int
    colour: str
    shape: str

    def __post_init__(self) -> None:
        if not 1 <= self.count <= len(NUMBERS):
            raise ValueError(f"a group holds 1 to {len(NUMBERS)} objects, not {self.count}")
        if self.colour not in COLOURS:
            raise ValueError(f"unknown colour {self.colour!r}; known: {', '.join(COLOURS)}")
        if self.shape not in SHAPES:
            raise ValueError(f"unknown shape {self.shape!r}; known: {', '.join(SHAPES)}")

    @property
    def kind(self) -> str:
        """Colour and shape, for example ``"red circle"``."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a caption asks for.

    Attributes:
        groups: One to three groups of distinct kinds, at most `MAX_OBJECTS` objects in all.
        size: One of `SIZES` for a single object, else None.
        relation: Where the first of two single objects lies with respect to the second (one of `RELATIONS`), else
            None.
    """

    groups: tuple[Group, ...]
    size: str | None = None
    relation: str | None = None

    def __post_init__(self) -> None:
        counts = [group.count for group in self.groups]
        if not 1 <= len(counts) <= 3:
            raise ValueError(f"a scene has one to three groups, not {len(counts)}")
        if len({group.kind for group in self.groups}) != len(counts):
            raise ValueError("the groups of a scene must differ in colour or shape")
        if sum(counts) > MAX_OBJECTS:
            raise ValueError(f"a scene has at most {MAX_OBJECTS} objects, not {sum(counts)}")
        if len(counts) == 3 and counts != [1, 1, 1]:
            raise ValueError("three groups must be single objects")
        if self.size is not None and (self.size not in SIZES or counts != [1]):
            raise ValueError(f"size {self.size!r} is only defined as one of {SIZES} for a single object")
        if self.relation is not None and (self.relation not in RELATIONS or counts != [1, 1]):
            raise ValueError(f"relation {self.relation!r} is only defined as one of {RELATIONS} between two objects")

    @property
    def kinds(self) -> frozenset[str]:
        """The set of colour-shape kinds of the scene."""
        return frozenset(group.kind for group in self.groups)

    @property
    def pairs(self) -> frozenset[frozenset[str]]:
        """All unordered pairs of kinds that occur together in the scene (empty for one group)."""
        return frozenset(frozenset(pair) for pair in combinations(sorted(self.kinds), 2))


@dataclass(frozen=True)
class Split:
    """A partition of the grammar.

    Attributes:
        train: Scenes allowed in pretraining and in RL training.
        heldout: Scenes reserved for evaluation.
        heldout_pairs: Pairs of kinds that never occur together in `train`.
    """

    train: tuple[Scene, ...]
    heldout: tuple[Scene, ...]
    heldout_pairs: frozenset[frozenset[str]]


def caption(scene: Scene) -> str:
    """Returns the caption of a scene; the inverse of `parse_caption`."""
    phrases = []
    for group in scene.groups:
        size = f"{scene.size} " if scene.size else ""
        plural = "s" if group.count > 1 else ""
        phrases.append(f"{NUMBERS[group.count - 1]} {size}{group.kind}{plural}")
    return f" {scene.relation or 'and'} ".join(phrases)


@lru_cache(maxsize=65536)
def parse_caption(text: str) -> Scene:
    """Parses a caption.

    Args:
        text: A caption of the grammar; case and repeated blanks do not matter.

    Returns:
        The scene, with ``caption(scene)`` equal to the normalised text.

    Raises:
        ValueError: If the text is not a caption of the grammar.
    """
    words = text.lower().split()
    try:
        return _parse_words(words)
    except ValueError as error:
        raise ValueError(f"not a shapes caption: {text!r}: {error}") from error


def difficulty_class(scene: Scene) -> str:
    """Returns the class of a scene, one of `CLASSES`."""
    if len(scene.groups) == 3:
        return "three"
    if len(scene.groups) == 2:
        if scene.relation is not None:
            return "relation"
        return "pair" if all(group.count == 1 for group in scene.groups) else "mixed"
    if scene.size is not None:
        return "size"
    return "one" if scene.groups[0].count == 1 else "count"


@lru_cache(maxsize=1)
def enumerate_scenes() -> tuple[Scene, ...]:
    """Returns every scene of the grammar exactly once, in a fixed order (by class, then by words)."""
    return tuple(_generate_scenes())


def all_pairs() -> tuple[frozenset[str], ...]:
    """Returns all unordered pairs of distinct colour-shape kinds, in a fixed order."""
    kinds = [f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES)]
    return tuple(frozenset(pair) for pair in combinations(kinds, 2))


@lru_cache(maxsize=1)
def split() -> Split:
    """Returns the fixed train / held-out split.

    A fifth of the pairs of kinds is held out: no scene with such a pair, of any class, is a training scene. Of the
    scenes with a single group, about a sixth of each class is held out.
    """
    pairs = sorted(all_pairs(), key=lambda pair: _rank(" + ".join(sorted(pair))))
    heldout_pairs = frozenset(pairs[: round(_PAIR_FRACTION * len(pairs))])
    heldout_single: set[Scene] = set()
    for name in ("one", "count", "size"):
        scenes = [scene for scene in enumerate_scenes() if difficulty_class(scene) == name]
        scenes.sort(key=lambda scene: _rank(caption(scene)))
        heldout_single.update(scenes[: round(_CAPTION_FRACTION * len(scenes))])
    train, heldout = [], []
    for scene in enumerate_scenes():
        held = scene in heldout_single or not heldout_pairs.isdisjoint(scene.pairs)
        (heldout if held else train).append(scene)
    return Split(train=tuple(train), heldout=tuple(heldout), heldout_pairs=heldout_pairs)


def subsample(scenes: tuple[Scene, ...], *, per_class: int) -> tuple[Scene, ...]:
    """Returns at most `per_class` scenes of every class, chosen deterministically, in the order of `CLASSES`."""
    out: list[Scene] = []
    for name in CLASSES:
        members = [scene for scene in scenes if difficulty_class(scene) == name]
        members.sort(key=lambda scene: _rank(caption(scene)))
        out.extend(members[:per_class])
    return tuple(out)


def _rank(text: str) -> str:
    return hashlib.sha256(f"{_SPLIT_SALT}:{text}".encode()).hexdigest()


def _generate_scenes() -> Iterator[Scene]:
    kinds = list(product(COLOURS, SHAPES))
    for kind in kinds:
        yield Scene((Group(1, *kind),))
    for kind, count in product(kinds, (2, 3)):
        yield Scene((Group(count, *kind),))
    for kind, size in product(kinds, SIZES):
        yield Scene((Group(1, *kind),), size=size)
    for first, second in permutations(kinds, 2):
        yield Scene((Group(1, *first), Group(1, *second)))
    for (first, second), relation in product(permutations(kinds, 2), RELATIONS):
        yield Scene((Group(1, *first), Group(1, *second)), relation=relation)
    for (first, second), (m, n) in product(permutations(kinds, 2), ((1, 2), (1, 3), (2, 1), (2, 2), (3, 1))):
        yield Scene((Group(m, *first), Group(n, *second)))
    for triple in permutations(kinds, 3):
        yield Scene(tuple(Group(1, *kind) for kind in triple))


def _parse_words(words: list[str]) -> Scene:
    groups: list[Group] = []
    relation: str | None = None
    group, size, position = _parse_group(words, 0)
    groups.append(group)
    while position < len(words):
        if size is not None or relation is not None:
            raise ValueError(f"unexpected {words[position]!r}")
        connector, position = _parse_connector(words, position)
        if connector != "and":
            if len(groups) > 1:
                raise ValueError("a relation joins exactly two objects")
            relation = connector
        group, extra_size, position = _parse_group(words, position)
        if extra_size is not None:
            raise ValueError("a size is only defined for a single object")
        groups.append(group)
    return Scene(tuple(groups), size=size, relation=relation)


def _word(words: list[str], position: int, expected: str) -> str:
    if position >= len(words):
        raise ValueError(f"expected {expected} at the end")
    return words[position]


def _parse_group(words: list[str], position: int) -> tuple[Group, str | None, int]:
    number = _word(words, position, "a number")
    if number not in NUMBERS:
        raise ValueError(f"expected one of {NUMBERS}, found {number!r}")
    count = NUMBERS.index(number) + 1
    position += 1
    size: str | None = None
    if _word(words, position, "a colour") in SIZES:
        size = words[position]
        position += 1
    colour = _word(words, position, "a colour")
    noun = _word(words, position + 1, "a shape")
    if noun not in _NOUNS:
        raise ValueError(f"expected a shape, found {noun!r}")
    shape, plural = _NOUNS[noun]
    if plural != (count > 1):
        raise ValueError(f"{noun!r} does not agree with {number!r}")
    return Group(count, colour, shape), size, position + 2


def _parse_connector(words: list[str], position: int) -> tuple[str, int]:
    if words[position] == "and":
        return "and", position + 1
    for relation in RELATIONS:
        parts = relation.split()
        if words[position : position + len(parts)] == parts:
            return relation, position + len(parts)
    raise ValueError(f"expected 'and' or a relation, found {words[position]!r}")
