"""Keypoint3D (Chen et al. 2021) without its reinforcement learning, the peer that the paper compares with."""

from __future__ import annotations

import torch
from torch import Tensor

from bkind3d.models.depth import backproject, center_depth, expected_depth, weighted_mean
from bkind3d.models.discovery import DiscoveryModel, Lifted
from bkind3d.models.heatmaps import locate, peak
from bkind3d.models.targets import frame_target
from bkind3d_kernels import VoxelGrid


class Keypoint3dModel(DiscoveryModel):
    """Heatmaps and a depth map for each keypoint in every view, held together by a consistency loss.

    The later frame itself is reconstructed, from the looks of the earlier frame and the keypoints at both times. The
    peer draws points (`bottleneck="points"`), wider the nearer they are; with edges this is a variant of it.
    Arguments as `DiscoveryModel`.
    """

    target = staticmethod(frame_target)

    @property
    def map_channels(self) -> int:
        """A heatmap and a depth map for each keypoint."""
        return 2 * self.config.keypoints

    def lift(self, maps: Tensor, projections: Tensor, size: tuple[int, int], grid: VoxelGrid) -> Lifted:
        """Lift each view's keypoints and average them; arguments as `DiscoveryModel.lift`.

        A view's weight is the softmax over keypoints of the mean of their logits: views share a keypoint by how much
        of their attention goes to it.
        """
        with torch.autocast(maps.device.type, enabled=False):
            heatmaps, depths = maps.float().chunk(2, dim=2)
            logits = self.config.heatmap_gain * heatmaps
            pixels, probability = locate(logits, size)
            lifted = backproject(pixels, expected_depth(probability, depths, projections, grid), projections)
            positions = weighted_mean(lifted, logits.mean((-2, -1)).softmax(2))
            spread = consistency_error(lifted, grid.side)
        return Lifted(positions, peak(probability).mean(1), {"consistency": spread}, pixels)

    def point_scale(self, depth: Tensor, projections: Tensor, grid: VoxelGrid) -> Tensor:
        """Width of each Gaussian, 1 at the depth of the box's centre and ∝ 1 / depth, at most 10."""
        center = center_depth(projections, grid).abs()[..., None]
        return center / torch.maximum(depth, 0.1 * center)


def consistency_error(lifted: Tensor, side: Tensor) -> Tensor:
    """Mean square deviation of the views' keypoints from their mean over views, per coordinate.

    Its gradient is that of the mean square distance over all pairs of views with one side held fixed (Chen et al.).

    Args:
        lifted: (N, M, J, 3), world units.
        side: Longest side of the volume, world units.

    Returns:
        Scalar, in units of the squared side.
    """
    return (lifted / side).var(1, correction=0).mean()
