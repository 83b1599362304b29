"""Edge maps in Triton: max over edges of w·exp(−d²/σ²), its winners, and the gradient to ends and weights of winners.

``_prepare`` writes a table of each edge's frame (float64 arithmetic, 28 bytes an edge in float32) for every map and
sample. ``_forward`` gives each tile of 8 × 16 pixels to one warp, which finds the largest lower bound of log w − d²/σ²
over the tile, 32 edges at a time, then visits, in order, only edges whose upper bound reaches it. Best score and winner
stay in registers; one exponential gives the value. The bounds allow for rounding: culling changes no bit. Up to 8 maps
share one launch. Backward, ``_scatter``: a warp sums over its tile for one distinct winner after the other, 5 atomics
for each. Deterministic: ``_gather`` has one program for each map, sample and edge, which reads the tiles that the edge
can reach in order, and ``_collect`` adds up in order. Saved for backward: the inputs and the winners, 2 bytes a pixel.

Bound by arithmetic: at N = 64, 30 keypoints = 435 edges and 128² pixels there are 456 M pairs of pixel and edge;
culling leaves 65 edges to a tile (σ = 2.9), at 59 instructions for 4 pixels and 100 for the bounds of 32 edges
(sm_90), against 6.3 MB written and, backward, read. Backward has 7 distinct winners in a tile: 0.3 M atomics.
Measured on an H200 (benchmarks/results/2026-11-27-h200/times/results.csv, ``batch-64``): forward 0.203 ms, backward
0.914, both in a training step 1.49; the host takes 0.4 to 0.6 ms of any backward pass (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import GEOMETRY_DTYPES
from ..registration import INT16_EDGES, call
from . import INTERPRETED, NAMESPACE, Variant, define, double_bits, on_device
from . import unavailable as _unavailable

__all__ = ["run", "unavailable"]

MAPS = 8  # in one launch: a kernel is compiled for each number of maps
# A table is (maps, N, blocks, COLUMNS, BLOCK): of each block of edges, whose bounds are taken at once and make a bit of
# an int32 each, the columns ux, uy, across, lo, hi, log w and 1 / (hi − lo). So these are at constant distances.
BLOCK, COLUMNS = tl.constexpr(32), tl.constexpr(7)
LONGEST = 2**22  # pixels of a side

# Pixels of a program, rows × columns: float32, the same below so many pixels in all, and float64, which would spill.
TILE, SMALL_TILE, DOUBLE_TILE, FEW_PIXELS = (8, 16), (8, 8), (4, 8), 2**18
# Edges of one program in `_prepare`, `_gather` and `_collect`, and keypoints in the last.
PREPARED, GATHERED, COLLECTED, POINTS = 128, 1, 64, 32
if INTERPRETED:  # where every program costs milliseconds
    TILE = SMALL_TILE = DOUBLE_TILE = (64, 64)
    GATHERED = 2**15

# Arguments for whose values nothing is compiled anew. Strides are not among them; those of the table are constant.
INTEGERS = ("samples", "points", "count", "capacity", "maps", "first_height", "first_width")
# Numbers in a tuple would be compiled as constants where they are 1, and by divisibility: so what differs from map to
# map travels as an odd int64.
FLAG, MASK = tl.constexpr(2**62), tl.constexpr(2**63 - 1)


class Limits(NamedTuple):
    """Of a dtype: as in csrc/common/rasterize_edges.h."""

    lowest: float  # a pixel whose best score is lower has value 0 and no winner
    tolerance: float  # 8 times a bound of relative rounding errors
    slack: float  # of scores; with infinity here nothing is culled


LIMITS = {
    torch.float32: Limits(-87.33, 16 * 2.0**-24, 16 * 2.0**-24 * 200),
    torch.float64: Limits(-708.0, 16 * 2.0**-53, 16 * 2.0**-53 * 1500),
}


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on this device type and dtype, or None."""
    reason = _unavailable(device, dtype)
    return reason if reason or dtype in GEOMETRY_DTYPES else f"{dtype} is not one of float32, float64"


def run(
    keypoints: Tensor, weights: Tensor, edges: Tensor, sizes: list[tuple[int, int]], sigmas: list[float]
) -> list[Tensor]:
    """One map for each size; arguments as in ``reference/rasterize_edges.py``."""
    flat = [length for size in sizes for length in size]
    return call(NAMESPACE, "rasterize_edges", keypoints, weights, edges, flat, sigmas)[0]


# ---- where a program works ----


@triton.jit
def _pick(options, index):
    """options[index] of a tuple."""
    chosen = options[0]
    for i in tl.static_range(1, len(options)):
        chosen = tl.where(index == i, options[i], chosen)
    return chosen


@triton.jit
def _decode(number):
    """What `_encode` was given."""
    return ((number.to(tl.int64) ^ FLAG) >> 1) & MASK


@triton.jit
def _size(sizes, index):
    """Height and width of a map."""
    size = _decode(_pick(sizes, index))
    return (size >> 32).to(tl.int32), size.to(tl.int32)


