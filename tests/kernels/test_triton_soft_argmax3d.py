"""The Triton kernels of soft_argmax3d: tiles, offsets, launches, and what they alone refuse."""

import itertools
from typing import Any

import pytest
import torch
from cases import soft_argmax3d as cases
from cases.soft_argmax3d import DTYPES, backward, compare, forward, last, random_grads
from torch import Tensor

from bkind3d_kernels import triton_ops

pytestmark = pytest.mark.skipif(triton_ops.MISSING is not None, reason=str(triton_ops.MISSING))
if triton_ops.MISSING is None:
    from bkind3d_kernels.triton_ops import soft_argmax3d as kernels

OPERATORS = getattr(torch.ops, triton_ops.NAMESPACE)
DEVICE = "cpu" if triton_ops.INTERPRETED else "cuda"


def logits_of(*shape: int, **options: Any) -> Tensor:
    return cases.logits_of(*shape, **options).to(DEVICE)


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch):
    """Sets the tile, so that a volume has several, and merges two tiles of a row at a time."""

    def use(w: int, x: int, joints: int) -> None:
        monkeypatch.setattr(kernels, "_tile", lambda *_: kernels.Tile(w, x, joints))
        monkeypatch.setattr(kernels, "MERGED", 2)

    return use


# ---- tiles ----


@pytest.mark.parametrize("layout", ["rows", "last"])
@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((1, 1, 5, 3, 7), (8, 2, 1)),  # 3 by 3 tiles, borders in both directions, lines that they cut
        ((2, 3, 3, 2, 4), (8, 4, 2)),  # a tile of keypoints with one too many, planes that fit exactly
        ((1, 2, 4, 4, 4), (4, 1, 4)),
        ((1, 1, 9, 1, 1), (2, 4, 1)),
    ],
)
def test_tiles_of_any_shape(tiled, shape: tuple[int, ...], tile: tuple[int, ...], layout: str) -> None:
    tiled(*tile)
    logits = logits_of(*shape, dtype=torch.float64)
    compare(OPERATORS, last(logits) if layout == "last" else logits, 0.7)


@pytest.mark.parametrize("index", ["int32", "int64"])
def test_the_tiles_of_a_gpu(monkeypatch: pytest.MonkeyPatch, index: str) -> None:
    for layout, itemsize in itertools.product(("rows", "small", "last", "few"), (2, 4, 8)):
        for backward_, double in itertools.product((False, True), (False, True)):
            tile = kernels.device_tile(layout, itemsize, kernels.VOXELS[backward_, double])
            assert tile.w * tile.x * tile.joints == kernels.VOXELS[backward_, double]
    monkeypatch.setattr(kernels, "_tile", lambda *_: kernels.device_tile("rows", 4, 8192))
    monkeypatch.setattr(kernels, "NARROW", 2**31 if index == "int32" else 0)
    compare(OPERATORS, logits_of(1, 2, 20, 30, 31))
    monkeypatch.setattr(kernels, "_tile", lambda *_: kernels.device_tile("last", 4, 4096))
    compare(OPERATORS, last(logits_of(1, 33, 5, 5, 9)))


def test_more_samples_than_a_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "GRID", 2)
    compare(OPERATORS, logits_of(5, 2, 3, 2, 4, dtype=torch.float64))


def test_common_sizes_are_offset_in_32_bits() -> None:
    logits = torch.empty(1, device="meta").expand(2, 30, 128, 128, 128)
    assert logits[0].numel() < kernels.NARROW
    for shape, wide in (((2, 30, 128, 128, 128), False), ((1, 30, 512, 512, 512), True)):
        for memory in (torch.empty(shape, device="meta"), last(torch.empty(shape, device="meta"))):
            arguments = kernels._over_tiles(memory, 1.0, False, backward=False).arguments
            native = kernels._voxel_stride(memory)
            assert (arguments["INDEX"] == kernels.tl.int64) == (wide and native != 1)


# ---- values that several tiles share ----


@pytest.mark.parametrize("width", [0.15, 0.3, 1.0])
def test_sharp_peak_far_from_the_centre(tiled, width: float) -> None:
    tiled(4096, 8, 1)
    cases.check_sharp_peak(OPERATORS, cases.sharp_logits(64, width)[:, :1].to(DEVICE), width)


