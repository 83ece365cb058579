"""The shapes reward: how well an image shows what a caption of the shapes grammar asks for."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import ClassVar

from rewards.contract import API_VERSION, ItemError, RewardInfo, Sample
from rewards.shapes.verifier import score

_VERSION = 1  # raise it whenever the same image would score otherwise


class ShapesReward:
    """Scores each image by the verifier, which sees the pixels and the prompt and nothing else.

    Metrics: ``smooth`` in [0, 1] and ``strict``, 0 or 1. Checkpoint: none, and so no licence but this project's,
    Apache-2.0. Preprocessing: none, the verifier takes any size. Reference implementation: `rewards.shapes.verifier`
    itself. Needs numpy and scipy.
    """

    api_version: ClassVar[int] = API_VERSION
    info = RewardInfo(
        name="shapes",
        metrics=("smooth", "strict"),
        value_range=(0.0, 1.0),
        max_batch=64,
        tolerance=0.0,
        source="rewards/shapes/verifier.py",
        licence="Apache-2.0, no weights",
        example_prompts=("a red circle", "two blue squares", "a red circle left of a green square"),
    )

    def load(self, device: str) -> None:
        """Nothing to load."""

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        """Smooth and strict score of each image.

        Raises:
            ItemError: a prompt is outside the grammar; the message names it.
        """
        return [self._score(sample) for sample in batch]

    def fingerprint(self) -> str:
        return f"shapes@{_VERSION}/numpy {version('numpy')}/scipy {version('scipy')}"

    def close(self) -> None:
        """Nothing to free."""

    def _score(self, sample: Sample) -> dict[str, float]:
        try:
            result = score(sample.image, sample.prompt)
        except ValueError as error:
            raise ItemError(str(error)) from error
        return {"smooth": result.smooth, "strict": result.strict}
