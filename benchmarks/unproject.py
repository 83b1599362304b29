"""Unprojection: workloads, the published algorithm and floors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bkind3d_kernels import VoxelGrid, unproject

from . import peers
from .problems import EXP, FLOATING, Floor, Function, Peer, Problem, Workload


def _workload(
    name: str, n: int, m: int, c: int, size: tuple[int, int], volume: tuple[int, int, int], **kind: bool
) -> Workload:
    return Workload(name, {"N": n, "M": m, "C": c, "map": size, "volume": volume}, **kind)


def _cube(size: int) -> tuple[int, int, int]:
    return (size, size, size)


BASE = {"N": 1, "M": 4, "C": 32, "map": (64, 64), "volume": _cube(64)}
WORKLOADS = (
    _workload("paper", 1, 4, 32, (64, 64), _cube(64)),
    _workload("batch-8", 8, 4, 32, (64, 64), _cube(64), gpu=True),
    _workload("rat-pair", 2, 6, 32, (64, 64), _cube(64)),
    _workload("batch", 5, 4, 32, (96, 96), _cube(64)),
    _workload("room", 1, 5, 15, (128, 240), (80, 80, 20)),
    _workload("few-channels", 4, 6, 3, (256, 256), _cube(80)),
    _workload("many-channels", 1, 4, 128, (64, 64), _cube(64)),
    _workload("fine", 1, 4, 32, (64, 64), _cube(128)),
    _workload("finest", 1, 6, 32, (64, 64), _cube(192)),
    *(_workload(f"volume-{b}", 1, 4, 32, (64, 64), _cube(b), sweep=True) for b in (16, 32, 48, 96)),
    *(_workload(f"views-{m}", 1, m, 32, (64, 64), _cube(64), sweep=True) for m in (2, 8, 16)),
    *(_workload(f"channels-{c}", 1, 4, c, (64, 64), _cube(64), sweep=True) for c in (8, 16, 64)),
    *(_workload(f"map-{s}", 1, 4, 32, (s, s), _cube(64), sweep=True) for s in (32, 128, 256)),
)
DTYPES = FLOATING
SMALLEST = _workload("smallest", 1, 2, 4, (8, 8), _cube(6))
# Channels last; channels first; channels last, with gradients to the cameras too; the mean over the views that see a
# voxel instead of the softmax over all.
VARIANTS = ("channels-last", "channels-first", "camera-gradients", "mean")
PUBLISHED = VARIANTS[:3]
SLICES = {"N": ({"features": 0, "projections": 0}, 0), "C": ({"features": 2}, 1)}
HUGE = (
    (_workload("huge-batch", 265, 2, 32, (16, 16), _cube(64)), torch.bfloat16, "N"),
    (_workload("huge-sample", 1, 2, 264, (16, 16), _cube(204)), torch.bfloat16, "C"),
)

RADIUS = 5.0  # of the ring of cameras; the longest side of the volume is 2


def ring(m: int, size: tuple[int, int]) -> Tensor:
    """(M, 3, 4): cameras on a ring around the origin, somewhat above it, that see most of a cube of side 2."""
    h, w = size
    focal = 0.36 * RADIUS * min(h, w)
    k = torch.tensor([[focal, 0.0, (w - 1) / 2], [0.0, focal, (h - 1) / 2], [0.0, 0.0, 1.0]]).double()
    cameras = []
    for index in range(m):
        angle, height = 0.3 + 2 * math.pi * index / m, 0.8 + 0.4 * (index % 3)
        center = torch.tensor([math.cos(angle), math.sin(angle), 0.0]).double() * math.sqrt(RADIUS**2 - height**2)
        center[2] = height
        z = -center / center.norm()
        x = F.normalize(torch.linalg.cross(z, torch.tensor([0.0, 0.0, 1.0]).double()), dim=0)
        rotation = torch.stack([x, torch.linalg.cross(z, x), z])
        cameras.append(k @ torch.cat([rotation, -(rotation @ center)[:, None]], dim=1))
    return torch.stack(cameras)


def make(workload: Workload, variant: str, dtype: torch.dtype, device: str) -> Problem:
    n, m, c, (h, w) = workload.N, workload.M, workload.C, workload.map
    generator = torch.Generator().manual_seed(0)
    if variant == "channels-first":
        features = torch.randn(n, m, c, h, w, generator=generator)
    else:
        features = torch.randn(n, m, h, w, c, generator=generator).permute(0, 1, 4, 2, 3)
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    longest = max(workload.volume)
    grid = VoxelGrid.box(torch.zeros(3, dtype=geometry), [2 * s / longest for s in workload.volume], workload.volume)
    inputs = {
        "features": features.to(device=device, dtype=dtype),
        "projections": ring(m, (h, w)).expand(n, -1, -1, -1).to(device=device, dtype=geometry).contiguous(),
        "grid": grid.to(device),
    }
    if variant == "mean":
        inputs["mean"] = torch.ones((), device=device)  # its presence asks for it
    return Problem(inputs, ("features", "projections") if variant == "camera-gradients" else ("features",))


def apply(inputs: dict[str, Any], workload: Workload, backend: str) -> list[Tensor]:
    options: dict[str, Any] = {"aggregation": "mean", "unseen": "exclude"} if "mean" in inputs else {}
    return [unproject(inputs["features"], inputs["projections"], inputs["grid"], backend=backend, **options)]


def published(inputs: dict[str, Any], workload: Workload) -> Function:
    """A volume of coordinates made once; then each view's samples of all voxels, stacked, and a softmax over views."""
    features, projections, grid = inputs["features"], inputs["projections"], inputs["grid"]
    n, m, c, h, w = features.shape
    points = grid.coordinates().reshape(1, -1, 3).expand(n, -1, -1)
    points = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)  # (N, XYZ, 4)

    def run() -> list[Tensor]:
        maps = features.to(points.dtype)
        views = []
        for view in range(m):
            x, y, depth = (points @ projections[:, view].mT).unbind(-1)  # (N, XYZ) each
            valid = depth > 0
            depth = depth.where(valid, 1.0)
            pixels = torch.stack([2 * (x / depth) / (w - 1) - 1, 2 * (y / depth) / (h - 1) - 1], dim=-1)
            samples = F.grid_sample(maps[:, view], pixels.unsqueeze(2), align_corners=True)  # (N, C, XYZ, 1)
            views.append(samples.squeeze(-1).where(valid.unsqueeze(1), 0.0))
        values = torch.stack(views, dim=1).view(n, m, c, *grid.shape)  # (N, M, C, X, Y, Z)
        return [(values.softmax(1) * values).sum(1).to(features.dtype)]

    return run


