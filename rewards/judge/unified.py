"""The questions of UnifiedReward, to the letter, and where its answers hold the scores.

Text from github.com/CodeGoat24/UnifiedReward, MIT: unified.LICENSE. The checkpoints were trained with these words. A
question also asks version 1 for ``element (type): value`` lines, which are not used.
"""

from rewards.judge.answers import NUMBER

SOURCE = (
    "github.com/CodeGoat24/UnifiedReward: inference_qwen/image_generation/qwen_point_score_image_generation.py@ed52f98 "
    "and inference_qwen/UnifiedReward-2.0-inference/point_score_ACS_image_generation.py@a759534"
)
LICENCE = "MIT"

_POINT = (
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
    "based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy "
    "of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color "
    "accuracy, and overall aesthetic appeal.\n"
    "Extract key elements from the provided text caption, evaluate their presence in the generated image using the "
    "format: 'element (type): value' (where value=0 means not generated, and value=1 means generated), and assign a "
    "score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)
_AXES = (
    "You are presented with a generated image and its associated text caption. Your task is to analyze the image "
    "across multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
    "Output your evaluation using the format below:\n\n"
    "Alignment Score (1-5): X\n"
    "Coherence Score (1-5): Y\n"
    "Style Score (1-5): Z\n\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)
_RANGE = (1.0, 5.0)
#: By version: question, regular expression of each metric, range.
VERSIONS: dict[int, tuple[str, dict[str, str], tuple[float, float]]] = {
    1: (_POINT, {"score": rf"Final Score:\s*{NUMBER}"}, _RANGE),
    2: (
        _AXES,
        {axis.lower(): rf"{axis} Score \(1-5\):\s*{NUMBER}" for axis in ("Alignment", "Coherence", "Style")},
        _RANGE,
    ),
}
