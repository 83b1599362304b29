"""Unprojection in Triton: every view's sample of every voxel, aggregated over the views, and the gradients.

Forward: a program has a block of channels (a cache line: 32 of float32) and a brick of 8 × 8 × 8 voxels, a layer of 64
at a time, so that neighbours find their taps in the first-level cache; 8 lanes load a voxel's channels, 16 bytes each.
Up to four views are unrolled, their samples in registers; more go through an online softmax. Backward: a program has
4 × 4 × 2 voxels, aggregates again in a first loop over the views, and in a second adds dL/dv times the four weights to
the maps by vector atomics; dL/dQ and dL/dweights are summed in registers, stored by program and added up by torch.
Maps are (N, M, H, W, C), copied once if they are not. Saved for backward: the inputs alone.

Bound, at (N, M, C) = (8, 4, 32), 64² maps, 64³ voxels, float32: by bytes 285 MB forward and 302 MB backward, by
operations 9.1 G and 12.3 G; inside, 4.3 GB of taps through the first-level cache, 1,673 instructions a thread for 16
elements and 4 views (sm_90), and backward 1.07 G additions to the maps in the second-level cache.
Measured on an H200 (benchmarks/results/2026-11-27-h200/times/results.csv, ``batch-8``): forward 0.354 ms, backward
1.52, both in a training step 1.87; the paper's sizes 0.196, 0.620 and 1.26.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..checks import FEATURE_DTYPES
from ..registration import call
from . import INTERPRETED, NAMESPACE, Variant, define, on_device, unavailable

__all__ = ["run", "unavailable", "variants"]

AGGREGATIONS, UNSEEN = ("softmax", "mean", "sum", "max", "weighted"), ("zero", "exclude")
MAX_VIEWS = 255  # counts are bytes
COMPILED = tl.constexpr(not INTERPRETED)
STRIDES = ("stride_n", "stride_c", "stride_x", "stride_y", "stride_z")
GRADIENTS = ("grad_features", "poison", "scales", "bounds", "grad_q", "grad_weights")  # None if not wanted


def run(
    features: Tensor,
    q: Tensor,
    shape: tuple[int, int, int],
    aggregation: str,
    unseen: str,
    view_mask: Tensor | None,
    view_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Volume and counts; arguments as in ``reference/unproject.py``."""
    return call(NAMESPACE, "unproject", features, q, view_mask, view_weights, shape, aggregation, unseen)


# ---- device: geometry, per voxel ----


