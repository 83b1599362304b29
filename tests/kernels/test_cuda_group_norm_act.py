"""The CUDA kernels of group_norm_act, emulated on the CPU: slabs and groups, packs, the order of blocks."""

import pytest
import torch
from cases import group_norm_act as cases
from cases.group_norm_act import ACTIVATIONS, DTYPES, backward, double, forward, inputs, random_grad, results
from native import emulation
from torch import Tensor

pytestmark = pytest.mark.skipif(emulation.MISSING is not None, reason=str(emulation.MISSING))
OPERATORS = torch.ops.bkind3d_emulated

# Groups that a block holds: exactly, in rows that do not fill it, of one channel.
WHOLE = [((1, 8, 32, 64), 2), ((2, 24, 7, 9), 2), ((1, 3, 50, 60), 3)]
# Slabs: several; chunks of a voxel too; columns that do not fill the block; the last chunk not full, in packs, in
# elements; more channels in a group than the merging kernels have threads.
SLABS = [
    ((2, 32, 45, 50), 8),
    ((2, 96, 20, 21), 2),
    ((1, 40, 11, 32), 1),
    ((1, 7, 40, 61), 1),
    ((1, 76, 19, 20), 1),
    ((1, 45, 30, 40), 9),
    ((1, 1100, 3, 3), 1),
]
LARGE = SLABS[0]


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    emulation.load()


def unaligned(x: Tensor) -> Tensor:
    """The same map, one element behind a multiple of 16 bytes."""
    memory = x.new_empty(x.numel() + 1)[1:]
    moved = memory.as_strided(x.shape, x.stride(), memory.storage_offset()).copy_(x)
    assert moved.data_ptr() % 16
    return moved


# ---- divisions ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "groups"), WHOLE + SLABS)
def test_error_of_each_division(shape: tuple[int, ...], groups: int, activation: str, dtype: torch.dtype) -> None:
    for residual in (False, True):
        cases.check_error(OPERATORS, inputs(*shape, residual=residual, dtype=dtype), groups, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), [WHOLE[1], SLABS[1]])
def test_maps_at_any_address(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    x, weight, bias, residual = inputs(*shape, dtype=dtype)
    grad = random_grad(x)
    assert residual is not None
    for given in (
        (unaligned(x), weight, bias, residual),
        (x, weight, bias, unaligned(residual)),
        (unaligned(x), weight, bias, unaligned(residual)),
    ):
        cases.check_error(OPERATORS, given, groups, "relu")
    given = x, weight, bias, residual
    outputs = forward(OPERATORS, given, groups)
    expected = backward(OPERATORS, grad, given, outputs)
    got = backward(OPERATORS, unaligned(grad), given, outputs)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("shape", "groups"), [WHOLE[1], *SLABS[:4]])
def test_each_sample_has_the_bits_that_it_has_alone(shape: tuple[int, ...], groups: int) -> None:
    x, weight, bias, residual = inputs(3, *shape[1:])
    assert residual is not None
    grad = random_grad(x)
    given = x, weight, bias, residual
    outputs = forward(OPERATORS, given, groups)
    gradients = backward(OPERATORS, grad, given, outputs)
    for n in range(3):
        one = x[n : n + 1], weight, bias, residual[n : n + 1]
        alone = forward(OPERATORS, one, groups)
        assert all(torch.equal(a[n : n + 1], b) for a, b in zip(outputs, alone))
        of_one = backward(OPERATORS, grad[n : n + 1], one, alone)
        assert torch.equal(gradients[0][n : n + 1], of_one[0])
        assert torch.equal(gradients[3][n : n + 1], of_one[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), WHOLE[1:] + SLABS[1:])
