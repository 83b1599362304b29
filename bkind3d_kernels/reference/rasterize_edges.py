"""Edge maps in plain PyTorch.

The largest of w·exp(−d²/σ²) over the edges is the exponential of the largest log w − d²/σ². So the winning edge of
each pixel is found first, a few edges at a time and without autograd, and only the winner's value is computed with it:
nothing of size edges × pixels is ever stored, and the gradient is exact, since it goes to the winner alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import rescale_points
from . import unavailable

__all__ = ["run", "unavailable"]

# Edges × pixels visited at once: 1 MiB in float32 stays in a core's cache; a GPU needs more to be busy.
CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 2**18, 2**26
MIN_LENGTH_SQUARED = 1e-12  # pixels²: a shorter segment is a point


def run(
    keypoints: Tensor, weights: Tensor, edges: Tensor, sizes: list[tuple[int, int]], sigmas: list[float]
) -> list[Tensor]:
    """Maps [(N, H, W), ...] in the dtype of the keypoints.

    Args:
        keypoints: (N, K, 2) in pixels of the first size, float32 or float64.
        weights: (N, E), dtype of the keypoints.
        edges: (E, 2) int64.
        sizes: (H, W) of each map.
        sigmas: σ of each map, in its own pixels.
    """
    return [
        _map(rescale_points(keypoints, sizes[0], size), weights, edges, size, sigma)
        for size, sigma in zip(sizes, sigmas)
    ]


def _map(keypoints: Tensor, weights: Tensor, edges: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """One map (N, H, W)."""
    n, (h, w) = keypoints.shape[0], size
    if edges.shape[0] == 0 or n == 0:
        return keypoints.new_zeros(n, h, w) + 0 * (keypoints.sum() + weights.sum())
    with torch.no_grad():
        drawn, winner = _winner(keypoints, weights, edges, size, sigma)
    pairs = edges[winner.flatten(1)]  # (N, HW, 2)
    a = keypoints.gather(1, pairs[..., :1].expand(-1, -1, 2))  # (N, HW, 2)
    b = keypoints.gather(1, pairs[..., 1:].expand(-1, -1, 2))
    y = torch.arange(h, dtype=a.dtype, device=a.device).repeat_interleave(w)
    x = torch.arange(w, dtype=a.dtype, device=a.device).repeat(h)
    distance = squared_distance(torch.stack([x, y], dim=-1), a, b)  # (N, HW)
    value = weights.gather(1, winner.flatten(1)) * torch.exp(-distance / sigma**2)
    return value.view(n, h, w).where(drawn, 0.0)


def squared_distance(p: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of points p to the segments a–b, (..., 2) each -> (...); finite gradients at zero length."""
    ab, ap, bp = b - a, p - a, p - b
    length = (ab * ab).sum(-1, keepdim=True)
    proper = length > MIN_LENGTH_SQUARED
    t = ((ap * ab).sum(-1, keepdim=True) / length.where(proper, 1.0)).clamp(0, 1).where(proper, 0.0)
    s = ((bp * -ab).sum(-1, keepdim=True) / length.where(proper, 1.0)).clamp(0, 1)  # 1 - t
    # From the nearer end: the other may be far outside, and exact where the nearest point is an end.
    offset = torch.where(t < 0.5, ap - t * ab, bp + s * ab)
    return (offset * offset).sum(-1)


def _winner(
    keypoints: Tensor, weights: Tensor, edges: Tensor, size: tuple[int, int], sigma: float
) -> tuple[Tensor, Tensor]:
    """Per pixel, whether an edge is drawn there and the index of the one with the largest log w − d²/σ², (N, H, W)."""
    n, (h, w), count = keypoints.shape[0], size, edges.shape[0]
    limit = CHUNK_ELEMENTS if keypoints.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    step = count if torch.compiler.is_compiling() else max(1, limit // (n * h * w))
    best = keypoints.new_full((n, h, w), -torch.inf)
    winner = torch.zeros(n, h, w, dtype=torch.int64, device=keypoints.device)
    for start in range(0, count, step):
        part = slice(start, start + step)
        score, index = _scores(keypoints, weights[:, part], edges[part], size, sigma).max(1)
        # Strictly larger: ties stay with the lowest index. A NaN is kept, so that it is seen in the map.
        better = (score > best) | score.isnan()
        best, winner = torch.where(better, score, best), torch.where(better, index + start, winner)
    return best != -torch.inf, winner


def _scores(keypoints: Tensor, weights: Tensor, edges: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """log w − d²/σ² of every edge at every pixel, (N, E, H, W); −inf for edges that are not drawn.

    In the segment's own frame d² = across² + (along − clamp(along, 0, length))², and both coordinates are a sum of a
    term in x and a term in y.
    """
    a, b = keypoints[:, edges[:, 0]] / sigma, keypoints[:, edges[:, 1]] / sigma  # (N, E, 2)
    # Measured from the end nearer to the map's centre: one far outside would cost digits.
    centre = a.new_tensor([size[1] / (2 * sigma), size[0] / (2 * sigma)])
    swap = ((b - centre).square().sum(-1) < (a - centre).square().sum(-1)).unsqueeze(-1)
    a, b = torch.where(swap, b, a), torch.where(swap, a, b)
    ab = b - a
    length = ab.norm(dim=-1)
    unit = ab / length.clamp(min=torch.finfo(a.dtype).tiny).unsqueeze(-1)
    unit = torch.where((length > 0).unsqueeze(-1), unit, unit.new_tensor([1.0, 0.0]))
    ux, uy = unit[..., 0, None], unit[..., 1, None]
    x = torch.arange(size[1], dtype=a.dtype, device=a.device) / sigma - a[..., :1]  # (N, E, W)
    y = torch.arange(size[0], dtype=a.dtype, device=a.device) / sigma - a[..., 1:]  # (N, E, H)
    along = (x * ux).unsqueeze(-2) + (y * uy).unsqueeze(-1)  # (N, E, H, W)
    across = (y * ux).unsqueeze(-1) - (x * uy).unsqueeze(-2)
    beyond = along - torch.minimum(along.clamp(min=0), length[..., None, None])
    log_weight = torch.where(weights <= 0, -torch.inf, weights.log())[..., None, None]
    score = torch.addcmul(log_weight, across, across, value=-1)
    return torch.addcmul(score, beyond, beyond, value=-1)
