"""A 1×1×1 convolution with a 3D soft-argmax in Triton; the logits are never in memory.

``_forward``: a program has a slab of one sample's voxels and up to 32 joints. Tile by tile it makes the logits (V, J)
by ``tl.dot`` and goes on as attention does: running maximum, weights, and as "values" the moments' basis 1, x, y, z,
xx, ... (V, 16) of the voxel index, so one more ``tl.dot`` adds all moments. ``_merge`` joins the slabs of a row in
float64. ``_backward``, after ``_coefficients``: logits again, their gradient g as the weight times a polynomial of the
index, then gᵀ h into the program's own part of the weight's gradient (added up by ``sum``: no atomics, the same bits
every time) and g W, the features' gradient. Products are "tf32x3": each factor as the sum of two TF32 numbers, whose
products lose 2⁻²² as float32 does 2⁻²⁴; half features are widened. Saved for backward: inputs and outputs.

Bound, at 2 × 128³ voxels, C 32, J 30, float32: by bytes 537 MB forward and 1.07 GB backward, by operations 11.2 G and
27.2 G; inside, the issue of 1,352 instructions a warp for 64 voxels forward and 1,688 for 32 backward (sm_90).
Measured on an H200 (benchmarks/results/2026-11-27-h200/times/results.csv, ``fine``): forward 0.676 ms, backward 1.14,
both in a training step 1.82. Of small volumes the time is that of the host's launches (docs/benchmarks.md).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registration import call
from . import INTERPRETED, NAMESPACE, Variant, define, on_device, unavailable

__all__ = ["run", "unavailable", "variants"]

LOG2_E = 1.4426950408889634
MOMENTS = 10  # that are kept of a slab: those of _basis
COEFFICIENTS = 16  # numbers of a joint in the table of _coefficients, one of them unused
STAGES = 2
MOST_PROGRAMS, LEAST_TILES = 1024, 8  # programs of a launch, about; tiles of a program
ROWS_AT_ONCE, SLABS_AT_ONCE = (64, 8) if INTERPRETED else (1, 256)  # of a program that merges


@dataclass(frozen=True)
class Config:
    """Voxels, channels and joints that a program has at once, its warps, and programs wanted per multiprocessor."""

    voxels: int
    channels: int
    joints: int
    warps: int
    programs: int


def configuration(
    kernel: str, dtype: torch.dtype, voxels: int, channels: int, joints: int, interpreted: bool = INTERPRETED
) -> Config:
    """Of the kernel "forward" or "backward"."""
    double = dtype == torch.float64
    block_c = min(max(16, triton.next_power_of_2(channels)), 16 if double else 32)
    block_j = min(max(16, triton.next_power_of_2(joints)), 32)
    if interpreted:
        return Config(min(max(16, triton.next_power_of_2(voxels)), 2048), block_c, block_j, 4, 1)
    if double:
        return Config(32, block_c, block_j, 4, 2)
    if kernel == "forward" or block_j == 16:
        return Config(64, block_c, block_j, 4, 2)
    return Config(32, block_c, block_j, 2, 4)


# ---- device code that the kernels share ----


@triton.jit
def _index(v, size_y, size_z):
    """Of voxels in the order of memory: x, y, z."""
    line = v // size_z
    x = line // size_y
    return x, line - x * size_y, v - line * size_z


@triton.jit
def _origin(slab, slab_voxels, size_y, size_z):
    """The voxel about which a slab's moments are: in its middle, and in that of z where the slab has whole lines."""
    x, y, z = _index(slab * slab_voxels + slab_voxels // 2, size_y, size_z)
    return x, y, tl.where(slab_voxels >= size_z, size_z // 2, z)


@triton.jit
def _basis(v, x0, y0, z0, size_y, size_z):
    """(V, 16) int32: 1, x, y, z, xx, xy, xz, yy, yz, zz of each voxel about (x0, y0, z0), and zeros."""
    x, y, z = _index(v, size_y, size_z)
    x, y, z = (x - x0)[:, None], (y - y0)[:, None], (z - z0)[:, None]
    k = tl.arange(0, 16)[None, :]
    one = tl.where((k == 1) | ((k >= 4) & (k <= 6)), x, tl.where((k == 2) | (k == 7) | (k == 8), y, z))
    other = tl.where(k == 4, x, tl.where((k == 5) | (k == 7), y, z))
    return tl.where(k == 0, 1, tl.where(k < 4, one, tl.where(k < 10, one * other, 0)))


@triton.jit
def _rows(features, v, c, voxels, channels, stride_v, stride_c, ACC: tl.constexpr):
    """(V, C) of the features of one sample."""
    at = v.to(tl.int64)[:, None] * stride_v + c.to(tl.int64)[None, :] * stride_c
    mask = (v < voxels)[:, None] & (c < channels)[None, :]
    return tl.load(features + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def _columns(weight, c, j, channels, joints):
    """(C, J) of the weight, transposed."""
    mask = (c < channels)[:, None] & (j < joints)[None, :]
    return tl.load(weight + j[None, :] * channels + c[:, None], mask=mask, other=0.0)


@triton.jit
def _product(features, weight, h, w, v, j, voxels, channels, joints, stride_v, stride_c, CHUNKS: tl.constexpr):
    """(V, J): features times weight; of ``h`` and ``w``, or where these have a chunk of the channels, of all chunks.

    "tf32" alone would lose 2⁻¹¹; "ieee" has no tensor cores and keeps a row of operands in every thread's registers.
    """
    ACC: tl.constexpr = weight.dtype.element_ty
    if CHUNKS == 1:
        product = tl.dot(h, w, input_precision="tf32x3", out_dtype=ACC)
    else:
        product = tl.zeros((h.shape[0], w.shape[1]), ACC)
        for chunk in range(CHUNKS):
            c = chunk * h.shape[1] + tl.arange(0, h.shape[1])
            rows = _rows(features, v, c, voxels, channels, stride_v, stride_c, ACC)
            columns = _columns(weight, c, j, channels, joints)
            product = tl.dot(rows, columns, product, input_precision="tf32x3", out_dtype=ACC)
    return product


# ---- forward ----


@triton.jit
def _forward(features, weight, bias, moments, maxima, places, slabs, slab_voxels, voxels, size_y, size_z, channels,
             joints, joint_blocks, stride_n, stride_v, stride_c, scale, scale_low, CHUNKS: tl.constexpr,
             BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr):  # fmt: skip
    """One slab of one sample and a block of joints."""
    ACC: tl.constexpr = weight.dtype.element_ty
    factor = tl.full((), scale, ACC) + tl.full((), scale_low, ACC)
    program = tl.program_id(0)
    slab = program // joint_blocks % slabs  # the blocks of one slab side by side: the second finds it in the caches
    n = (program // joint_blocks // slabs).to(tl.int64)
    j = program % joint_blocks * BLOCK_J + tl.arange(0, BLOCK_J)
    c = tl.arange(0, BLOCK_C)
    features += n * stride_n
    w = _columns(weight, c, j, channels, joints)
    shift = tl.zeros((BLOCK_J,), ACC)
    if bias is not None:
        shift = tl.load(bias + j, mask=j < joints, other=0.0)
    x0, y0, z0 = _origin(slab, slab_voxels, size_y, size_z)

    maximum = tl.full((BLOCK_J,), float("-inf"), ACC)
    place = tl.zeros((BLOCK_J,), tl.int32)
    total = tl.zeros((16, BLOCK_J), ACC)
    for start in range(0, slab_voxels, BLOCK_V):
        # Logits of the tile.
        v = slab * slab_voxels + start + tl.arange(0, BLOCK_V)
        h = _rows(features, v, c, voxels, channels, stride_v, stride_c, ACC)
        logits = _product(features, weight, h, w, v, j, voxels, channels, joints, stride_v, stride_c, CHUNKS)
        logits = tl.where((v < voxels)[:, None], logits + shift[None, :], float("-inf"))
        # Running maximum and its voxel.
        largest = tl.max(logits, 0)  # a NaN is passed over, to come back in the moments
        first = tl.min(tl.where(logits == largest[None, :], v[:, None], voxels - 1), 0)
        higher = largest > maximum
        place = tl.where(higher, first, place)
        highest = tl.where(higher, largest, maximum)
        reference = tl.where(highest == float("-inf"), 0.0, highest)  # -inf + inf would be NaN
        # Weights and moments.
        total *= tl.where(higher, tl.exp2((maximum - reference) * factor), 1.0)[None, :]
        e = tl.exp2((logits - reference[None, :]) * factor)
        basis = _basis(v, x0, y0, z0, size_y, size_z).to(ACC)
        total = tl.dot(tl.trans(basis), e, total, input_precision="tf32x3", out_dtype=ACC)
        maximum = highest

    # Write the slab's moments.
    row = n * joints + j
    tl.store(maxima + row * slabs + slab, maximum, mask=j < joints)
    tl.store(places + row * slabs + slab, place, mask=j < joints)
    k = tl.arange(0, 16)[:, None]
    tl.store(moments + (row[None, :] * 10 + k) * slabs + slab, total, mask=(k < 10) & (j < joints)[None, :])


@triton.jit
def _moment(moments, i, mask, slabs, k: tl.constexpr, weight):
    return weight * tl.load(moments + k * slabs + i, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _merge(moments, maxima, places, mean, peak, covariance, maximum, total, argmax, rows, slabs, slab_voxels, size_y,
           size_z, scale, scale_low, COVARIANCE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The slabs of a few rows, in float64: about the corner of the grid their moments do not cancel."""
    factor = tl.full((), scale, tl.float64) + tl.full((), scale_low, tl.float64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    known = row < rows
    maxima += row[:, None] * slabs
    places += row[:, None] * slabs
    moments += row[:, None] * slabs * 10
    # The row's maximum.
    # One reduction after the loop: Triton 3.6 cannot compile that of float64 values as they are loaded within one.
    running = tl.full((ROWS, BLOCK), float("-inf"), tl.float64)
    for start in range(0, slabs, BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]
        m = tl.load(maxima + i, mask=known[:, None] & (i < slabs), other=float("-inf")).to(tl.float64)
        running = tl.maximum(running, m)
    highest = tl.max(running, 1)
    reference = tl.where(highest == float("-inf"), 0.0, highest)

    # The lowest voxel that has it, and all slabs' moments about the corner of the grid.
    place = tl.full((ROWS,), 2147483647, tl.int32)
    s = tl.zeros((ROWS,), tl.float64)
    sx, sy, sz, sxx, sxy, sxz, syy, syz, szz = s, s, s, s, s, s, s, s, s
    for start in range(0, slabs, BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]
        mask = known[:, None] & (i < slabs)
        m = tl.load(maxima + i, mask=mask, other=float("-inf")).to(tl.float64)
        equal = m == highest[:, None]
        argmaxes = tl.load(places + i, mask=mask, other=2147483647)
        place = tl.minimum(place, tl.min(tl.where(equal, argmaxes, 2147483647), 1))
        weight = tl.where(equal, 1.0, tl.exp2((m - reference[:, None]) * factor))
        x0, y0, z0 = _origin(i, slab_voxels, size_y, size_z)
        x, y, z = x0.to(tl.float64), y0.to(tl.float64), z0.to(tl.float64)
        m1 = _moment(moments, i, mask, slabs, 0, weight)
        mx = _moment(moments, i, mask, slabs, 1, weight)
        my = _moment(moments, i, mask, slabs, 2, weight)
        mz = _moment(moments, i, mask, slabs, 3, weight)
        s += tl.sum(m1, 1)
        sx += tl.sum(mx + x * m1, 1)
        sy += tl.sum(my + y * m1, 1)
        sz += tl.sum(mz + z * m1, 1)
        if COVARIANCE:
            sxx += tl.sum(_moment(moments, i, mask, slabs, 4, weight) + x * (2 * mx + x * m1), 1)
            sxy += tl.sum(_moment(moments, i, mask, slabs, 5, weight) + x * my + y * (mx + x * m1), 1)
            sxz += tl.sum(_moment(moments, i, mask, slabs, 6, weight) + x * mz + z * (mx + x * m1), 1)
            syy += tl.sum(_moment(moments, i, mask, slabs, 7, weight) + y * (2 * my + y * m1), 1)
            syz += tl.sum(_moment(moments, i, mask, slabs, 8, weight) + y * mz + z * (my + y * m1), 1)
            szz += tl.sum(_moment(moments, i, mask, slabs, 9, weight) + z * (2 * mz + z * m1), 1)

    # Outputs.
    s = tl.where(s > 0, s, float("nan"))  # nothing but -inf, or a NaN: nothing can be said of this row
    ux, uy, uz = sx / s, sy / s, sz / s
    tl.store(mean + 3 * row, ux, mask=known)
    tl.store(mean + 3 * row + 1, uy, mask=known)
    tl.store(mean + 3 * row + 2, uz, mask=known)
    tl.store(peak + row, 1 / s, mask=known)
    tl.store(maximum + row, highest, mask=known)
    tl.store(total + row, s, mask=known)
    tl.store(argmax + row, place.to(tl.int64), mask=known)
    if COVARIANCE:
        vxy, vxz, vyz = sxy / s - ux * uy, sxz / s - ux * uz, syz / s - uy * uz
        covariance += 9 * row
        tl.store(covariance, sxx / s - ux * ux, mask=known)
        tl.store(covariance + 1, vxy, mask=known)
        tl.store(covariance + 2, vxz, mask=known)
        tl.store(covariance + 3, vxy, mask=known)
        tl.store(covariance + 4, syy / s - uy * uy, mask=known)
        tl.store(covariance + 5, vyz, mask=known)
        tl.store(covariance + 6, vxz, mask=known)
        tl.store(covariance + 7, vyz, mask=known)
        tl.store(covariance + 8, szz / s - uz * uz, mask=known)


# ---- backward ----


@triton.jit
def _entry(matrix, row, mask, a: tl.constexpr, b: tl.constexpr):
    return tl.load(matrix + 9 * row + 3 * a + b, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _both(matrix, row, mask, a: tl.constexpr, b: tl.constexpr):
    return _entry(matrix, row, mask, a, b) + _entry(matrix, row, mask, b, a)


@triton.jit
def _coefficients(grad_mean, grad_peak, grad_covariance, mean, covariance, maximum, total, argmax, bias, table, places,
                  count, joints, padded_joints, scale, scale_low, BLOCK_J: tl.constexpr):  # fmt: skip
    """What _backward reads, (N, blocks of J, 16, BLOCK_J).

    With d the index less the mean, dL/dlogit is the weight times constant + linear · d + dᵀ quadratic d, and ``peak``
    more at the argmax; the weight is 2 to the power of scale · (logit + shift).
    """
    # Which joints, and what is left of the logit in the exponent.
    i = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)  # a joint of a sample, where they are padded
    j = i % padded_joints
    mask = (i < count) & (j < joints)
    row = i // padded_joints * joints + j
    tl.store(places + i, tl.load(argmax + row, mask=mask, other=-1).to(tl.int32), mask=i < count)
    sums = tl.load(total + row, mask=mask, other=1.0).to(tl.float64)
    beta = (tl.full((), scale, tl.float64) + tl.full((), scale_low, tl.float64)) * 0.6931471805599453 / sums
    peak = tl.load(grad_peak + row, mask=mask, other=0.0).to(tl.float64)
    shift = -tl.load(maximum + row, mask=mask, other=0.0)
    if bias is not None:
        shift += tl.load(bias + j, mask=mask, other=0.0)
    table += tl.program_id(0).to(tl.int64) * (16 * BLOCK_J) + tl.arange(0, BLOCK_J)
    tl.store(table, shift)
    tl.store(table + BLOCK_J, beta * peak)
    # The polynomial.
    constant = -peak / sums
    if grad_covariance is not None:
        for a in tl.static_range(3):
            for b in tl.static_range(3):
                constant -= _entry(grad_covariance, row, mask, a, b) * _entry(covariance, row, mask, a, b)
        tl.store(table + 9 * BLOCK_J, beta * _entry(grad_covariance, row, mask, 0, 0))
        tl.store(table + 10 * BLOCK_J, beta * _both(grad_covariance, row, mask, 0, 1))
        tl.store(table + 11 * BLOCK_J, beta * _both(grad_covariance, row, mask, 0, 2))
        tl.store(table + 12 * BLOCK_J, beta * _entry(grad_covariance, row, mask, 1, 1))
        tl.store(table + 13 * BLOCK_J, beta * _both(grad_covariance, row, mask, 1, 2))
        tl.store(table + 14 * BLOCK_J, beta * _entry(grad_covariance, row, mask, 2, 2))
    tl.store(table + 2 * BLOCK_J, beta * constant)
    for i in tl.static_range(3):
        tl.store(table + (3 + i) * BLOCK_J, tl.load(mean + 3 * row + i, mask=mask, other=0.0))
        slope = tl.load(grad_mean + 3 * row + i, mask=mask, other=0.0).to(tl.float64)
        tl.store(table + (6 + i) * BLOCK_J, beta * slope)


@triton.jit
def _entries(table, k: tl.constexpr, BLOCK_J: tl.constexpr):
    """(1, J)"""
    return tl.load(table + k * BLOCK_J + tl.arange(0, BLOCK_J))[None, :]


@triton.jit
def _slope(table, v, size_y, size_z, COVARIANCE: tl.constexpr, BLOCK_J: tl.constexpr):
    """(V, J): dL/dlogit over the weight. The table is read anew for each tile: it would fill the registers."""
    x, y, z = _index(v, size_y, size_z)
    dx = x[:, None] - _entries(table, 3, BLOCK_J)
    dy = y[:, None] - _entries(table, 4, BLOCK_J)
    dz = z[:, None] - _entries(table, 5, BLOCK_J)
    along_x, along_y, along_z = _entries(table, 6, BLOCK_J), _entries(table, 7, BLOCK_J), _entries(table, 8, BLOCK_J)
    if COVARIANCE:
        along_x += dx * _entries(table, 9, BLOCK_J) + dy * _entries(table, 10, BLOCK_J)
        along_x += dz * _entries(table, 11, BLOCK_J)
        along_y += dy * _entries(table, 12, BLOCK_J) + dz * _entries(table, 13, BLOCK_J)
        along_z += dz * _entries(table, 14, BLOCK_J)
    return _entries(table, 2, BLOCK_J) + dx * along_x + dy * along_y + dz * along_z


@triton.jit
def _backward(features, weight, table, places, grad_features, grad_weight, slabs, slab_voxels, voxels, size_y, size_z,
              channels, joints, joint_block, joint_blocks, stride_n, stride_v, stride_c, scale, scale_low,
              ADD: tl.constexpr, COVARIANCE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_V: tl.constexpr,
              BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr):  # fmt: skip
    """One slab of one sample, a block of joints and a chunk of channels.

    Each further block of joints is a launch that adds to the gradient of the features.
    """
    ACC: tl.constexpr = weight.dtype.element_ty
    factor = tl.full((), scale, ACC) + tl.full((), scale_low, ACC)
    program = tl.program_id(0)
    slab = program // CHUNKS % slabs
    n = (program // CHUNKS // slabs).to(tl.int64)
    j = joint_block * BLOCK_J + tl.arange(0, BLOCK_J)
    c = program % CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)
    features += n * stride_n
    table += (n * joint_blocks + joint_block) * (16 * BLOCK_J)
    places += (n * joint_blocks + joint_block) * BLOCK_J

    weight_sums = tl.zeros((BLOCK_J, BLOCK_C), ACC)
    for start in range(0, slab_voxels, BLOCK_V):
        v = slab * slab_voxels + start + tl.arange(0, BLOCK_V)
        h = _rows(features, v, c, voxels, channels, stride_v, stride_c, ACC)
        # Logits.
        # Features and weight are loaded, from the first-level cache, where they are used; barriers keep the compiler
        # from beginning the next product meanwhile: the parts of all operands would not fit the registers.
        w = _columns(weight, c, j, channels, joints)
        logits = _product(features, weight, h, w, v, j, voxels, channels, joints, stride_v, stride_c, CHUNKS)
        # Their gradient.
        g = tl.exp2((logits + _entries(table, 0, BLOCK_J)) * factor)
        g *= _slope(table, v, size_y, size_z, COVARIANCE, BLOCK_J)
        place = tl.load(places + tl.arange(0, BLOCK_J))
        g += tl.where(v[:, None] == place[None, :], _entries(table, 1, BLOCK_J), 0.0)
        g = tl.where((v < voxels)[:, None] & (j < joints)[None, :], g, 0.0)
        # Gradient of the features.
        if grad_features is not None:
            tl.debug_barrier()
            mask = (j < joints)[:, None] & (c < channels)[None, :]
            w = tl.load(weight + j[:, None] * channels + c[None, :], mask=mask, other=0.0)
            found = tl.dot(g, w, input_precision="tf32x3", out_dtype=ACC)
            at = grad_features + (n * voxels + v.to(tl.int64))[:, None] * channels + c[None, :]
            mask = (v < voxels)[:, None] & (c < channels)[None, :]
            if ADD:
                found += tl.load(at, mask=mask, other=0.0)
            tl.store(at, found, mask=mask)
        # Gradient of the weight.
        if grad_weight is not None:
            tl.debug_barrier()
            h = _rows(features, v, c, voxels, channels, stride_v, stride_c, ACC)
            weight_sums = tl.dot(tl.trans(g), h, weight_sums, input_precision="tf32x3", out_dtype=ACC)
    if grad_weight is not None:
        at = grad_weight + ((n * slabs + slab) * joints + j)[:, None] * channels + c[None, :]
        tl.store(at, weight_sums, mask=(j < joints)[:, None] & (c < channels)[None, :])


# ---- launches ----


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if features.ndim != 5 or 0 in features.shape[1:] or features.shape[2:].numel() > 2**30:
        raise ValueError(f"features {tuple(features.shape)}: expected (N, C, X, Y, Z), no more than 2^30 voxels")
    accumulated = _accumulated(features.dtype)
    if weight.ndim != 2 or weight.shape[1] != features.shape[1] or 0 in weight.shape:
        raise ValueError(f"weight {tuple(weight.shape)}: expected (J, {features.shape[1]})")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias {tuple(bias.shape)}: expected ({weight.shape[0]},)")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != accumulated or tensor.device != features.device):
            raise ValueError(
                f"{name}: expected {accumulated} on {features.device}, got {tensor.dtype} on {tensor.device}"
            )


def _even(features: Tensor) -> Tensor:
    """The features, or a copy of them, such that voxels follow one another at even distances."""
    _, _, x, y, z = features.shape
    _, _, sx, sy, sz = features.stride()
    even = (y == 1 or sy == z * sz) and (x == 1 or sx == y * z * sz)
    return features if even else features.contiguous(memory_format=torch.channels_last_3d)


def _slabs(n: int, voxels: int, tile: int) -> tuple[int, int]:
    """How many slabs a sample has, and voxels of one: whole tiles, from the sizes alone."""
    tiles = triton.cdiv(voxels, tile)
    each = max(LEAST_TILES, triton.cdiv(n * tiles, MOST_PROGRAMS))
    return triton.cdiv(tiles, each), min(each, tiles) * tile


def _scale(temperature: float) -> tuple[float, float]:
    """log2(e) / temperature as two numbers of float32, which is what kernels are given, that add up to it."""
    scale = LOG2_E / temperature
    high = struct.unpack("f", struct.pack("f", scale))[0]
    return high, scale - high


def forward(
    features: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, covariance: bool
) -> tuple[Tensor, ...]:
    """The operator ``linear_soft_argmax3d``."""
    _check(features, weight, bias)
    features, weight = _even(features), weight.contiguous()
    n, channels, x, y, z = features.shape
    joints, voxels = weight.shape[0], x * y * z
    outputs = (
        weight.new_empty((n, joints, 3)),
        weight.new_empty((n, joints)),
        weight.new_empty((n, joints, 3, 3) if covariance else (0,)),
        weight.new_empty((n, joints)),
        weight.new_empty((n, joints)),
        weight.new_empty((n, joints), dtype=torch.int64),
    )
    if n == 0:
        return outputs
    config = configuration("forward", features.dtype, voxels, channels, joints)
    slabs, slab_voxels = _slabs(n, voxels, config.voxels)
    blocks = triton.cdiv(joints, config.joints)
    moments = weight.new_empty((n, joints, MOMENTS, slabs))
    maxima, places = weight.new_empty((n, joints, slabs)), weight.new_empty((n, joints, slabs), dtype=torch.int32)
    sizes = slabs, slab_voxels
    stride_n, stride_c, _, _, stride_v = features.stride()
    with on_device(features):
        _forward[(n * blocks * slabs,)](
            features, weight, None if bias is None else bias.contiguous(), moments, maxima, places, *sizes, voxels, y,
            z, channels, joints, blocks, stride_n, stride_v, stride_c, *_scale(temperature),
            triton.cdiv(channels, config.channels), config.voxels, config.channels, config.joints,
            num_warps=config.warps, num_stages=STAGES,
        )  # fmt: skip
        _merge[(triton.cdiv(n * joints, ROWS_AT_ONCE),)](
            moments, maxima, places, *outputs, n * joints, *sizes, y, z, *_scale(temperature), covariance, ROWS_AT_ONCE,
            SLABS_AT_ONCE,
        )  # fmt: skip
    return outputs


def backward(
    grad_mean: Tensor,
    grad_peak: Tensor,
    grad_covariance: Tensor | None,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    mean: Tensor,
    covariance: Tensor,
    maximum: Tensor,
    total: Tensor,
    argmax: Tensor,
    needs_features: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The operator ``linear_soft_argmax3d_backward``."""
    _check(features, weight, bias)
    features, weight = _even(features), weight.contiguous()
    n, channels, x, y, z = features.shape
    joints, voxels = weight.shape[0], x * y * z
    small = _small(features, weight, {
        "grad_mean": (grad_mean, 3), "grad_peak": (grad_peak, 1), "grad_covariance": (grad_covariance, 9),
        "mean": (mean, 3), "covariance": (None if grad_covariance is None else covariance, 9),
        "maximum": (maximum, 1), "total": (total, 1), "argmax": (argmax, 1),
    })  # fmt: skip
    config = configuration("backward", features.dtype, voxels, channels, joints)
    slabs, slab_voxels = _slabs(n, voxels, config.voxels)
    blocks, chunks = triton.cdiv(joints, config.joints), triton.cdiv(channels, config.channels)
    # Several blocks of joints add to it, and only their sum is rounded.
    kept = features.dtype if blocks == 1 else weight.dtype
    grad_features = torch.empty((n, x, y, z, channels) if needs_features else (0,), dtype=kept, device=features.device)
    partial_weights = weight.new_empty((n * slabs, joints, channels) if needs_weight else (0, 0))
    stride_n, stride_c, _, _, stride_v = features.stride()
    if n > 0 and (needs_features or needs_weight):
        scale = _scale(temperature)
        table = weight.new_empty((n, blocks, COEFFICIENTS, config.joints))
        places = weight.new_empty((n, blocks, config.joints), dtype=torch.int32)
        with on_device(features):
            _coefficients[(n * blocks,)](
                *small, None if bias is None else bias.contiguous(), table, places, places.numel(), joints,
                blocks * config.joints, *scale, config.joints,
            )  # fmt: skip
            for block in range(blocks):
                _backward[(n * slabs * chunks,)](
                    features, weight, table, places, grad_features if needs_features else None,
                    partial_weights if needs_weight else None, slabs, slab_voxels, voxels, y, z, channels, joints,
                    block, blocks, stride_n, stride_v, stride_c, *scale, block > 0, grad_covariance is not None, chunks,
                    config.voxels, config.channels, config.joints, num_warps=config.warps, num_stages=STAGES,
                )  # fmt: skip
    if needs_features:
        grad_features = grad_features.to(features.dtype).permute(0, 4, 1, 2, 3)
    return grad_features, partial_weights.sum(0)


def _small(features: Tensor, weight: Tensor, tensors: dict[str, tuple[Tensor | None, int]]) -> list[Tensor | None]:
    """Contiguous, in the dtype of the weight but for indices, and each of the size that the kernel reads."""
    rows = features.shape[0] * weight.shape[0]
    found: list[Tensor | None] = []
    for name, (tensor, each) in tensors.items():
        if tensor is not None:
            if tensor.numel() != rows * each or tensor.device != features.device:
                raise ValueError(f"{name} {tuple(tensor.shape)}: expected {rows * each} elements on {features.device}")
            tensor = tensor.to(torch.int64 if name == "argmax" else weight.dtype).contiguous()
        found.append(tensor)
    return found


define("linear_soft_argmax3d", forward, backward)


def run(
    features: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, covariance: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean, peak and covariance of the index; arguments as in ``reference/linear_soft_argmax3d.py``."""
    outputs = call(NAMESPACE, "linear_soft_argmax3d", features, weight, bias, temperature, covariance)
    return outputs[0], outputs[1], outputs[2] if covariance else None


# ---- ahead of time ----

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_HALF = (torch.bfloat16, torch.float16)
_NUMBERS = {"scale": "fp32", "scale_low": "fp32"}
_INDICES = {"places": "*i32", "argmax": "*i64"}
_SMALL = ("weight", "bias", "moments", "maxima", "mean", "peak", "covariance", "maximum", "total", "grad_mean",
          "grad_peak", "grad_covariance", "grad_weight", "table")  # fmt: skip


def _types(kernel: Any, dtype: torch.dtype) -> dict[str, str]:
    small = f"*{_NAMES[_accumulated(dtype)]}"
    known = dict.fromkeys(_SMALL, small) | _INDICES | _NUMBERS
    known |= dict.fromkeys(("features", "grad_features"), f"*{_NAMES[dtype]}")
    return {name: known.get(name, "i32") for name in kernel.arg_names}


def _variant(kernel: Any, dtype: torch.dtype, channels: int, joints: int, last: bool, covariance: bool) -> Variant:
    config = configuration(kernel.__name__[1:], dtype, 64**3, channels, joints, interpreted=False)
    constants = {
        "CHUNKS": triton.cdiv(channels, config.channels), "BLOCK_V": config.voxels, "BLOCK_C": config.channels,
        "BLOCK_J": config.joints, "ADD": False, "COVARIANCE": covariance, "stride_c" if last else "stride_v": 1,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = _types(kernel, dtype)
    aligned = [name for name, kind in types.items() if kind.startswith("*")]
    aligned += ["slab_voxels", "voxels", "channels", "stride_n", "stride_v" if last else "stride_c"]
    words = [_NAMES[dtype], f"C {channels}", f"J {joints}", *([] if last else ["channels first"])]
    if "COVARIANCE" in constants and covariance:
        words.append("covariance")
    return Variant(", ".join(words), kernel, types, constants, tuple(aligned), config.warps, STAGES, config.programs)


def variants() -> Iterator[Variant]:
    """Each dtype with the sizes of the paper; few and many joints, many channels, channels first; the small kernels."""
    for kernel in (_forward, _backward):
        for dtype in _NAMES:
            yield _variant(kernel, dtype, 32, 30, True, dtype not in _HALF)
        yield _variant(kernel, torch.float32, 32, 15, True, False)
        yield _variant(kernel, torch.float32, 128, 60, True, True)
        yield _variant(kernel, torch.float32, 32, 30, False, False)
    for kernel, sizes in ((_merge, {"ROWS": 1, "BLOCK": 256}), (_coefficients, {"BLOCK_J": 32})):
        for dtype in (torch.float32, torch.float64):
            types = _types(kernel, dtype)
            constants = {"COVARIANCE": True, **sizes} if kernel is _merge else sizes
            aligned = tuple(name for name, kind in types.items() if kind.startswith("*"))
            yield Variant(_NAMES[dtype], kernel, types, constants, aligned, programs=4)