@triton.jit
def _locate(program, samples, sizes, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """A program's map, its size and how many pixels the maps before have in all samples; sample, first row and column.

    Programs count through columns, rows, samples and maps.
    """
    index, first, end = 0, 0, 0
    before = tl.zeros([], tl.int64)
    pixels = tl.zeros([], tl.int64)
    for i in tl.static_range(len(sizes)):
        here = program >= end
        index = tl.where(here, i, index)
        first = tl.where(here, end, first)
        before = tl.where(here, pixels, before)
        height, width = _size(sizes, i)
        end += samples * ((height + HEIGHT - 1) // HEIGHT * ((width + WIDTH - 1) // WIDTH))
        pixels += samples * (height.to(tl.int64) * width)
    height, width = _size(sizes, index)
    columns = (width + WIDTH - 1) // WIDTH
    tiles = (height + HEIGHT - 1) // HEIGHT * columns
    sample, tile = (program - first) // tiles, (program - first) % tiles
    return index, height, width, before, sample.to(tl.int64), tile // columns * HEIGHT, tile % columns * WIDTH


@triton.jit
def _frames(table, index, sample, samples, capacity):
    """The part of a table for one map and sample."""
    return table + (index.to(tl.int64) * samples + sample) * capacity * COLUMNS


@triton.jit
def _frame(frames, edge):
    """Where an edge, or each of several, has its first column."""
    return frames + edge // BLOCK * (BLOCK * COLUMNS) + edge % BLOCK


# ---- segments: as in csrc/common/rasterize_edges.h ----


@triton.jit
def _coordinate(keypoints, point, known, stride, length, first_length):
    """A keypoint's x or y relative to the centre of the map, in its pixels, float64; NaN where it is not known."""
    value = tl.load(keypoints + point * stride, mask=known, other=float("nan")).to(tl.float64)
    scale = length.to(tl.float64) / first_length.to(tl.float64)
    return (value + 0.5) * scale - 0.5 - 0.5 * (length - 1).to(tl.float64)


@triton.jit
def _segment(ax, ay, bx, by, sigma):
    """ux, uy, across, lo, hi, inverse: direction over σ, line, ends along it, 1 / (hi − lo). Not finite becomes NaN."""
    dx, dy = bx - ax, by - ay
    squared = dx * dx + dy * dy
    finite = (squared - squared) + 1.0
    proper = squared > 1e-12  # pixels²: a shorter segment is a point, its first end
    length = tl.sqrt(tl.where(proper, squared, finite))
    scale = finite / (length * sigma)
    nearer = bx * bx + by * by < ax * ax + ay * ay  # b is: the line is known best at the nearer end
    ux = tl.where(proper, dx, finite) * scale
    uy = tl.where(proper, dy, finite - finite) * scale
    lo = ax * ux + ay * uy
    hi = tl.where(proper, tl.maximum(bx * ux + by * uy, lo), lo)
    across = tl.where(nearer, bx, ax) * uy - tl.where(nearer, by, ay) * ux
    return ux, uy, across, lo, hi, tl.where(proper, sigma / length, finite - finite)


@triton.jit
def _load_frame(frame):
    """ux, uy, across, lo, hi."""
    ux, uy, across = tl.load(frame), tl.load(frame + BLOCK), tl.load(frame + 2 * BLOCK)
    return ux, uy, across, tl.load(frame + 3 * BLOCK), tl.load(frame + 4 * BLOCK)


@triton.jit
def _offset(x, y, ux, uy, across, lo, hi):
    """From the nearest point of the segment to a pixel: across it and beyond its ends; and where that point is."""
    along = y * uy + x * ux
    clamped = tl.minimum(tl.maximum(along, lo), hi)
    return y * ux + (across - x * uy), along - clamped, clamped


@triton.jit
def _bounds(frame, x0, y0, x1, y1, TOLERANCE: tl.constexpr):
    """Of log w − d²/σ² of edges over the pixels from (x0, y0) to (x1, y1), rounding allowed for: upper, lower."""
    ux, uy, line, lo, hi = _load_frame(frame)
    log_weight = tl.load(frame + 5 * BLOCK)
    x, y, half_width, half_height = (x0 + x1) * 0.5, (y0 + y1) * 0.5, (x1 - x0) * 0.5, (y1 - y0) * 0.5
    extent = tl.abs(x) + tl.abs(y) + half_width + half_height
    au, av = tl.abs(ux), tl.abs(uy)
    slack = TOLERANCE * (tl.abs(line) + (au + av) * extent)
    radius_across = av * half_width + au * half_height + slack
    radius_along = au * half_width + av * half_height + slack
    side, along = tl.abs(y * ux + (line - x * uy)), x * ux + y * uy
    outside = tl.maximum(lo - along, along - hi)
    near_side, near_end = tl.maximum(side - radius_across, 0.0), tl.maximum(outside - radius_along, 0.0)
    far_side, far_end = side + radius_across, tl.maximum(outside + radius_along, 0.0)
    upper = log_weight - (near_side * near_side + near_end * near_end) * (1 - TOLERANCE)
    return upper, log_weight - (far_side * far_side + far_end * far_end) * (1 + TOLERANCE)


# ---- preparation ----


@triton.jit(do_not_specialize=INTEGERS)
def _prepare(
    keypoints,
    weights,
    edges,
    table,
    samples,
    points,
    count,
    capacity,
    point_strides,
    weight_strides,
    edge_strides,
    first_height,
    first_width,
    sizes,
    sigmas,
    FORWARD: tl.constexpr,
    EDGES: tl.constexpr,
):
    """A block of edges of one sample in the pixels of one map, to the table; rows behind the last are not drawn.

    An edge that holds a NaN, or names a keypoint that there is not, has an infinite log w. In forward its frame is 0,
    so that its score is infinite at every pixel: the first of them wins, and shows as NaN.
    """
    # Which map, sample and edges.
    blocks = tl.cdiv(capacity, EDGES)
    pair = tl.program_id(0) // blocks
    index, sample = pair // samples, (pair % samples).to(tl.int64)
    height, width = _size(sizes, index)
    sigma = _decode(_pick(sigmas, index)).to(tl.float64, bitcast=True)
    edge = tl.program_id(0) % blocks * EDGES + tl.arange(0, EDGES)
    real = edge < count
    wide = edge.to(tl.int64)
    a = tl.load(edges + wide * edge_strides[0], mask=real, other=-1)
    b = tl.load(edges + wide * edge_strides[0] + edge_strides[1], mask=real, other=-1)
    a_known, b_known = (a >= 0) & (a < points), (b >= 0) & (b < points)
    # Their frames.
    xs = keypoints + sample * point_strides[0]
    ys = xs + point_strides[2]
    ux, uy, across, lo, hi, inverse = _segment(
        _coordinate(xs, a, a_known, point_strides[1], width, first_width),
        _coordinate(ys, a, a_known, point_strides[1], height, first_height),
        _coordinate(xs, b, b_known, point_strides[1], width, first_width),
        _coordinate(ys, b, b_known, point_strides[1], height, first_height),
        sigma,
    )
    # log w.
    weight = tl.load(weights + sample * weight_strides[0] + wide * weight_strides[1], mask=real, other=0.0)
    drawn = (weight > 0) | (weight != weight)
    log_weight = tl.where(drawn, tl.log(tl.where(drawn, weight, 1.0).to(tl.float64)), float("-inf"))
    broken = (across != across) | (weight != weight)
    # An infinite weight has a finite logarithm instead, whose exponential is infinite all the same.
    log_weight = tl.where(broken, float("inf"), tl.minimum(log_weight, 1e30))
    log_weight = tl.where(real, log_weight, float("-inf"))
    if FORWARD:
        broken |= edge >= count
        ux, uy, across = tl.where(broken, 0.0, ux), tl.where(broken, 0.0, uy), tl.where(broken, 0.0, across)
        lo, hi = tl.where(broken, 0.0, lo), tl.where(broken, 0.0, hi)
    # Write.
    to = _frame(_frames(table, index, sample, samples, capacity), edge)
    in_table = edge < capacity
    tl.store(to, ux, mask=in_table)
    tl.store(to + BLOCK, uy, mask=in_table)
    tl.store(to + 2 * BLOCK, across, mask=in_table)
    tl.store(to + 3 * BLOCK, lo, mask=in_table)
    tl.store(to + 4 * BLOCK, hi, mask=in_table)
    tl.store(to + 5 * BLOCK, log_weight, mask=in_table)
    tl.store(to + 6 * BLOCK, inverse, mask=in_table)


# ---- forward ----


@triton.jit
def _lowest_bit(bits):
    """Position of the lowest bit set: the exponent of that bit as a float32."""
    lowest = (bits & -bits).to(tl.float32).to(tl.int32, bitcast=True)
    return ((lowest >> 23) & 255) - 127


@triton.jit(do_not_specialize=INTEGERS)
def _forward(
    table,
    winners,
    maps,
    samples,
    capacity,
    sizes,
    slack,
    LOWEST: tl.constexpr,
    TOLERANCE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One tile of one map of one sample: values and winners."""
    T: tl.constexpr = table.dtype.element_ty
    # Where the tile is.
    index, height, width, before, sample, row, column = _locate(tl.program_id(0), samples, sizes, HEIGHT, WIDTH)
    frames = _frames(table, index, sample, samples, capacity)
    right, bottom = 0.5 * (width - 1).to(T), 0.5 * (height - 1).to(T)
    x0, y0 = column.to(T) - right, row.to(T) - bottom
    x1, y1 = tl.minimum(x0 + (WIDTH - 1), right), tl.minimum(y0 + (HEIGHT - 1), bottom)
    corner = (sample * height + row) * width + column
    lanes = tl.arange(0, BLOCK)

    # The best lower bound.
    lowers = tl.full([BLOCK], LOWEST, T)
    for first in range(0, capacity, BLOCK):
        _, lower = _bounds(frames + first * COLUMNS + lanes, x0, y0, x1, y1, TOLERANCE)
        lowers = tl.maximum(lowers, lower)
    least = tl.max(lowers) - slack

    # Edges that may win, 32 at a time, each against all pixels.
    columns, rows = tl.arange(0, WIDTH)[None, :], tl.arange(0, HEIGHT)[:, None]
    inside = (column + columns < width) & (row + rows < height)
    x, y = x0 + columns.to(T), y0 + rows.to(T)
    best = tl.full([HEIGHT, WIDTH], float("-inf"), T)
    winner = tl.full([HEIGHT, WIDTH], -1, tl.int32)
    for first in range(0, capacity, BLOCK):
        block = frames + first * COLUMNS
        upper, _ = _bounds(block + lanes, x0, y0, x1, y1, TOLERANCE)
        bits = tl.sum(tl.where(upper < least, 0, 1 << lanes))
        while bits != 0:
            lane = _lowest_bit(bits)
            bits &= bits - 1
            ux, uy, line, lo, hi = _load_frame(block + lane)
            across, beyond, _nearest = _offset(x, y, ux, uy, line, lo, hi)
            score = (tl.load(block + lane + 5 * BLOCK) - across * across) - beyond * beyond
            better = score > best  # strictly: ties stay with the lowest index
            best = tl.where(better, score, best)
            winner = tl.where(better, first + lane, winner)
        # What the pixels have found raises the bound.
        least = tl.maximum(least, tl.min(tl.where(inside, best, float("inf"))) - slack)

    # Write.
    drawn = best >= LOWEST
    value = tl.where(drawn, tl.where(best == float("inf"), float("nan"), tl.exp(best)), 0.0)
    at = corner + (rows * width + columns)
    tl.store(_pick(maps, index) + at, value, mask=inside)
    tl.store(winners + before + at, tl.where(drawn, winner, -1), mask=inside)


# ---- backward ----


@triton.jit
def _moments(grad, x, y, ux, uy, line, lo, hi, inverse):
    """m = gradient · value / weight of pixels, and m · share of each end · offset across and beyond, in the frame.

    The nearest point is near · a + far · b. The smaller share comes from the nearer end: its relative error stays small
    where the other end is far outside.
    """
    across, beyond, clamped = _offset(x, y, ux, uy, line, lo, hi)
    m = grad * tl.exp(-across * across - beyond * beyond)
    from_a, from_b = clamped - lo, hi - clamped
    first = from_a <= from_b
    small = tl.where(first, from_a, from_b) * inverse
    near, far = tl.where(first, 1 - small, small), tl.where(first, small, 1 - small)
    return m, m * near * across, m * near * beyond, m * far * across, m * far * beyond


@triton.jit
def _end_gradients(across_a, beyond_a, across_b, beyond_b, ux, uy, weight, scale_x, scale_y):
    """Gradients of both ends, in pixels of the first map, from sums of moments: that of −d² is 2 share · offset.

    An edge that has won nothing has none, even if it holds a NaN.
    """
    idle = (across_a == 0) & (beyond_a == 0) & (across_b == 0) & (beyond_b == 0)
    vx, vy = tl.where(idle, 0.0, 2 * weight * ux), tl.where(idle, 0.0, 2 * weight * uy)
    return (
        scale_x * (beyond_a * vx - across_a * vy),
        scale_y * (beyond_a * vy + across_a * vx),
        scale_x * (beyond_b * vx - across_b * vy),
        scale_y * (beyond_b * vy + across_b * vx),
    )


@triton.jit
def _pixels(
    row, column, height, width, sample, grad_strides, index, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, T: tl.constexpr
):
    """A tile's coordinates from the centre of the map, where its winners and gradients are, and which it has."""
    xs, ys = column + tl.arange(0, WIDTH)[None, :], row + tl.arange(0, HEIGHT)[:, None]
    x, y = xs.to(T) - 0.5 * (width - 1).to(T), ys.to(T) - 0.5 * (height - 1).to(T)
    grad_at = sample * _pick(grad_strides[0], index) + ys.to(tl.int64) * _pick(grad_strides[1], index)
    grad_at += xs.to(tl.int64) * _pick(grad_strides[2], index)
    return x, y, (sample * height + ys) * width + xs, grad_at, (xs < width) & (ys < height)


@triton.jit
def _add_to_point(gradient, point, points, x, y):
    known = (point >= 0) & (point < points)
    tl.atomic_add(gradient + point * 2, x, mask=known, sem="relaxed")
    tl.atomic_add(gradient + point * 2 + 1, y, mask=known, sem="relaxed")


@triton.jit(do_not_specialize=INTEGERS)
def _scatter(
    table,
    weights,
    edges,
    winners,
    grads,
    grad_keypoints,
    grad_weights,
    samples,
    points,
    count,
    capacity,
    weight_strides,
    edge_strides,
    first_height,
    first_width,
    sizes,
    grad_strides,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One tile: the sums of each distinct winner, added to the gradients of its ends and weight."""
    T: tl.constexpr = table.dtype.element_ty
    index, height, width, before, sample, row, column = _locate(tl.program_id(0), samples, sizes, HEIGHT, WIDTH)
    frames = _frames(table, index, sample, samples, capacity)
    # Moments of each pixel for its winner.
    x, y, at, grad_at, inside = _pixels(row, column, height, width, sample, grad_strides, index, HEIGHT, WIDTH, T)
    winner = tl.load(winners + before + at, mask=inside, other=-1).to(tl.int32)
    grad = tl.load(_pick(grads, index) + grad_at, mask=inside, other=0.0)
    won = (winner >= 0) & (winner < count)
    of_winner = _frame(frames, tl.where(won, winner, 0))
    ux, uy, line, lo, hi = _load_frame(of_winner)
    inverse = tl.load(of_winner + 6 * BLOCK)
    m, across_a, beyond_a, across_b, beyond_b = _moments(grad, x, y, ux, uy, line, lo, hi, inverse)

    # One distinct winner after the other.
    scale_x, scale_y = width.to(T) / first_width.to(T), height.to(T) / first_height.to(T)
    left = tl.where(won & (m != 0), winner, count)
    edge = tl.min(left)
    while edge < count:
        mine = left == edge
        left = tl.where(mine, count, left)
        wide, frame = edge.to(tl.int64), _frame(frames, edge)
        ax, ay, bx, by = _end_gradients(
            tl.sum(tl.where(mine, across_a, 0.0)),
            tl.sum(tl.where(mine, beyond_a, 0.0)),
            tl.sum(tl.where(mine, across_b, 0.0)),
            tl.sum(tl.where(mine, beyond_b, 0.0)),
            tl.load(frame),
            tl.load(frame + BLOCK),
            tl.load(weights + sample * weight_strides[0] + wide * weight_strides[1]),
            scale_x,
            scale_y,
        )
        ends, to = edges + wide * edge_strides[0], grad_keypoints + sample * points * 2
        _add_to_point(to, tl.load(ends), points, ax, ay)
        _add_to_point(to, tl.load(ends + edge_strides[1]), points, bx, by)
        value = tl.sum(tl.where(mine, m, 0.0))
        tl.atomic_add(grad_weights + sample * count + edge, value, sem="relaxed")
        edge = tl.min(left)


@triton.jit(do_not_specialize=INTEGERS)
def _gather(
    table,
    weights,
    winners,
    grads,
    partial,
    samples,
    count,
    capacity,
    weight_strides,
    first_height,
    first_width,
    sizes,
    grad_strides,
    slack,
    LOWEST: tl.constexpr,
    TOLERANCE: tl.constexpr,
    EDGES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Gradients of the ends and the weight of some edges from one map of one sample, to ``partial`` (maps, N, 5, E).

    Each pixel of the tile has its own sums, in the order of tiles; they are added up at the end.
    """
    T: tl.constexpr = table.dtype.element_ty
    # Which map, sample and edges.
    groups = tl.cdiv(count, EDGES)
    pair = tl.program_id(0) // groups
    index, sample = pair // samples, (pair % samples).to(tl.int64)
    pixels = tl.zeros([], tl.int64)
    before = tl.zeros([], tl.int64)
    for i in tl.static_range(len(sizes)):
        before = tl.where(index == i, pixels, before)
        height, width = _size(sizes, i)
        pixels += samples * (height.to(tl.int64) * width)
    height, width = _size(sizes, index)
    frames = _frames(table, index, sample, samples, capacity)
    scale_x, scale_y = width.to(T) / first_width.to(T), height.to(T) / first_height.to(T)
    right, bottom = 0.5 * (width - 1).to(T), 0.5 * (height - 1).to(T)
    start = tl.program_id(0) % groups * EDGES
    for step in range(0, tl.minimum(EDGES, count - start)):
        edge = start + step
        frame = _frame(frames, edge)
        ux, uy, line, lo, hi = _load_frame(frame)
        inverse = tl.load(frame + 6 * BLOCK)
        value = tl.zeros([HEIGHT, WIDTH], T)
        across_a = tl.zeros([HEIGHT, WIDTH], T)
        beyond_a = tl.zeros([HEIGHT, WIDTH], T)
        across_b = tl.zeros([HEIGHT, WIDTH], T)
        beyond_b = tl.zeros([HEIGHT, WIDTH], T)
        # Tiles that the edge can reach, in order.
        columns = tl.cdiv(width, WIDTH)
        for tile in range(tl.cdiv(height, HEIGHT) * columns):
            row, column = tile // columns * HEIGHT, tile % columns * WIDTH
            x0, y0 = column.to(T) - right, row.to(T) - bottom
            x1, y1 = tl.minimum(x0 + (WIDTH - 1), right), tl.minimum(y0 + (HEIGHT - 1), bottom)
            upper, _ = _bounds(frame, x0, y0, x1, y1, TOLERANCE)
            if (upper >= LOWEST - slack) | (upper != upper):
                x, y, at, grad_at, inside = _pixels(
                    row, column, height, width, sample, grad_strides, index, HEIGHT, WIDTH, T
                )
                winner = tl.load(winners + before + at, mask=inside, other=-1)
                grad = tl.load(_pick(grads, index) + grad_at, mask=inside, other=0.0)
                m, sa, ca, sb, cb = _moments(grad, x, y, ux, uy, line, lo, hi, inverse)
                mine = (winner == edge) & (m != 0)
                value += tl.where(mine, m, 0.0)
                across_a += tl.where(mine, sa, 0.0)
                beyond_a += tl.where(mine, ca, 0.0)
                across_b += tl.where(mine, sb, 0.0)
                beyond_b += tl.where(mine, cb, 0.0)
        # The tile's pixels added up.
        weight = tl.load(weights + sample * weight_strides[0] + edge.to(tl.int64) * weight_strides[1])
        ax, ay, bx, by = _end_gradients(
            tl.sum(across_a), tl.sum(beyond_a), tl.sum(across_b), tl.sum(beyond_b), ux, uy, weight, scale_x, scale_y
        )
        to = partial + pair.to(tl.int64) * 5 * count + edge
        tl.store(to, ax)
        tl.store(to + count, ay)
        tl.store(to + 2 * count, bx)
        tl.store(to + 3 * count, by)
        tl.store(to + 4 * count, tl.sum(value))


@triton.jit(do_not_specialize=INTEGERS)
def _collect(
    partial,
    edges,
    grad_keypoints,
    grad_weights,
    maps,
    samples,
    points,
    count,
    edge_strides,
    EDGES: tl.constexpr,
    POINTS: tl.constexpr,
):
    """Some keypoints of one sample: what edges that end there have in all maps; and the gradient of the weights."""
    T: tl.constexpr = partial.dtype.element_ty
    blocks = tl.cdiv(points, POINTS)
    block = tl.program_id(0) % blocks
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    point = block * POINTS + tl.arange(0, POINTS)
    sum_x = tl.zeros([POINTS], T)
    sum_y = tl.zeros([POINTS], T)
    for first in range(0, count, EDGES):
        edge = first + tl.arange(0, EDGES)
        real = edge < count
        # All maps, in order.
        value = tl.zeros([EDGES], T)
        ax = tl.zeros([EDGES], T)
        ay = tl.zeros([EDGES], T)
        bx = tl.zeros([EDGES], T)
        by = tl.zeros([EDGES], T)
        for index in range(maps):
            of_map = partial + (index * samples + sample) * 5 * count + edge
            ax += tl.load(of_map, mask=real, other=0.0)
            ay += tl.load(of_map + count, mask=real, other=0.0)
            bx += tl.load(of_map + 2 * count, mask=real, other=0.0)
            by += tl.load(of_map + 3 * count, mask=real, other=0.0)
            value += tl.load(of_map + 4 * count, mask=real, other=0.0)
        # To the keypoints at both ends.
        ends = edges + edge.to(tl.int64) * edge_strides[0]
        at_a = tl.load(ends, mask=real, other=-1)[:, None] == point[None, :]
        at_b = tl.load(ends + edge_strides[1], mask=real, other=-1)[:, None] == point[None, :]
        sum_x += tl.sum(tl.where(at_a, ax[:, None], 0.0) + tl.where(at_b, bx[:, None], 0.0), 0)
        sum_y += tl.sum(tl.where(at_a, ay[:, None], 0.0) + tl.where(at_b, by[:, None], 0.0), 0)
        tl.store(grad_weights + sample * count + edge, value, mask=real & (block == 0))
    to = grad_keypoints + (sample * points + point) * 2
    tl.store(to, sum_x, mask=point < points)
    tl.store(to + 1, sum_y, mask=point < points)


# ---- launches ----


def _check(keypoints: Tensor, weights: Tensor, edges: Tensor, sizes: list[int], sigmas: list[float]) -> None:
    """What the kernels rely on; the range of edges they check themselves."""
    if keypoints.ndim != 3 or keypoints.shape[2] != 2 or keypoints.dtype not in GEOMETRY_DTYPES:
        raise ValueError(f"keypoints {tuple(keypoints.shape)}: expected (N, K, 2) float32 or float64")
    if edges.ndim != 2 or edges.shape[1] != 2 or edges.dtype != torch.int64:
        raise ValueError(f"edges {tuple(edges.shape)}: expected (E, 2) int64")
    if weights.shape != (keypoints.shape[0], edges.shape[0]) or weights.dtype != keypoints.dtype:
        raise ValueError(f"weights {tuple(weights.shape)}: expected (N, E) in the dtype of the keypoints")
    for name, tensor in (("weights", weights), ("edges", edges)):
        if tensor.device != keypoints.device:
            raise ValueError(f"{name}: expected device {keypoints.device} as keypoints has, got {tensor.device}")
    if not sigmas or len(sizes) != 2 * len(sigmas):
        raise ValueError(f"sizes {sizes}: expected (H, W) for each of {len(sigmas)} sigmas")
    if min(sizes) < 1 or max(sizes) >= LONGEST or not min(sigmas) > 0:
        raise ValueError(f"sizes {sizes} and sigmas {sigmas}: expected positive numbers, and sides below {LONGEST}")


def _check_gradients(grad_maps: list[Tensor], winners: Tensor, keypoints: Tensor, shapes: list[Any], e: int) -> None:
    n = keypoints.shape[0]
    given = [(*grad.shape, grad.dtype, grad.device) for grad in grad_maps]
    if given != [(n, h, w, keypoints.dtype, keypoints.device) for h, w in shapes]:
        raise ValueError("grad_maps: expected the shapes, dtype and device of the maps")
    pixels, dtype = n * sum(h * w for h, w in shapes), _index_dtype(e)
    if winners.shape != (pixels,) or winners.dtype != dtype or winners.device != keypoints.device:
        raise ValueError(f"winners {tuple(winners.shape)}: expected those that the forward pass returned")
    if not winners.is_contiguous():
        raise ValueError("winners: expected a contiguous tensor")


def _index_dtype(edges: int) -> torch.dtype:
    return torch.int16 if edges <= INT16_EDGES else torch.int32


def _encode(number: int) -> int:
    """As an int64 that is odd, and too large for an int32."""
    bits = (number << 1 | 1) ^ FLAG.value
    return bits - 2**64 if bits >= 2**63 else bits


class _Launch(NamedTuple):
    """The maps of one launch."""

    maps: slice  # of all maps
    shapes: list[tuple[int, int]]
    sizes: tuple[int, ...]  # height and width of each, and
    sigmas: tuple[int, ...]  # bits of a float64 (an argument that is a float would become a float32), encoded
    pixels: slice  # of the winners

    def tiles(self, tile: tuple[int, int]) -> int:
        """In one sample."""
        return sum(triton.cdiv(h, tile[0]) * triton.cdiv(w, tile[1]) for h, w in self.shapes)


def _launches(samples: int, sizes: list[int], sigmas: list[float]) -> Iterator[_Launch]:
    start = 0
    for first in range(0, len(sigmas), MAPS):
        maps = slice(first, min(first + MAPS, len(sigmas)))
        shapes = list(zip(sizes[::2], sizes[1::2]))[maps]
        end = start + samples * sum(h * w for h, w in shapes)
        packed = tuple(_encode(h << 32 | w) for h, w in shapes)
        bits = tuple(_encode(double_bits(sigma)) for sigma in sigmas[maps])
        yield _Launch(maps, shapes, packed, bits, slice(start, end))
        start = end


def _tile(keypoints: Tensor, sizes: list[int]) -> tuple[int, int]:
    if keypoints.dtype == torch.float64:
        return DOUBLE_TILE
    pixels = keypoints.shape[0] * sum(h * w for h, w in zip(sizes[::2], sizes[1::2]))
    return SMALL_TILE if pixels < FEW_PIXELS else TILE


def _table(
    keypoints: Tensor, weights: Tensor, edges: Tensor, sizes: list[int], launch: _Launch, forward: bool
) -> tuple[Tensor, int]:
    """And its capacity: edges, rounded up to whole blocks."""
    (n, k, _), e, maps = keypoints.shape, edges.shape[0], len(launch.shapes)
    capacity = triton.cdiv(e, BLOCK.value) * BLOCK.value
    table = keypoints.new_empty((maps, n, capacity * COLUMNS.value))
    if table.numel() == 0:
        return table, capacity
    with on_device(keypoints):
        _prepare[(maps * n * triton.cdiv(capacity, PREPARED),)](
            keypoints,
            weights,
            edges,
            table,
            n,
            k,
            e,
            capacity,
            keypoints.stride(),
            weights.stride(),
            edges.stride(),
            *sizes[:2],
            launch.sizes,
            launch.sigmas,
            FORWARD=forward,
            EDGES=PREPARED,
        )
    return table, capacity


def _rasterize(
    keypoints: Tensor, weights: Tensor, edges: Tensor, sizes: list[int], sigmas: list[float]
) -> tuple[list[Tensor], Tensor]:
    _check(keypoints, weights, edges, sizes, sigmas)
    n, limits, tile = keypoints.shape[0], LIMITS[keypoints.dtype], _tile(keypoints, sizes)
    maps = [keypoints.new_empty((n, h, w)) for h, w in zip(sizes[::2], sizes[1::2])]
    winners = keypoints.new_empty((sum(m.numel() for m in maps),), dtype=_index_dtype(edges.shape[0]))
    for launch in _launches(n, sizes, sigmas) if n else ():
        table, capacity = _table(keypoints, weights, edges, sizes, launch, forward=True)
        with on_device(keypoints):
            _forward[(n * launch.tiles(tile),)](
                table,
                winners[launch.pixels],
                tuple(maps[launch.maps]),
                n,
                capacity,
                launch.sizes,
                limits.slack,
                LOWEST=limits.lowest,
                TOLERANCE=limits.tolerance,
                HEIGHT=tile[0],
                WIDTH=tile[1],
                num_warps=1,
            )
    return maps, winners


def _rasterize_backward(
    grad_maps: list[Tensor],
    keypoints: Tensor,
    weights: Tensor,
    edges: Tensor,
    winners: Tensor,
    sizes: list[int],
    sigmas: list[float],
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    _check(keypoints, weights, edges, sizes, sigmas)
    _check_gradients(grad_maps, winners, keypoints, list(zip(sizes[::2], sizes[1::2])), edges.shape[0])
    backward = _gather_all if deterministic else _scatter_all
    return backward(grad_maps, keypoints, weights, edges, winners, sizes, sigmas)


def _strides(grads: tuple[Tensor, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(grad.stride(d) for grad in grads) for d in range(3))


def _scatter_all(
    grad_maps: list[Tensor],
    keypoints: Tensor,
    weights: Tensor,
    edges: Tensor,
    winners: Tensor,
    sizes: list[int],
    sigmas: list[float],
) -> tuple[Tensor, Tensor]:
    (n, k, _), e, tile = keypoints.shape, edges.shape[0], _tile(keypoints, sizes)
    grad_keypoints, grad_weights = keypoints.new_zeros((n, k, 2)), weights.new_zeros((n, e))
    for launch in _launches(n, sizes, sigmas) if n * e else ():
        table, capacity = _table(keypoints, weights, edges, sizes, launch, forward=False)
        grads = tuple(grad_maps[launch.maps])
        with on_device(keypoints):
            _scatter[(n * launch.tiles(tile),)](
                table,
                weights,
                edges,
                winners[launch.pixels],
                grads,
                grad_keypoints,
                grad_weights,
                n,
                k,
                e,
                capacity,
                weights.stride(),
                edges.stride(),
                *sizes[:2],
                launch.sizes,
                _strides(grads),
                HEIGHT=tile[0],
                WIDTH=tile[1],
                num_warps=1,
            )
    return grad_keypoints, grad_weights


def _gather_all(
    grad_maps: list[Tensor],
    keypoints: Tensor,
    weights: Tensor,
    edges: Tensor,
    winners: Tensor,
    sizes: list[int],
    sigmas: list[float],
) -> tuple[Tensor, Tensor]:
    (n, k, _), e, limits = keypoints.shape, edges.shape[0], LIMITS[keypoints.dtype]
    if n * k * e == 0:
        return keypoints.new_zeros((n, k, 2)), weights.new_zeros((n, e))
    grad_keypoints, grad_weights = keypoints.new_empty((n, k, 2)), weights.new_empty((n, e))
    partial = keypoints.new_empty((len(sigmas), n, 5, e))
    for launch in _launches(n, sizes, sigmas):
        table, capacity = _table(keypoints, weights, edges, sizes, launch, forward=False)
        grads = tuple(grad_maps[launch.maps])
        with on_device(keypoints):
            _gather[(len(grads) * n * triton.cdiv(e, GATHERED),)](
                table,
                weights,
                winners[launch.pixels],
                grads,
                partial[launch.maps],
                n,
                e,
                capacity,
                weights.stride(),
                *sizes[:2],
                launch.sizes,
                _strides(grads),
                limits.slack,
                LOWEST=limits.lowest,
                TOLERANCE=limits.tolerance,
                EDGES=GATHERED,
                HEIGHT=TILE[0],
                WIDTH=TILE[1],
                num_warps=1,
            )
    with on_device(keypoints):
        _collect[(n * triton.cdiv(k, POINTS),)](
            partial,
            edges,
            grad_keypoints,
            grad_weights,
            len(sigmas),
            n,
            k,
            e,
            edges.stride(),
            EDGES=COLLECTED,
            POINTS=POINTS,
        )
    return grad_keypoints, grad_weights


define("rasterize_edges", _rasterize, _rasterize_backward)


# ---- ahead of time ----


def _types(dtype: str, maps: int, winner: str) -> dict[str, Any]:
    """Of the arguments of all kernels, as Triton names them."""
    names = "keypoints", "weights", "table", "grad_keypoints", "grad_weights", "partial"
    types: dict[str, Any] = dict.fromkeys(names, f"*{dtype}")
    types |= dict.fromkeys(("samples", "points", "count", "capacity", "first_height", "first_width"), "i32")
    types |= {"maps": (f"*{dtype}",) * maps, "grads": (f"*{dtype}",) * maps}
    types |= {"sizes": ("i64",) * maps, "sigmas": ("i64",) * maps}
    types |= {"point_strides": ("i32",) * 3, "weight_strides": ("i32",) * 2, "edge_strides": ("i32",) * 2}
    return types | {"grad_strides": (("i32",) * maps,) * 3, "edges": "*i64", "winners": f"*{winner}", "slack": "fp32"}


def _variant(kernel: Any, name: str, types: dict[str, Any], constants: dict[str, Any], warps: int, n: int) -> Variant:
    argument_types = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
    aligned = tuple(argument for argument, kind in argument_types.items() if isinstance(kind, str) and kind[0] == "*")
    return Variant(name, kernel, argument_types, constants, aligned, warps=warps, programs=n)


def variants() -> Iterator[Variant]:
    """Every kernel for both dtypes; for one map, the decoder's five, and more edges than an int16 counts."""
    for dtype, name in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        limits, single = LIMITS[dtype], dtype == torch.float32
        bounds: dict[str, Any] = {"LOWEST": limits.lowest, "TOLERANCE": limits.tolerance}
        tiles = TILE, SMALL_TILE, DOUBLE_TILE
        large, small, double = ({"HEIGHT": tile[0], "WIDTH": tile[1]} for tile in tiles)
        pixels = large if single else double
        five = _types(name, 5, "i16")
        for forward in (True, False):
            constants = {"FORWARD": forward, "EDGES": PREPARED}
            yield _variant(_prepare, f"{name}, {'forward' if forward else 'backward'}", five, constants, 4, 4)
        programs = 28 if single else 16
        constants = {**bounds, **pixels}
        yield _variant(_forward, f"{name}, 5 maps", five, constants, 1, programs)
        yield _variant(_scatter, f"{name}, 5 maps", five, pixels, 1, programs)
        yield _variant(_gather, f"{name}, 5 maps", five, {**bounds, **large, "EDGES": GATHERED}, 1, programs - 4)
        yield _variant(_collect, name, {**five, "maps": "i32"}, {"EDGES": COLLECTED, "POINTS": POINTS}, 4, 4)
        if single:
            one, wide = _types(name, 1, "i16"), _types(name, 1, "i32")
            yield _variant(_forward, f"{name}, 1 map", one, constants, 1, programs)
            yield _variant(_forward, f"{name}, 1 map, small tiles", one, {**constants, **small}, 1, programs)
            yield _variant(_forward, f"{name}, 1 map, int32", wide, constants, 1, programs)
            yield _variant(_scatter, f"{name}, 1 map, small tiles", one, small, 1, programs)
