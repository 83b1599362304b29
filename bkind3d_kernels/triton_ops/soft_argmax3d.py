"""3D soft-argmax in Triton: a pass over tiles of the volumes, the tiles of a volume merged, and the gradient.

``_tiles`` holds a tile of logits in registers, W voxels that follow each other in each of X planes (of 32 keypoints
where logits are channels last, else of one), and leaves its maximum, where that is, and sums of weights about that
voxel, so that neither a large volume nor a sharp peak cancels. ``_merge`` joins the tiles of a volume in float64 and in
a fixed order: no atomics, the same bits every time. ``_gradient`` recomputes the weights from the maximum; along x the
rest is a polynomial of degree 2, whose coefficients are found once for the X voxels above each other. Other memory
layouts are copied once; the gradient is contiguous. Saved for backward: the logits (an input) and the outputs.

Bound by bytes in float32: at (2, 30, 128, 128, 128) forward reads 503 MB, backward reads and writes as much each; the
sums of tiles are 0.1 % of that. A voxel takes 17 instructions of a lane forward (22 with the covariance or channels
last, 19 in bfloat16) and about 20 backward (sm_90): by that count arithmetic bounds half formats.
Measured on an H200 (benchmarks/results/2026-11-27-h200/times/results.csv, ``fine``): forward 0.289 ms, backward 0.804,
both in a training step 1.19. Of small volumes the time is that of the host's launches (docs/benchmarks.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import FEATURE_DTYPES, check_positive, describe
from ..registration import call
from . import INTERPRETED, NAMESPACE, Variant, define, double_bits, on_device, unavailable
from .scalars import ACCUMULATORS, NARROW, as_double

__all__ = ["run", "unavailable"]

GRID = 65535  # programs along the second and third axis of a launch, at most
# Voxels of a tile by (backward, double): 64 or 32 registers of each of 128 threads.
VOXELS = {(False, False): 8192, (True, False): 4096, (False, True): 4096, (True, True): 2048}
MERGED = 256  # tiles of a row that the merging kernel takes at a time


class Tile(NamedTuple):
    """Voxels of one program: ``w`` that follow each other in each of ``x`` planes of ``joints`` volumes."""

    w: int
    x: int
    joints: int


def device_tile(layout: str, itemsize: int, voxels: int) -> Tile:
    """On a GPU: 16 bytes of a plane for each of 128 threads, or 128 bytes of the gradient of 32 keypoints."""
    w, joints = {"rows": (2048 // itemsize, 1), "small": (128, 1), "last": (32, 32), "few": (128, 8)}[layout]
    return Tile(w, voxels // (w * joints), joints)


# ---- kernels ----


@triton.jit
def _voxels(tiles_of_plane, INDEX: tl.constexpr, W: tl.constexpr, X: tl.constexpr):
    """The first plane of this program's tile, and its places in each of its planes (W)."""
    tile = tl.program_id(0)
    x = (tile // tiles_of_plane * X).to(INDEX)
    return x, (tile % tiles_of_plane * W).to(INDEX) + tl.arange(0, W)


@triton.jit
def _load(logits, n, j, x, w, size_x, plane, joints, stride_n, stride_j, stride_v, ACC: tl.constexpr):
    """The tile (W, X, J), -inf outside the volume; the index of its voxels (W, X); and which are inside."""
    voxel = w[:, None] + x[None, :] * plane
    volume = logits + n * stride_n + j.to(tl.int64) * stride_j
    inside = ((w < plane)[:, None] & (x < size_x)[None, :])[:, :, None] & (j < joints)[None, None, :]
    tile = tl.load(volume[None, None, :] + (voxel * stride_v)[:, :, None], mask=inside, other=float("-inf"))
    return tile.to(ACC), voxel, inside


@triton.jit(do_not_specialize=["step", "scale", "size_x", "size_z", "tiles_of_plane", "first_n"])
def _tiles(
    logits,
    sums,
    argmaxes,
    step: tl.int64,
    scale,
    size_x,
    plane,
    size_z,
    joints,
    stride_n,
    stride_j,
    stride_v,
    tiles_of_plane,
    first_n,
    COVARIANCE: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    W: tl.constexpr,
    X: tl.constexpr,
    J: tl.constexpr,
):
    """Of each tile the maximum, where it is, and the sums of weight, weight d and weight d d^T about that voxel."""
    # Load the tile.
    x0, w = _voxels(tiles_of_plane, INDEX, W, X)
    j = tl.program_id(1) * J + tl.arange(0, J)
    n = first_n + tl.program_id(2).to(tl.int64)
    x = x0 + tl.arange(0, X)
    logit, _, _ = _load(logits, n, j, x, w, size_x, plane, joints, stride_n, stride_j, stride_v, ACC)

    # Maximum, its voxel, weights.
    maximum = tl.max(tl.max(logit, 1), 0)
    lowest = tl.min(tl.where(logit == maximum[None, None, :], tl.arange(0, X)[None, :, None], X), 1)
    argmax = tl.min((x0 + lowest) * plane + w[:, None], 0)
    # -inf from -inf would be NaN; the weights of a masked tile are 0.
    reference = tl.where(maximum == float("-inf"), 0.0, maximum)
    weight = tl.exp2((logit - reference[None, None, :]) * as_double(scale).to(ACC))

    # Sums about that voxel.
    origin_x = argmax // plane
    origin_w = argmax - origin_x * plane
    origin_y = origin_w // size_z
    origin_z = origin_w - origin_y * size_z
    y = w // size_z
    z = w - y * size_z
    dx = (tl.arange(0, X).to(ACC)[:, None] + (x0 - origin_x).to(ACC)[None, :])[None, :, :]
    dy = (y[:, None] - origin_y[None, :]).to(ACC)
    dz = (z[:, None] - origin_z[None, :]).to(ACC)
    weight_dx = weight * dx
    total = tl.sum(weight, 1)
    first = tl.sum(weight_dx, 1)

    # Write.
    real_joint = j < joints
    cell = (n * joints + j) * tl.num_programs(0) + tl.program_id(0)
    tl.store(argmaxes + cell, argmax.to(tl.int64), mask=real_joint)
    sums += cell
    tl.store(sums, maximum, mask=real_joint)
    tl.store(sums + step, tl.sum(total, 0), mask=real_joint)
    tl.store(sums + 2 * step, tl.sum(first, 0), mask=real_joint)
    tl.store(sums + 3 * step, tl.sum(total * dy, 0), mask=real_joint)
    tl.store(sums + 4 * step, tl.sum(total * dz, 0), mask=real_joint)
    if COVARIANCE:
        tl.store(sums + 5 * step, tl.sum(tl.sum(weight_dx * dx, 1), 0), mask=real_joint)
        tl.store(sums + 6 * step, tl.sum(first * dy, 0), mask=real_joint)
        tl.store(sums + 7 * step, tl.sum(first * dz, 0), mask=real_joint)
        tl.store(sums + 8 * step, tl.sum(total * dy * dy, 0), mask=real_joint)
        tl.store(sums + 9 * step, tl.sum(total * dy * dz, 0), mask=real_joint)
        tl.store(sums + 10 * step, tl.sum(total * dz * dz, 0), mask=real_joint)


@triton.jit(do_not_specialize=["step", "scale", "size_z", "voxels", "tiles", "rows"])
def _merge(
    sums,
    argmaxes,
    mean,
    peak,
    covariance,
    maxima,
    totals,
    argmax,
    step: tl.int64,
    scale,
    plane,
    size_z,
    voxels,
    tiles,
    rows,
    COVARIANCE: tl.constexpr,
    INDEX: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
):
    """The tiles of R rows together, in double, about the argmax of the row."""
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    real_row = row < rows
    # The row's maximum and its voxel.
    maximum = tl.full((R, T), float("-inf"), tl.float64)
    lowest = tl.zeros((R, T), tl.int64) + (voxels - 1)
    for first in range(0, tiles, T):
        t = first + tl.arange(0, T)[None, :]
        real_tile = (t < tiles) & real_row
        highest = tl.load(sums + row * tiles + t, mask=real_tile, other=float("-inf")).to(tl.float64)
        at = tl.load(argmaxes + row * tiles + t, mask=real_tile, other=voxels)
        lowest = tl.where(highest > maximum, at, tl.where(highest == maximum, tl.minimum(at, lowest), lowest))
        maximum = tl.where(highest > maximum, highest, maximum)
    row_maximum = tl.max(maximum, 1)[:, None]
    # Where no tile has the maximum there is NaN, and any voxel will do.
    lowest = tl.min(tl.where(maximum == row_maximum, lowest, voxels - 1), 1)[:, None]
    origin_x = lowest // plane
    origin_y = lowest % plane // size_z
    origin_z = lowest % plane % size_z

    # Sums of all tiles about that voxel.
    total = tl.zeros((R, T), tl.float64)
    x, y, z = total, total, total
    xx, xy, xz, yy, yz, zz = total, total, total, total, total, total
    for first in range(0, tiles, T):
        t = first + tl.arange(0, T)[None, :]
        real_tile = (t < tiles) & real_row
        at = tl.load(argmaxes + row * tiles + t, mask=real_tile, other=0).to(INDEX)
        of_tile = sums + row * tiles + t
        highest = tl.load(of_tile, mask=real_tile, other=float("-inf")).to(tl.float64)
        factor = tl.exp2((highest - row_maximum) * as_double(scale))
        s = factor * tl.load(of_tile + step, mask=real_tile, other=0.0)
        sx = factor * tl.load(of_tile + 2 * step, mask=real_tile, other=0.0)
        sy = factor * tl.load(of_tile + 3 * step, mask=real_tile, other=0.0)
        sz = factor * tl.load(of_tile + 4 * step, mask=real_tile, other=0.0)
        dx = (at // plane - origin_x).to(tl.float64)
        dy = (at % plane // size_z - origin_y).to(tl.float64)
        dz = (at % plane % size_z - origin_z).to(tl.float64)
        total += s
        x += sx + s * dx
        y += sy + s * dy
        z += sz + s * dz
        if COVARIANCE:
            xx += factor * tl.load(of_tile + 5 * step, mask=real_tile, other=0.0) + dx * (2 * sx + s * dx)
            xy += factor * tl.load(of_tile + 6 * step, mask=real_tile, other=0.0) + dx * sy + dy * (sx + s * dx)
            xz += factor * tl.load(of_tile + 7 * step, mask=real_tile, other=0.0) + dx * sz + dz * (sx + s * dx)
            yy += factor * tl.load(of_tile + 8 * step, mask=real_tile, other=0.0) + dy * (2 * sy + s * dy)
            yz += factor * tl.load(of_tile + 9 * step, mask=real_tile, other=0.0) + dy * sz + dz * (sy + s * dy)
            zz += factor * tl.load(of_tile + 10 * step, mask=real_tile, other=0.0) + dz * (2 * sz + s * dz)

    # Outputs. Nothing but -inf, or a NaN: the total is NaN, from -inf - -inf, and with it all that follows.
    total = tl.sum(total, 1)[:, None]
    x = tl.sum(x, 1)[:, None] / total
    y = tl.sum(y, 1)[:, None] / total
    z = tl.sum(z, 1)[:, None] / total
    tl.store(mean + 3 * row, origin_x + x, mask=real_row)
    tl.store(mean + 3 * row + 1, origin_y + y, mask=real_row)
    tl.store(mean + 3 * row + 2, origin_z + z, mask=real_row)
    tl.store(peak + row, 1 / total, mask=real_row)
    tl.store(maxima + row, row_maximum, mask=real_row)
    tl.store(totals + row, total, mask=real_row)
    tl.store(argmax + row, lowest, mask=real_row)
    if COVARIANCE:
        xy = tl.sum(xy, 1)[:, None] / total - x * y
        xz = tl.sum(xz, 1)[:, None] / total - x * z
        yz = tl.sum(yz, 1)[:, None] / total - y * z
        covariance += 9 * row
        tl.store(covariance, tl.sum(xx, 1)[:, None] / total - x * x, mask=real_row)
        tl.store(covariance + 1, xy, mask=real_row)
        tl.store(covariance + 2, xz, mask=real_row)
        tl.store(covariance + 3, xy, mask=real_row)
        tl.store(covariance + 4, tl.sum(yy, 1)[:, None] / total - y * y, mask=real_row)
        tl.store(covariance + 5, yz, mask=real_row)
        tl.store(covariance + 6, xz, mask=real_row)
        tl.store(covariance + 7, yz, mask=real_row)
        tl.store(covariance + 8, tl.sum(zz, 1)[:, None] / total - z * z, mask=real_row)


@triton.jit(do_not_specialize=["scale", "beta", "size_x", "size_z", "tiles_of_plane", "first_n"])
def _gradient(
    grad,
    grad_mean,
    grad_peak,
    grad_covariance,
    logits,
    mean,
    covariance,
    maxima,
    totals,
    argmaxes,
    scale,
    beta,
    size_x,
    plane,
    size_z,
    joints,
    stride_n,
    stride_j,
    stride_v,
    tiles_of_plane,
    first_n,
    COVARIANCE: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    W: tl.constexpr,
    X: tl.constexpr,
    J: tl.constexpr,
):
    """dL/dl = weight (constant + linear . d + d^T quadratic d), d = index - mean, and more at the argmax."""
    # Load the tile.
    x0, w = _voxels(tiles_of_plane, INDEX, W, X)
    x = x0 + tl.arange(0, X)
    j = tl.program_id(1) * J + tl.arange(0, J)
    n = first_n + tl.program_id(2).to(tl.int64)
    logit, voxel, inside = _load(logits, n, j, x, w, size_x, plane, joints, stride_n, stride_j, stride_v, ACC)
    real_joint = j < joints
    row = n * joints + j

    # Coefficients of each volume.
    share = 1 / tl.load(totals + row, mask=real_joint, other=1.0)
    factor = share * as_double(beta).to(ACC)
    peak = tl.load(grad_peak + row, mask=real_joint, other=0.0) * share
    constant = -peak
    linear_x = tl.load(grad_mean + 3 * row, mask=real_joint, other=0.0) * factor
    linear_y = tl.load(grad_mean + 3 * row + 1, mask=real_joint, other=0.0) * factor
    linear_z = tl.load(grad_mean + 3 * row + 2, mask=real_joint, other=0.0) * factor
    y = w // size_z
    dx = (x.to(ACC)[:, None] - tl.load(mean + 3 * row, mask=real_joint, other=0.0)[None, :])[None, :, :]
    dy = y.to(ACC)[:, None] - tl.load(mean + 3 * row + 1, mask=real_joint, other=0.0)[None, :]
    dz = (w - y * size_z).to(ACC)[:, None] - tl.load(mean + 3 * row + 2, mask=real_joint, other=0.0)[None, :]

    # The polynomial of each place: its constant part, its slope in x.
    along_x = linear_x[None, :]
    across = dy * linear_y[None, :] + dz * linear_z[None, :]
    if COVARIANCE:
        g = grad_covariance + 9 * row
        for entry in tl.static_range(9):
            constant -= tl.load(g + entry, mask=real_joint, other=0.0) * tl.load(
                covariance + 9 * row + entry, mask=real_joint, other=0.0
            )
        xx = tl.load(g, mask=real_joint, other=0.0) * factor
        xy = (tl.load(g + 1, mask=real_joint, other=0.0) + tl.load(g + 3, mask=real_joint, other=0.0)) * factor
        xz = (tl.load(g + 2, mask=real_joint, other=0.0) + tl.load(g + 6, mask=real_joint, other=0.0)) * factor
        yy = tl.load(g + 4, mask=real_joint, other=0.0) * factor
        yz = (tl.load(g + 5, mask=real_joint, other=0.0) + tl.load(g + 7, mask=real_joint, other=0.0)) * factor
        zz = tl.load(g + 8, mask=real_joint, other=0.0) * factor
        along_x = along_x + dy * xy[None, :] + dz * xz[None, :]
        across += dy * (dy * yy[None, :] + dz * yz[None, :]) + dz * dz * zz[None, :]
    across += (constant * factor)[None, :]
    slope = along_x[:, None, :]
    if COVARIANCE:
        slope = slope + dx * xx[None, None, :]

    # Weight times polynomial.
    maximum = tl.load(maxima + row, mask=real_joint, other=0.0)
    weight = tl.exp2((logit - maximum[None, None, :]) * as_double(scale).to(ACC))
    result = weight * (across[:, None, :] + dx * slope)
    # The gradient of the peak: few tiles come near the argmax.
    argmax = tl.load(argmaxes + row, mask=real_joint, other=-1).to(INDEX)
    near = (argmax >= x0 * plane) & (argmax < (x0 + X) * plane)
    if tl.max(near.to(tl.int32), 0) > 0:
        at_x = argmax // plane
        at_w = argmax - at_x * plane
        here = (x[:, None] == at_x[None, :])[None, :, :] & (w[:, None] == at_w[None, :])[:, None, :]
        result += tl.where(here, (peak * as_double(beta).to(ACC))[None, None, :], 0.0)
    out = grad + row * size_x * plane
    tl.store(out[None, None, :] + voxel[:, :, None], result, mask=inside)


# ---- launches ----


def _voxel_stride(logits: Tensor) -> int | None:
    """From one voxel to the next in memory, if it is the same all over a volume."""
    step, voxels = None, 1
    for size, stride in reversed(list(zip(logits.shape, logits.stride()))[2:]):
        if size == 1:
            continue
        if step is None:
            step = stride
        if stride != step * voxels:
            return None
        voxels *= size
    return 1 if step is None else step


def _coalesced(logits: Tensor) -> Tensor:
    """The logits as they are if voxels, or keypoints of channels-last logits, lie side by side, else a copy."""
    step = _voxel_stride(logits)
    last = logits.stride(1) == 1 and logits.shape[1] > 1 and step is not None
    return logits if step == 1 or last else logits.contiguous()


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _tile(logits: Tensor, backward: bool) -> Tile:
    """Its shape by that of the logits, their layout and dtype."""
    joints, size_x, size_y, size_z = logits.shape[1:]
    plane = size_y * size_z
    if INTERPRETED:  # the cost is by program and operation
        w, j = min(_power_of_2(plane), 2**14), min(_power_of_2(joints), 32)
        return Tile(w, min(_power_of_2(size_x), 2**19 // (w * j)), j)
    # Where the compiler does not know of 16 bytes in a line (it asks for multiples of 16 elements) it stores halves one
    # by one, and then gives each thread all keypoints of a tile with the coefficients of each: 32 would spill.
    single = backward and logits.element_size() == 2 and plane % 16 != 0
    rows, last = "small" if plane <= 128 else "rows", "few" if joints <= 8 or single else "last"
    layout = rows if _voxel_stride(logits) == 1 else last
    return device_tile(layout, logits.element_size(), VOXELS[backward, logits.dtype == torch.float64])


class Launch(NamedTuple):
    """What the two kernels over tiles share: their grid, and arguments by name."""

    grid: tuple[int, int]
    arguments: dict[str, Any]


def _over_tiles(logits: Tensor, temperature: float, covariance: bool, backward: bool) -> Launch:
    tile = _tile(logits, backward)
    joints, size_x, size_y, size_z = logits.shape[1:]
    plane, stride_v = size_y * size_z, _voxel_stride(logits) or 0
    of_plane, of_x = triton.cdiv(plane, tile.w), triton.cdiv(size_x, tile.x)
    beyond = of_x * tile.x * plane + of_plane * tile.w  # offsets of masked voxels are computed too
    arguments = {
        "scale": double_bits(1 / (temperature * math.log(2))),
        "size_x": size_x,
        "plane": plane,
        "size_z": size_z,
        "joints": joints,
        "stride_n": logits.stride(0),
        "stride_j": logits.stride(1),
        "stride_v": stride_v,
        "tiles_of_plane": of_plane,
        "COVARIANCE": covariance,
        "ACC": ACCUMULATORS[_arithmetic(logits)],
        "INDEX": tl.int64 if beyond * max(stride_v, 1) > NARROW else tl.int32,
        "W": tile.w,
        "X": tile.x,
        "J": tile.joints,
    }
    return Launch((of_plane * of_x, triton.cdiv(joints, tile.joints)), arguments)


def _arithmetic(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check(logits: Tensor, temperature: float) -> None:
    check_positive("temperature", temperature)
    if logits.ndim != 5 or 0 in logits.shape[1:] or logits.shape[1] > GRID:
        raise ValueError(
            f"logits {describe(logits)}: expected (N, J, X, Y, Z) with no empty dimension but N and J up to {GRID}"
        )
    if logits.dtype not in FEATURE_DTYPES:
        raise ValueError(f"logits: expected float32, bfloat16, float16 or float64, got {logits.dtype}")


def _forward(logits: Tensor, temperature: float, covariance: bool) -> tuple[Tensor, ...]:
    _check(logits, temperature)
    logits = _coalesced(logits)
    n, joints = logits.shape[:2]
    dtype = _arithmetic(logits)
    (tiles, groups), arguments = _over_tiles(logits, temperature, covariance, backward=False)

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return logits.new_empty(shape, dtype=of)

    sums, argmaxes = empty(11 if covariance else 5, n, joints, tiles), empty(n, joints, tiles, of=torch.int64)
    mean, peak, second = empty(n, joints, 3), empty(n, joints), empty(*(n, joints, 3, 3) if covariance else (0,))
    maxima, totals, argmax = empty(n, joints), empty(n, joints), empty(n, joints, of=torch.int64)
    step = n * joints * tiles
    with on_device(logits):
        for first in range(0, n, GRID):
            grid = tiles, groups, min(n - first, GRID)
            _tiles[grid](logits, sums, argmaxes, step=step, first_n=first, **arguments)
        if n > 0:
            shared = {name: arguments[name] for name in ("scale", "plane", "size_z", "COVARIANCE", "INDEX")}
            rows = min(_power_of_2(n * joints), 32) if INTERPRETED else 1
            _merge[(triton.cdiv(n * joints, rows),)](
                sums,
                argmaxes,
                mean,
                peak,
                second,
                maxima,
                totals,
                argmax,
                step=step,
                voxels=logits[0, 0].numel(),
                tiles=tiles,
                rows=n * joints,
                R=rows,
                T=MERGED,
                **shared,
            )
    return mean, peak, second, maxima, totals, argmax


def _small(name: str, tensor: Tensor, shape: tuple[int, ...], logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of a few numbers for each volume, or ValueError."""
    if tensor.shape != shape or tensor.device != logits.device:
        raise ValueError(f"{name} {describe(tensor)} on {tensor.device}: expected {shape} on {logits.device} as logits")
    return tensor.to(dtype).contiguous()


def _backward(
    grad_mean: Tensor,
    grad_peak: Tensor,
    grad_covariance: Tensor | None,
    logits: Tensor,
    temperature: float,
    mean: Tensor,
    covariance: Tensor,
    maximum: Tensor,
    total: Tensor,
    argmax: Tensor,
) -> Tensor:
    _check(logits, temperature)
    logits = _coalesced(logits)
    n, joints = logits.shape[:2]
    dtype = _arithmetic(logits)

    def small(name: str, tensor: Tensor, *shape: int, of: torch.dtype = dtype) -> Tensor:
        return _small(name, tensor, (n, joints, *shape), logits, of)

    second = grad_covariance is not None
    grad = logits.new_empty(logits.shape)
    tensors = (
        grad,
        small("grad_mean", grad_mean, 3),
        small("grad_peak", grad_peak),
        small("grad_covariance", grad_covariance, 3, 3) if grad_covariance is not None else None,
        logits,
        small("mean", mean, 3),
        small("covariance", covariance, 3, 3) if second else None,
        small("maximum", maximum),
        small("total", total),
        small("argmax", argmax, of=torch.int64),
    )
    (tiles, groups), arguments = _over_tiles(logits, temperature, second, backward=True)
    with on_device(logits):
        for first in range(0, n, GRID):
            grid = tiles, groups, min(n - first, GRID)
            _gradient[grid](*tensors, beta=double_bits(1 / temperature), first_n=first, **arguments)
    return grad


define("soft_argmax3d", _forward, _backward)


def run(logits: Tensor, temperature: float, covariance: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean, peak and covariance of the index; arguments as in ``reference/soft_argmax3d.py``."""
    mean, peak, second, *_ = call(NAMESPACE, "soft_argmax3d", logits, temperature, covariance)
    return mean, peak, second if covariance else None


# ---- ahead of time ----

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# Type, layout, covariance, whether offsets are 64 bits wide, whether planes and strides are multiples of 16, programs
# of forward and of backward in a multiprocessor.
CASES = (
    ("fp32", "rows", False, False, True, 5, 5),
    ("fp32", "rows", True, False, True, 4, 4),
    ("bf16", "rows", False, False, True, 4, 5),
    ("fp16", "rows", True, False, True, 4, 4),
    ("fp64", "rows", True, False, True, 4, 3),
    ("fp32", "small", True, True, True, 3, 3),
    ("fp32", "last", False, False, True, 4, 4),
    ("bf16", "last", True, True, True, 3, 2),
    ("fp64", "few", True, False, True, 3, 2),
    ("bf16", "few", True, False, False, 2, 2),
)
INTEGERS = (
    *("size_x", "plane", "size_z", "joints", "stride_n", "stride_j", "stride_v"),
    *("tiles_of_plane", "first_n", "voxels", "tiles", "rows"),
)
ALIGNED = ("plane", "stride_n", "stride_j")  # divisible by 16
PER_VOLUME = ("sums", "mean", "peak", "covariance", "maxima", "totals", "grad_mean", "grad_peak", "grad_covariance")


def _variant(
    kernel: Any, name: str, dtype: str, constants: dict[str, Any], programs: int, even: bool = True
) -> Variant:
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    types = dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(PER_VOLUME, f"*{accumulator}")
    types |= dict.fromkeys(("logits", "grad"), f"*{dtype}") | dict.fromkeys(("argmax", "argmaxes"), "*i64")
    types |= dict.fromkeys(("scale", "beta", "step"), "i64")
    aligned = tuple(
        argument
        for argument in kernel.arg_names
        if argument not in constants and ((argument in ALIGNED and even) or types.get(argument, "").startswith("*"))
    )
    return Variant(name, kernel, types, constants, aligned, programs=programs)


def variants() -> Iterator[Variant]:
    """Every kernel as it is compiled for the volumes of the paper (30 keypoints), and in other layouts and types."""
    for dtype, layout, covariance, wide, even, forward, backward in CASES:
        name = f"{dtype} {layout}{' covariance' * covariance}{' int64' * wide}{' odd planes' * (not even)}"
        shared = {
            "COVARIANCE": covariance,
            "ACC": tl.float64 if dtype == "fp64" else tl.float32,
            "INDEX": tl.int64 if wide else tl.int32,
            "stride_v" if layout in ("rows", "small") else "stride_j": 1,
        }
        for kernel, programs in ((_tiles, forward), (_gradient, backward)):
            voxels = VOXELS[kernel is _gradient, dtype == "fp64"]
            tile = device_tile(layout, TYPES[dtype].itemsize, voxels)
            constants = shared | {"W": tile.w, "X": tile.x, "J": tile.joints}
            if kernel is _gradient and not covariance:
                constants |= {"grad_covariance": None, "covariance": None}
            yield _variant(kernel, name, dtype, constants, programs, even)
    for dtype in ("fp32", "fp64"):
        constants = {"COVARIANCE": True, "INDEX": tl.int32, "R": 1, "T": MERGED}
        yield _variant(_merge, f"{dtype} covariance", dtype, constants, 2)