def published_bytes(workload: Workload) -> int:
    """Samples of every view and all stacked, their softmax, its product with them, and the volume."""
    volume = workload.N * workload.C * math.prod(workload.volume) * 4
    return (4 * workload.M + 1) * volume


def _peer(run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[dict[str, Any], Workload], Function]:
    """A peer's function of features, cameras and a volume of coordinates that is made once."""

    def make(inputs: dict[str, Any], workload: Workload) -> Function:
        features, projections = inputs["features"], inputs["projections"]
        points = peers.homogeneous(inputs["grid"].coordinates()).expand(workload.N, -1, -1, -1, -1)
        return lambda: [run(features.to(points.dtype), projections, points).to(features.dtype)]

    return make


def _peer_bytes(workload: Workload) -> int:
    """Two volumes of every view and one without views."""
    return (2 * workload.M + 1) * workload.N * workload.C * math.prod(workload.volume) * 4


PEERS = {
    "learnable-triangulation": Peer(
        "Learnable Triangulation", _peer(peers.learnable_triangulation), _peer_bytes, PUBLISHED
    ),
    "voxelpose": Peer("VoxelPose", _peer(peers.voxelpose), _peer_bytes, ("mean",)),
}


def floor(workload: Workload, variant: str, mode: str, itemsize: int) -> Floor:
    """Features are read once (twice for both: nothing per view is kept), volumes and gradients pass once."""
    if mode == "both":
        return floor(workload, variant, "forward", itemsize) + floor(workload, variant, "backward", itemsize)
    voxels = workload.N * math.prod(workload.volume)
    features = workload.N * workload.M * workload.C * math.prod(workload.map) * itemsize
    volume = voxels * workload.C * itemsize
    # Per voxel and view: three rows of Q incremented along the grid's axis (3), 1/depth and two products (3), two
    # floors, two fractions, four weights (10).
    project = voxels * workload.M * 16
    # Per voxel, view and channel: four taps as multiply-adds (8); the softmax's maximum, difference, exp, sum and
    # weighted sum (1 + 1 + EXP + 1 + 2). Per voxel and channel: one division.
    sample = voxels * workload.M * workload.C * 8
    softmax = voxels * workload.M * workload.C * (EXP + 5) + voxels * workload.C
    if variant == "mean":
        return _floor_of_mean(workload, mode, features, volume, project + sample)
    if mode == "forward":
        return Floor(features, volume, project + sample + softmax)
    # Sampled again rather than kept; then g·w·(1 + v − V) (4) and four taps of the gradient as multiply-adds (8).
    operations = project + sample + softmax + voxels * workload.M * workload.C * 12
    if variant == "camera-gradients":
        operations += voxels * workload.M * workload.C * 12  # two slopes from the four taps, two multiply-adds
    return Floor(features + volume, features, operations)


def _floor_of_mean(workload: Workload, mode: str, features: int, volume: int, operations: int) -> Floor:
    """One addition for each view and one division; its gradient does not ask for the samples again."""
    if mode == "forward":
        voxels = workload.N * workload.C * math.prod(workload.volume)
        return Floor(features, volume, operations + voxels * (workload.M + 1))
    return Floor(volume, features, operations)
