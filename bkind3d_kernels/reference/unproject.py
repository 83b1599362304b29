"""Unprojection in plain PyTorch.

One slab of voxels at a time: project its voxels into every view, sample the features there, aggregate over views.
The slab size does not depend on the number of samples or views, and where autograd would keep much the slab is
checkpointed: only the volume itself is then kept, and the samples are taken again in the backward pass.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import unavailable

__all__ = ["run", "unavailable"]

# Voxels in a slab: several times a feature map's pixels, since each slab's backward writes one gradient of that size.
SLAB_MAPS, SLAB_MIN = 4, 4096
CHECKPOINT_ELEMENTS = 2**26  # per-view samples that may be kept for backward: 256 MiB in float32


def run(
    features: Tensor,
    q: Tensor,
    shape: tuple[int, int, int],
    aggregation: str,
    unseen: str,
    view_mask: Tensor | None,
    view_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Volume (N, C, X, Y, Z) in the dtype of the features, and counts (N, X, Y, Z) uint8.

    Args:
        features: (N, M, C, H, W).
        q: (N, M, 3, 4), voxel index to homogeneous feature-map pixel, float32 or float64.
        shape: (X, Y, Z).
        aggregation: "softmax", "mean", "sum", "max" or "weighted".
        unseen: "zero" or "exclude".
        view_mask: (N, M) bool or None.
        view_weights: (N, M, C) in the dtype of ``q``, given exactly with "weighted".
    """
    n, m, c, h, w = features.shape
    voxels = shape[0] * shape[1] * shape[2]
    if view_mask is None:
        view_mask = torch.ones(n, m, dtype=torch.bool, device=features.device)
    # The compiler fuses and recomputes by itself; a Python loop would only be unrolled.
    tracing = torch.compiler.is_compiling()
    step = voxels if tracing else min(voxels, max(SLAB_MAPS * h * w, SLAB_MIN))
    slab = partial(_slab, shape=shape, aggregation=aggregation, unseen=unseen)
    if not tracing and torch.is_grad_enabled() and n * m * c * voxels > CHECKPOINT_ELEMENTS:
        slab = partial(checkpoint, slab, use_reentrant=False, preserve_rng_state=False)
    maps = features.to(q.dtype)
    pieces = [slab(maps, q, view_mask, view_weights, i, min(i + step, voxels)) for i in range(0, voxels, step)]
    volume = torch.cat([v for v, _ in pieces], dim=1).to(features.dtype)  # (N, XYZ, C)
    counts = torch.cat([s for _, s in pieces], dim=1)  # (N, XYZ)
    # (N, X, Y, Z, C) in memory, so the permuted tensor is channels_last_3d.
    return volume.view(n, *shape, c).permute(0, 4, 1, 2, 3), counts.view(n, *shape)


def _slab(
    maps: Tensor,
    q: Tensor,
    view_mask: Tensor,
    view_weights: Tensor | None,
    start: int,
    stop: int,
    *,
    shape: tuple[int, int, int],
    aggregation: str,
    unseen: str,
) -> tuple[Tensor, Tensor]:
    """Voxels start to stop in the order of memory: volume (N, S, C) and counts (N, S)."""
    u, v, seen = _project(q, view_mask, shape, start, stop, (maps.shape[-2], maps.shape[-1]))
    values = _sample(maps, u, v, seen)  # (N, M, C, S)
    volume = _aggregate(values, seen.unsqueeze(2), view_weights, aggregation, unseen)  # (N, C, S)
    return volume.transpose(1, 2).contiguous(), seen.sum(1, dtype=torch.uint8)


def _project(
    q: Tensor, view_mask: Tensor, shape: tuple[int, int, int], start: int, stop: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel coordinates u, v (N, M, S) of the voxels in each view, and whether the view sees them (N, M, S) bool."""
    index = torch.arange(start, stop, device=q.device)
    i, j, k = index // (shape[1] * shape[2]), index // shape[2] % shape[1], index % shape[2]
    # Each coordinate is a row of Q times (i, j, k, 1); written out, since a matrix product may round to TF32 or bf16.
    rows = q.unsqueeze(-1).unbind(-2)  # four (N, M, 3, 1)
    x, y, depth = (rows[0] * i + rows[1] * j + rows[2] * k + rows[3]).unbind(-2)  # (N, M, S) each
    height, width = size
    with torch.no_grad():
        u, v = x / depth, y / depth
        # A tap is inside where floor(u) is in -1 .. W-1. A NaN compares false: unseen.
        seen = (depth > 0) & (u >= -1) & (u < width) & (v >= -1) & (v < height) & view_mask.unsqueeze(-1)
    # Unseen voxels are moved off before the division, so that no infinity meets a zero gradient.
    x, y, depth = x.where(seen, -2.0), y.where(seen, -2.0), depth.where(seen, 1.0)
    return x / depth, y / depth, seen


def _sample(maps: Tensor, u: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Bilinear samples (N, M, C, S) of maps (N, M, C, H, W) at pixels u, v (N, M, S), zero padding, 0 where unseen."""
    n, m, c, h, w = maps.shape
    s = u.shape[-1]
    # align_corners=False: -1 and 1 are the outer borders of the image, so a map of width 1 is no special case.
    grid = torch.stack([(2 * u + 1) / w - 1, (2 * v + 1) / h - 1], dim=-1)  # (N, M, S, 2)
    values = F.grid_sample(
        maps.reshape(n * m, c, h, w),
        grid.reshape(n * m, s, 1, 2),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return values.view(n, m, c, s).where(seen.unsqueeze(2), 0.0)


def _aggregate(values: Tensor, seen: Tensor, weights: Tensor | None, aggregation: str, unseen: str) -> Tensor:
    """Reduce values (N, M, C, S), zero where not seen (N, M, 1, S), over the views: (N, C, S)."""
    exclude = unseen == "exclude"
    if aggregation == "sum":
        return values.sum(1)
    if aggregation == "mean":
        return values.sum(1) / (seen.sum(1).clamp(min=1) if exclude else values.shape[1])
    if aggregation == "max":
        return _max(values, seen, exclude)
    if aggregation == "weighted":
        assert weights is not None
        return _weighted(values, seen, weights.unsqueeze(-1), exclude)
    if not exclude:
        return (values.softmax(1) * values).sum(1)
    logits = values.where(seen, -torch.inf)
    # A voxel seen by none has no softmax; its zeros do.
    logits = logits.where(seen.any(1, keepdim=True), 0.0)
    return (logits.softmax(1) * values).sum(1)


def _max(values: Tensor, seen: Tensor, exclude: bool) -> Tensor:
    """Largest value over the views; ties go to the lowest view index."""
    candidates = values.where(seen, -torch.inf) if exclude else values
    best = candidates[:, 0]
    for candidate in candidates.unbind(1)[1:]:
        best = torch.where(candidate > best, candidate, best)
    return best.where(seen.any(1), 0.0) if exclude else best


def _weighted(values: Tensor, seen: Tensor, weights: Tensor, exclude: bool) -> Tensor:
    """Σ w v over the views; with ``exclude`` divided by the Σ w of the seeing views, 0 where that is 0."""
    total = (weights * values).sum(1)
    if not exclude:
        return total
    norm = (weights * seen).sum(1)
    return torch.where(norm != 0, total / norm.where(norm != 0, 1.0), 0.0)
