"""Unprojection in Triton: what the tests of every backend do not reach. Interpreted where there is no GPU."""

import itertools
from functools import partial
from importlib import metadata

import pytest
import torch
from measure import saved_elements
from test_cpp_unproject import inputs, layouts, relative, samples
from torch import Tensor

from bkind3d_kernels import triton_ops, unproject
from bkind3d_kernels.reference import unproject as reference

pytestmark = pytest.mark.skipif(triton_ops.MISSING is not None, reason=str(triton_ops.MISSING))
if triton_ops.MISSING is None:
    from bkind3d_kernels.triton_ops import unproject as kernels

DEVICE = "cpu" if triton_ops.INTERPRETED else "cuda"
OPTIONS = list(itertools.product(["softmax", "mean", "sum", "max", "weighted"], ["zero", "exclude"]))
HALVES = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def problem(n, m, c, size, shape, dtype=torch.float64, seed=0):
    """Features, Q, mask and weights for the operators, on the device."""
    features, projections, grid, mask, weights = inputs(n, m, c, size, shape, dtype, seed)
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    q = grid.voxel_to_pixel(projections)
    return features.to(DEVICE, dtype), q.to(DEVICE, geometry), mask.to(DEVICE), weights.to(DEVICE, geometry)


def call(run, features, q, mask, weights, shape, aggregation, unseen, gradient=None):
    """Volume, counts, and the gradients of what requires one against a fixed random gradient of the volume."""
    features, q, weights = (t.detach().clone().requires_grad_() for t in (features, q, weights))
    weights = weights if aggregation == "weighted" else None
    volume, counts = run(features, q, shape, aggregation, unseen, mask, weights)
    if gradient is None:
        gradient = torch.randn(volume.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    leaves = [t for t in (features, q, weights) if t is not None]
    gradients = torch.autograd.grad(volume, leaves, gradient.to(volume))
    return volume.detach(), counts, *gradients


def exact(features, q, mask, weights, *options, gradient=None):
    """The reference in float64."""
    return call(reference.run, features.double(), q.double(), mask, weights.double(), *options, gradient=gradient)


def compare(got, expected, tolerance: float) -> None:
    assert torch.equal(got[1], expected[1])
    for a, b in zip((got[0], *got[2:]), (expected[0], *expected[2:])):
        assert relative(a, b) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("aggregation", "unseen"), OPTIONS)
def test_agrees_with_the_reference(aggregation: str, unseen: str, dtype: torch.dtype) -> None:
    """In a loop over the views, and unrolled."""
    for m, c in ((5, 6), (3, 3)) if aggregation == "softmax" else ((5, 6),):
        tensors = problem(1, m, c, (7, 9), (3, 5, 4), dtype)
        options = (3, 5, 4), aggregation, unseen
        compare(call(kernels.run, *tensors, *options), exact(*tensors, *options), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", [("softmax", "exclude"), ("weighted", "zero"), ("mean", "exclude")])
def test_halves_err_by_the_rounding_of_their_output(options: tuple[str, str], dtype: torch.dtype) -> None:
    tensors = problem(1, 4, 8, (7, 9), (3, 5, 4), dtype)
    got, expected = call(kernels.run, *tensors, (3, 5, 4), *options), exact(*tensors, (3, 5, 4), *options)
    compare(got, expected, TOLERANCE[dtype])
    assert got[0].dtype == got[2].dtype == dtype
    assert got[3].dtype == torch.float32
    same_dtype = call(reference.run, *tensors, (3, 5, 4), *options)
    for a, b, c in zip(got[:1] + got[2:], expected[:1] + expected[2:], same_dtype[:1] + same_dtype[2:]):
        assert relative(a, b) <= 2 * relative(c, b) + 1e-6


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1)])
def test_maps_of_one_pixel(size: tuple[int, int]) -> None:
    tensors = problem(1, 3, 2, size, (4, 3, 5))
    options = (4, 3, 5), "softmax", "exclude"
    got = call(kernels.run, *tensors, *options)
    compare(got, exact(*tensors, *options), 1e-12)
    assert got[1].any()
    assert got[2].permute(0, 1, 3, 4, 2).is_contiguous()


