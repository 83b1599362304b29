"""3D soft-argmax: workloads, the published algorithm and floors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bkind3d_kernels import VoxelGrid, soft_argmax3d

from . import peers
from .problems import EXP, FLOATING, Floor, Function, Peer, Problem, Workload


def _workload(name: str, n: int, j: int, size: int, sweep: bool = False) -> Workload:
    return Workload(name, {"N": n, "J": j, "volume": (size, size, size)}, sweep)


BASE = {"N": 2, "J": 30, "volume": (64, 64, 64)}
WORKLOADS = (
    _workload("paper", 2, 15, 64),
    _workload("paper-30", 2, 30, 64),
    _workload("fine", 2, 30, 128),
    _workload("room", 1, 23, 80),
    *(_workload(f"volume-{b}", 2, 30, b, sweep=True) for b in (16, 32, 48, 96)),
    *(_workload(f"keypoints-{j}", 2, j, 64, sweep=True) for j in (4, 8, 60)),
)
DTYPES = FLOATING
SMALLEST = _workload("smallest", 1, 2, 6)
VARIANTS = ("plain", "peak-and-covariance")
PUBLISHED = VARIANTS
SLICES = {"N": ({"logits": 0}, 0), "J": ({"logits": 1}, 1)}
HUGE = (
    (_workload("huge-batch", 520, 2, 128), torch.bfloat16, "N"),
    (_workload("huge-sample", 1, 36, 400), torch.bfloat16, "J"),
)


def make(workload: Workload, variant: str, dtype: torch.dtype, device: str) -> Problem:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(workload.N, workload.J, *workload.volume, generator=generator)
    center = torch.zeros(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    grid = VoxelGrid.cube(center, 2.0, workload.volume[0]).to(device)
    inputs = {"logits": logits.to(device=device, dtype=dtype), "grid": grid}
    if variant == "peak-and-covariance":
        inputs["moments"] = torch.ones((), device=device)  # its presence asks for them
    return Problem(inputs, ("logits",))


def apply(inputs: dict[str, Any], workload: Workload, backend: str) -> list[Tensor]:
    if "moments" in inputs:
        options = {"return_peak": True, "return_covariance": True}
        return list(soft_argmax3d(inputs["logits"], inputs["grid"], backend=backend, **options))
    return [soft_argmax3d(inputs["logits"], inputs["grid"], backend=backend)]


def published(inputs: dict[str, Any], workload: Workload) -> Function:
    """A volume of coordinates made once; then a softmax over the volume and its product with the coordinates."""
    logits = inputs["logits"]
    coordinates = inputs["grid"].coordinates().expand(workload.N, -1, -1, -1, -1).contiguous()  # (N, X, Y, Z, 3)

    def run() -> list[Tensor]:
        n, j = logits.shape[:2]
        values = logits.to(coordinates.dtype)
        probability = values.reshape(n, j, -1).softmax(-1).view_as(values)
        points = torch.einsum("njxyz,nxyzc->njc", probability, coordinates)
        if "moments" not in inputs:
            return [points]
        offset = coordinates.unsqueeze(1) - points[:, :, None, None, None]  # (N, J, X, Y, Z, 3)
        covariance = torch.einsum("njxyz,njxyza,njxyzb->njab", probability, offset, offset)
        return [points, probability.amax((2, 3, 4)), covariance]

    return run


def published_bytes(workload: Workload) -> int:
    """The probabilities, and in the backward pass their gradient and that of the logits."""
    return 3 * 4 * workload.N * workload.J * workload.volume[0] ** 3


def _kornia(inputs: dict[str, Any], workload: Workload) -> Function:
    logits, grid = inputs["logits"], inputs["grid"]
    return lambda: [grid.index_to_world(peers.kornia(logits.to(grid.affine.dtype)))]


PEERS = {"kornia": Peer("kornia", _kornia, published_bytes, ("plain",), package="kornia")}


def floor(workload: Workload, variant: str, mode: str, itemsize: int) -> Floor:
    """Logits pass once forward; backward they are read once and their gradient is written once."""
    if mode == "both":
        return floor(workload, variant, "forward", itemsize) + floor(workload, variant, "backward", itemsize)
    count = workload.N * workload.J * workload.volume[0] ** 3
    # Per logit: the running maximum, the difference, exp, the sum, and one multiply-add for the moment along a row
    # (those along the other axes are taken from the sums of rows).
    operations = count * (1 + 1 + EXP + 1 + 2)
    if variant == "peak-and-covariance":
        operations += count * 2  # the second moment along a row
    if mode == "forward":
        return Floor(count * itemsize, 0, operations)
    # Per logit: difference, exp, a polynomial in the row's index as multiply-adds, the product of both.
    return Floor(count * itemsize, count * itemsize, count * (1 + EXP + (4 if variant != "plain" else 2) + 1))
