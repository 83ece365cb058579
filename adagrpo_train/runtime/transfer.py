"""Copies to the device that the host does not wait for."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; from the host it is queued behind the work that is already there.

    From pageable memory CUDA would make the host wait until that work is done; the allocator of pinned memory keeps the
    source until the copy has passed.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
