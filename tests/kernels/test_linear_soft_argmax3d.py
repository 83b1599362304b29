from functools import partial

import numpy as np
import oracle
import pytest
import scenes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import gradients, saved_elements
from torch import Tensor, nn

from bkind3d_kernels import LinearSoftArgmax3d, SoftArgmax3d, VoxelGrid, linear_soft_argmax3d, soft_argmax3d
from bkind3d_kernels.reference import linear_soft_argmax3d as reference


def scene(n=2, channels=4, joints=3, shape=(4, 3, 5), seed=0, grids=1, scale=2.0):
    """Features, weight, bias and grid in float64; the logits have a deviation of about ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, channels, *shape, generator=generator).double()
    weight = scale * channels**-0.5 * torch.randn(joints, channels, generator=generator).double()
    bias = torch.randn(joints, generator=generator).double()
    return features, weight, bias, scenes.grid(shape, generator, grids)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 2),
    channels=st.sampled_from([1, 2, 5, 17]),
    joints=st.integers(1, 3),
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    per_sample=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_oracle(n, channels, joints, shape, temperature, per_sample, seed) -> None:
    features, weight, bias, grid = scene(n, channels, joints, shape, seed, n if per_sample else 1)
    given = (t.numpy() for t in (features, weight, bias, grid.affine))
    expected = oracle.linear_soft_argmax3d(*given, temperature)
    options = {"temperature": temperature, "return_peak": True, "return_covariance": True}
    for backend in ("auto", "reference"):
        for a, b in zip(linear_soft_argmax3d(features, weight, bias, grid, backend=backend, **options), expected):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("options", [{}, {"return_peak": True}, {"return_covariance": True}])
def test_gradcheck(temperature: float, options: dict, backend: str) -> None:
    features, weight, bias, grid = scene(n=2, channels=3, joints=2, shape=(2, 3, 2), grids=2)

    def function(features: Tensor, weight: Tensor, bias: Tensor, affine: Tensor) -> Tensor:
        there = VoxelGrid(affine, grid.shape)
        return linear_soft_argmax3d(features, weight, bias, there, temperature=temperature, backend=backend, **options)

    inputs = [t.clone().requires_grad_() for t in (features, weight, bias, grid.affine)]
    # Interpreted, one call takes a tenth of a second: every element is tried in test_linear_soft_argmax3d_operators.py.
    assert torch.autograd.gradcheck(function, inputs, fast_mode=backend == "triton")
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_gradients_that_are_asked_for(wanted: tuple[bool, bool], backend: str) -> None:
    features, weight, bias, grid = scene()
    whole = gradients(partial(linear_soft_argmax3d, grid=grid, backend=backend), features, weight, bias)
    inputs = [t.clone().requires_grad_(want) for t, want in zip((features, weight, bias), (*wanted, True))]
    output = linear_soft_argmax3d(*inputs, grid, backend=backend)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).double())
    for leaf, want, expected in zip(inputs, wanted, whole):
        assert (leaf.grad is not None) == want
        if want:
            torch.testing.assert_close(leaf.grad, expected)


def test_bias_changes_nothing_and_has_no_gradient(backend: str) -> None:
    features, weight, bias, grid = scene()
    run = partial(
        linear_soft_argmax3d, grid=grid, return_peak=True, return_covariance=True, backend=backend, temperature=0.7
    )
    for a, b, c in zip(run(features, weight, bias), run(features, weight, None), run(features, weight, bias + 3)):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)
    gradient = gradients(run, features, weight, bias)[2]
    assert gradient.abs().max() < 1e-13
    if backend != "reference":
        assert not gradient.any()


@pytest.mark.parametrize("bias", [float("nan"), float("-inf")])
def test_a_bias_that_is_no_number_is_seen(bias: float, backend: str) -> None:
    features, weight, _, grid = scene()
    output = linear_soft_argmax3d(features, weight, torch.tensor([0.0, bias, 0.0]), grid, backend=backend)
    assert output[:, 1].isnan().all()
    assert output[:, ::2].isfinite().all()


def test_what_is_asked_for_in_order(backend: str) -> None:
    run = partial(linear_soft_argmax3d, *scene(), backend=backend)
    coordinates, peak, covariance = run(return_peak=True, return_covariance=True)
    assert coordinates.shape == (2, 3, 3)
    assert peak.shape == (2, 3)
    assert covariance.shape == (2, 3, 3, 3)
    torch.testing.assert_close(run(), coordinates)
    torch.testing.assert_close(run(return_peak=True)[1], peak)
    torch.testing.assert_close(run(return_covariance=True)[1], covariance)
    assert torch.linalg.eigvalsh(covariance).min() > -1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("last", [False, True])
def test_is_a_convolution_and_a_soft_argmax(dtype: torch.dtype, last: bool, backend: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(6, 5, 1, dtype=dtype)
    module = LinearSoftArgmax3d.from_conv(conv, temperature=0.2, return_peak=True, backend=backend)
    two = nn.Sequential(conv, SoftArgmax3d(temperature=0.2, return_peak=True, backend="reference"))
    features, _, _, grid = scene(channels=6, shape=(5, 6, 7))
    features, grid = features.to(dtype), grid.to(dtype=dtype)
    if last:
        features = features.contiguous(memory_format=torch.channels_last_3d)
    inputs = [features, features.clone()]
    for x in inputs:
        x.requires_grad_()
    got, expected = module(inputs[0], grid), two[1](two[0](inputs[1]), grid)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)
    for outputs in (got, expected):
        sum(o.square().sum() for o in outputs).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(module.weight.grad, conv.weight.grad.flatten(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(module.bias.grad, conv.bias.grad, rtol=0, atol=1e-5)


def test_peak_gradient_of_a_tie_goes_to_the_lowest_index(backend: str) -> None:
    features = torch.zeros(1, 1, 1, 1, 3, requires_grad=True)
    grid = VoxelGrid.box((0, 0, 0.0), (1, 1, 1), (1, 1, 3))
    _, peak = linear_soft_argmax3d(features, torch.ones(1, 1), None, grid, return_peak=True, backend=backend)
    peak.sum().backward()
    assert features.grad is not None
    torch.testing.assert_close(features.grad.flatten(), torch.tensor([2 / 9, -1 / 9, -1 / 9]))


def test_huge_logits_and_low_temperature_stay_finite(backend: str) -> None:
    features, weight, bias, grid = scene(scale=1e4)
    grid = grid.to(dtype=torch.float32)
    options = {"temperature": 0.01, "return_peak": True, "return_covariance": True}
    run = partial(linear_soft_argmax3d, grid=grid, backend=backend, **options)
    inputs = features.float(), weight.float(), bias.float()
    assert all(t.isfinite().all() for t in run(*inputs))
    assert all(g.isfinite().all() for g in gradients(run, *inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    """Logits are not rounded to half: only inputs and gradients are."""
    features, weight, bias, grid = scene(channels=7, shape=(12, 9, 14))
    inputs = features.to(dtype), weight.float(), bias.float()
    run = partial(linear_soft_argmax3d, grid=grid, return_peak=True, return_covariance=True, backend=backend)
    exact = [t.double() for t in inputs]
    for a, b in zip(run(*inputs), run(*exact)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    for x, got, expected in zip(inputs, gradients(run, *inputs), gradients(run, *exact)):
        assert got.dtype == x.dtype
        error = float((got.double() - expected).norm())
        assert error <= max(torch.finfo(x.dtype).eps, 1e-5) * float(expected.norm()) + 1e-5


def test_parameters_of_another_dtype(backend: str) -> None:
    features, weight, bias, grid = scene()
    half = weight.bfloat16(), bias.bfloat16()
    for x in (features, features.float(), features.half()):
        wide = [p.to(torch.float64 if x.dtype == torch.float64 else torch.float32) for p in half]
        run = partial(linear_soft_argmax3d, grid=grid, backend=backend)
        assert torch.equal(run(x, *half), run(x, *wide))
        got = gradients(run, x, *half)
        assert [g.dtype for g in got] == [x.dtype, torch.bfloat16, torch.bfloat16]
        torch.testing.assert_close(got[1], gradients(run, x, *wide)[1].bfloat16())


def test_autocast_leaves_the_product_exact(backend: str) -> None:
    features, weight, bias, grid = scene(channels=16, scale=20.0)
    inputs = features.float(), weight.float(), bias.float()
    run = partial(linear_soft_argmax3d, grid=grid.to(dtype=torch.float32), return_peak=True, backend=backend)
    expected = *run(*inputs), *gradients(run, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = *run(*inputs), *gradients(run, *inputs)
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


def test_strides_empty_batch_and_poison(backend: str, poisoned: None) -> None:
    features, weight, bias, grid = scene(channels=5)
    run = partial(linear_soft_argmax3d, grid=grid, backend=backend)
    last = features.contiguous(memory_format=torch.channels_last_3d)
    padded = torch.full((3, 7, 6, 5, 7), torch.nan).double()[1:, 1:6, 1:5, 1:4, 1:6]
    padded.copy_(features)
    assert len({x.stride() for x in (features, last, padded)}) == 3
    expected = run(features, weight, bias)
    for x in (last, padded, features.transpose(2, 4).contiguous().transpose(2, 4)):
        torch.testing.assert_close(run(x, weight, bias), expected)
    torch.testing.assert_close(run(features, weight.t().contiguous().t(), bias), expected)
    assert all(g.isfinite().all() for g in gradients(run, features, weight, bias))
    coordinates, peak, covariance = run(features[:0], weight, bias, return_peak=True, return_covariance=True)
    assert (coordinates.shape, peak.shape, covariance.shape) == ((0, 3, 3), (0, 3), (0, 3, 3, 3))
    nothing = gradients(run, features[:0], weight, bias)
    assert nothing[0].shape == (0, 5, 4, 3, 5)
    assert not nothing[1].any()
    assert not nothing[2].any()


def test_no_logits_are_kept_for_backward(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHECKPOINT_ELEMENTS", 0)
    features, weight, bias, grid = scene(channels=2, joints=9)
    leaves = [t.requires_grad_() for t in (features, weight, bias)]
    with saved_elements() as counts:
        output = linear_soft_argmax3d(*leaves, grid, backend=backend)
    assert max(counts) == features.numel()
    output.sum().backward()
    plain = gradients(partial(linear_soft_argmax3d, grid=grid, backend="reference"), *leaves)
    assert features.grad is not None
    assert plain[0].shape == features.grad.shape


def test_compiles_and_exports(backend: str) -> None:
    torch._dynamo.reset()
    features, _, _, grid = scene(channels=4)
    features, grid = features.float(), grid.to(dtype=torch.float32)
    module = LinearSoftArgmax3d(4, 3, temperature=0.3, return_peak=True, return_covariance=True, backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for n in (2, 1):
        for a, b in zip(compiled(features[:n], grid), module(features[:n], grid)):
            torch.testing.assert_close(a, b)
    a, b = (gradients(lambda x, m=m: m(x, grid), features)[0] for m in (compiled, module))
    torch.testing.assert_close(a, b)
    program = torch.export.export(module, (features, grid))
    for a, b in zip(program.module()(features, grid), module(features, grid)):
        torch.testing.assert_close(a, b)


def test_module(backend: str) -> None:
    features, _, _, grid = scene(channels=9)
    features = features.float()
    module = LinearSoftArgmax3d(9, 3, temperature=0.5, return_peak=True, backend=backend)
    assert [tuple(p.shape) for p in module.parameters()] == [(3, 9), (3,)]
    assert all(0 < p.abs().max() <= 1 / 3 for p in module.parameters())
    options = {"temperature": 0.5, "return_peak": True, "backend": backend}
    for a, b in zip(module(features, grid), linear_soft_argmax3d(features, *module.parameters(), grid, **options)):
        assert torch.equal(a, b)
    assert "9, 3, bias=True, temperature=0.5, return_peak=True, return_covariance=False" in repr(module)
    without = LinearSoftArgmax3d(9, 3, bias=False, dtype=torch.float64)
    assert without.bias is None
    assert without.weight.dtype == torch.float64
    module.load_state_dict(LinearSoftArgmax3d(9, 3).state_dict())


def test_convolutions_that_are_more_than_a_product_are_refused() -> None:
    for conv in (nn.Conv3d(4, 2, 3), nn.Conv3d(4, 2, 1, stride=2), nn.Conv3d(4, 2, 1, groups=2)):
        with pytest.raises(ValueError, match=r"conv Conv3d.*: expected kernel size and stride 1"):
            LinearSoftArgmax3d.from_conv(conv)
    with pytest.raises(ValueError, match="expected kernel size and stride 1, no padding"):
        LinearSoftArgmax3d.from_conv(nn.Conv3d(4, 2, 1, padding=1))
    assert LinearSoftArgmax3d.from_conv(nn.Conv3d(4, 2, 1, bias=False)).bias is None


FEATURES, WEIGHT, BIAS = torch.zeros(2, 4, 2, 2, 2), torch.zeros(3, 4), torch.zeros(3)
GRID = VoxelGrid.cube((0.0, 0.0, 0.0), 1.0, 2)
GOOD = {"features": FEATURES, "weight": WEIGHT, "bias": BIAS, "grid": GRID}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": FEATURES[0]}, r"features \(4, 2, 2, 2\): expected \(N, C, X, Y, Z\)"),
        ({"features": FEATURES.long()}, r"features \(2, 4, 2, 2, 2\): expected float32, .*, got torch.int64"),
        ({"features": FEATURES[..., :1]}, r"features \(2, 4, 2, 2, 1\): expected .* with the grid's shape \(2, 2, 2\)"),
        ({"features": FEATURES[:, :0]}, r"features \(2, 0, 2, 2, 2\): expected .* no empty dimension but N"),
        ({"weight": WEIGHT[:, :3]}, r"weight \(3, 3\): expected \(J, 4\)"),
        ({"weight": WEIGHT[:0]}, r"weight \(0, 4\): expected \(J, C\) with a J of at least 1"),
        ({"weight": WEIGHT[0]}, r"weight \(4,\): expected \(J, C\)"),
        ({"weight": WEIGHT.int()}, r"weight \(3, 4\): expected float32, .*, got torch.int32"),
        ({"weight": WEIGHT.to("meta")}, r"weight \(3, 4\): expected device cpu as features has, got meta"),
        ({"bias": BIAS[:2]}, r"bias \(2,\): expected \(3,\)$"),
        ({"bias": BIAS.int()}, r"bias \(3,\): expected float32, .*, got torch.int32"),
        ({"bias": BIAS.to("meta")}, r"bias \(3,\): expected device cpu as features has, got meta"),
        ({"grid": VoxelGrid(GRID.affine.expand(3, 3, 4), (2, 2, 2))}, r"grid.affine \(3, 3, 4\): expected \(1, 3, 4\)"),
        ({"grid": GRID.to("meta")}, r"grid.affine \(1, 3, 4\): expected device cpu as features has, got meta"),
        ({"temperature": 0.0}, r"temperature 0\.0: expected a finite number above 0"),
        ({"backend": "cupy"}, "backend 'cupy': expected one of auto"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        linear_soft_argmax3d(**(GOOD | changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"temperature": -1.0}, {"backend": "gpu"}, {"channels": 0}, {"joints": 2.5}])
def test_bad_options_of_the_module_are_named(changes: dict) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(changes))} .*: expected"):
        LinearSoftArgmax3d(**({"channels": 2, "joints": 3} | changes))


@pytest.mark.parametrize("name", ["features", "weight", "grid", "bias"])
def test_wrong_types_are_named(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected a "):
        linear_soft_argmax3d(**(GOOD | {name: "no"}))


def test_equals_the_soft_argmax_of_the_same_logits(backend: str) -> None:
    features, weight, bias, grid = scene()
    logits = torch.einsum("jc,ncxyz->njxyz", weight, features) + bias.view(-1, 1, 1, 1)
    options = {"temperature": 0.4, "return_peak": True, "return_covariance": True}
    expected = soft_argmax3d(logits, grid, backend="reference", **options)
    for a, b in zip(linear_soft_argmax3d(features, weight, bias, grid, backend=backend, **options), expected):
        torch.testing.assert_close(a, b)


def test_a_temperature_may_be_a_tensor_that_is_learned() -> None:
    features, weight, bias, grid = scene()
    scale = torch.tensor(0.4, dtype=features.dtype, requires_grad=True)
    got = linear_soft_argmax3d(features, weight, bias, grid, temperature=scale)
    run = partial(linear_soft_argmax3d, features, weight, bias, grid, backend="reference")
    torch.testing.assert_close(got, run(temperature=0.4))
    got.square().sum().backward()
    high, low = (run(temperature=t).square().sum() for t in (0.401, 0.399))
    torch.testing.assert_close(scale.grad, (high - low) / 2e-3, rtol=1e-2, atol=1e-3)
    module = LinearSoftArgmax3d(4, 2, temperature=torch.nn.Parameter(torch.tensor(0.4)))
    assert sorted(module.state_dict()) == ["bias", "temperature", "weight"]
    assert module.temperature.item() == pytest.approx(0.4)
