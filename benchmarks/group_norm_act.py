"""Group normalisation with a residual and a ReLU: workloads, what is usual in its place, and floors."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bkind3d_kernels import group_norm_act

from .problems import FLOATING, Floor, Function, Peer, Problem, Workload


def _workload(name: str, n: int, c: int, size: tuple[int, ...], sweep: bool = False) -> Workload:
    return Workload(name, {"N": n, "C": c, "groups": 8, "map": size}, sweep)


BASE = {"N": 32, "C": 32, "groups": 8, "map": (40, 40)}
WORKLOADS = (
    _workload("maps", 32, 32, (40, 40)),
    _workload("bottleneck", 16, 64, (10, 10)),
    _workload("few-maps", 8, 32, (64, 64)),
    _workload("paper-volume", 2, 32, (64, 64, 33)),
    *(_workload(f"samples-{n}", n, 32, (40, 40), sweep=True) for n in (4, 128)),
    *(_workload(f"features-{c}", 32, c, (40, 40), sweep=True) for c in (8, 128)),
)
DTYPES = FLOATING
SMALLEST = Workload("smallest", {"N": 2, "C": 6, "groups": 3, "map": (5, 4)})
VARIANTS = ("plain", "residual")
PUBLISHED = VARIANTS
PEERS: dict[str, Peer] = {}
SLICES = {"N": ({"x": 0, "residual": 0}, 0)}


def make(workload: Workload, variant: str, dtype: torch.dtype, device: str) -> Problem:
    """Channels-last maps; the parameters are float32 beside half-precision maps."""
    generator = torch.Generator().manual_seed(0)
    shape = workload.N, workload.C, *workload.map
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    real = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {"x": torch.randn(shape, generator=generator) + 0.5}
    if variant == "residual":
        inputs["residual"] = torch.randn(shape, generator=generator)
    inputs = {name: value.to(dtype).contiguous(memory_format=last) for name, value in inputs.items()}
    inputs["weight"] = (1 + 0.3 * torch.randn(workload.C, generator=generator)).to(real)
    inputs["bias"] = (0.3 * torch.randn(workload.C, generator=generator)).to(real)
    return Problem({name: value.to(device) for name, value in inputs.items()}, tuple(inputs))


def apply(inputs: dict[str, Any], workload: Workload, backend: str) -> list[Tensor]:
    given = inputs["x"], workload.groups, inputs["weight"], inputs["bias"]
    return [group_norm_act(*given, residual=inputs.get("residual"), backend=backend)]


def published(inputs: dict[str, Any], workload: Workload) -> Function:
    """torch's group_norm, an addition and a ReLU, as networks have them."""

    def run() -> list[Tensor]:
        x = inputs["x"]
        y = F.group_norm(x, workload.groups, inputs["weight"].to(x.dtype), inputs["bias"].to(x.dtype))
        return [F.relu(y + inputs["residual"] if "residual" in inputs else y)]

    return run


def _elements(workload: Workload) -> int:
    return workload.N * workload.C * math.prod(workload.map)


def published_bytes(workload: Workload) -> int:
    """The normalised map, the result, and in the backward pass the gradients of the first and of x."""
    return 4 * 4 * _elements(workload)


def floor(workload: Workload, variant: str, mode: str, itemsize: int) -> Floor:
    """Forward x and the residual are read once and y is written; backward the gradient, x and with a residual y are
    read, and the gradients of x and of the residual written. About 10 and 15 operations an element.
    """
    if mode == "both":
        return floor(workload, variant, "forward", itemsize) + floor(workload, variant, "backward", itemsize)
    count, more = _elements(workload), variant == "residual"
    size = count * itemsize
    if mode == "forward":
        return Floor((1 + more) * size, size, 10 * count)
    return Floor((2 + more) * size, (1 + more) * size, 15 * count)
