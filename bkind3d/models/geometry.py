"""The geometry decoder Ψ (paper, Section 3.1.1): appearance features to the 2D maps that are lifted to 3D."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bkind3d.errors import InputError
from bkind3d.models.layers import ConvNorm2d, upsample_to


class GeometryDecoder(nn.Module):
    """Top-down pyramid: lateral 1 × 1 convolutions, upsampled and added, then a head to C raw channels.

    Features, fine to coarse, (N, C_l, H / s_l, W / s_l) -> maps (N, channels, H / map_stride, W / map_stride). The
    maps are not normalised: the softmax over views and the volume network work on raw values.
    """

    def __init__(
        self, inputs: Sequence[int], strides: Sequence[int], channels: int, map_stride: int, width: int, norm: str
    ) -> None:
        super().__init__()
        if map_stride not in strides:
            raise InputError(f"model.map_stride: this encoder has strides {tuple(strides)}, got {map_stride}")
        self.first = list(strides).index(map_stride)
        self.laterals = nn.ModuleList(nn.Conv2d(count, width, 1) for count in inputs[self.first :])
        self.head = nn.Sequential(ConvNorm2d(width, width, norm), nn.Conv2d(width, channels, 1))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return the maps (N, channels, H / map_stride, W / map_stride)."""
        used = features[self.first :]
        x = self.laterals[-1](used[-1])
        for lateral, feature in zip(reversed(self.laterals[:-1]), reversed(used[:-1]), strict=True):
            skip = lateral(feature)
            x = skip + upsample_to(x, skip.shape[-2:])
        return self.head(x)
