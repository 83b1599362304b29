"""Unprojection in Triton beyond what every family holds: programs, configurations, fixed point, the interpreter.

Interpreted where there is no GPU.
"""

import itertools
from functools import partial
from importlib import metadata

import pytest
import torch
from cases import unproject as cases
from switches import deterministic
from torch import Tensor

from bkind3d_kernels import triton_ops

pytestmark = pytest.mark.skipif(triton_ops.MISSING is not None, reason=str(triton_ops.MISSING))
if triton_ops.MISSING is None:
    from bkind3d_kernels.triton_ops import unproject as kernels

DEVICE = "cpu" if triton_ops.INTERPRETED else "cuda"


def operands(*arguments) -> tuple[Tensor, ...]:
    return tuple(tensor.to(DEVICE) for tensor in cases.operands(*arguments))


def evaluate(*problem, gradient: Tensor | None = None) -> tuple[Tensor, ...]:
    return cases.evaluate(torch.ops.bkind3d_triton.unproject, *problem, gradient=gradient)


def small_programs(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int, int]) -> None:
    """Several programs a launch, of 4 channels; in the forward pass two steps in x."""

    def config(shape, views, channels, itemsize, backward):
        x, y, z = tile
        unrolled = views if views < 4 else 0
        return (
            kernels.Config(1, tile, 4, unrolled, 1) if backward else kernels.Config(2, (x // 2, y, z), 4, unrolled, 1)
        )

    monkeypatch.setattr(kernels, "_config", config)


@pytest.mark.parametrize(
    ("n", "m", "options"), [(2, 2, ("softmax", "zero")), (1, 4, ("mean", "exclude")), (1, 2, ("weighted", "exclude"))]
)
def test_many_programs(n: int, m: int, options: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bricks and blocks of channels with a rest, and partial sums over both."""
    small_programs(monkeypatch, (2, 4, 4))
    cases.check(torch.ops.bkind3d_triton, (*operands(n, m, 5, (6, 5), (3, 3, 5)), (3, 3, 5), *options))


@pytest.mark.parametrize(("m", "c"), [(4, 32), (5, 35)])
def test_configurations_of_a_gpu(m: int, c: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_config", partial(kernels._config, interpreted=False))
    problem = *operands(1, m, c, (6, 5), (3, 4, 8), torch.float32), (3, 4, 8), "softmax", "exclude"
    cases.check(torch.ops.bkind3d_triton, problem)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_deterministic_gradient_knows_no_order(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tiles are another order of the additions: the same bits, where plain atomics give others."""
    problem = *operands(1, 3, 4, (4, 5), (4, 4, 6), dtype), (4, 4, 6), "softmax", "zero"
    fixed, loose = [], []
    for tile in ((4, 4, 8), (2, 4, 8), (4, 4, 2)):
        small_programs(monkeypatch, tile)
        with deterministic():
            fixed.append(evaluate(*problem)[2])
        loose.append(evaluate(*problem)[2])
    assert all(torch.equal(fixed[0], other) for other in fixed[1:])
    assert any(not torch.equal(loose[0], other) for other in loose[1:])
    assert cases.relative(fixed[0], cases.exact(*problem)[2]) < (1e-10 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_deterministic_gradient_of_any_scale(scale: float) -> None:
    problem = *operands(2, 2, 3, (4, 5), (3, 4, 2), torch.float32), (3, 4, 2), "weighted", "exclude"
    gradient = torch.randn(2, 3, 3, 4, 2, generator=torch.Generator().manual_seed(1)) * scale
    gradient[1] *= 1e-6  # of the other sample: each has its own unit
    with deterministic():
        got = evaluate(*problem, gradient=gradient)
    expected = cases.exact(*problem, gradient=gradient)
    for sample in range(2):
        a, b = got[2][sample].double() / scale, expected[2][sample] / scale
        assert b.abs().max() > 0
        assert float((a - b).norm() / b.norm()) < 1e-6


def test_what_is_not_finite_stays_so_in_fixed_point() -> None:
    features, *others = operands(1, 2, 3, (4, 5), (3, 4, 2), torch.float32)
    features[0, 0, 1, 2, 2] = torch.nan
    problem = features, *others, (3, 4, 2), "softmax", "zero"
    loose = evaluate(*problem)[2]
    with deterministic():
        fixed = evaluate(*problem)[2]
    assert loose.isnan().any()
    assert not loose.isnan().all()
    assert torch.equal(loose.isnan(), fixed.isnan())
    torch.testing.assert_close(loose, fixed, equal_nan=True)


@pytest.mark.parametrize(
    "shape", [(64, 64, 64), (80, 80, 20), (1, 1, 1), (1, 1, 7), (3, 1, 1000), (5, 300, 2), (1, 9, 9)]
)
def test_tiles(shape: tuple[int, int, int]) -> None:
    """A tile has the voxels that it should, a power of two along each axis, and a flat volume a flat tile."""
    for channels, itemsize, backward, views in itertools.product((1, 3, 32, 33, 512), (2, 4, 8), (False, True), (4, 5)):
        config = kernels._config(shape, views, channels, itemsize, backward, interpreted=False)
        x, y, z = config.tile
        elements = x * y * z * config.channels
        assert elements in ((256,) if itemsize == 8 else (512, 1024, 2048)) or x * y * z == 256
        assert x * y * z <= 256
        assert all(s & (s - 1) == 0 for s in (x, y, z, config.channels))
        assert config.channels * itemsize <= 128
        assert min(shape) < 8 or y * z >= min(16, x * y * z)
        assert shape[2] > 1 or z == 1 or x * y >= shape[0] * shape[1]
        assert config.bricks(shape) * x * y * z * config.steps >= shape[0] * shape[1] * shape[2]


def test_interpreted_kernels_are_for_cpu_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for interpreted, runs, refused in ((True, "cpu", "cuda"), (False, "cuda", "cpu")):
        monkeypatch.setattr(triton_ops, "INTERPRETED", interpreted)
        assert triton_ops.unavailable(runs, torch.float32) is None
        assert triton_ops.unavailable(refused, torch.float32) is not None


def test_triton_from_a_distribution_of_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert triton_ops._missing() is None
