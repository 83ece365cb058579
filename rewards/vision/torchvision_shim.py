"""Lets torchvision be imported beside a CPU-only build of torch.

torchvision's published wheels are built against CUDA. Beside a CPU build of torch its compiled operators do not load,
and the import ends in ``RuntimeError: operator torchvision::nms does not exist``, because the Python part describes
two operators that nobody declared. Declaring them, without an implementation, is all that is missing: transforms,
models and whatever is built on them (open_clip, timm; transformers and diffusers look for torchvision too) work, and
only the operators themselves, such as non-maximum suppression, stay out of reach. Measured with torch 2.13.0+cpu,
torchvision 0.28.0, open_clip 3.3.0.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

_OPERATORS = ("nms", "qnms")
_declared: list[object] = []  # torch forgets the operators of a library that is garbage collected


def mend_torchvision() -> None:
    """Make ``import torchvision`` work if a CPU-only torch is what keeps it from working.

    Call it before the first import of anything that imports torchvision. Without torchvision it does nothing.

    Raises:
        RuntimeError: torchvision does not import for another reason.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        _declare_operators()
        import_module("torchvision")


def import_open_clip() -> ModuleType:
    """open_clip, with torchvision mended.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    mend_torchvision()
    try:
        return import_module("open_clip")
    except ImportError as error:
        raise ImportError(
            "this reward needs open_clip, which is kept out of the trainer's environment: run "
            "`bash scripts/make_reward_env.sh open-clip` and start the reward with .venvs/open-clip/bin/python"
        ) from error


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