@triton.jit
def _inverse(x):
    """1 / x to 1 ulp; a division cares for denormals, at five instructions more. The interpreter knows no PTX."""
    if COMPILED and x.dtype == tl.float32:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def _voxels(brick, step, X, Y, Z, STEPS: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr):
    """Indices i, j, k of the voxels of one of a brick's tiles, and whether they are inside the volume."""
    bricks_z, bricks_y = tl.cdiv(Z, BZ), tl.cdiv(Y, BY)
    t = tl.arange(0, BX * BY * BZ)
    k = brick % bricks_z * BZ + t % BZ
    j = brick // bricks_z % bricks_y * BY + t // BZ % BY
    i = (brick // bricks_z // bricks_y * STEPS + step) * BX + t // (BZ * BY)
    return i, j, k, (i < X) & (j < Y) & (k < Z)


@triton.jit
def _project(q, i, j, k, present, H, W):
    """Pixel u, v, 1 / depth and whether the view sees the voxel. Where it does not the three may be anything."""
    # In this order what neighbours in z or y share is computed once.
    x = tl.load(q + 3) + tl.load(q) * i + tl.load(q + 2) * k + tl.load(q + 1) * j
    y = tl.load(q + 7) + tl.load(q + 4) * i + tl.load(q + 6) * k + tl.load(q + 5) * j
    depth = tl.load(q + 11) + tl.load(q + 8) * i + tl.load(q + 10) * k + tl.load(q + 9) * j
    inverse = _inverse(depth)
    u, v = x * inverse, y * inverse
    # A tap is inside where floor(u) is in -1 .. W-1. A NaN compares false: unseen.
    return u, v, inverse, present & (depth > 0) & (u >= -1) & (u < W) & (v >= -1) & (v < H)


@triton.jit
def _axis(u, size):
    """First of two neighbouring pixels, inside the map whatever u is, and u relative to it: in -1 .. 2 if seen."""
    first = tl.minimum(tl.maximum(u.to(tl.int32), 0), size - 2)  # clamped as integers, which are never NaN
    return first, u - first.to(u.dtype)


@triton.jit
def _tent(t):
    """Weights of the two pixels: the tents 1 - |t| and 1 - |t - 1|, or 0. A tap outside the map has thus weight 0."""
    return tl.maximum(1.0 - tl.abs(t), 0.0), tl.maximum(tl.minimum(t, 2.0 - t), 0.0)


@triton.jit
def _slopes(t):
    """Derivatives of the two weights."""
    return tl.where(t < 0, 1.0, tl.where(t < 1, -1.0, 0.0)), tl.where(t < 0, 0.0, tl.where(t < 1, 1.0, -1.0))


@triton.jit
def _corner(view, u, v, H, W, C: tl.constexpr):
    """Start of the view's map; of each voxel the first of its four taps; length of a row; u, v from the first tap."""
    height, width = tl.maximum(H, 2), tl.maximum(W, 2)
    column, s = _axis(u, width)
    row, t = _axis(v, height)
    return view.to(tl.int64) * (height * width * C), (row * width + column) * C, width * C, s, t


@triton.jit
def _present(mask, view, inside):
    return inside if mask is None else inside & tl.load(mask + view)


# ---- device: samples, per voxel and channel ----


@triton.jit
def _load(pointers, c, C: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """Rows of channels. Unmasked where possible: a masked load costs one instruction more per register."""
    if C % BLOCK_C == 0:
        return tl.load(pointers).to(ACC)
    return tl.load(pointers, mask=(c < C)[None, :], other=0.0).to(ACC)


@triton.jit
def _taps(base, corner, row, c, C: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """The four taps (voxels, channels), in the order 00, 01, 10, 11 of (row, column)."""
    upper = base + corner[:, None] + c[None, :]
    lower = upper + row
    return (
        _load(upper, c, C, BLOCK_C, ACC),
        _load(upper + C, c, C, BLOCK_C, ACC),
        _load(lower, c, C, BLOCK_C, ACC),
        _load(lower + C, c, C, BLOCK_C, ACC),
    )


@triton.jit
def _weights(s, t):
    """Of the four taps, per voxel."""
    left, right = _tent(s)
    up, down = _tent(t)
    return up * left, up * right, down * left, down * right


@triton.jit
def _blend(taps, weights, seen):
    """Samples (voxels, channels); 0 where unseen, whatever the features are there."""
    f00, f01, f10, f11 = taps
    w00, w01, w10, w11 = weights
    v = f00 * w00[:, None] + f01 * w01[:, None] + f10 * w10[:, None] + f11 * w11[:, None]
    return tl.where(seen[:, None], v, 0.0)


@triton.jit
def _sample(
    features, q, mask, view, i, j, k, inside, c, H, W, C: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr
):
    """Samples of one view (voxels, channels), and which voxels it sees."""
    u, v, _, seen = _project(q + view * 12, i, j, k, _present(mask, view, inside), H, W)
    start, corner, row, s, t = _corner(view, u, v, H, W, C)
    taps = _taps(features + start, corner, row, c, C, BLOCK_C, ACC)
    return _blend(taps, _weights(s, t), seen), seen


# ---- device: aggregation over the views, one view at a time ----
#
# Three numbers per voxel and channel are carried: `best`, `total` and `sum`.
#   softmax   the largest logit so far, and relative to it the sums of exponentials and of exponentials times samples
#   max       the largest sample so far and its view, for the backward pass
#   others    the sum of weights (of seeing views) and of weights times samples


@triton.jit
def _exp_minus(x):
    """e^-x; tl.exp would treat denormal results with care, at three instructions more."""
    return tl.exp2(x * -1.4426950408889634)


@triton.jit
def _softmax_step(best, total, sum, v, seen, EXCLUDE: tl.constexpr):
    """One exponential only: either what is carried or the new sample is rescaled, the other has weight 1."""
    logit = tl.where(seen[:, None], v, float("-inf")) if EXCLUDE else v
    larger = logit > best
    e = _exp_minus(tl.abs(logit - best))
    if EXCLUDE:
        e = tl.where(logit == float("-inf"), 0.0, e)
        v = tl.where(logit == float("-inf"), 0.0, v)
    old, new = tl.where(larger, e, 1.0), tl.where(larger, 1.0, e)
    return tl.where(larger, logit, best), total * old + new, sum * old + new * v


@triton.jit
def _softmax(logits, EXCLUDE: tl.constexpr):
    """The same from a tuple with the logits of all views: half the arithmetic, where the registers hold them."""
    best = logits[0]
    for m in tl.static_range(1, len(logits)):
        best = tl.maximum(best, logits[m])
    reference = tl.where(best == float("-inf"), 0.0, best) if EXCLUDE else best
    total = tl.zeros_like(best)
    sum = total
    for m in tl.static_range(len(logits)):
        e = _exp_minus(reference - logits[m])
        total += e
        sum += e * (tl.where(logits[m] == float("-inf"), 0.0, logits[m]) if EXCLUDE else logits[m])
    return best, total, sum


@triton.jit
def _max_step(best, winner, v, seen, m, EXCLUDE: tl.constexpr):
    """Ties go to the lowest view; a NaN in the first stays, as in a chain of comparisons."""
    candidate = tl.where(seen[:, None], v, float("-inf")) if EXCLUDE else v
    larger = (candidate > best) | (m == 0)
    return tl.where(larger, candidate, best), tl.where(larger, m, winner)


@triton.jit
def _view_weights(weights, view, c, C: tl.constexpr):
    return tl.load(weights + view.to(tl.int64) * C + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def _gather(
    features,
    q,
    mask,
    weights,
    n,
    i,
    j,
    k,
    inside,
    c,
    M,
    H,
    W,
    C: tl.constexpr,
    VIEWS: tl.constexpr,
    AGGREGATION: tl.constexpr,
    EXCLUDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """Every view once: `best`, `total` and `sum`, and how many views see each voxel."""
    # Few views: all samples in registers.
    V: tl.constexpr = inside.shape[0]
    sum = tl.zeros((V, BLOCK_C), ACC)
    best, total = sum + float("-inf"), sum
    count = tl.zeros((V,), tl.int32)
    if AGGREGATION == "softmax" and VIEWS > 0:
        logits = ()
        for m in tl.static_range(VIEWS):
            v, seen = _sample(features, q, mask, n * M + m, i, j, k, inside, c, H, W, C, BLOCK_C, ACC)
            count += seen.to(tl.int32)
            logits += (tl.where(seen[:, None], v, float("-inf")) if EXCLUDE else v,)  # type: ignore[assignment]
        best, total, sum = _softmax(logits, EXCLUDE)
        return best, total, sum, count
    # Any number: one view at a time.
    for m in range(M):
        view = n * M + m
        v, seen = _sample(features, q, mask, view, i, j, k, inside, c, H, W, C, BLOCK_C, ACC)
        count += seen.to(tl.int32)
        if AGGREGATION == "softmax":
            best, total, sum = _softmax_step(best, total, sum, v, seen, EXCLUDE)
        elif AGGREGATION == "max":
            best, total = _max_step(best, total, v, seen, m, EXCLUDE)
        elif AGGREGATION == "weighted":
            w = _view_weights(weights, view, c, C)
            sum += w * v
            if EXCLUDE:
                total += tl.where(seen[:, None], w, 0.0)
        else:
            sum += v
    return best, total, sum, count


@triton.jit
def _divisor(x):
    """x, and 1 in place of 0. To divide by, where the reciprocal of a subnormal number would be infinite."""
    return tl.where(x == 0, 1.0, x)


@triton.jit
def _reciprocal(x):
    """1 / x, and 0 of 0."""
    return tl.where(x == 0, 0.0, _inverse(_divisor(x)))


@triton.jit
def _mean_scale(count, M, EXCLUDE: tl.constexpr, ACC: tl.constexpr):
    return 1.0 / (tl.maximum(count, 1) if EXCLUDE else tl.full(count.shape, 0, tl.int32) + M).to(ACC)


@triton.jit
def _aggregate(best, total, sum, count, M, AGGREGATION: tl.constexpr, EXCLUDE: tl.constexpr, ACC: tl.constexpr):
    """The volume's value."""
    if AGGREGATION == "softmax":
        return sum * (_reciprocal(total) if EXCLUDE else _inverse(total))
    if AGGREGATION == "max":
        return tl.where(best == float("-inf"), 0.0, best) if EXCLUDE else best
    if AGGREGATION == "mean":
        return sum * _mean_scale(count, M, EXCLUDE, ACC)[:, None]
    if AGGREGATION == "weighted" and EXCLUDE:
        return tl.where(total == 0, 0.0, sum / _divisor(total))
    return sum


@triton.jit
def unproject_kernel(
    features,
    q,
    mask,
    weights,
    volume,
    counts,
    M,
    H,
    W,
    X,
    Y,
    Z,
    C: tl.constexpr,
    AGGREGATION: tl.constexpr,
    EXCLUDE: tl.constexpr,
    STEPS: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
    BZ: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VIEWS: tl.constexpr,
):
    """One brick of voxels and one block of channels a program."""
    ACC: tl.constexpr = q.dtype.element_ty
    bricks = tl.cdiv(X, BX * STEPS) * tl.cdiv(Y, BY) * tl.cdiv(Z, BZ)
    n, brick = tl.program_id(0) // bricks, tl.program_id(0) % bricks
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    for step in range(STEPS):
        # Sample all views.
        i, j, k, inside = _voxels(brick, step, X, Y, Z, STEPS, BX, BY, BZ)
        best, total, sum, count = _gather(
            features, q, mask, weights, n, i, j, k, inside, c, M, H, W, C, VIEWS, AGGREGATION, EXCLUDE, BLOCK_C, ACC
        )
        # Aggregate and write.
        value = _aggregate(best, total, sum, count, M, AGGREGATION, EXCLUDE, ACC)
        voxel = ((n.to(tl.int64) * X + i) * Y + j) * Z + k
        tl.store(counts + voxel, count.to(tl.uint8), mask=inside & (tl.program_id(1) == 0))
        pointers = volume + (voxel * C)[:, None] + c[None, :]
        tl.store(pointers, value.to(volume.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])


# ---- device: backward ----


@triton.jit
def _prepare(g, best, total, sum, count, M, AGGREGATION: tl.constexpr, EXCLUDE: tl.constexpr, ACC: tl.constexpr):
    """Of the gradient of the volume, what all views share."""
    if AGGREGATION == "softmax":
        return g * (_reciprocal(total) if EXCLUDE else _inverse(total))
    if AGGREGATION == "mean":
        return g * _mean_scale(count, M, EXCLUDE, ACC)[:, None]
    if AGGREGATION == "weighted" and EXCLUDE:
        return tl.where(total == 0, 0.0, g)
    return g


@triton.jit
def _sample_gradient(g, v, w, best, total, value, m, AGGREGATION: tl.constexpr, EXCLUDE: tl.constexpr):
    """dL/dv of view m, from what :func:`_prepare` leaves in g; of a maximum, ``total`` is the view that has it."""
    if AGGREGATION == "softmax":
        d = g * _exp_minus(best - v) * (1.0 + v - value)
        return tl.where(v == float("-inf"), 0.0, d) if EXCLUDE else d
    if AGGREGATION == "max":
        return tl.where(total == m, g, 0.0)
    if AGGREGATION == "weighted":
        return g * (w / _divisor(total)) if EXCLUDE else g * w
    return g


@triton.jit
def _add(grad, poison, at, value, mask, scale, SCATTER: tl.constexpr):
    """Add to the maps' gradient: as it is, or in units of 1 / scale as an integer, whose sum knows no order."""
    if SCATTER == "atomic":
        tl.atomic_add(grad + at, value, mask=mask, sem="relaxed")
    else:
        finite = tl.abs(value) < float("inf")
        fixed = tl.where(finite, value, 0.0).to(tl.float64) * scale
        tl.atomic_add(grad + at, fixed.to(tl.int64), mask=mask, sem="relaxed")
        tl.store(
            poison + at, tl.full(at.shape, 1, tl.int8), mask=mask & (finite == 0)
        )  # all who write here write the same


@triton.jit
def _scatter(grad, poison, start, corner, row, c, d, weights, seen, scale, C: tl.constexpr, SCATTER: tl.constexpr):
    """Each of the four taps gets its weight times d (voxels, channels); taps of weight 0 get nothing."""
    offset = corner[:, None] + c[None, :]
    visible = seen[:, None] & (c < C)[None, :]
    for tap in tl.static_range(4):
        w = weights[tap]
        at = start + (offset + ((tap % 2) * C + (tap // 2) * row))
        _add(grad, poison, at, d * w[:, None], visible & (w != 0)[:, None], scale, SCATTER)


@triton.jit
def _pixel_gradient(d, taps, s, t):
    """dL/du and dL/dv of each voxel, summed over the channels."""
    f00, f01, f10, f11 = taps
    left, right = _tent(s)
    up, down = _tent(t)
    left_slope, right_slope = _slopes(s)
    up_slope, down_slope = _slopes(t)
    upper = f00 * left_slope[:, None] + f01 * right_slope[:, None]
    lower = f10 * left_slope[:, None] + f11 * right_slope[:, None]
    along_u = upper * up[:, None] + lower * down[:, None]
    upper = f00 * left[:, None] + f01 * right[:, None]
    lower = f10 * left[:, None] + f11 * right[:, None]
    along_v = upper * up_slope[:, None] + lower * down_slope[:, None]
    return tl.sum(d * along_u, 1), tl.sum(d * along_v, 1)


@triton.jit
def _store_matrix(pointers, gu, gv, u, v, inverse, seen, i, j, k):
    """dL/dQ of one view, summed over the voxels: u = x / depth, v = y / depth, (x, y, depth) = Q (i, j, k, 1)."""
    x, y = tl.where(seen, gu * inverse, 0.0), tl.where(seen, gv * inverse, 0.0)
    depth = tl.where(seen, -(x * u + y * v), 0.0)
    column = tl.arange(0, 4)
    index = tl.where(column == 0, i[:, None], tl.where(column == 1, j[:, None], tl.where(column == 2, k[:, None], 1)))
    tl.store(pointers + column, tl.sum(x[:, None] * index, 0))
    tl.store(pointers + 4 + column, tl.sum(y[:, None] * index, 0))
    tl.store(pointers + 8 + column, tl.sum(depth[:, None] * index, 0))


@triton.jit
def unproject_backward_kernel(
    grad_volume,
    stride_n,
    stride_c,
    stride_x,
    stride_y,
    stride_z,
    features,
    q,
    mask,
    weights,
    grad_features,
    poison,
    scales,
    bounds,
    grad_q,
    grad_weights,
    M,
    H,
    W,
    X,
    Y,
    Z,
    C: tl.constexpr,
    AGGREGATION: tl.constexpr,
    EXCLUDE: tl.constexpr,
    SCATTER: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
    BZ: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VIEWS: tl.constexpr,
):
    """One brick of voxels and one block of channels a program. A pointer that is None is of a gradient not wanted."""
    ACC: tl.constexpr = q.dtype.element_ty
    bricks = tl.cdiv(X, BX) * tl.cdiv(Y, BY) * tl.cdiv(Z, BZ)
    n, brick = tl.program_id(0) // bricks, tl.program_id(0) % bricks
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # The volume's gradient.
    i, j, k, inside = _voxels(brick, 0, X, Y, Z, 1, BX, BY, BZ)
    at = n.to(tl.int64) * stride_n + i.to(tl.int64) * stride_x + j.to(tl.int64) * stride_y + k.to(tl.int64) * stride_z
    pointers = grad_volume + at[:, None] + (c.to(tl.int64) * stride_c)[None, :]
    g = tl.load(pointers, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(ACC)
    # First loop over the views: the aggregate again.
    best, total, sum, count = _gather(
        features, q, mask, weights, n, i, j, k, inside, c, M, H, W, C, VIEWS, AGGREGATION, EXCLUDE, BLOCK_C, ACC
    )
    value = _aggregate(best, total, sum, count, M, AGGREGATION, EXCLUDE, ACC)
    g = _prepare(g, best, total, sum, count, M, AGGREGATION, EXCLUDE, ACC)
    scale = 0.0 if scales is None else tl.load(scales + n)
    largest = tl.zeros((BX * BY * BZ, BLOCK_C), ACC)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    # Second loop: each view's samples again, and their gradients.
    for m in range(M):
        view = n * M + m
        u, v, inverse, seen = _project(q + view * 12, i, j, k, _present(mask, view, inside), H, W)
        start, corner, row, s, t = _corner(view, u, v, H, W, C)
        taps = _taps(features + start, corner, row, c, C, BLOCK_C, ACC)
        tap_weights = _weights(s, t)
        sample = _blend(taps, tap_weights, seen)
        w = _view_weights(weights, view, c, C) if AGGREGATION == "weighted" else 1.0
        d = _sample_gradient(g, sample, w, best, total, value, m, AGGREGATION, EXCLUDE)
        # The largest gradient, for fixed point.
        if bounds is not None:
            size = tl.where(seen[:, None], tl.abs(d), 0.0)
            largest = tl.where((size > largest) & (size < float("inf")), size, largest)
        # To the maps, the matrix, the view's weights.
        if grad_features is not None:
            _scatter(grad_features, poison, start, corner, row, c, d, tap_weights, seen, scale, C, SCATTER)
        if grad_q is not None:
            gu, gv = _pixel_gradient(d, taps, s, t)
            _store_matrix(grad_q + (program * M + m) * 12, gu, gv, u, v, inverse, seen, i, j, k)
        if grad_weights is not None:
            share = g / _divisor(total) * (sample - value) if EXCLUDE else g * sample
            share = tl.where(seen[:, None], share, 0.0)
            tl.store(grad_weights + (tl.program_id(0).to(tl.int64) * M + m) * C + c, tl.sum(share, 0), mask=c < C)
    if bounds is not None:
        tl.store(bounds + program, tl.max(tl.max(largest, 1), 0))


# ---- launch ----


class Config(NamedTuple):
    """How the voxels and channels are cut: a program has a brick of ``steps`` tiles, one after the other, in x."""

    steps: int
    tile: tuple[int, int, int]
    channels: int
    views: int  # unrolled, their samples all in registers; 0 if not
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        """As both kernels take them."""
        bx, by, bz = self.tile
        return {"BX": bx, "BY": by, "BZ": bz, "BLOCK_C": self.channels, "VIEWS": self.views}

    def bricks(self, shape: tuple[int, ...]) -> int:
        """How many cover a volume."""
        bx, by, bz = self.tile
        return triton.cdiv(shape[0], bx * self.steps) * triton.cdiv(shape[1], by) * triton.cdiv(shape[2], bz)


def _powers_of_2(shape: tuple[int, ...]) -> list[int]:
    return [triton.next_power_of_2(max(size, 1)) for size in shape]


def _tile(voxels: int, shape: tuple[int, ...], side: int) -> tuple[int, int, int]:
    """A tile of so many voxels: up to ``side`` in z and y, the rest in x; longer where the volume is flat."""
    x, y, z = _powers_of_2(shape)
    bz = min(z, max(side, voxels // (x * y)), voxels)
    by = min(y, max(side, voxels // (x * bz)), voxels // bz)
    return voxels // (by * bz), by, bz


def _config(
    shape: tuple[int, ...], views: int, channels: int, itemsize: int, backward: bool, interpreted: bool = INTERPRETED
) -> Config:
    width = triton.next_power_of_2(channels)
    unrolled = views if views <= 4 else 0
    if interpreted:  # few programs, since each costs milliseconds, whatever its size
        return Config(1, _tile(min(4096, math.prod(_powers_of_2(shape))), shape, 16), min(width, 128), unrolled, 1)
    block = min(width, 128 // itemsize)  # a cache line
    elements = 2048 if unrolled and not backward else 1024  # 16 or 8 a thread
    if itemsize == 8:  # twice the registers for each number: 2 a thread
        elements, unrolled = 256, 0
    elif channels % block:  # twice the registers for addresses
        elements, unrolled = elements // 2, 0
    voxels = min(elements // block, 256)  # 2 a thread: each has its own pixel and taps, however few its channels
    if backward:
        return Config(1, _tile(voxels, shape, 4), block, unrolled, 4)
    return Config(8, _tile(voxels, shape, 8), block, unrolled, 4)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check(
    features: Tensor,
    q: Tensor,
    view_mask: Tensor | None,
    view_weights: Tensor | None,
    shape: list[int],
    aggregation: str,
    unseen: str,
) -> None:
    """What the kernels rely on, though the public function has checked it with better words."""
    _require(features.ndim == 5, "features: expected (N, M, C, H, W)")
    n, m, c, h, w = features.shape
    _require(features.dtype in FEATURE_DTYPES, "features: expected float32, float64, bfloat16 or float16")
    _require(1 <= m <= MAX_VIEWS and min(c, h, w) > 0, "features: expected 1 to 255 views, no empty dimension but N")
    _require(c * max(h, 2) * max(w, 2) < 2**31, "features: one map of (C, H, W) is too large for 32-bit offsets")
    _require(max(h, w) < 2**24, "features: expected maps narrower than 2^24 pixels")
    _require(q.shape == (n, m, 3, 4), "q: expected (N, M, 3, 4)")
    _require(len(shape) == 3 and all(0 <= s < 2**24 for s in shape), "shape: expected three integers below 2^24")
    _require(shape[0] * shape[1] * shape[2] < 2**31, "shape: expected fewer than 2^31 voxels")
    _require(aggregation in AGGREGATIONS, f"aggregation {aggregation!r}: expected one of {', '.join(AGGREGATIONS)}")
    _require(unseen in UNSEEN, f"unseen {unseen!r}: expected zero or exclude")
    masked = view_mask is None or (view_mask.shape == (n, m) and view_mask.dtype == torch.bool)
    _require(masked, "view_mask: expected (N, M) bool")
    weighted = view_weights is not None and view_weights.shape == (n, m, c)
    _require(
        weighted if aggregation == "weighted" else view_weights is None,
        "view_weights: expected (N, M, C) with aggregation 'weighted' and none with another",
    )
    for name, tensor in (("q", q), ("view_mask", view_mask), ("view_weights", view_weights)):
        _require(tensor is None or tensor.device == features.device, f"{name}: expected device {features.device}")


def _inputs(features: Tensor, q: Tensor, view_mask: Tensor | None, view_weights: Tensor | None) -> dict[str, Any]:
    """The arguments that both kernels begin with. Maps are (N, M, H, W, C), at least two pixels high and wide."""
    _, m, _, h, w = features.shape
    maps = features.permute(0, 1, 3, 4, 2)
    if min(h, w) == 1:  # then there are always four taps, some of them zeros
        maps = F.pad(maps, (0, 0, 0, int(w == 1), 0, int(h == 1)))
    geometry = torch.float64 if features.dtype == torch.float64 else torch.float32
    return {
        "features": maps.contiguous(),
        "q": q.to(geometry).contiguous(),
        "mask": None if view_mask is None else view_mask.contiguous(),
        "weights": None if view_weights is None else view_weights.to(geometry).contiguous(),
        "M": m,
        "H": h,
        "W": w,
    }


def _forward(
    features: Tensor,
    q: Tensor,
    view_mask: Tensor | None,
    view_weights: Tensor | None,
    shape: list[int],
    aggregation: str,
    unseen: str,
) -> tuple[Tensor, Tensor]:
    _check(features, q, view_mask, view_weights, shape, aggregation, unseen)
    n, m, c = features.shape[:3]
    # The interpreter would truncate to bfloat16, where the GPU rounds.
    stored = torch.float32 if INTERPRETED and features.dtype == torch.bfloat16 else features.dtype
    volume = torch.empty((n, c, *shape), dtype=stored, device=features.device, memory_format=torch.channels_last_3d)
    counts = features.new_empty((n, *shape), dtype=torch.uint8)
    config = _config(tuple(shape), m, c, features.element_size(), False)
    grid = n * config.bricks(tuple(shape)), triton.cdiv(c, config.channels)
    if grid[0] == 0:
        return volume.to(features.dtype), counts
    with on_device(features):
        unproject_kernel[grid](
            **_inputs(features, q, view_mask, view_weights),
            volume=volume,
            counts=counts,
            **dict(zip("XYZ", shape)),
            C=c,
            AGGREGATION=aggregation,
            EXCLUDE=unseen == "exclude",
            STEPS=config.steps,
            **config.constants,
            num_warps=config.warps,
        )
    return volume.to(features.dtype), counts


class Backward(NamedTuple):
    """A launch of the backward kernel without the gradients that it is to write."""

    arguments: dict[str, Any]
    grid: tuple[int, int]
    warps: int

    def __call__(self, **gradients: Any) -> None:
        """Those given are written, or added to."""
        if self.grid[0] == 0:
            return
        wanted = {"SCATTER": "atomic", **dict.fromkeys(GRADIENTS), **gradients}
        with on_device(self.arguments["grad_volume"]):
            unproject_backward_kernel[self.grid](**self.arguments, **wanted, num_warps=self.warps)


def _scatter_in_any_order(launch: Backward, maps: Tensor, partials: dict[str, Tensor]) -> Tensor:
    """Gradient of the maps by atomic additions, rounded in the order in which they come."""
    grad = maps.new_zeros(maps.shape, dtype=launch.arguments["q"].dtype)
    launch(grad_features=grad, **partials)
    return grad


def _scatter_in_fixed_point(launch: Backward, maps: Tensor, partials: dict[str, Tensor]) -> Tensor:
    """The same in integers, of a scale that the largest dL/dv of the sample sets: the order changes no bit.

    All voxels may meet in one pixel, and none gives it more than dL/dv: with 2^62 over their number for the largest,
    no sum overflows. Of 64³ voxels, the unit is then below 2^-43 of the largest. What is not finite is noted apart.
    """
    n = maps.shape[0]
    voxels = math.prod(launch.arguments[axis] for axis in "XYZ")
    bounds = maps.new_zeros(
        (n, max(1, launch.grid[0] // max(n, 1)) * launch.grid[1]), dtype=launch.arguments["q"].dtype
    )
    launch(bounds=bounds)
    exponent = torch.frexp(bounds.amax(1)).exponent.clamp(min=-900)  # the largest is below 2^exponent
    scales = torch.exp2((62 - voxels.bit_length() - exponent).double())
    total = maps.new_zeros(maps.shape, dtype=torch.int64)
    poison = maps.new_zeros(maps.shape, dtype=torch.int8)
    launch(SCATTER="fixed", grad_features=total, poison=poison, scales=scales, **partials)
    grad = (total / scales.view(n, 1, 1, 1, 1)).to(bounds.dtype)
    return grad.masked_fill_(poison.bool(), torch.nan)


def _backward(
    grad_volume: Tensor,
    features: Tensor,
    q: Tensor,
    view_mask: Tensor | None,
    view_weights: Tensor | None,
    shape: list[int],
    aggregation: str,
    unseen: str,
    needs_features: bool,
    needs_q: bool,
    needs_weights: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(features, q, view_mask, view_weights, shape, aggregation, unseen)
    n, m, c, h, w = features.shape
    _require(grad_volume.shape == (n, c, *shape), "grad_volume: expected (N, C, X, Y, Z)")
    _require(grad_volume.device == features.device, f"grad_volume: expected device {features.device}")
    _require(not needs_weights or view_weights is not None, "needs_weights: there are no view_weights")
    config = _config(tuple(shape), m, c, features.element_size(), True)
    bricks, blocks = config.bricks(tuple(shape)), triton.cdiv(c, config.channels)
    inputs = _inputs(features, q, view_mask, view_weights)
    arguments = {
        "grad_volume": grad_volume,
        **dict(zip(STRIDES, grad_volume.stride())),
        **inputs,
        **dict(zip("XYZ", shape)),
        "C": c,
        "AGGREGATION": aggregation,
        "EXCLUDE": unseen == "exclude",
        **config.constants,
    }
    launch = Backward(arguments, (n * bricks, blocks), config.warps)
    # Summed over the voxels of a program in registers, and here over the programs: no atomics.
    partials = {}
    if needs_q:
        partials["grad_q"] = inputs["q"].new_empty((n, bricks * blocks, m, 3, 4))
    if needs_weights:
        partials["grad_weights"] = inputs["q"].new_empty((n, bricks, m, c))
    grad_features = features.new_empty(0)
    if needs_features:
        scatter = _scatter_in_fixed_point if deterministic else _scatter_in_any_order
        grad = scatter(launch, inputs["features"], partials)
        if grad.shape[2:4] != (h, w):  # without what narrow maps were padded by
            grad = grad[:, :, :h, :w].clone(memory_format=torch.contiguous_format)
        grad_features = grad.to(features.dtype).permute(0, 1, 4, 2, 3)
    else:
        launch(**partials)
    grad_q, grad_weights = (
        partials[name].sum(1, dtype=torch.float64).to(q.dtype) if name in partials else q.new_empty(0)
        for name in ("grad_q", "grad_weights")
    )
    return grad_features, grad_q, grad_weights


define("unproject", _forward, _backward)


# ---- variants, to be compiled ahead of time ----

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def _variant(
    dtype: torch.dtype,
    channels: int,
    aggregation: str,
    unseen: str,
    backward: bool,
    *wanted: str,
    views: int = 4,
    programs: int = 3,
) -> Variant:
    """As the kernel is launched for 64³ voxels; ``wanted`` are the gradients asked for."""
    config = _config((64, 64, 64), views, channels, dtype.itemsize, backward, interpreted=False)
    scatter = "fixed" if "scales" in wanted else "atomic"
    storage, geometry = TYPES[dtype], "fp64" if dtype == torch.float64 else "fp32"
    kernel = unproject_backward_kernel if backward else unproject_kernel
    pointers = {"features": storage, "q": geometry, "weights": geometry, "mask": "i1"}
    pointers |= {"grad_volume": storage} if backward else {"volume": storage, "counts": "u8"}
    pointers |= {
        "grad_features": "i64" if scatter == "fixed" else geometry,
        "poison": "i8",
        "scales": "fp64",
        "bounds": geometry,
        "grad_q": geometry,
        "grad_weights": geometry,
    }
    absent = ["mask", *({*GRADIENTS} - {*wanted}), *([] if aggregation == "weighted" else ["weights"])]
    constants: dict[str, Any] = dict.fromkeys(name for name in absent if name in kernel.arg_names)
    constants |= {"C": channels, "AGGREGATION": aggregation, "EXCLUDE": unseen == "exclude", **config.constants}
    constants |= {"SCATTER": scatter, "stride_c": 1} if backward else {"STEPS": config.steps}
    integers = ("M", "H", "W", "X", "Y", "Z", *(STRIDES if backward else ()))
    types = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(integers, "i32")
    used = [name for name in kernel.arg_names if name not in constants]
    return Variant(
        name=" ".join([storage, f"M={views} C={channels}", aggregation, unseen, *wanted]),
        kernel=kernel,
        types={name: types[name] for name in used},
        constants=constants,
        aligned=tuple(
            name for name in used if name in pointers or name in "XYZ" or (name in STRIDES and channels % 16 == 0)
        ),
        warps=config.warps,
        programs=programs,
    )


def variants() -> Iterator[Variant]:
    """Each dtype's path, forward and backward; channels that make vectors and that do not; each kind of scatter."""
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    yield _variant(f32, 32, "softmax", "zero", False)
    yield _variant(f32, 32, "softmax", "exclude", False, views=6)
    yield _variant(f32, 15, "softmax", "exclude", False)
    yield _variant(f32, 1, "softmax", "exclude", False)
    yield _variant(f32, 32, "weighted", "exclude", False, programs=2)
    yield _variant(bf16, 32, "softmax", "zero", False)
    yield _variant(f16, 32, "max", "exclude", False)
    yield _variant(f64, 32, "softmax", "zero", False)
    yield _variant(f64, 15, "softmax", "exclude", False)
    maps, matrices = ("grad_features",), ("grad_features", "grad_q")
    yield _variant(f32, 32, "softmax", "zero", True, *maps)
    yield _variant(f32, 32, "softmax", "zero", True, *matrices, programs=2)
    yield _variant(f32, 32, "softmax", "exclude", True, *maps, views=6)
    yield _variant(f32, 15, "softmax", "exclude", True, *maps)
    yield _variant(f32, 32, "weighted", "exclude", True, *matrices, "grad_weights")
    yield _variant(bf16, 32, "softmax", "zero", True, *matrices, programs=2)
    yield _variant(f16, 32, "mean", "exclude", True, *maps)
    yield _variant(f64, 32, "softmax", "zero", True, *matrices)
    yield _variant(f64, 15, "softmax", "exclude", True, *matrices, "poison", "scales", programs=2)
    yield _variant(f32, 32, "softmax", "zero", True, "bounds")
    yield _variant(f32, 32, "softmax", "zero", True, *matrices, "poison", "scales", programs=2)