def test_a_broad_maximum_far_from_the_largest_logit(tiled) -> None:
    tiled(4096, 16, 1)
    compare(OPERATORS, cases.broad_logits(64).to(DEVICE), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:All-NaN")  # by the interpreter's maximum
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [(64, 4, 8), (8, 2, 8)])
def test_masked_infinite_and_nan_logits(tiled, tile: tuple[int, ...], dtype: torch.dtype) -> None:
    tiled(*tile)
    cases.check_special(OPERATORS, cases.special_logits(3, 5, 4, dtype=dtype).to(DEVICE))


@pytest.mark.parametrize("places", cases.TIES)
@pytest.mark.parametrize("layout", ["rows", "last"])
def test_argmax_is_the_lowest_index(tiled, places: list[tuple[int, int, int]], layout: str) -> None:
    tiled(16, 2, 2)
    logits = cases.tied_logits((5, 5, 10), places).to(DEVICE)
    cases.check_ties(OPERATORS, last(logits) if layout == "last" else logits, places)


# ---- memory ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("covariance", [False, True])
def test_every_element_is_written_as_the_fakes_declare(
    tiled, poisoned: None, dtype: torch.dtype, covariance: bool
) -> None:
    tiled(16, 4, 4)
    cases.check_written(OPERATORS, logits_of(2, 3, 4, 5, 6, dtype=dtype), covariance)


def test_layouts_that_are_read_without_a_copy() -> None:
    native = "channels last", "not aligned", "slice of samples and keypoints", "slice of channels last"
    for name, view in cases.strided(logits_of(2, 3, 4, 5, 6)).items():
        assert (kernels._coalesced(view) is view) == (name in native), name


def test_voxel_strides() -> None:
    def stride(*shape: int, dims: tuple[int, ...] = (0, 1, 2, 3, 4)) -> int | None:
        return kernels._voxel_stride(torch.empty(shape).permute(dims))

    assert stride(2, 3, 4, 5, 6) == 1
    assert stride(2, 4, 5, 6, 3, dims=(0, 4, 1, 2, 3)) == 3
    assert stride(2, 3, 1, 1, 1) == 1
    assert stride(2, 4, 5, 1, 3, dims=(0, 4, 1, 2, 3)) == 3
    assert stride(2, 3, 4, 6, 5, dims=(0, 1, 2, 4, 3)) is None
    assert stride(2, 3, 1, 1, 6, dims=(0, 1, 4, 2, 3)) == 1


# ---- what is refused ----


def test_gradients_elsewhere_and_too_many_keypoints_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(1, 2, 2, 2, 2)
    outputs = forward(OPERATORS, logits)
    with pytest.raises(ValueError, match=r"grad_mean .* on meta: expected"):
        kernels._backward(outputs[0].to("meta"), *outputs[1:3], logits, 1.0, outputs[0], *outputs[2:])
    monkeypatch.setattr(kernels, "GRID", 1)
    with pytest.raises(ValueError, match="J up to 1"):
        forward(OPERATORS, logits)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperatures_that_the_operators_refuse(temperature: float) -> None:
    logits = logits_of(1, 2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"temperature .*: expected a finite number above 0"):
        forward(OPERATORS, logits, temperature)
    outputs = forward(OPERATORS, logits)
    with pytest.raises(ValueError, match=r"temperature .*: expected a finite number above 0"):
        backward(OPERATORS, random_grads(outputs[0]), logits, temperature, outputs)


@pytest.mark.parametrize(("side", "backward_", "joints"), [(15, True, 8), (16, True, 32), (15, False, 32)])
def test_halves_stored_one_by_one_have_few_keypoints(
    side: int, backward_: bool, joints: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile of 32 keypoints of planes of odd size spilled kilobytes a thread."""
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    logits = last(torch.empty(1, 30, 8, side, side, dtype=torch.bfloat16, device="meta"))
    assert kernels._tile(logits, backward_).joints == joints
    assert kernels._tile(logits.float(), backward_).joints == 32
