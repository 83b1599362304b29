"""Keypoints of single views, triangulated (paper, Section 4.1.2: "Triang.+Reproj.")."""

from __future__ import annotations

import torch
from torch import Tensor

from bkind3d.models.discovery import DiscoveryModel, Lifted, box_center
from bkind3d.models.heatmaps import locate, peak
from bkind3d.models.triangulate import triangulate
from bkind3d_kernels import VoxelGrid
from bkind3d_kernels.geometry import project_points


class TriangulationModel(DiscoveryModel):
    """2D BKinD in every view, triangulation weighted by the heatmaps' peaks, and the reprojection error as a loss.

    Arguments as `DiscoveryModel`.
    """

    @property
    def map_channels(self) -> int:
        """One heatmap for each keypoint."""
        return self.config.keypoints

    def lift(self, maps: Tensor, projections: Tensor, size: tuple[int, int], grid: VoxelGrid) -> Lifted:
        """Locate each keypoint in each view and triangulate it; arguments as `DiscoveryModel.lift`."""
        with torch.autocast(maps.device.type, enabled=False):
            detected, probability = locate(self.config.heatmap_gain * maps.float(), size)
            confidence = peak(probability)
            positions = triangulate(detected, confidence, projections, box_center(grid), grid.side)
            error = reprojection_error(positions, detected, projections, size)
        return Lifted(positions, confidence.mean(1), {"reprojection": error}, detected)


def reprojection_error(positions: Tensor, detected: Tensor, projections: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean square distance between projected and detected keypoints, the detections held fixed.

    Args:
        positions: (N, J, 3), world units.
        detected: (N, M, J, 2), image pixels.
        projections: (N, M, 3, 4).
        size: (H, W) of the images.

    Returns:
        Scalar in units of the squared longest side of the image; a point behind a camera does not count in it.
    """
    pixels, depth = project_points(projections, positions[:, None])
    squared = ((pixels - detected.detach()) / max(size)).square().sum(-1)
    return torch.where(depth > 0, squared, 0.0).mean()
