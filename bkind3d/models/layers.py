"""Small pieces shared by the networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def norm2d(kind: str, channels: int) -> nn.Module:
    """Return a 2D normalisation layer: "group" (groups of at least four channels) or "batch"."""
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(groups(channels), channels)


def norm3d(kind: str, channels: int) -> nn.Module:
    """Return a 3D normalisation layer: "group" (groups of at least four channels) or "batch"."""
    return nn.BatchNorm3d(channels) if kind == "batch" else nn.GroupNorm(groups(channels), channels)


def groups(channels: int) -> int:
    """Largest number of groups that divides `channels`, at most 8, with four channels or more in each if it can be."""
    return math.gcd(channels, max(1, min(8, channels // 4)))


class ConvNorm2d(nn.Sequential):
    """Convolution 3 × 3, normalisation, ReLU: (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, norm: str, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            norm2d(norm, outputs),
            nn.ReLU(inplace=True),
        )


def channels_last(module: nn.Module) -> None:
    """Store all convolutions of a module channels-last; their inputs and outputs then follow."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        elif parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)


def upsample_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (N, C, H, W) to `size` (height, width) bilinearly, by the pixel-centre rule."""
    return nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
