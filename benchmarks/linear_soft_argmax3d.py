"""A 1×1×1 convolution with a 3D soft-argmax: workloads, the published algorithm and floors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bkind3d_kernels import VoxelGrid, linear_soft_argmax3d

from . import peers
from .problems import EXP, FLOATING, Floor, Function, Peer, Problem, Workload


def _workload(name: str, n: int, c: int, j: int, size: int, sweep: bool = False) -> Workload:
    return Workload(name, {"N": n, "C": c, "J": j, "volume": (size, size, size)}, sweep)


BASE = {"N": 2, "C": 32, "J": 30, "volume": (64, 64, 64)}
WORKLOADS = (
    _workload("paper", 2, 32, 15, 64),
    _workload("paper-30", 2, 32, 30, 64),
    _workload("fine", 2, 32, 30, 128),
    _workload("room", 1, 64, 23, 80),
    *(_workload(f"volume-{b}", 2, 32, 30, b, sweep=True) for b in (16, 32, 48, 96)),
    *(_workload(f"keypoints-{j}", 2, 32, j, 64, sweep=True) for j in (4, 8, 60)),
    *(_workload(f"channels-{c}", 2, c, 30, 64, sweep=True) for c in (8, 16, 64, 128)),
)
DTYPES = FLOATING
SMALLEST = _workload("smallest", 1, 4, 2, 6)
VARIANTS = ("channels-last", "channels-first", "peak-and-covariance")
PUBLISHED = VARIANTS


def make(workload: Workload, variant: str, dtype: torch.dtype, device: str) -> Problem:
    """Logits have a deviation of 4, as for the soft-argmax alone; the parameters are float32 beside half features."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(workload.N, workload.C, *workload.volume, generator=generator).to(dtype)
    if variant != "channels-first":
        features = features.contiguous(memory_format=torch.channels_last_3d)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    weight = 4 * workload.C**-0.5 * torch.randn(workload.J, workload.C, generator=generator)
    bias = torch.randn(workload.J, generator=generator)
    grid = VoxelGrid.cube(torch.zeros(3, dtype=real), 2.0, workload.volume[0]).to(device)
    inputs = {"features": features.to(device), "weight": weight.to(device, real), "bias": bias.to(device, real)}
    if variant == "peak-and-covariance":
        inputs["moments"] = torch.ones((), device=device)  # its presence asks for them
    # The gradient of the bias is zero.
    return Problem({**inputs, "grid": grid}, ("features", "weight"))


def apply(inputs: dict[str, Any], workload: Workload, backend: str) -> list[Tensor]:
    given = (inputs[name] for name in ("features", "weight", "bias", "grid"))
    if "moments" in inputs:
        return list(linear_soft_argmax3d(*given, return_peak=True, return_covariance=True, backend=backend))
    return [linear_soft_argmax3d(*given, backend=backend)]


def published(inputs: dict[str, Any], workload: Workload) -> Function:
    """A convolution, a softmax over the volume, and its product with a volume of coordinates made once."""
    features, weight, bias = inputs["features"], inputs["weight"], inputs["bias"]
    coordinates = inputs["grid"].coordinates().expand(workload.N, -1, -1, -1, -1).contiguous()  # (N, X, Y, Z, 3)

    def run() -> list[Tensor]:
        kernel, offset = weight[:, :, None, None, None].to(features.dtype), bias.to(features.dtype)
        logits = F.conv3d(features, kernel, offset).to(coordinates.dtype)
        probability = logits.flatten(2).softmax(-1).view(logits.shape)
        points = torch.einsum("njxyz,nxyzc->njc", probability, coordinates)
        if "moments" not in inputs:
            return [points]
        distance = coordinates.unsqueeze(1) - points[:, :, None, None, None]  # (N, J, X, Y, Z, 3)
        covariance = torch.einsum("njxyz,njxyza,njxyzb->njab", probability, distance, distance)
        return [points, probability.amax((2, 3, 4)), covariance]

    return run


def published_bytes(workload: Workload) -> int:
    """The probabilities, and in the backward pass their gradient, that of the logits and that of the features."""
    return 4 * workload.N * (3 * workload.J + workload.C) * workload.volume[0] ** 3


def _kornia(inputs: dict[str, Any], workload: Workload) -> Function:
    """A convolution of torch's, whose logits go to kornia's functions."""
    features, weight, bias, grid = (inputs[name] for name in ("features", "weight", "bias", "grid"))

    def run() -> list[Tensor]:
        kernel, offset = weight[:, :, None, None, None].to(features.dtype), bias.to(features.dtype)
        logits = F.conv3d(features, kernel, offset).to(grid.affine.dtype)
        return [grid.index_to_world(peers.kornia(logits))]

    return run


PEERS = {"kornia": Peer("kornia", _kornia, published_bytes, VARIANTS[:2], package="kornia")}


def floor(workload: Workload, variant: str, mode: str, itemsize: int) -> Floor:
    """Features pass once forward; backward they are read once and their gradient is written once. No logits."""
    if mode == "both":
        return floor(workload, variant, "forward", itemsize) + floor(workload, variant, "backward", itemsize)
    voxels = workload.N * workload.volume[0] ** 3
    count, size = voxels * workload.J, voxels * workload.C * itemsize
    product = 2 * count * workload.C
    # Per logit, as for the soft-argmax alone: the running maximum, the difference, exp, the sum, and one multiply-add
    # for the moment along a row; with the covariance another.
    if mode == "forward":
        return Floor(size, 0, product + count * (1 + 1 + EXP + 1 + (4 if variant == "peak-and-covariance" else 2)))
    # Three products: the logits again, the gradient of the features and that of the weight. Per logit: difference, exp,
    # a polynomial in the row's index as multiply-adds, the product of both.
    slope = 4 if variant == "peak-and-covariance" else 2
    return Floor(size, size, 3 * product + count * (1 + EXP + slope + 1))