def test_the_order_of_blocks_and_threads_changes_nothing(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    given = inputs(*shape, dtype=dtype)
    grad = random_grad(given[0])
    both = []
    for descending in (False, True):
        with emulation.order(descending=descending):
            both.append((*forward(OPERATORS, given, groups)[1:], *results(OPERATORS, given, groups, "relu", grad)))
    assert all(map(torch.equal, *both))


# ---- what the contract asks of small maps, in slabs ----


@pytest.mark.parametrize("mean", [0.0, 1e4, -1e4])
def test_slabs_with_a_mean_far_from_zero(mean: float) -> None:
    shape, groups = LARGE
    given = inputs(*shape, residual=False, mean=mean)
    cases.check_statistics(OPERATORS, given, groups, units=10)
    cases.check_error(OPERATORS, given, groups, "none")


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 31, 44, 49), (0, 5, 5, 6), (1, 17, 5, 5)])
def test_slabs_with_one_value_far_from_all_others(place: tuple[int, ...]) -> None:
    shape, groups = LARGE
    given = inputs(*shape, residual=False)
    given[0][place] = 1e5
    cases.check_statistics(OPERATORS, given, groups, units=10)


def test_slabs_of_one_value_give_the_bias() -> None:
    shape, groups = LARGE
    x, weight, bias, _ = inputs(*shape, residual=False)
    for value in (3.7e3, 0.1, -1e30):
        y, mean, _ = forward(OPERATORS, (torch.full_like(x, value), weight, bias, None), groups, "none")
        assert torch.equal(y, bias.view(1, -1, 1, 1).expand_as(y))
        assert torch.equal(mean, torch.full_like(mean, value))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_in_its_group_in_slabs(value: float) -> None:
    shape, groups = LARGE
    x, *rest = inputs(*shape)
    expected = forward(OPERATORS, (x, *rest), groups, "none")
    x[1, 9, 40, 3] = value  # of group 2
    got = forward(OPERATORS, (x, *rest), groups, "none")
    assert got[0][1, 8:12].isnan().all()
    assert got[2][1, 2].isnan()
    for a, b, index in zip(got, expected, ((1, slice(8, 12)), (1, 2), (1, 2)), strict=True):
        a[index] = b[index]
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), [SLABS[1], SLABS[3], SLABS[4]])
def test_every_element_is_written_in_slabs(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, poisoned: None
) -> None:
    for residual in (False, True):
        for activation in ACTIVATIONS:
            cases.check_written(OPERATORS, inputs(*shape, residual=residual, dtype=dtype), groups, activation)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "groups"), SLABS[1:5])
def test_gradients_that_are_asked_for_in_slabs(
    shape: tuple[int, ...], groups: int, activation: str, residual: bool
) -> None:
    given = inputs(*shape, residual=residual)
    grad = random_grad(given[0])
    outputs = forward(OPERATORS, given, groups, activation)
    expected = backward(OPERATORS, grad, given, outputs, activation)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (True, True, False)):
        got = backward(OPERATORS, grad, given, outputs, activation, needs)
        wanted = needs[0], needs[1], needs[1], needs[2] and residual
        for a, b, want in zip(got, expected, wanted):
            assert torch.equal(a, b) if want else a.shape == (0,)


def test_a_mask_that_is_kept_is_that_which_is_made_again() -> None:
    shape, groups = SLABS[1]
    given = inputs(*shape, residual=False, dtype=torch.float64)
    assert not cases.at_the_kink(given, groups)
    x, weight, bias, _ = double(given)
    y, mean, rstd = forward(OPERATORS, given, groups)
    both = [
        OPERATORS.group_norm_act_backward(
            random_grad(x), x, weight, bias, output, mean, rstd, "relu", True, True, False
        )
        for output in (y, None)
    ]
    assert all(map(torch.equal, *both))


# ---- what this family alone refuses ----


def test_channels_that_are_no_32_bit_numbers_are_refused() -> None:
    huge = torch.zeros(()).expand(1, 2**31, 1, 1)
    with pytest.raises(RuntimeError, match=r"x: expected fewer than 2\^31 channels"):
        forward(OPERATORS, (huge, torch.zeros(1), torch.zeros(1), None), 1)
