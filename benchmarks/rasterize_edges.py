"""Edge maps: workloads, the published algorithm and floors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bkind3d_kernels import rasterize_edges
from bkind3d_kernels.geometry import all_pairs, rescale_points

from . import peers
from .problems import EXP, Floor, Function, Peer, Problem, Workload

# σ in pixels for each size of map: those of the training package's decoder (`model.edge_sigmas`), and 256 like 128.
SIGMAS = {8: 1.8, 16: 3.6, 32: 2.3, 64: 4.5, 128: 2.9, 256: 5.8}
PYRAMID = (8, 16, 32, 64, 128)


def _workload(name: str, n: int, j: int, sizes: int | tuple[int, ...], **kind: bool) -> Workload:
    return Workload(name, {"N": n, "J": j, "sizes": (sizes,) if isinstance(sizes, int) else sizes}, **kind)


BASE = {"N": 1, "J": 15, "sizes": (64,)}
WORKLOADS = (
    _workload("paper-one", 1, 15, PYRAMID),  # one view alone: what the published algorithm can hold in memory
    _workload("paper", 8, 15, PYRAMID),
    _workload("paper-30", 8, 30, PYRAMID),
    _workload("batch-64", 64, 30, 128, gpu=True),
    _workload("batch", 64, 32, 128),
    _workload("large", 12, 15, 256),
    _workload("large-30", 12, 30, 256),
    _workload("many-edges", 8, 64, 128),
    *(_workload(f"keypoints-{j}", 1, j, 64, sweep=True) for j in (4, 8, 15, 30, 60)),
    *(_workload(f"size-{s}", 1, 15, s, sweep=True) for s in (16, 32, 128, 256)),
)
DTYPES = (torch.float32, torch.float64)
SMALLEST = _workload("smallest", 1, 3, 8)
VARIANTS = ("plain",)
PUBLISHED = VARIANTS
SLICES = {"N": ({"keypoints": 0}, 0)}
HUGE = ((_workload("huge", 32800, 3, 256), torch.float32, "N"),)


def _sizes(workload: Workload) -> tuple[list[tuple[int, int]], list[float]]:
    return [(s, s) for s in workload.sizes], [SIGMAS[s] for s in workload.sizes]


def make(workload: Workload, variant: str, dtype: torch.dtype, device: str) -> Problem:
    generator = torch.Generator().manual_seed(0)
    pairs = workload.J * (workload.J - 1) // 2
    keypoints = (0.1 + 0.8 * torch.rand(workload.N, workload.J, 2, generator=generator)) * workload.sizes[0] - 0.5
    weights = F.softplus(0.8 + 1.2 * torch.randn(pairs, generator=generator))
    inputs = {"keypoints": keypoints.to(device=device, dtype=dtype), "weights": weights.to(device=device, dtype=dtype)}
    return Problem(inputs, ("keypoints", "weights"))


def apply(inputs: dict[str, Any], workload: Workload, backend: str) -> list[Tensor]:
    sizes, sigmas = _sizes(workload)
    return rasterize_edges(inputs["keypoints"], inputs["weights"], sizes, sigmas, backend=backend)


def published(inputs: dict[str, Any], workload: Workload) -> Function:
    """Distance of every pixel to points sampled along every segment, as many as the map is high; minimum, exp, max."""
    keypoints, weights = inputs["keypoints"], inputs["weights"]
    sizes, sigmas = _sizes(workload)
    first, second = all_pairs(workload.J, keypoints.device).unbind(1)

    def draw(size: tuple[int, int], sigma: float) -> Tensor:
        points = rescale_points(keypoints, sizes[0], size)
        start, end = points[:, first, None], points[:, second, None]  # (N, E, 1, 2)
        t = torch.linspace(0, 1, size[0], dtype=points.dtype, device=points.device)[:, None]
        samples = (1 - t) * start + t * end  # (N, E, H, 2), H samples
        y = torch.arange(size[0], dtype=points.dtype, device=points.device)[:, None]
        x = torch.arange(size[1], dtype=points.dtype, device=points.device)[:, None]
        dx = (x - samples[..., None, :, 0]).square()  # (N, E, W, H)
        dy = (y - samples[..., None, :, 1]).square()  # (N, E, H, H)
        distance = (dy.unsqueeze(3) + dx.unsqueeze(2)).min(-1).values  # (N, E, H, W, H) -> (N, E, H, W)
        return (weights[:, None, None] * torch.exp(-distance / sigma**2)).amax(1)

    return lambda: [draw(size, sigma) for size, sigma in zip(sizes, sigmas)]


def published_bytes(workload: Workload) -> int:
    """Distances of the largest map's pixels to all sampled points; backward their gradient in their place."""
    return workload.N * (workload.J * (workload.J - 1) // 2) * max(workload.sizes) ** 3 * 4


def _autolink(inputs: dict[str, Any], workload: Workload) -> Function:
    keypoints, weights = inputs["keypoints"], inputs["weights"]
    pairs = all_pairs(workload.J, keypoints.device)
    return lambda: peers.autolink(keypoints, weights, pairs, *_sizes(workload))


def _autolink_bytes(workload: Workload) -> int:
    """Three offsets of two numbers for every edge and pixel of every map."""
    return 6 * 4 * workload.N * (workload.J * (workload.J - 1) // 2) * sum(size**2 for size in workload.sizes)


PEERS = {"autolink": Peer("AutoLink", _autolink, _autolink_bytes, VARIANTS)}


def floor(workload: Workload, variant: str, mode: str, itemsize: int) -> Floor:
    """One edge per pixel, the winner: edges that cannot win in a tile may be left out unseen.

    So this does not grow with the number of edges, and nothing can reach it.
    """
    if mode == "both":
        return floor(workload, variant, "forward", itemsize) + floor(workload, variant, "backward", itemsize)
    pixels = workload.N * sum(s * s for s in workload.sizes)
    # Along and across (4 + 2), what lies beyond the ends (3), the squared distance (3).
    distance = 12
    if mode == "forward":
        return Floor(0, pixels * itemsize, pixels * (distance + EXP + 1))
    # Its derivative with respect to two ends and a weight: the nearest point's two shares, five multiply-adds.
    return Floor(pixels * itemsize, 0, pixels * (distance + EXP + 14))
