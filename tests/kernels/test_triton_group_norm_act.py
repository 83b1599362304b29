"""The Triton kernels of group_norm_act: tiles, blocks of channels, many samples. Interpreted on the CPU."""

import pytest
import torch
from cases import group_norm_act as cases
from cases.group_norm_act import ACTIVATIONS, inputs, random_grad, results

from bkind3d_kernels import triton_ops

pytestmark = pytest.mark.skipif(not triton_ops.INTERPRETED, reason="needs Triton's interpreter")
if triton_ops.MISSING is None:
    from bkind3d_kernels.triton_ops import group_norm_act as kernels

OPERATORS = getattr(torch.ops, triton_ops.NAMESPACE)


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tiles of this many rows and channels."""
    monkeypatch.setattr(kernels, "_tile", lambda x, arithmetic: kernels.Tile(*request.param))


@pytest.mark.parametrize("tile", [(1, 8), (8, 16), (16, 4), (64, 2), (4, 32)], indirect=True)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("tile")
def test_every_division_into_tiles(activation: str) -> None:
    for shape, groups in (((2, 12, 5, 7), 3), ((1, 10, 3, 4, 2), 1), ((2, 6, 1, 1), 2), ((0, 6, 2, 2), 2)):
        given = inputs(*shape)
        cases.check_error(OPERATORS, given, groups, activation)


@pytest.mark.parametrize("tile", [(4, 8)], indirect=True)
@pytest.mark.usefixtures("tile")
def test_tiles_far_from_each_other_do_not_cancel() -> None:
    x, *rest = inputs(1, 4, 8, 9, residual=False)
    x[:, :, 4:] += 1e4
    cases.check_statistics(OPERATORS, (x, *rest), 2, units=10)
    x, *rest = inputs(2, 16, 10, 11, residual=False, mean=1e4)
    cases.check_statistics(OPERATORS, (x, *rest), 4, units=10)


@pytest.mark.parametrize("merged", [1, 2, 8])
@pytest.mark.parametrize("tile", [(4, 8)], indirect=True)
@pytest.mark.usefixtures("tile")
def test_tiles_are_merged_some_at_a_time(merged: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MERGED", merged)
    cases.check_error(OPERATORS, inputs(2, 8, 5, 6), 4, "relu")


@pytest.mark.parametrize("tile", [(4, 4)], indirect=True)
@pytest.mark.usefixtures("tile")
def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(2, 8, 5, 6)
    grad = random_grad(given[0])
    expected = results(OPERATORS, given, 4, "relu", grad)
    monkeypatch.setattr(kernels, "NARROW", 3)
    assert all(map(torch.equal, results(OPERATORS, given, 4, "relu", grad), expected))


def test_the_tiles_of_a_gpu() -> None:
    for elements in kernels.ELEMENTS.values():
        for channels in (1, 3, 16, 45, 128, 700):
            tile = kernels.device_tile(channels, elements)
            assert tile.rows * tile.channels == (elements if channels % 16 == 0 else elements // 2)
            assert tile.channels >= min(channels, 128)
