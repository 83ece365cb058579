"""Keeps float32 arithmetic of CUDA exact, whatever cuDNN may do.

cuDNN rounds the inputs of float32 convolutions to TF32, 10 bits of fraction, unless the whole process forbids it
(`torch.backends.cudnn.allow_tf32`): that would also change whatever else runs in the process, such as training. So the
convolutions of a reward are computed as matrix products, which torch leaves exact by default.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewards.contract import LostError


class _ProductConv2d(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = functional.pad(input, self._reversed_padding_repeated_twice, mode=mode)
        sizes = [
            (side - reach * (kernel - 1) - 1) // step + 1
            for side, reach, kernel, step in zip(
                padded.shape[2:], self.dilation, self.kernel_size, self.stride, strict=True
            )
        ]
        columns = functional.unfold(padded, self.kernel_size, dilation=self.dilation, stride=self.stride)
        columns = columns.unflatten(1, (self.groups, -1))  # [B, groups, C / groups * kernel, places]
        values = weight.reshape(self.groups, weight.shape[0] // self.groups, -1) @ columns
        values = values.flatten(1, 2).unflatten(2, sizes)
        return values if bias is None else values + bias[:, None, None]


class _ProductConv3d(nn.Conv3d):
    """Of inputs that are one kernel large."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.shape[1:] != weight.shape[1:] or any(self.padding):
            raise ValueError(f"an input of {tuple(input.shape[1:])} is not one kernel of {tuple(weight.shape[1:])}")
        return functional.linear(input.flatten(1), weight.flatten(1), bias)[..., None, None, None]


_PRODUCTS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: _ProductConv2d, nn.Conv3d: _ProductConv3d}


def as_products(model: nn.Module) -> None:
    """Have a model compute its convolutions as matrix products from now on. Names and weights stay as they are.

    Raises:
        ValueError: it has a convolution that this cannot be done for.
    """
    for name, module in model.named_modules():
        if type(module) in _PRODUCTS:
            module.__class__ = _PRODUCTS[type(module)]
        elif isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, tuple(_PRODUCTS.values())):
            raise ValueError(
                f"dtype=float32: {name} is a {type(module).__name__}, which a GPU may round to TF32; set dtype=bfloat16"
            )


def require_exact_products() -> None:
    """Refuse to score while this process lets CUDA round the inputs of float32 matrix products.

    Raises:
        LostError: it does.
    """
    current = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # since torch 2.9
    rounds = torch.get_float32_matmul_precision() != "highest" if current is None else current == "tf32"
    if rounds:
        raise LostError(
            "dtype=float32, but this process lets CUDA round float32 matrix products to TF32 "
            "(torch.set_float32_matmul_precision): leave it at 'highest', give the reward a process of its own by "
            "mode=local, or set dtype=bfloat16"
        )
