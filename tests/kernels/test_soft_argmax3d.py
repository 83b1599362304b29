from functools import partial

import numpy as np
import oracle
import pytest
import scenes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import gradients
from torch import Tensor

from bkind3d_kernels import SoftArgmax3d, VoxelGrid, soft_argmax2d, soft_argmax3d


def scene(n=2, joints=3, shape=(4, 3, 5), seed=0, grids=1, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, joints, *shape, generator=generator).double()
    return logits, scenes.grid(shape, generator, grids)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 2),
    joints=st.integers(1, 3),
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    per_sample=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_oracle(n, joints, shape, temperature, per_sample, seed) -> None:
    logits, grid = scene(n, joints, shape, seed, n if per_sample else 1)
    expected = oracle.soft_argmax3d(logits.numpy(), grid.affine.numpy(), temperature)
    results = soft_argmax3d(logits, grid, temperature=temperature, return_peak=True, return_covariance=True)
    for a, b in zip(results, expected):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("options", [{}, {"return_peak": True}, {"return_covariance": True}])
def test_gradcheck(temperature: float, options: dict, backend: str) -> None:
    logits, grid = scene(n=2, joints=2, shape=(2, 3, 2), grids=2)

    def function(logits: Tensor, affine: Tensor) -> Tensor:
        return soft_argmax3d(logits, VoxelGrid(affine, grid.shape), temperature=temperature, backend=backend, **options)

    inputs = logits.requires_grad_(), grid.affine.clone().requires_grad_()
    # Interpreted or emulated, calls are slow: every element is tried in test_soft_argmax3d_operators.py.
    assert torch.autograd.gradcheck(function, inputs, fast_mode=backend in ("triton", "cuda"))
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_what_is_asked_for_in_order(backend: str) -> None:
    logits, grid = scene()
    run = partial(soft_argmax3d, logits, grid, backend=backend)
    coordinates, peak, covariance = run(return_peak=True, return_covariance=True)
    assert coordinates.shape == (2, 3, 3)
    assert peak.shape == (2, 3)
    assert covariance.shape == (2, 3, 3, 3)
    assert torch.equal(run(), coordinates)
    assert torch.equal(run(return_peak=True)[1], peak)
    assert torch.equal(run(return_covariance=True)[1], covariance)
    assert torch.linalg.eigvalsh(covariance).min() > -1e-12


def test_a_single_voxel_is_found_exactly(backend: str) -> None:
    grid = VoxelGrid.box((1.0, 2.0, 3.0), (2.0, 4.0, 6.0), (5, 9, 7))
    logits = torch.zeros(1, 1, 5, 9, 7)
    logits[0, 0, 4, 0, 3] = 200.0
    coordinates, peak, covariance = soft_argmax3d(
        logits, grid, return_peak=True, return_covariance=True, backend=backend
    )
    torch.testing.assert_close(coordinates[0, 0], torch.tensor([2.0, 0.0, 3.0]))
    assert peak.item() == 1.0
    assert covariance.abs().max() < 1e-12


def test_flat_logits_give_the_centre_and_a_uniform_box(backend: str) -> None:
    grid = VoxelGrid.box((1.0, 2.0, 3.0), (2.0, 4.0, 6.0), (5, 9, 7))
    coordinates, peak, covariance = soft_argmax3d(
        torch.full((1, 1, 5, 9, 7), 7.0), grid, return_peak=True, return_covariance=True, backend=backend
    )
    torch.testing.assert_close(coordinates[0, 0], torch.tensor([1.0, 2.0, 3.0]))
    assert peak.item() == pytest.approx(1 / 315)
    # n equally spaced samples over a side s: variance s² (n + 1) / (12 (n − 1))
    expected = torch.tensor([s * s * (n + 1) / (12 * (n - 1)) for s, n in ((2, 5), (4, 9), (6, 7))])
    torch.testing.assert_close(covariance[0, 0], torch.diag(expected), atol=1e-5, rtol=1e-5)


