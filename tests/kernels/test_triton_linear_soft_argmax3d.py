"""The Triton kernels of linear_soft_argmax3d: tiles, slabs and blocks of any size, and what they alone refuse."""

import pytest
import torch
from cases import linear_soft_argmax3d as cases
from cases.linear_soft_argmax3d import Inputs, backward, compare, double, exact_gradients, forward, on
from cases.soft_argmax3d import DTYPES, random_grads

from bkind3d_kernels import triton_ops

if triton_ops.MISSING is not None:
    pytest.skip(triton_ops.MISSING, allow_module_level=True)

from bkind3d_kernels.triton_ops import linear_soft_argmax3d as kernels

DEVICE = "cpu" if triton_ops.INTERPRETED else "cuda"
OPERATORS = getattr(torch.ops, triton_ops.NAMESPACE)


def inputs(*sizes: int, dtype: torch.dtype = torch.float32) -> Inputs:
    return on(DEVICE, cases.inputs(*sizes, dtype=dtype))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of few voxels, channels and joints, so that slabs, tiles and blocks have borders everywhere."""
    monkeypatch.setattr(kernels, "configuration", lambda *_: kernels.Config(16, 16, 16, 4, 1))
    monkeypatch.setattr(kernels, "LEAST_TILES", 3)
    monkeypatch.setattr(kernels, "SLABS_AT_ONCE", 2)
    monkeypatch.setattr(kernels, "ROWS_AT_ONCE", 4)


# ---- borders of tiles, slabs and blocks ----


@pytest.mark.parametrize(
    ("n", "channels", "joints", "shape"),
    [
        (1, 1, 1, (1, 1, 1)),
        (2, 3, 5, (3, 5, 7)),
        (1, 16, 16, (4, 4, 13)),
        (2, 17, 2, (2, 3, 17)),  # a second part of the channels
        (1, 40, 3, (1, 1, 131)),
        (1, 5, 17, (5, 11, 1)),  # a second block of joints
        (1, 18, 33, (3, 4, 5)),
    ],
)
def test_several_programs(small: None, n: int, channels: int, joints: int, shape: tuple[int, int, int]) -> None:
    compare(OPERATORS, inputs(n, channels, joints, *shape), 0.7)
    compare(OPERATORS, inputs(n, channels, joints, *shape, dtype=torch.float64), 0.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_two_blocks_of_joints_are_rounded_once(small: None, dtype: torch.dtype) -> None:
    given = inputs(1, 4, 40, 3, 4, 5, dtype=dtype)
    outputs = forward(OPERATORS, given)
    grads = random_grads(outputs[0])
    exact = exact_gradients(double(given), 1.0, grads)[0]
    got = backward(OPERATORS, grads, given, 1.0, outputs)[0]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_slabs_follow_from_the_sizes() -> None:
    for n, voxels, tile in ((1, 1, 16), (2, 64**3, 64), (2, 128**3, 32), (5000, 4096, 64), (1, 63, 64), (1, 513, 64)):
        slabs, each = kernels._slabs(n, voxels, tile)
        assert each % tile == 0
        assert (slabs - 1) * each < voxels <= slabs * each
        assert n * slabs <= max(n, 2 * kernels.MOST_PROGRAMS)


# ---- values that several programs share ----


def test_sharp_peak_far_from_the_centre(small: None) -> None:
    given = on(DEVICE, cases.sharp_inputs((3, 12, 24), 100.0))
    cases.check_sharp_peak(OPERATORS, given, mean=2e-4, peak=1e-3, covariance=(1e-3, 1e-4))


def test_infinite_and_nan_logits(small: None) -> None:
    cases.check_special(OPERATORS, on(DEVICE, cases.special_inputs(3, 5, 7, dtype=torch.float32)))


@pytest.mark.parametrize(("shape", "places"), cases.TIES)
def test_argmax_is_the_lowest_index(
    small: None, shape: tuple[int, int, int], places: list[tuple[int, int, int]]
) -> None:
    cases.check_ties(OPERATORS, on(DEVICE, cases.tied_inputs(shape, places)), places)


def test_any_strides(small: None) -> None:
    cases.check_strides(OPERATORS, inputs(1, 5, 2, 3, 4, 6, dtype=torch.float16), exact=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("covariance", [False, True])
def test_every_element_is_written_as_the_fakes_declare(
    small: None, poisoned: None, dtype: torch.dtype, covariance: bool
) -> None:
    for sizes in cases.WRITTEN_SIZES[OPERATORS.name]:
        cases.check_written(OPERATORS, inputs(*sizes, dtype=dtype), covariance)


def test_repeated_calls_give_the_same_bits(small: None) -> None:
    given = inputs(1, 17, 18, 3, 4, 7)
    first, second = (
        (*outputs, *backward(OPERATORS, random_grads(outputs[0]), given, 1.0, outputs))
        for outputs in (forward(OPERATORS, given), forward(OPERATORS, given))
    )
    assert all(map(torch.equal, first, second))


def test_volumes_whose_offsets_are_no_32_bit_numbers_are_refused() -> None:
    _, *parameters = inputs(1, 3, 2, 2, 2, 2)
    features = torch.zeros(1, 1, 1, 1, 1, device=DEVICE).expand(1, 3, 2**11, 2**10, 2**10)
    outputs = forward(OPERATORS, inputs(1, 3, 2, 2, 2, 2))
    with pytest.raises(ValueError, match="no more than 2\\^30 voxels"):
        forward(OPERATORS, (features, *parameters))
    with pytest.raises(ValueError, match="no more than 2\\^30 voxels"):
        backward(OPERATORS, random_grads(outputs[0]), (features, *parameters), 1.0, outputs)
