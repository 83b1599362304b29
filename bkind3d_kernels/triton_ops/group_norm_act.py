"""Group normalisation with a residual and a ReLU in Triton: channels-last maps in tiles of rows by channels.

Forward: ``_statistics`` leaves of each tile the mean of every channel and the sum of squared distances from it, so that
nothing cancels; ``_moments`` merges those of a group, in float64 and in a fixed order; ``_apply`` normalises. Backward:
``_sums`` leaves two sums of every channel of a tile and writes the residual's gradient on its way; ``_slopes`` adds
them up and finds what the elements of a group have in common, ``_parameters`` the gradients of weight and bias,
``_gradient`` that of x. No atomics: the same bits every time. Other memory layouts are copied once. Saved for backward:
x, mean and 1/sqrt(var + eps); the output where there are a residual and a ReLU.

Bound by bytes. For E elements of b bytes forward reads 2 E b and writes E b, and reads E b more with a residual;
backward reads 4 E b and writes E b (with residual and ReLU 5 E b and 2 E b). What tiles leave is 5 % of a map of 32
channels in bfloat16 forward, 3 % backward. Not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import FEATURE_DTYPES, check_positive
from ..registration import call, empty_channels_last
from . import INTERPRETED, NAMESPACE, Variant, define, double_bits, on_device, unavailable
from .scalars import ACCUMULATORS, NARROW, as_double

__all__ = ["run", "unavailable"]

ELEMENTS = {torch.float32: 4096, torch.float64: 2048}  # of a tile by arithmetic: 32 registers of each of 128 threads
WIDEST = 128  # channels of a tile, at most
MERGED = 64  # tiles that the merging kernels take at a time


class Tile(NamedTuple):
    """What one program takes: rows of ``channels`` elements."""

    rows: int
    channels: int


def device_tile(channels: int, elements: int) -> Tile:
    """On a GPU: whole rows, or a part of very wide ones; half as many where elements are addressed one by one."""
    width = min(triton.next_power_of_2(channels), WIDEST)
    return Tile(elements // (width if channels % 16 == 0 else 2 * width), width)


# ---- kernels ----


@triton.jit
def _place(voxels, channels, tiles, blocks, INDEX: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Sample, tile, channels (C), offsets of the tile in its sample (R, C), and which are inside."""
    program = tl.program_id(0)
    n = (program // (tiles * blocks)).to(tl.int64)
    tile = program // blocks % tiles
    row = (tile * R).to(INDEX) + tl.arange(0, R)
    c = program % blocks * C + tl.arange(0, C)
    inside = (row < voxels)[:, None] & (c < channels)[None, :]
    return n, tile, c, row[:, None] * channels + c[None, :], inside


@triton.jit
def _constants(mean, rstd, weight, bias, n, c, channels, of_group):
    """Of each channel: the mean of its group, the factor 1/sqrt(var + eps) w, the bias; (C) each."""
    real = c < channels
    group = n * (channels // of_group) + c // of_group
    m = tl.load(mean + group, mask=real, other=0.0)
    scale = tl.load(rstd + group, mask=real, other=0.0) * tl.load(weight + c, mask=real, other=0.0)
    return m, scale, tl.load(bias + c, mask=real, other=0.0), group


@triton.jit(do_not_specialize=["tiles", "blocks", "step"])
def _statistics(
    x,
    partial,
    step: tl.int64,
    voxels,
    channels,
    tiles,
    blocks,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Of each channel of a tile a number near the mean, what is missing to it, the sum of squares about the mean."""
    # Load the tile.
    n, tile, c, offset, inside = _place(voxels, channels, tiles, blocks, INDEX, R, C)
    value = tl.load(x + n * voxels * channels + offset, mask=inside, other=0.0).to(ACC)
    # The mean as it comes, then both about it.
    rows = tl.minimum(voxels - tile * R, R).to(ACC)
    shift = tl.sum(value, 0) / rows
    distance = tl.where(inside, value - shift[None, :], 0.0)
    sum_ = tl.sum(distance, 0)
    squares = tl.sum(distance * distance, 0) - sum_ * (sum_ / rows)
    # Write: the mean in two parts, since it may be far larger than how far the channels' means are apart.
    cell = partial + (n * tiles + tile) * channels + c
    tl.store(cell, shift, mask=c < channels)
    tl.store(cell + step, sum_ / rows, mask=c < channels)
    tl.store(cell + 2 * step, tl.where(squares < 0, 0.0, squares), mask=c < channels)


@triton.jit
def _mean_of_tile(cell, step, real):
    """In double."""
    shift = tl.load(cell, mask=real, other=0.0).to(tl.float64)
    return shift + tl.load(cell + step, mask=real, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["tiles", "step", "eps", "rows"])
def _moments(
    partial,
    mean,
    rstd,
    step: tl.int64,
    eps,
    voxels,
    channels,
    tiles,
    of_group,
    rows,
    TILE: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
):
    """The tiles and channels of B groups together, in double. TILE: rows of a tile."""
    group = tl.program_id(0) * B + tl.arange(0, B)
    groups = channels // of_group
    n = (group // groups).to(tl.int64)
    k = tl.arange(0, K)[None, None, :]
    first_cell = partial + (n * tiles * channels + group % groups * of_group)[:, None, None] + k
    real_channel = (group < rows)[:, None, None] & (k < of_group)
    members = voxels.to(tl.float64) * of_group
    # The mean of the means.
    total = tl.zeros((B, T, K), tl.float64)
    for first in range(0, tiles, T):
        t = first + tl.arange(0, T)[None, :, None]
        weight = tl.minimum(voxels - t * TILE, TILE).to(tl.float64)
        total += weight * _mean_of_tile(first_cell + t * channels, step, real_channel & (t < tiles))
    middle = tl.sum(tl.sum(total, 2), 1) / members
    # Squared distances from it.
    squares = tl.zeros((B, T, K), tl.float64)
    for first in range(0, tiles, T):
        t = first + tl.arange(0, T)[None, :, None]
        real = real_channel & (t < tiles)
        weight = tl.minimum(voxels - t * TILE, TILE).to(tl.float64)
        cell = first_cell + t * channels
        away = _mean_of_tile(cell, step, real) - middle[:, None, None]
        each = tl.load(cell + 2 * step, mask=real, other=0.0).to(tl.float64) + weight * away * away
        squares += tl.where(real, each, 0.0)
    variance = tl.sum(tl.sum(squares, 2), 1) / members
    tl.store(mean + group, middle, mask=group < rows)
    tl.store(rstd + group, 1 / tl.sqrt(variance + as_double(eps)), mask=group < rows)


@triton.jit(do_not_specialize=["tiles", "blocks"])
def _apply(
    y,
    x,
    residual,
    weight,
    bias,
    mean,
    rstd,
    voxels,
    channels,
    of_group,
    tiles,
    blocks,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """y = act((x - mean) scale + bias + residual)."""
    n, _, c, offset, inside = _place(voxels, channels, tiles, blocks, INDEX, R, C)
    sample = n * voxels * channels
    m, scale, b, _ = _constants(mean, rstd, weight, bias, n, c, channels, of_group)
    value = tl.load(x + sample + offset, mask=inside, other=0.0).to(ACC)
    # The mean is taken off first: a product would round what the subtraction leaves.
    result = (value - m[None, :]) * scale[None, :] + b[None, :]
    if residual is not None:
        result += tl.load(residual + sample + offset, mask=inside, other=0.0).to(ACC)
    if RELU:
        result = tl.where(result <= 0, 0.0, result)  # NaN stays NaN
    tl.store(y + sample + offset, result, mask=inside)


@triton.jit
def _let_through(h, value, output, place, inside, m, scale, b, RELU: tl.constexpr, ACC: tl.constexpr):
    """The gradient h where the ReLU lets it through: as the output says, or x again."""
    if RELU:
        if output is not None:
            after = tl.load(output + place, mask=inside, other=0.0).to(ACC)
        else:
            after = (value - m[None, :]) * scale[None, :] + b[None, :]
        h = tl.where(after <= 0, 0.0, h)
    return h


@triton.jit(do_not_specialize=["tiles", "blocks", "step"])
def _sums(
    partial,
    grad_residual,
    grad,
    x,
    output,
    weight,
    bias,
    mean,
    rstd,
    step: tl.int64,
    voxels,
    channels,
    of_group,
    tiles,
    blocks,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Of each channel of a tile the sums of h and h (x - mean), h being the gradient that was let through."""
    n, tile, c, offset, inside = _place(voxels, channels, tiles, blocks, INDEX, R, C)
    place = n * voxels * channels + offset
    m, scale, b, _ = _constants(mean, rstd, weight, bias, n, c, channels, of_group)
    value = tl.load(x + place, mask=inside, other=0.0).to(ACC)
    h = tl.load(grad + place, mask=inside, other=0.0).to(ACC)
    h = _let_through(h, value, output, place, inside, m, scale, b, RELU, ACC)
    if grad_residual is not None:
        tl.store(grad_residual + place, h, mask=inside)
    cell = partial + (n * tiles + tile) * channels + c
    tl.store(cell, tl.sum(h, 0), mask=c < channels)
    moment = tl.where(inside, h * (value - m[None, :]), 0.0)  # a mean may be infinite
    tl.store(cell + step, tl.sum(moment, 0), mask=c < channels)


@triton.jit(do_not_specialize=["tiles", "step", "rows"])
def _slopes(
    partial,
    totals,
    group_gradient,
    weight,
    rstd,
    step: tl.int64,
    voxels,
    channels,
    tiles,
    of_group,
    rows,
    B: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
):
    """Sums of each channel of B groups over its tiles, and from them slope and offset of the groups, in double."""
    group = tl.program_id(0) * B + tl.arange(0, B)
    groups = channels // of_group
    n = (group // groups).to(tl.int64)
    k = tl.arange(0, K)
    c = (group % groups * of_group)[:, None] + k[None, :]
    real_channel = (group < rows)[:, None] & (k < of_group)[None, :]
    # Sums over tiles.
    total = tl.zeros((B, T, K), tl.float64)
    moment = total
    for first in range(0, tiles, T):
        t = first + tl.arange(0, T)[None, :, None]
        real = real_channel[:, None, :] & (t < tiles)
        cell = partial + (n[:, None, None] * tiles + t) * channels + c[:, None, :]
        total += tl.load(cell, mask=real, other=0.0).to(tl.float64)
        moment += tl.load(cell + step, mask=real, other=0.0).to(tl.float64)
    total = tl.sum(total, 1)
    moment = tl.sum(moment, 1)
    # Of the channels, for the parameters.
    r = tl.load(rstd + group, mask=group < rows, other=0.0).to(tl.float64)
    cell = totals + 2 * (n[:, None] * channels + c)
    tl.store(cell, total, mask=real_channel)
    tl.store(cell + 1, moment * r[:, None], mask=real_channel)
    # Of the groups.
    w = tl.load(weight + c, mask=real_channel, other=0.0).to(tl.float64)
    members = voxels.to(tl.float64) * of_group
    tl.store(group_gradient + 2 * group, -r * r * r * (tl.sum(w * moment, 1) / members), mask=group < rows)
    tl.store(group_gradient + 2 * group + 1, -r * (tl.sum(w * total, 1) / members), mask=group < rows)


@triton.jit(do_not_specialize=["samples"])
def _parameters(totals, grad_weight, grad_bias, samples, channels, C: tl.constexpr):
    """Sums over the samples, in their order."""
    c = tl.program_id(0) * C + tl.arange(0, C)
    real = c < channels
    bias = tl.zeros((C,), tl.float64)
    weight = bias
    for n in range(samples):
        cell = totals + 2 * (n * channels.to(tl.int64) + c)
        bias += tl.load(cell, mask=real, other=0.0)
        weight += tl.load(cell + 1, mask=real, other=0.0)
    tl.store(grad_weight + c, weight, mask=real)
    tl.store(grad_bias + c, bias, mask=real)


@triton.jit(do_not_specialize=["tiles", "blocks"])
def _gradient(
    grad_x,
    grad,
    x,
    output,
    weight,
    bias,
    mean,
    rstd,
    group_gradient,
    voxels,
    channels,
    of_group,
    tiles,
    blocks,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """dL/dx = h scale + (x - mean) slope + offset."""
    n, _, c, offset, inside = _place(voxels, channels, tiles, blocks, INDEX, R, C)
    place = n * voxels * channels + offset
    m, scale, b, group = _constants(mean, rstd, weight, bias, n, c, channels, of_group)
    slope = tl.load(group_gradient + 2 * group, mask=c < channels, other=0.0)
    constant = tl.load(group_gradient + 2 * group + 1, mask=c < channels, other=0.0)
    value = tl.load(x + place, mask=inside, other=0.0).to(ACC)
    h = tl.load(grad + place, mask=inside, other=0.0).to(ACC)
    h = _let_through(h, value, output, place, inside, m, scale, b, RELU, ACC)
    result = h * scale[None, :] + ((value - m[None, :]) * slope[None, :] + constant[None, :])
    tl.store(grad_x + place, result, mask=inside)


# ---- launches ----


def _last(x: Tensor) -> Tensor:
    """Channels-last in memory."""
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


class Launch(NamedTuple):
    """What the kernels over tiles share, and those over groups: arguments by name, and the grid."""

    over_tiles: dict[str, Any]
    over_groups: dict[str, Any]
    tiles: int
    tile_grid: tuple[int]
    group_grid: tuple[int]


def _tile(x: Tensor, arithmetic: torch.dtype) -> Tile:
    channels, voxels = x.shape[1], x[0, 0].numel() if len(x) else 1
    if INTERPRETED:  # the cost is by program and operation; rows are added one after another
        return Tile(min(triton.next_power_of_2(voxels), 128), triton.next_power_of_2(channels))
    return device_tile(channels, ELEMENTS[arithmetic])


def _launch(x: Tensor, weight: Tensor, groups: int) -> Launch:
    """The division of channels-last maps."""
    samples, channels = x.shape[:2]
    voxels, tile = x.shape[2:].numel(), _tile(x, weight.dtype)
    tiles, blocks = triton.cdiv(voxels, tile.rows), triton.cdiv(channels, tile.channels)
    sizes = {"voxels": voxels, "channels": channels, "tiles": tiles}
    of_group = channels // groups
    beyond = tiles * tile.rows * channels + blocks * tile.channels  # offsets of masked elements are computed too
    over_tiles = sizes | {
        "blocks": blocks,
        "ACC": ACCUMULATORS[weight.dtype],
        "INDEX": tl.int64 if beyond > NARROW else tl.int32,
        "R": tile.rows,
        "C": tile.channels,
    }
    at_once = triton.next_power_of_2(samples * groups) if INTERPRETED else 1
    over_groups = sizes | {
        "of_group": of_group,
        "rows": samples * groups,
        "B": at_once,
        "T": min(MERGED, triton.next_power_of_2(tiles)) if INTERPRETED else MERGED,
        "K": triton.next_power_of_2(of_group),
    }
    over_both = samples * tiles * blocks, triton.cdiv(samples * groups, at_once)
    return Launch(over_tiles, over_groups, tiles, *((count,) for count in over_both))


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, activation: str) -> None:
    if x.ndim not in (4, 5):
        raise ValueError("x: expected (N, C, H, W) or (N, C, X, Y, Z)")
    if x.dtype not in FEATURE_DTYPES:
        raise ValueError("x: expected float32, float64, bfloat16 or float16")
    if 0 in x.shape[1:]:
        raise ValueError("x: expected no empty dimension but N")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError("groups: expected a divisor of the channels")
    if activation not in ("relu", "none"):
        raise ValueError(f"activation '{activation}': expected relu or none")
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != (x.shape[1],) or tensor.dtype != arithmetic or tensor.device != x.device:
            raise ValueError(f"{name}: expected (C,), float32, or float64 for float64 maps, on the device of x")


def _like(name: str, tensor: Tensor, x: Tensor) -> Tensor:
    if tensor.shape != x.shape or tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(f"{name}: expected the shape and dtype of x, on its device")
    return _last(tensor)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, groups: int, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, bias, groups, activation)
    check_positive("eps", eps)
    residual = None if residual is None else _like("residual", residual, x)
    x, weight, bias = _last(x), weight.contiguous(), bias.contiguous()
    y = empty_channels_last(x)
    mean, rstd = (weight.new_empty((len(x), groups)) for _ in range(2))
    if len(x) == 0:
        return y, mean, rstd
    with on_device(x):
        launch = _launch(x, weight, groups)
        partial = weight.new_empty((3, len(x), launch.tiles, x.shape[1]))
        step = partial[0].numel()
        _statistics[launch.tile_grid](x, partial, step=step, **launch.over_tiles)
        _moments[launch.group_grid](
            partial, mean, rstd, step=step, eps=double_bits(eps), TILE=launch.over_tiles["R"], **launch.over_groups
        )
        of_group = launch.over_groups["of_group"]
        _apply[launch.tile_grid](
            y, x, residual, weight, bias, mean, rstd, of_group=of_group, RELU=activation == "relu", **launch.over_tiles
        )
    return y, mean, rstd


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
    needs_x: bool,
    needs_weight: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if mean.ndim != 2:
        raise ValueError("mean: expected (N, G) in the dtype of the weight")
    groups, relu = mean.shape[1], activation == "relu"
    _check(x, weight, bias, groups, activation)
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        if tensor.shape != (len(x), groups) or tensor.dtype != weight.dtype or tensor.device != x.device:
            raise ValueError(f"{name}: expected (N, G) in the dtype of the weight, on the device of x")
    if output is None and relu and needs_residual:
        raise ValueError("output: expected where a residual was added before a ReLU")
    grad, output = _like("grad", grad, x), None if output is None else _like("output", output, x)
    x, weight, bias, mean, rstd = _last(x), *(t.contiguous() for t in (weight, bias, mean, rstd))
    grad_x = empty_channels_last(x) if needs_x else x.new_empty((0,))
    grad_residual = empty_channels_last(x) if needs_residual else x.new_empty((0,))
    grad_weight, grad_bias = (weight.new_empty(weight.shape if needs_weight else (0,)) for _ in range(2))
    if not (needs_x or needs_weight or needs_residual):
        return grad_x, grad_weight, grad_bias, grad_residual
    samples, channels = x.shape[:2]
    totals = weight.new_empty((samples, channels, 2), dtype=torch.float64)
    with on_device(x):
        if samples:
            launch = _launch(x, weight, groups)
            shared = launch.over_tiles | {"of_group": launch.over_groups["of_group"]}
            partial = weight.new_empty((2, samples, launch.tiles, channels))
            group_gradient = weight.new_empty((samples, groups, 2))
            step = partial[0].numel()
            written = grad_residual if needs_residual else None
            tensors = (x, output, weight, bias, mean, rstd)
            _sums[launch.tile_grid](partial, written, grad, *tensors, step=step, RELU=relu, **shared)
            _slopes[launch.group_grid](partial, totals, group_gradient, weight, rstd, step=step, **launch.over_groups)
            if needs_x:
                # The residual's gradient, where it was written, is what has been let through.
                let_through = (grad, relu) if written is None else (written, False)
                _gradient[launch.tile_grid](
                    grad_x, let_through[0], *tensors, group_gradient, RELU=let_through[1], **shared
                )
        if needs_weight:
            width = min(triton.next_power_of_2(channels), WIDEST)
            _parameters[(triton.cdiv(channels, width),)](totals, grad_weight, grad_bias, samples, channels, C=width)
    return grad_x, grad_weight, grad_bias, grad_residual


define("group_norm_act", _forward, _backward)


def run(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, groups: int, eps: float, activation: str
) -> Tensor:
    """The normalised map; arguments as in ``reference/group_norm_act.py``."""
    return call(NAMESPACE, "group_norm_act", x, weight, bias, residual, groups, eps, activation)[0]


# ---- ahead of time ----

# Type, channels, residual, ReLU, whether offsets are 64 bits wide, programs of forward and of backward in a
# multiprocessor.
CASES = (
    ("fp32", 32, True, True, False, 4, 3),
    ("bf16", 32, True, True, False, 4, 4),
    ("bf16", 32, False, True, False, 4, 4),
    ("bf16", 16, False, False, False, 4, 4),
    ("fp16", 128, True, True, True, 4, 4),
    ("fp64", 32, True, True, False, 3, 3),
    ("fp32", 45, False, True, False, 4, 4),
)
INTEGERS = ("voxels", "channels", "of_group", "tiles", "blocks", "samples", "rows")
MAPS = ("x", "y", "residual", "output", "grad", "grad_x", "grad_residual")
NUMBERS = ("weight", "bias", "mean", "rstd", "partial", "group_gradient", "grad_weight", "grad_bias")


def _variant(kernel: Any, name: str, dtype: str, constants: dict[str, Any], channels: int, programs: int) -> Variant:
    accumulator = "fp64" if dtype == "fp64" else "fp32"
    types = dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(MAPS, f"*{dtype}")
    types |= dict.fromkeys(NUMBERS, f"*{accumulator}") | {"totals": "*fp64", "step": "i64", "eps": "i64"}
    even = ("channels",) if channels % 16 == 0 else ()
    aligned = tuple(
        argument
        for argument in kernel.arg_names
        if argument not in constants and (argument in even or types.get(argument, "").startswith("*"))
    )
    return Variant(name, kernel, types, constants, aligned, programs=programs)


def variants() -> Iterator[Variant]:
    """Every kernel as it is compiled for maps of the volume network's levels, and in other types."""
    for dtype, channels, residual, relu, wide, forward, backward in CASES:
        name = f"{dtype} C={channels}{' residual' * residual}{' relu' * relu}{' int64' * wide}"
        shared = {"ACC": tl.float64 if dtype == "fp64" else tl.float32, "INDEX": tl.int64 if wide else tl.int32}
        absent = {} if residual else {"residual": None, "output": None, "grad_residual": None}
        for kernel, programs in ((_statistics, forward), (_apply, forward), (_sums, backward), (_gradient, backward)):
            tile = device_tile(channels, ELEMENTS[torch.float64 if dtype == "fp64" else torch.float32])
            constants = shared | {"R": tile.rows, "C": tile.channels}
            if kernel is not _statistics:
                constants |= {"RELU": relu and (kernel is not _gradient or not residual)}
            constants |= {name: None for name in absent if name in kernel.arg_names}
            yield _variant(kernel, name, dtype, constants, channels, programs)
    for dtype in ("fp32", "fp64"):
        constants = {"B": 1, "T": MERGED, "K": 4}
        yield _variant(_moments, dtype, dtype, constants | {"TILE": 128}, 32, 2)
        yield _variant(_slopes, dtype, dtype, constants, 32, 2)
        yield _variant(_parameters, dtype, dtype, {"C": 32}, 32, 2)
