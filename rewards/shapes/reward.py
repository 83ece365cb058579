"""The shapes reward: how well an image shows what a caption of the shapes grammar asks for.

Range: smooth in [0, 1], strict 0 or 1. No weights, no licence beyond this project's. Needs numpy and scipy.
"""

import numpy as np

from rewards.shapes.verifier import score


class ShapesReward:
    """Scores each image by the verifier, which sees the pixels and the prompt and nothing else."""

    def score(self, images: np.ndarray, prompts: list[str]) -> dict[str, list[float]]:
        """Score images against captions.

        Args:
            images: uint8 [N, H, W, 3].
            prompts: N captions of the grammar.

        Raises:
            ValueError: a prompt is outside the grammar; the message names it.
        """
        scores = [score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return {"smooth": [s.smooth for s in scores], "strict": [s.strict for s in scores]}
