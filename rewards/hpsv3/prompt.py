"""What HPSv3 is told about a picture: the words it was trained with, to the letter.

instruction.txt and `QUESTION` are INSTRUCTION and prompt_with_special_token of hpsv3 1.0.0 (PyPI),
hpsv3/dataset/data_collator_qwen.py, under the licence in instruction.LICENSE. Double spaces at the ends of lines belong
to them.
"""

from functools import cache
from importlib.resources import files

#: Its last hidden state is what the score is read from. Everything behind it is there because it was in training.
REWARD_TOKEN = "<|Reward|>"
IMAGE_TOKEN = "<|image_pad|>"
QUESTION = f"\nPlease provide the overall ratings of this image: {REWARD_TOKEN}\n\nEND\n"
_SLOT = "{text_prompt}"


@cache
def instruction() -> str:
    """The published text, with ``{text_prompt}`` where the prompt goes."""
    # Bytes, because reading as text would hide line ends that somebody's checkout changed.
    return files("rewards.hpsv3").joinpath("instruction.txt").read_bytes().decode("utf-8")


def conversation(prompt: str, image_tokens: int) -> str:
    """Everything the model reads about one picture, in the chat format of Qwen2-VL.

    Args:
        prompt: what the picture should show; braces in it mean nothing.
        image_tokens: how many tokens the picture takes.
    """
    picture = f"<|vision_start|>{IMAGE_TOKEN * image_tokens}<|vision_end|>"
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{picture}{instruction().replace(_SLOT, prompt)}{QUESTION}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
