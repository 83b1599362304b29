"""Points from their pixels in several views: weighted linear triangulation that stays finite."""

from __future__ import annotations

import torch
from torch import Tensor

from bkind3d.errors import InputError
from bkind3d_kernels.geometry import exact_matmul

# Strength of the pull to the box's centre. At rigs of ordinary geometry it moves a point by about 1e-8 of its distance
# from the centre; where the views do not fix a direction, noise in it is amplified at most by 1 / (2 √PRIOR).
PRIOR = 1e-9
# Sum of a point's weights below which the prior takes over; a softmax over 1000 pixels peaks above 1e-3 in every view.
LEAST_WEIGHT = 1e-6
# Least depth of the centre that a view's rows are divided by, in sides: a camera's plane may cut the box.
LEAST_DEPTH = 0.1


def triangulate(pixels: Tensor, weights: Tensor, projections: Tensor, center: Tensor, side: float | Tensor) -> Tensor:
    r"""Triangulate points by the weighted direct linear transform (Hartley & Sturm 1997, inhomogeneous).

    A view with projection rows :math:`p_1, p_2, p_3` sees the point X at (u, v) if
    :math:`(p_1 - u \, p_3) \tilde X = (p_2 - v \, p_3) \tilde X = 0`. With coordinates :math:`y = (X - c) / s` of the
    box (centre c, side s) and both rows divided by the view's depth of c, so that residuals are pixels, and by the
    pixels that a side spans there (root mean square over views), each view gives :math:`A_m y = b_m`, and

    .. math:: y = \arg\min_y \sum_m w_m^2 \|A_m y - b_m\|^2 + \lambda \|y\|^2, \quad
              w_m = \frac{\mathrm{weight}_m}{\epsilon + \sum_k \mathrm{weight}_k}

    by its 3 × 3 normal equations in float64. λ = 1e-9 keeps them regular: values and gradients are finite for parallel
    or identical views (the point of the ray that is nearest to c), for weights that vanish (c itself, reached
    smoothly), and for points at a camera's plane or behind it, because nothing is divided by their depth.

    Args:
        pixels: (N, M, J, 2), order (x, y), centres at integers; all views of about the same image size.
        weights: Confidences (N, M, J), not negative; only their ratios over the views matter.
        projections: (N or 1, M, 3, 4), world to those pixels.
        center: Centre of the box (3,), or (N or 1, 3), world units.
        side: Longest side of the box, world units.

    Returns:
        Points (N, J, 3), world units, in the dtype of the pixels. Gradients: pixels, weights, projections, center.

    Raises:
        InputError: Shapes that do not fit.
    """
    _check(pixels, weights, projections)
    dtype, pixels, weights, projections = pixels.dtype, pixels.double(), weights.double(), projections.double()
    center = center.double().reshape(-1, 1, 3)  # (N or 1, 1, 3)
    side = torch.as_tensor(side, dtype=torch.float64, device=pixels.device)
    with torch.autocast(pixels.device.type, enabled=False):
        at_center, depth = _center_in_views(projections, center, side)
        coefficients, offsets = _rows(pixels, projections, depth, center, side)
        span, _ = _rows(at_center[:, :, None], projections, depth, center, side)
        unit = span.square().sum((-2, -1)).mean((1, 2)).div(2).clamp_min(1e-12).sqrt()  # (N or 1,) pixels per side
        share = weights / (weights.sum(1, keepdim=True) + LEAST_WEIGHT) / unit[:, None, None]
        coefficients, offsets = coefficients * share[..., None, None], offsets * share[..., None]
        coefficients, offsets = coefficients.transpose(1, 2).flatten(2, 3), offsets.transpose(1, 2).flatten(2, 3)
        normal = exact_matmul(coefficients.mT, coefficients)  # (N, J, 3, 3)
        normal = normal + PRIOR * torch.eye(3, dtype=normal.dtype, device=normal.device)
        right = (coefficients * offsets[..., None]).sum(-2)  # (N, J, 3)
        solution, _ = torch.linalg.solve_ex(normal, right)
        return (center + side * solution).to(dtype)


def _center_in_views(projections: Tensor, center: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel (N or 1, M, 2) and depth (N or 1, M) of the centre, the depth kept away from 0 and made positive."""
    homogeneous = (
        exact_matmul(center[:, None], projections[..., :3].mT)[..., 0, :] + projections[..., 3]
    )  # (N or 1, M, 3)
    least = LEAST_DEPTH * side * projections[..., 2, :3].norm(dim=-1)
    depth = torch.maximum(homogeneous[..., 2].abs(), least)
    return homogeneous[..., :2] / depth[..., None], depth


def _rows(pixels: Tensor, projections: Tensor, depth: Tensor, center: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """A (N, M, J, 2, 3) and b (N, M, J, 2), in pixels, for coordinates of the box."""
    projections = projections[:, :, None]  # (N or 1, M, 1, 3, 4)
    rows = (projections[..., :2, :] - pixels[..., None] * projections[..., 2:, :]) / depth[..., None, None, None]
    offsets = -(rows[..., :3] * center[:, None, :, None]).sum(-1) - rows[..., 3]
    return side * rows[..., :3], offsets


def _check(pixels: Tensor, weights: Tensor, projections: Tensor) -> None:
    n, m = pixels.shape[:2]
    if pixels.ndim != 4 or pixels.shape[-1] != 2:
        raise InputError(f"pixels: expected (N, M, J, 2), got {tuple(pixels.shape)}")
    if weights.shape != pixels.shape[:3]:
        raise InputError(f"weights: expected {tuple(pixels.shape[:3])} as the pixels, got {tuple(weights.shape)}")
    if projections.shape[1:] != (m, 3, 4) or projections.shape[0] not in (1, n):
        raise InputError(f"projections: expected ({n} or 1, {m}, 3, 4), got {tuple(projections.shape)}")
