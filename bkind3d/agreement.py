"""What the views say of each keypoint, without a label: do they agree on where it is, and is it on the body?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bkind3d.data.window import HALF
from bkind3d.errors import InputError
from bkind3d_kernels.geometry import project_points

FOREGROUND = HALF + 1  # of 255: a pixel of a mask is foreground from here on


def reprojection_error(positions: Tensor, detected: Tensor, projections: Tensor, scale: np.ndarray) -> np.ndarray:
    """How far the views' own keypoints lie from the projected one, (F, J): root mean square over the views.

    It is small where the views agree. A view behind whose camera the keypoint lies does not count; without any, NaN.

    Args:
        positions: (F, J, 3), world units.
        detected: (F, M, J, 2) keypoints of the single views, pixels.
        projections: (F or 1, M, 3, 4), world to those pixels.
        scale: (M, 2), by which lengths along x and y are multiplied: to the pixels of another image size.
    """
    pixels, depth = project_points(projections.double(), positions.double()[:, None])
    distance = ((pixels - detected) * torch.as_tensor(scale).to(pixels)[:, None]).square().sum(-1)  # (F, M, J)
    front = depth > 0
    mean = torch.where(front, distance, 0.0).sum(1) / front.sum(1)  # 0 / 0 is NaN
    return mean.sqrt().float().cpu().numpy()


def on_body(positions: np.ndarray, projections: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Share of the views that see foreground at the pixel nearest to each keypoint, (F, J).

    A view counts where the keypoint is in front of the camera and inside the picture; with no such view the share is 0.

    Args:
        positions: (F, J, 3) keypoints, finite, world units.
        projections: (M, 3, 4) world to pixels of the masks.
        masks: (F, M, H, W) uint8, foreground from :data:`FOREGROUND` on.

    Raises:
        InputError: shapes that do not fit.
    """
    hit, inside = seen_on_body(positions, projections, masks)
    return hit.sum(axis=1) / np.maximum(inside.sum(axis=1), 1)


def seen_on_body(positions: np.ndarray, projections: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which views see foreground at the pixel nearest to each keypoint, and which show that pixel, (F, M, J) bool each.

    Arguments and errors as :func:`on_body`.
    """
    pixels, depth = in_masks(positions, projections, masks)
    height, width = masks.shape[2:]
    nearest = np.floor(pixels.numpy() + 0.5)  # (F, M, J, 2), order (x, y)
    inside = (depth.numpy() > 0) & (nearest >= 0).all(axis=3) & (nearest < [width, height]).all(axis=3)
    x, y = np.moveaxis(np.where(inside[..., None], nearest, 0).astype(np.int64), 3, 0)
    frame, view = np.ogrid[: masks.shape[0], : masks.shape[1]]
    return inside & (masks[frame[..., None], view[..., None], y, x] >= FOREGROUND), inside


def in_masks(positions: np.ndarray, projections: np.ndarray, masks: np.ndarray) -> tuple[Tensor, Tensor]:
    """Pixels (F, M, J, 2) and depth (F, M, J), float64, of the keypoints in the masks; arguments as :func:`on_body`."""
    if positions.ndim != 3 or positions.shape[2] != 3 or 0 in positions.shape or not np.isfinite(positions).all():
        raise InputError(f"positions: expected finite positions of shape (F, J, 3), got {positions.shape}")
    if projections.ndim != 3 or projections.shape[1:] != (3, 4):
        raise InputError(f"projections: expected shape (M, 3, 4), got {projections.shape}")
    if masks.ndim != 4 or masks.shape[:2] != (len(positions), len(projections)) or masks.dtype != np.uint8:
        raise InputError(
            f"masks: expected uint8 of shape ({len(positions)}, {len(projections)}, H, W), got {masks.dtype} of shape "
            f"{masks.shape}"
        )
    points = torch.as_tensor(positions, dtype=torch.float64)[:, None]  # (F, 1, J, 3)
    return project_points(torch.as_tensor(projections, dtype=torch.float64), points)