def small_programs(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int, int]) -> None:
    """Several programs a launch, of 4 channels; in the forward pass two steps in x."""

    def config(shape, views, channels, itemsize, backward):
        x, y, z = tile
        unrolled = views if views < 4 else 0
        return (
            kernels.Config(1, tile, 4, unrolled, 1) if backward else kernels.Config(2, (x // 2, y, z), 4, unrolled, 1)
        )

    monkeypatch.setattr(kernels, "_config", config)


@pytest.mark.parametrize(("n", "m", "options"), [(2, 2, OPTIONS[0]), (1, 4, OPTIONS[3]), (1, 2, OPTIONS[9])])
def test_many_programs(n: int, m: int, options: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bricks and blocks of channels with a rest, and partial sums over both."""
    small_programs(monkeypatch, (2, 4, 4))
    tensors = problem(n, m, 5, (6, 5), (3, 3, 5))
    compare(call(kernels.run, *tensors, (3, 3, 5), *options), exact(*tensors, (3, 3, 5), *options), 1e-12)


@pytest.mark.parametrize(("m", "c"), [(4, 32), (5, 35)])
def test_configurations_of_a_gpu(m: int, c: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_config", partial(kernels._config, interpreted=False))
    tensors = problem(1, m, c, (6, 5), (3, 4, 8), torch.float32)
    options = (3, 4, 8), "softmax", "exclude"
    compare(call(kernels.run, *tensors, *options), exact(*tensors, *options), TOLERANCE[torch.float32])


def deterministic(function):
    torch.use_deterministic_algorithms(True)
    try:
        return function()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_deterministic_gradient_knows_no_order(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tiles are another order of the additions: the same bits, where plain atomics give others."""
    tensors = problem(1, 3, 4, (4, 5), (4, 4, 6), dtype)
    run = partial(call, kernels.run, *tensors, (4, 4, 6), "softmax", "zero")
    fixed, loose = [], []
    for tile in ((4, 4, 8), (2, 4, 8), (4, 4, 2)):
        small_programs(monkeypatch, tile)
        fixed.append(deterministic(run)[2])
        loose.append(run()[2])
    assert all(torch.equal(fixed[0], other) for other in fixed[1:])
    assert any(not torch.equal(loose[0], other) for other in loose[1:])
    expected = exact(*tensors, (4, 4, 6), "softmax", "zero")[2]
    assert relative(fixed[0], expected) < (1e-10 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_deterministic_gradient_of_any_scale(scale: float) -> None:
    tensors = problem(2, 2, 3, (4, 5), (3, 4, 2), torch.float32)
    gradient = torch.randn(2, 3, 3, 4, 2, generator=torch.Generator().manual_seed(1)) * scale
    gradient[1] *= 1e-6  # of the other sample: each has its own unit
    options = (3, 4, 2), "weighted", "exclude"
    got = deterministic(lambda: call(kernels.run, *tensors, *options, gradient=gradient))
    expected = exact(*tensors, *options, gradient=gradient)
    for sample in range(2):
        a, b = got[2][sample].double() / scale, expected[2][sample] / scale
        assert b.abs().max() > 0
        assert float((a - b).norm() / b.norm()) < 1e-6


def test_what_is_not_finite_stays_so_in_fixed_point() -> None:
    features, *tensors = problem(1, 2, 3, (4, 5), (3, 4, 2), torch.float32)
    features[0, 0, 1, 2, 2] = torch.nan
    run = partial(call, kernels.run, features, *tensors, (3, 4, 2), "softmax", "zero")
    loose, fixed = run()[2], deterministic(run)[2]
    assert loose.isnan().any()
    assert not loose.isnan().all()
    assert torch.equal(loose.isnan(), fixed.isnan())
    torch.testing.assert_close(loose, fixed, equal_nan=True)


def test_every_gradient_is_written(poisoned: None) -> None:
    """Determinism is on here, since memory is filled with NaN only then."""
    tensors = problem(1, 2, 3, (1, 5), (3, 4, 2))
    for output in call(kernels.run, *tensors, (3, 4, 2), "weighted", "zero"):
        assert output.isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "last", "strided", "expanded"])
def test_layouts_of_the_gradient(layout: str) -> None:
    tensors = problem(1, 2, 3, (4, 5), (3, 4, 2))
    gradient = torch.randn(1, 3, 3, 4, 2, generator=torch.Generator().manual_seed(1)).double().to(DEVICE)
    given = {
        "contiguous": gradient,
        "last": gradient.contiguous(memory_format=torch.channels_last_3d),
        "strided": torch.stack([gradient, gradient], dim=2)[:, :, 0],
        "expanded": gradient[..., :1].expand_as(gradient),
    }[layout]
    got = torch.ops.bkind3d_triton.unproject_backward(
        given, *tensors[:3], None, [3, 4, 2], "sum", "zero", True, False, False, False
    )
    assert relative(got[0], exact(*tensors, (3, 4, 2), "sum", "zero", gradient=given)[2]) < 1e-12


@pytest.mark.parametrize("layout", ["channels last", "cut out of channels last", "transposed", "strided"])
def test_layouts_of_the_features(layout: str) -> None:
    features, q, mask, _ = problem(1, 2, 3, (4, 5), (3, 4, 2))
    run = partial(torch.ops.bkind3d_triton.unproject, shape=[3, 4, 2], aggregation="max", unseen="zero")
    given = layouts(features.cpu())[layout].to(DEVICE)
    strided_q = torch.stack([q, q], dim=-1)[..., 0]
    for a, b in zip(run(given, strided_q, mask.mT.contiguous().mT, None), run(features, q, mask, None)):
        assert torch.equal(a, b)


def test_voxels_that_have_no_pixel() -> None:
    """NaN, infinite and huge pixels are seen by none, and read nowhere outside the maps."""
    features, q, mask, weights = problem(1, 4, 3, (4, 5), (3, 4, 2), torch.float32)
    q[0, 0], q[0, 1, 0], q[0, 2, :2, 3], q[0, 3, 2] = torch.nan, torch.inf, 1e30, 0.0
    volume, counts, *gradients = call(kernels.run, features, q, mask, weights, (3, 4, 2), "weighted", "zero")
    for output in (volume, counts, *gradients):
        assert not output.any()


@pytest.mark.parametrize("case", range(5))
def test_opcheck(case: int) -> None:
    features, q, mask, weights, *options = (
        t.to(DEVICE) if isinstance(t, Tensor) else t for t in [*samples()][[0, 1, 2, 3, 5][case]]
    )
    for tensor in (features, q, weights):
        if tensor is not None:
            tensor.requires_grad_()
    operators = torch.ops.bkind3d_triton
    torch.library.opcheck(
        operators.unproject.default,
        (features, q, mask, weights, *options),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    gradient = torch.ones(features.shape[0], features.shape[2], *options[0], device=DEVICE, dtype=features.dtype)
    for wanted in ((True, True, weights is not None), (False, False, False)):
        torch.library.opcheck(
            operators.unproject_backward.default,
            (
                gradient.transpose(3, 4).contiguous().transpose(3, 4),
                features,
                q,
                mask,
                weights,
                *options,
                *wanted,
                True,
            ),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


def test_opcheck_with_autograd() -> None:
    features, q, mask, _ = problem(1, 2, 3, (4, 5), (2, 3, 2))
    given = layouts(features.cpu())["transposed"].to(DEVICE).requires_grad_(), q.requires_grad_(), mask, None
    torch.library.opcheck(torch.ops.bkind3d_triton.unproject.default, (*given, [2, 3, 2], "softmax", "exclude"))


def test_keeps_nothing_but_its_inputs() -> None:
    features, q, mask, _ = problem(1, 2, 3, (4, 5), (4, 8, 8))
    features.requires_grad_()
    with saved_elements() as kept:
        volume, _ = kernels.run(features, q, (4, 8, 8), "softmax", "zero", mask, None)
    assert volume.requires_grad
    assert sum(kept) <= features.numel() + q.numel() + mask.numel() < volume.numel()


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_asked_for_is_computed(wanted: tuple[bool, bool, bool]) -> None:
    features, q, mask, weights = problem(1, 2, 3, (4, 5), (3, 4, 2))
    gradient = torch.ones(1, 3, 3, 4, 2, dtype=torch.float64, device=DEVICE)
    options = mask, weights, [3, 4, 2], "weighted", "exclude"
    run = partial(torch.ops.bkind3d_triton.unproject_backward, gradient, features, q, *options)
    for got, full, need in zip(run(*wanted, False), run(True, True, True, False), wanted):
        assert torch.equal(got, full) if need else got.numel() == 0


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


FEATURES, Q = torch.zeros(2, 3, 4, 5, 6, device=DEVICE), torch.zeros(2, 3, 3, 4, device=DEVICE)
GOOD = dict(
    features=FEATURES, q=Q, view_mask=None, view_weights=None, shape=[2, 2, 2], aggregation="sum", unseen="zero"
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": FEATURES[0]}, r"features: expected \(N, M, C, H, W\)"),
        ({"features": FEATURES[:, :0]}, "features: expected 1 to 255 views"),
        ({"features": FEATURES[:, :1].expand(2, 256, 4, 5, 6)}, "features: expected 1 to 255 views"),
        ({"features": FEATURES[..., :1].expand(2, 3, 4, 5, 2**27)}, "features: one map of .* is too large"),
        ({"features": FEATURES[:, :, :1, :1, :1].expand(2, 3, 1, 1, 2**25)}, "features: expected maps narrower"),
        ({"q": Q[:, :2]}, r"q: expected \(N, M, 3, 4\)"),
        ({"shape": [2, 2]}, "shape: expected three"),
        ({"shape": [2, 2, -1]}, "shape: expected three"),
        ({"shape": [2048, 2048, 512]}, "shape: expected fewer than 2.31 voxels"),
        ({"aggregation": "median"}, "aggregation 'median': expected one of softmax"),
        ({"unseen": "nan"}, "unseen 'nan': expected zero or exclude"),
        ({"view_mask": torch.ones(2, 3, device=DEVICE)}, r"view_mask: expected \(N, M\) bool"),
        ({"view_weights": FEATURES[..., 0, 0]}, "view_weights: expected .* none with another"),
        ({"aggregation": "weighted"}, r"view_weights: expected \(N, M, C\) with"),
        ({"aggregation": "weighted", "view_weights": FEATURES[..., 0, :2]}, r"view_weights: expected \(N, M, C\)"),
    ],
)
def test_operators_refuse_what_would_read_elsewhere(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.bkind3d_triton.unproject(**{**GOOD, **changes})


def test_backward_refuses_what_would_read_elsewhere() -> None:
    run = partial(torch.ops.bkind3d_triton.unproject_backward, **GOOD, needs_features=True, needs_q=False)
    good = torch.zeros(2, 4, 2, 2, 2, device=DEVICE)
    with pytest.raises(ValueError, match="grad_volume: expected"):
        run(good[:, :3], needs_weights=False, deterministic=False)
    with pytest.raises(ValueError, match="needs_weights: there are no view_weights"):
        run(good, needs_weights=True, deterministic=False)


def test_no_voxels() -> None:
    features, q, mask, weights = problem(1, 2, 3, (4, 5), (3, 4, 2))
    volume, counts, *gradients = call(kernels.run, features, q, mask, weights, (3, 0, 2), "weighted", "zero")
    assert volume.shape == (1, 3, 3, 0, 2)
    assert counts.numel() == 0
    assert [g.shape for g in gradients] == [features.shape, q.shape, weights.shape]
    assert not any(g.any() for g in gradients)


def test_public_function_reaches_the_kernels() -> None:
    features, projections, grid, mask, _ = inputs(1, 2, 3, (4, 5), (3, 4, 2))
    run = partial(unproject, features.to(DEVICE), projections.to(DEVICE), grid.to(DEVICE), view_mask=mask.to(DEVICE))
    torch.testing.assert_close(run(backend="triton"), run(backend="reference"))


def test_weights_that_are_nearly_nothing() -> None:
    """A softmax may give a view a weight whose reciprocal is infinite: alone, it still has all the share."""
    features, q, mask, weights = problem(1, 2, 3, (4, 5), (3, 4, 2), torch.float32)
    weights[:] = 1e-40
    options = (3, 4, 2), "weighted", "exclude", mask, weights
    volume, _ = kernels.run(features, q, *options)
    assert volume.any()
    torch.testing.assert_close(volume, reference.run(features, q, *options)[0], rtol=1e-3, atol=1e-4)


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
