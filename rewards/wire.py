"""The messages between a trainer and a reward server, and nothing that could be executed: typed msgpack.

Needs msgspec 0.20 or newer: older ones decode a nested memoryview with the length of the whole body (msgspec#835).
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

CONTENT_TYPE = "application/vnd.adagrpo.reward+msgpack"
MAX_ITEMS = 256
MIN_SIDE, MAX_SIDE = 16, 2048  # pixels
MAX_ID, MAX_PROMPT = 64, 8192  # characters

Format = Literal["raw", "png", "webp", "jpeg"]


class WireImage(Struct, forbid_unknown_fields=True):
    """An RGB image; ``raw`` is height x width x 3 bytes, row by row."""

    fmt: Format
    w: Annotated[int, Meta(ge=MIN_SIDE, le=MAX_SIDE)]
    h: Annotated[int, Meta(ge=MIN_SIDE, le=MAX_SIDE)]
    data: memoryview


class WireItem(Struct, forbid_unknown_fields=True):
    """One image to score."""

    id: Annotated[str, Meta(min_length=1, max_length=MAX_ID)]
    prompt: Annotated[str, Meta(max_length=MAX_PROMPT)]
    image: WireImage
    group: Annotated[str, Meta(max_length=64)] | None = None
    meta: dict[str, str | int | float | bool] = {}


class ScoreRequest(Struct, forbid_unknown_fields=True):
    """Body of ``POST /v1/score``. Strict: a server refuses a field that it does not know."""

    v: Literal[1]
    items: Annotated[list[WireItem], Meta(min_length=1, max_length=MAX_ITEMS)]


class Failure(Struct):
    """Why there is no score. Of an item: bad_image, deadline, scorer_error, non_finite or unsupported_item."""

    code: str
    message: str


class WireResult(Struct, omit_defaults=True):
    """Scores of one item, or why there are none."""

    id: str
    scores: dict[str, float] | None = None
    error: Failure | None = None


class ScoreResponse(Struct):
    """Every id of the request exactly once, in any order. Clients ignore fields that they do not know."""

    v: int
    fingerprint: str
    results: list[WireResult]


class Info(Struct):
    """Body of ``GET /v1/info`` (JSON)."""

    api: list[int]
    name: str
    metrics: list[str]
    value_range: tuple[float, float] | None
    max_batch: int
    tolerance: float
    source: str
    licence: str
    example_prompts: list[str]
    fingerprint: str
    formats: list[str]
    limits: dict[str, int | float]
