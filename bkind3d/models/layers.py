"""Small pieces shared by the networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bkind3d_kernels import GroupNormAct


class _BatchNormAct(nn.Module):
    """Batch normalisation, the addition of a residual and a ReLU, called as :class:`bkind3d_kernels.GroupNormAct` is.

    Args:
        channels: C.
        activation: "relu" or "none".
    """

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__(channels)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The normalised map or volume, in the shape of x."""
        x = super().forward(x)
        x = x if residual is None else x + residual
        return x.relu_() if self.activation == "relu" else x


class BatchNormAct2d(_BatchNormAct, nn.BatchNorm2d):
    """Of maps."""


class BatchNormAct3d(_BatchNormAct, nn.BatchNorm3d):
    """Of volumes."""


def norm_act2d(kind: str, channels: int, activation: str = "relu") -> nn.Module:
    """Return a normalisation of maps: "group" (groups of at least four channels) or "batch"; called with a residual it
    adds that before the activation, "relu" or "none".
    """
    return BatchNormAct2d(channels, activation) if kind == "batch" else _group_norm_act(channels, activation)


def norm_act3d(kind: str, channels: int, activation: str = "relu") -> nn.Module:
    """As :func:`norm_act2d`, of volumes."""
    return BatchNormAct3d(channels, activation) if kind == "batch" else _group_norm_act(channels, activation)


def _group_norm_act(channels: int, activation: str) -> GroupNormAct:
    return GroupNormAct(groups(channels), channels, activation=activation)


def use_backend(module: nn.Module, backend: str) -> None:
    """Let all group normalisations of a module run with a backend of the operations."""
    for part in module.modules():
        if isinstance(part, GroupNormAct):
            part.backend = backend


def groups(channels: int) -> int:
    """Largest number of groups that divides `channels`, at most 8, with four channels or more in each if it can be."""
    return math.gcd(channels, max(1, min(8, channels // 4)))


class ConvNorm2d(nn.Sequential):
    """Convolution 3 × 3, normalisation, ReLU: (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, norm: str, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            norm_act2d(norm, outputs),
        )


class PointwiseConv3d(nn.Conv3d):
    """Convolution 1³ as a matrix product of the voxels' features, (N, C_in, X, Y, Z) -> (N, C_out, X, Y, Z).

    Channels-last in memory, where it is just that. On one CPU thread torch copies a few volumes to another layout and
    back for such a convolution.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The volume that each voxel's features are mapped to."""
        return nn.functional.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


def channels_last(module: nn.Module) -> None:
    """Store all convolutions of a module channels-last; their inputs and outputs then follow."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        elif parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)


class _Leading(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        ctx.shape, ctx.strides = x.shape, x.stride()
        return x[:count]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.new_empty_strided(ctx.shape, ctx.strides)
        whole[: len(gradient)] = gradient
        whole[len(gradient) :] = 0
        return whole, None


def leading(x: Tensor, count: int) -> Tensor:
    """x[:count], a view. Its gradient has the strides of x: that of a slice would be contiguous, and copied back."""
    return _Leading.apply(x, count)


def recomputed(function: Callable[..., Tensor], *inputs: Any, enabled: bool = True) -> Tensor:
    """Call a function of which nothing but its inputs is kept for the backward pass, which calls it again."""
    if not enabled:
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def upsample_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (N, C, H, W) to `size` (height, width) bilinearly, by the pixel-centre rule."""
    return nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
