"""Keypoints of single views, lifted by a depth map of each view (paper, Section 4.1.2: "Depth Map")."""

from __future__ import annotations

import torch
from torch import Tensor

from bkind3d.models.discovery import DiscoveryModel, Lifted, box_center, box_radius
from bkind3d.models.heatmaps import locate, peak
from bkind3d_kernels import VoxelGrid
from bkind3d_kernels.geometry import exact_matmul, project_points


class DepthModel(DiscoveryModel):
    """Heatmaps and one depth map in every view; the views' keypoints are averaged with the heatmaps' peaks as weights.

    Arguments as `DiscoveryModel`.
    """

    @property
    def map_channels(self) -> int:
        """One heatmap for each keypoint, and the depth map."""
        return self.config.keypoints + 1

    def lift(self, maps: Tensor, projections: Tensor, size: tuple[int, int], grid: VoxelGrid) -> Lifted:
        """Locate each keypoint in each view, give it its depth, and average; arguments as `DiscoveryModel.lift`."""
        with torch.autocast(maps.device.type, enabled=False):
            heatmaps, depths = maps.float().split([self.config.keypoints, 1], dim=2)
            pixels, probability = locate(self.config.heatmap_gain * heatmaps, size)
            confidence = peak(probability)
            lifted = backproject(pixels, expected_depth(probability, depths, projections, grid), projections)
        return Lifted(weighted_mean(lifted, confidence), confidence.mean(1), detected=pixels)


def center_depth(projections: Tensor, grid: VoxelGrid) -> Tensor:
    """Depth of the box's centre in each view, (N, M)."""
    return project_points(projections, box_center(grid)[:, None, None])[1][..., 0]


def expected_depth(probability: Tensor, depths: Tensor, projections: Tensor, grid: VoxelGrid) -> Tensor:
    r"""Depth of each keypoint in each view, expected under its heatmap.

    .. math:: z = z_c + r \sum_q p(q) \tanh D(q), \quad r = \min(R, 0.95 \, |z_c|)

    with the depth z_c of the box's centre and the distance R of its corners from it: an untrained network starts around
    the centre's depth, the whole box can be reached from every side, and no keypoint gets behind its camera.

    Args:
        probability: Heatmaps p (N, M, J, h, w).
        depths: Raw depth maps D (N, M, J or 1, h, w).
        projections: (N, M, 3, 4).
        grid: The box.

    Returns:
        (N, M, J), in the unit of the projections' depth.
    """
    center = center_depth(projections, grid)[..., None]
    reach = torch.minimum(box_radius(grid).view(-1, 1, 1), 0.95 * center.abs())
    return center + reach * (probability * depths.tanh()).sum((-2, -1))


def backproject(pixels: Tensor, depth: Tensor, projections: Tensor) -> Tensor:
    r"""World points that a view has at given pixels and depths: the inverse of `project_points`.

    .. math:: X = P_{:, :3}^{-1} \, (z \, (u, v, 1)^T - P_{:, 3})

    for any projection matrix with an invertible left 3 × 3 part, such as K[R|t].

    Args:
        pixels: (..., J, 2), order (x, y).
        depth: (..., J).
        projections: (..., 3, 4).

    Returns:
        (..., J, 3), world units, in the dtype of the pixels.
    """
    matrix = projections.double()
    inverse, _ = torch.linalg.inv_ex(matrix[..., :3])
    homogeneous = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1).double() * depth.double()[..., None]
    return exact_matmul(homogeneous - matrix[..., None, :, 3], inverse.mT).to(pixels.dtype)


def weighted_mean(lifted: Tensor, confidence: Tensor) -> Tensor:
    """Mean over views: points (N, M, J, 3) with weights (N, M, J) > 0 -> (N, J, 3)."""
    weights = confidence / confidence.sum(1, keepdim=True)
    return (weights[..., None] * lifted).sum(1)
