"""The point bottleneck: every keypoint drawn as a Gaussian in a map of its own (paper, Table 4, "point")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkind3d_kernels.geometry import rescale_points


def draw_points(
    pixels: Tensor,
    scale: Tensor,
    front: Tensor,
    size: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    sigmas: Sequence[float],
) -> list[Tensor]:
    r"""Draw each keypoint into its own map, at several resolutions.

    .. math:: \mathrm{map}_j(p) = \exp(-\|p - u_j\|^2 / (s_j \sigma)^2)

    the profile that an edge has across (paper, Section 3.1.3), as the product of a row and a column.

    Args:
        pixels: Keypoints u (N, J, 2), order (x, y), in pixels of an image of `size`.
        scale: Factor s > 0 on the width of each (N, J).
        front: Which of them are in front of the camera (N, J); the others have no image.
        size: (H, W).
        sizes: (h, w) of each map.
        sigmas: σ in pixels of its own map, one for each of `sizes`.

    Returns:
        Maps (N, J, h, w), one for each of `sizes`.
    """
    maps = []
    for shape, sigma in zip(sizes, sigmas, strict=True):
        scaled, width = rescale_points(pixels, size, shape), sigma * scale
        column, row = (
            torch.exp(
                -(((torch.arange(count, device=pixels.device) - scaled[..., axis, None]) / width[..., None]) ** 2)
            )
            for axis, count in ((1, shape[0]), (0, shape[1]))
        )
        maps.append((column * front[..., None])[..., :, None] * row[..., None, :])
    return maps
