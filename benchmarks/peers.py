"""Operations as other projects publish them, as functions of tensors; each operation's module lists its own as `PEERS`.

Algorithms are written anew from what they do, with this library's conventions for pixels, so that the results can be
compared. The order of the work and what is stored on the way is the peer's; what its data alone need, such as lens
distortion, is left out, to its advantage. kornia's own functions are called.

The algorithm of BKinD-3D's published code is the competitor `published` in the module of each operation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bkind3d_kernels.geometry import rescale_points

VOXELPOSE_RANGE = 2.0  # where normalised coordinates are clamped; the border of a map is at 1


def homogeneous(points: Tensor) -> Tensor:
    """Points (..., 3) with a 1 behind them, (..., 4)."""
    return torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)


def learnable_triangulation(features: Tensor, projections: Tensor, points: Tensor) -> Tensor:
    """Volume (N, C, X, Y, Z), softmax over views: as in Learnable Triangulation (Iskakov et al. 2019).

    One sample and one view at a time: project all voxels, divide, sample one map, set to zero what lies behind the
    camera, and write the result into a volume of all views. Softmax and sum over views follow for each sample.

    It is the same function as `unproject`. The published code divides pixels by the size of the map instead of the size
    less one, with height and width exchanged; that is not repeated.

    Args:
        features: (N, M, C, H, W).
        projections: (N, M, 3, 4).
        points: (N, X, Y, Z, 4), homogeneous.
    """
    n, m, c, h, w = features.shape
    shape = points.shape[1:4]
    volumes = features.new_zeros(n, c, *shape)
    for sample in range(n):
        flat = points[sample].reshape(-1, 4)
        views = features.new_zeros(m, c, *shape)
        for view in range(m):
            x, y, depth = (flat @ projections[sample, view].mT).unbind(-1)  # (XYZ,) each
            behind = depth <= 0
            depth = depth.masked_fill(depth == 0, 1.0)
            pixels = torch.stack([2 * (x / depth) / (w - 1) - 1, 2 * (y / depth) / (h - 1) - 1], dim=-1)
            taken = F.grid_sample(features[sample, view, None], pixels[None, :, None], align_corners=True)
            taken = taken.view(c, -1)
            taken[:, behind] = 0.0
            views[view] = taken.view(c, *shape)
        share = views.clone().view(m, -1).softmax(0).view_as(views)
        volumes[sample] = (views * share).sum(0)
    return volumes


def voxelpose(features: Tensor, projections: Tensor, points: Tensor) -> Tensor:
    """Volume (N, C, X, Y, Z), mean over the views that see a voxel: the projection layer of VoxelPose (Tu et al. 2020).

    One sample and one view at a time: project all voxels, note which are inside the image, clamp, sample one map into a
    volume whose last dimension is the view. The mean is the sum of samples inside over their number plus 1e-6.

    Same function as `unproject` with `aggregation="mean", unseen="exclude"`, up to that 1e-6. Inside the image means
    here what it means there: at least one tap of the bilinear sample is in the map, and the voxel is in front of the
    camera. Normalised coordinates are clamped at 2 rather than at 1.1, which small maps would notice. Left out: lens
    distortion, the affine map from image to crop, a limit of values to 0 to 1, and a search for NaN.

    Args: as for :func:`learnable_triangulation`.
    """
    n, m, c, h, w = features.shape
    count = points.shape[1:4].numel()
    values, inside = features.new_zeros(n, c, count, m), features.new_zeros(n, 1, count, m)
    scale = projections.new_tensor([w - 1, h - 1])
    for sample in range(n):
        flat = points[sample].reshape(-1, 4)
        for view in range(m):
            x, y, depth = (flat @ projections[sample, view].mT).unbind(-1)
            pixels = torch.stack([x, y], dim=-1) / depth.clamp(min=1e-6).unsqueeze(-1)  # (XYZ, 2)
            u, v = pixels.unbind(-1)
            inside[sample, 0, :, view] = (u >= -1) & (v >= -1) & (u < w) & (v < h) & (depth > 0)
            pixels = pixels.clamp(-1.0, max(h, w))
            pixels = (2 * pixels / scale - 1).view(1, 1, -1, 2).clamp(-VOXELPOSE_RANGE, VOXELPOSE_RANGE)
            values[sample, :, :, view] += F.grid_sample(features[sample, view, None], pixels, align_corners=True)[
                0, :, 0
            ]
    mean = (values * inside).sum(-1) / (inside.sum(-1) + 1e-6)
    return mean.view(n, c, *points.shape[1:4])


def autolink(
    keypoints: Tensor, weights: Tensor, pairs: Tensor, sizes: list[tuple[int, int]], sigmas: list[float]
) -> list[Tensor]:
    """Edge maps [(N, H, W), ...]: the edge drawing of AutoLink (He et al. 2022), all edges and pixels at once.

    For every edge and pixel the distances to the start, to the end and to the foot of the perpendicular are all taken,
    (N, E, HW, 2) each; three masks choose among them. Then the Gaussian, the weight and the maximum over edges.

    Same function as `rasterize_edges`, but for 1e-8 in the squared length that keeps an edge without length finite.
    AutoLink draws one map with one width; here it is called for each map of the pyramid.

    Args:
        keypoints: (N, K, 2) in pixels of the first size.
        weights: (E,).
        pairs: (E, 2), the keypoints of each edge.
        sizes: (H, W) of each map.
        sigmas: widths of each map in its own pixels.
    """
    return [
        (weights[:, None, None] * _lines(rescale_points(keypoints, sizes[0], size)[:, pairs], size, sigma)).amax(1)
        for size, sigma in zip(sizes, sigmas)
    ]


def _lines(ends: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """Gaussian of the distance to each segment, (N, E, H, W), for ends (N, E, 2, 2)."""
    height, width = size
    y = torch.arange(height, dtype=ends.dtype, device=ends.device).repeat_interleave(width)
    x = torch.arange(width, dtype=ends.dtype, device=ends.device).repeat(height)
    pixels = torch.stack([x, y], dim=-1)  # (HW, 2)
    start, end = ends.unsqueeze(3).unbind(2)  # (N, E, 1, 2) each
    edge = end - start
    from_start, from_end = pixels - start, pixels - end  # (N, E, HW, 2)
    t = (from_start @ edge.mT).squeeze(-1) / (edge.square().sum(-1) + 1e-8)  # (N, E, HW)
    across = pixels - (start + t.unsqueeze(-1) * edge)
    squared = (t <= 0) * from_start.square().sum(-1) + (t >= 1) * from_end.square().sum(-1)
    squared = squared + (t > 0) * (t < 1) * across.square().sum(-1)
    return torch.exp(-squared / sigma**2).view(*ends.shape[:2], height, width)


def kornia(logits: Tensor) -> Tensor:
    """Expected voxel index (N, J, 3) of logits (N, J, X, Y, Z), by kornia's spatial softmax and spatial expectation.

    kornia's are of images: the softmax is taken of each volume as an image of X rows and Y·Z columns, the expectations
    of its sums along z and along x. `conv_soft_argmax3d` is made for small windows; with one window as large as the
    volume it gives the same and takes several times as long, so it is not what is measured.
    """
    from kornia.geometry.subpix import spatial_expectation2d, spatial_softmax2d

    probability = spatial_softmax2d(logits.flatten(3)).view_as(logits)
    yx = spatial_expectation2d(probability.sum(4), normalized_coordinates=False)  # (N, J, 2), column before row
    zy = spatial_expectation2d(probability.sum(2), normalized_coordinates=False)
    return torch.stack([yx[..., 1], yx[..., 0], zy[..., 0]], dim=-1)
