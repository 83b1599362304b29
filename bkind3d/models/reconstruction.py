"""The reconstruction decoder ψ (paper, Section 3.1.3): appearance and drawn keypoints to the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bkind3d.errors import InputError
from bkind3d.models.layers import ConvNorm2d, recomputed, upsample_to


class ReconstructionDecoder(nn.Module):
    """Coarse to fine: at each level the appearance feature and the maps of both times join; training only.

    Args:
        inputs: Channels of the appearance features, fine to coarse.
        feature_strides: Their strides.
        strides: Strides of the decoder's levels, coarse to fine; each must be one of `feature_strides`.
        channels: Channels of the levels.
        maps: Channels of the maps of both times together: 2 for edges, 2 J for points.
        outputs: Channels of the reconstruction (3: RGB, 1: grey).
        norm: "group" or "batch".

    Attributes:
        checkpointing: Whether the backward pass computes each level again, of which only the inputs are kept.
    """

    checkpointing = False

    def __init__(
        self,
        inputs: Sequence[int],
        feature_strides: Sequence[int],
        strides: Sequence[int],
        channels: Sequence[int],
        maps: int,
        outputs: int,
        norm: str,
    ) -> None:
        super().__init__()
        unknown = [stride for stride in strides if stride not in feature_strides]
        if unknown or list(strides) != sorted(strides, reverse=True) or len(strides) != len(channels):
            raise InputError(
                f"model.edge_strides: expected some of {tuple(feature_strides)} from coarse to fine, and as many "
                f"decoder_channels; got {tuple(strides)} and {tuple(channels)}"
            )
        self.levels = [list(feature_strides).index(stride) for stride in strides]
        blocks, previous = [], 0
        for level, width in zip(self.levels, channels, strict=True):
            joined = previous + inputs[level] + maps
            blocks.append(nn.Sequential(ConvNorm2d(joined, width, norm), ConvNorm2d(width, width, norm)))
            previous = width
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(previous, outputs, 3, padding=1)

    def forward(self, features: Sequence[Tensor], drawn: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Reconstruct the target.

        Args:
            features: Appearance features of frame t, fine to coarse, (N, C_l, h_l, w_l).
            drawn: One (N, maps, h, w) for each level, coarse to fine: the maps at t, then those at t + gap.
            size: (H, W) of the image.

        Returns:
            Reconstruction (N, outputs, H, W), unbounded.
        """
        before: list[Tensor] = []
        for level, block, maps in zip(self.levels, self.blocks, drawn, strict=True):
            before = [recomputed(_level, block, features[level], maps, *before, enabled=self.checkpointing)]
        return upsample_to(self.head(before[0]), size)


def _level(block: nn.Module, feature: Tensor, maps: Tensor, before: Tensor | None = None) -> Tensor:
    """Appearance, drawn maps and what the level before gave, if there is one, through the block of a level."""
    # All parts in one layout and dtype, or the joined tensor and its gradient are copied to what the convolution takes.
    parts = [feature, maps.to(feature.dtype, memory_format=torch.channels_last)]
    if before is not None:
        parts.append(upsample_to(before, (maps.shape[-2], maps.shape[-1])))
    return block(torch.cat(parts, dim=1))