def test_peak_gradient_of_a_tie_goes_to_the_lowest_index(backend: str) -> None:
    logits = torch.zeros(1, 1, 1, 1, 3, requires_grad=True)
    _, peak = soft_argmax3d(logits, VoxelGrid.box((0, 0, 0.0), (1, 1, 1), (1, 1, 3)), return_peak=True, backend=backend)
    peak.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.flatten(), torch.tensor([2 / 9, -1 / 9, -1 / 9]))


def test_huge_logits_and_low_temperature_stay_finite(backend: str) -> None:
    logits, grid = scene(scale=1e4)
    logits, grid = logits.float(), grid.to(dtype=torch.float32)
    run = partial(soft_argmax3d, grid=grid, temperature=0.01, return_peak=True, return_covariance=True, backend=backend)
    assert all(t.isfinite().all() for t in run(logits))
    assert all(g.isfinite().all() for g in gradients(run, logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    logits, grid = scene(shape=(12, 9, 14))
    logits = logits.to(dtype)
    run = partial(soft_argmax3d, grid=grid, return_peak=True, return_covariance=True, backend=backend)
    for a, b in zip(run(logits), run(logits.double())):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    (got,), (exact,) = gradients(run, logits), gradients(run, logits.double())
    assert got.dtype == dtype
    assert float((got.double() - exact).norm() / exact.norm()) < max(torch.finfo(dtype).eps, 1e-5)


def test_strides_empty_batch_and_poison(backend: str, poisoned: None) -> None:
    logits, grid = scene()
    run = partial(soft_argmax3d, grid=grid, backend=backend)
    last = logits.contiguous(memory_format=torch.channels_last_3d)
    assert last.stride() != logits.stride()
    torch.testing.assert_close(run(last), run(logits))
    assert gradients(run, logits)[0].isfinite().all()
    coordinates, peak, covariance = run(logits[:0], return_peak=True, return_covariance=True)
    assert (coordinates.shape, peak.shape, covariance.shape) == ((0, 3, 3), (0, 3), (0, 3, 3, 3))


def test_module_is_the_function(backend: str) -> None:
    logits, grid = scene()
    module = SoftArgmax3d(temperature=0.5, return_peak=True, backend=backend)
    for a, b in zip(
        module(logits, grid), soft_argmax3d(logits, grid, temperature=0.5, return_peak=True, backend=backend)
    ):
        assert torch.equal(a, b)
    assert "temperature=0.5, return_peak=True, return_covariance=False" in repr(module)


LOGITS, GRID = torch.zeros(2, 3, 2, 2, 2), VoxelGrid.cube((0.0, 0.0, 0.0), 1.0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": LOGITS[0]}, r"logits \(3, 2, 2, 2\): expected \(N, J, X, Y, Z\)"),
        ({"logits": LOGITS.long()}, r"logits \(2, 3, 2, 2, 2\): expected float32, .*, got torch.int64"),
        ({"logits": LOGITS[..., :1]}, r"logits \(2, 3, 2, 2, 1\): expected .* with the grid's shape \(2, 2, 2\)"),
        ({"logits": LOGITS[:, :0]}, r"logits \(2, 0, 2, 2, 2\): expected .* no empty dimension but N"),
        ({"grid": VoxelGrid(GRID.affine.expand(3, 3, 4), (2, 2, 2))}, r"grid.affine \(3, 3, 4\): expected \(1, 3, 4\)"),
        ({"grid": GRID.to("meta")}, r"grid.affine \(1, 3, 4\): expected device cpu as logits has, got meta"),
        ({"temperature": 0.0}, r"temperature 0\.0: expected a finite number above 0"),
        ({"temperature": float("nan")}, "temperature nan: expected a finite number above 0"),
        ({"temperature": torch.tensor(0.0)}, r"temperature 0\.0: expected a finite number above 0"),
        ({"temperature": torch.ones(1)}, r"temperature \(1,\), torch.float32: expected a number above 0 or a floating"),
        ({"temperature": "hot"}, "temperature 'hot': expected a finite number above 0"),
        ({"backend": "cupy"}, "backend 'cupy': expected one of auto"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        soft_argmax3d(**({"logits": LOGITS, "grid": GRID} | changes))
    assert "\n" not in str(caught.value)
    if "temperature" in changes:
        with pytest.raises(ValueError, match=message):
            SoftArgmax3d(**changes)


@pytest.mark.parametrize("name", ["logits", "grid"])
def test_wrong_types_are_named(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected a "):
        soft_argmax3d(**({"logits": LOGITS, "grid": GRID} | {name: None}))


def test_huge_logits_at_a_low_temperature(backend: str) -> None:
    """Their quotient is infinite, their differences are not."""
    logits = torch.zeros(1, 2, 3, 4, 5)
    logits[0, 0, 2, 1, 3] = 1e38
    logits[0, 1] = -1e38
    logits[0, 1, 0, 3, 4] = 3e37
    grid = VoxelGrid(torch.eye(3, 4)[None], (3, 4, 5))
    got = soft_argmax3d(logits, grid, temperature=1e-3, backend=backend)
    torch.testing.assert_close(got, torch.tensor([[[2.0, 1.0, 3.0], [0.0, 3.0, 4.0]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_temperature_may_be_a_tensor(dtype: torch.dtype) -> None:
    logits, grid = scene()
    logits = logits.to(dtype)
    run = partial(soft_argmax3d, logits, grid, return_peak=True, return_covariance=True)
    for a, b in zip(run(temperature=torch.tensor(0.5)), run(temperature=0.5)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    huge = torch.zeros(1, 1, 3, 4, 5)
    huge[0, 0, 2, 1, 3] = 1e38
    got = soft_argmax3d(huge, VoxelGrid(torch.eye(3, 4)[None], (3, 4, 5)), temperature=torch.tensor(1e-3))
    assert got.tolist() == [[[2.0, 1.0, 3.0]]]


def test_a_temperature_is_learned() -> None:
    """Its gradient is that of differences."""
    logits, grid = scene()
    logits = logits.double()
    module = SoftArgmax3d(temperature=torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64)))
    assert [*module.state_dict()] == ["temperature"]
    assert "temperature=learned" in repr(module)
    module(logits, grid).square().sum().backward()
    high, low = (soft_argmax3d(logits, grid, temperature=t).square().sum() for t in (0.7001, 0.6999))
    torch.testing.assert_close(module.temperature.grad, (high - low) / 2e-4, rtol=1e-5, atol=1e-8)


# ---- in two dimensions ----


def test_soft_argmax2d_is_its_formula(backend: str) -> None:
    logits = 2 * torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    p = (logits / 0.8).flatten(2).softmax(-1).view_as(logits)
    y, x = torch.meshgrid(torch.arange(5.0).double(), torch.arange(7.0).double(), indexing="ij")
    xy = torch.stack([x, y], dim=-1)  # (H, W, 2)
    mean = torch.einsum("njhw,hwc->njc", p, xy)
    offset = xy - mean[:, :, None, None]
    covariance = torch.einsum("njhw,njhwc,njhwd->njcd", p, offset, offset)
    options = {"temperature": 0.8, "return_peak": True, "return_covariance": True, "backend": backend}
    expected = mean, p.flatten(2).amax(-1), covariance
    for a, b in zip(soft_argmax2d(logits, **options), expected):
        torch.testing.assert_close(a, b)
    (gradient,) = gradients(lambda z: soft_argmax2d(z, backend=backend), logits)
    (same,) = gradients(lambda z: torch.einsum("njhw,hwc->njc", z.flatten(2).softmax(-1).view_as(z), xy), logits)
    torch.testing.assert_close(gradient, same)
    with pytest.raises(ValueError, match=r"logits \(3, 5, 7\): expected \(N, J, H, W\)"):
        soft_argmax2d(logits[0])
