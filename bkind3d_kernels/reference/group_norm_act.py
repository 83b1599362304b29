"""Group normalisation, the addition of a residual and a ReLU in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import unavailable

__all__ = ["run", "unavailable"]


def run(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, groups: int, eps: float, activation: str
) -> Tensor:
    """act((x − mean) · rstd · weight + bias + residual), in the shape and dtype of x and channels-last in memory.

    All of it is in float32, or float64 for float64 inputs, and rounded once.

    Args:
        x: (N, C, H, W) or (N, C, X, Y, Z).
        weight: (C,) in float32, or float64 for float64 inputs.
        bias: likewise.
        residual: like x, or None.
        groups: into so many groups of consecutive channels C is divided; each has its mean and variance.
        eps: is added to the variance.
        activation: "relu" or "none".
    """
    grouped = x.to(weight.dtype).unflatten(1, (groups, -1)).flatten(2)  # (N, G, members of the group)
    centred = grouped - grouped.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    shape = (1, -1, *[1] * (x.ndim - 2))
    y = (centred * torch.rsqrt(variance + eps)).view(x.shape) * weight.view(shape) + bias.view(shape)
    if residual is not None:
        y = y + residual.to(y.dtype)
    if activation == "relu":
        y = y.relu()
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return y.to(x.dtype).contiguous(memory_format=last)
