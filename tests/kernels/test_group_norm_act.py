from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import gradients, saved_elements
from torch import Tensor, nn

from bkind3d_kernels import GroupNormAct, group_norm_act


def scene(n=2, channels=6, shape=(4, 5), seed=0, dtype=torch.float64, mean=0.5):
    """x, weight, bias and residual."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    return (
        normal(n, channels, *shape) + mean,
        1 + 0.3 * normal(channels),
        0.3 * normal(channels),
        normal(n, channels, *shape),
    )


def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, **options) -> Tensor:
    """The function with three groups, all tensors in a row."""
    return group_norm_act(x, options.pop("groups", 3), weight, bias, residual=residual, **options)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 3]),
    members=st.sampled_from([1, 2, 5]),
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    residual=st.booleans(),
    activation=st.sampled_from(["relu", "none"]),
    eps=st.sampled_from([1e-5, 1e-3, 2.0]),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_oracle(n, groups, members, shape, residual, activation, eps, seed) -> None:
    x, weight, bias, other = scene(n, groups * members, tuple(shape), seed)
    added = other if residual else None
    arrays = x.numpy(), groups, weight.numpy(), bias.numpy(), eps, other.numpy() if residual else None
    expected = oracle.group_norm_act(*arrays, activation == "relu")
    for backend in ("auto", "reference"):
        y = run(x, weight, bias, added, groups=groups, eps=eps, activation=activation, backend=backend)
        np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 2), (2, 1, 3)])
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck(shape: tuple[int, ...], activation: str, residual: bool, backend: str) -> None:
    inputs = [t.requires_grad_() for t in scene(shape=shape)[: 4 if residual else 3]]
    function = partial(run, activation=activation, backend=backend)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=backend == "triton")
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", [0, 1, 2, 3, None])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_gradients_that_are_asked_for(wanted: int | None, activation: str, backend: str) -> None:
    tensors = scene()
    function = partial(run, activation=activation, backend=backend)
    whole = gradients(function, *tensors)
    leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    y = function(*leaves)
    assert y.requires_grad == (wanted is not None)
    if wanted is None:
        return
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).double())
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i == wanted)
    torch.testing.assert_close(leaves[wanted].grad, whole[wanted])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(7, 9), (4, 5, 6)])
@pytest.mark.parametrize("residual", [False, True])
def test_is_a_group_norm_an_addition_and_a_relu(
    dtype: torch.dtype, shape: tuple[int, ...], residual: bool, backend: str
) -> None:
    tensors = scene(channels=12, shape=shape, dtype=dtype)[: 4 if residual else 3]

    def plain(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None = None) -> Tensor:
        y = F.group_norm(x, 3, weight, bias)
        return F.relu(y if other is None else y + other)

    ours = partial(run, backend=backend)
    torch.testing.assert_close(ours(*tensors), plain(*tensors))
    for got, expected in zip(gradients(ours, *tensors), gradients(plain, *tensors)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    """Only inputs and results are rounded."""
    x, weight, bias, residual = scene(channels=12, shape=(9, 14))
    tensors = x.to(dtype), weight.float(), bias.float(), residual.to(dtype)
    function = partial(run, backend=backend)
    exact = [t.double() for t in tensors]
    y = function(*tensors)
    assert y.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), function(*exact), rtol=rounding, atol=1e-5)
    for t, got, expected in zip(tensors, gradients(function, *tensors), gradients(function, *exact)):
        assert got.dtype == t.dtype
        error = float((got.double() - expected).norm())
        assert error <= max(rounding, 1e-5) * float(expected.norm()) + 1e-5


def test_parameters_of_another_dtype(backend: str) -> None:
    x, weight, bias, residual = scene()
    half = weight.bfloat16(), bias.bfloat16()
    for dtype in (torch.float64, torch.float32, torch.float16):
        wide = [p.to(torch.float64 if dtype == torch.float64 else torch.float32) for p in half]
        maps = x.to(dtype), residual.to(dtype)
        function = partial(run, backend=backend)
        assert torch.equal(function(maps[0], *half, maps[1]), function(maps[0], *wide, maps[1]))
        assert [g.dtype for g in gradients(function, maps[0], *half, maps[1])] == [
            dtype,
            torch.bfloat16,
            torch.bfloat16,
            dtype,
        ]


def test_autocast_changes_nothing(backend: str) -> None:
    tensors = scene(dtype=torch.float32)
    function = partial(run, backend=backend)
    expected = function(*tensors), *gradients(function, *tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = function(*tensors), *gradients(function, *tensors)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)])
def test_layouts(shape: tuple[int, ...], backend: str) -> None:
    x, weight, bias, residual = scene(shape=shape)
    function = partial(run, backend=backend)
    expected = function(x, weight, bias, residual)
    assert expected.stride() == last(expected.clone()).stride()
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (x, residual)]
    for a, b in (
        (last(x), last(residual)),
        (last(x), residual),
        turned,
        (x.repeat(2, 1, *[1] * len(shape))[:2], turned[1]),
    ):
        y = function(a, weight, bias, b)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()


def test_poisoned_memory_and_an_empty_batch(backend: str, poisoned: None) -> None:
    x, weight, bias, residual = scene(shape=(3, 4, 5))
    function = partial(run, backend=backend)
    assert function(x, weight, bias, residual).isfinite().all()
    assert all(g.isfinite().all() for g in gradients(function, x, weight, bias, residual))
    nothing = function(x[:0], weight, bias, residual[:0])
    assert nothing.shape == (0, 6, 3, 4, 5)
    found = gradients(function, x[:0], weight, bias, residual[:0])
    assert [g.shape for g in found] == [x[:0].shape, weight.shape, bias.shape, x[:0].shape]
    assert not found[1].any()
    assert not found[2].any()


def test_mean_far_from_zero(backend: str) -> None:
    """With mean 10⁴ and deviation 1, float32 holds the mean to 5 · 10⁻⁴; nothing else is lost."""
    x, weight, bias, _ = scene(channels=12, shape=(30, 40), dtype=torch.float32, mean=1e4)
    function = partial(run, activation="none", backend=backend)
    exact = partial(run, activation="none", backend="reference")(x.double(), weight.double(), bias.double())
    y = function(x, weight, bias).double()
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=2e-3)
    centred = y - y.mean((2, 3), keepdim=True)
    torch.testing.assert_close(centred, exact - exact.mean((2, 3), keepdim=True), rtol=1e-5, atol=1e-5)


def test_nan_is_seen(backend: str) -> None:
    x, weight, bias, residual = scene(dtype=torch.float32)
    x[0, 3, 1, 2] = torch.nan
    y = run(x, weight, bias, residual, backend=backend)
    assert y[0, 2:4].isnan().all()
    y[0, 2:4] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_backward(dtype: torch.dtype, backend: str) -> None:
    """x, its statistics and the parameters, and the output where there are a residual and a ReLU."""
    if backend == "reference":
        pytest.skip("plain PyTorch keeps what its operations keep")
    x, weight, bias, residual = scene(dtype=dtype)
    statistics = [2 * 3] * 2
    for added, activation, maps in ((None, "relu", 1), (residual, "none", 1), (residual, "relu", 2), (None, "none", 1)):
        leaves = [t.clone().requires_grad_() for t in (x, weight.float(), bias.float())]
        with saved_elements() as counts:
            run(*leaves, added, activation=activation, backend=backend)
        assert sorted(counts) == sorted([*statistics, 6, 6, *[x.numel()] * maps])


def test_compiles_and_exports(backend: str) -> None:
    torch._dynamo.reset()
    x, _, _, residual = scene(channels=6, shape=(3, 4, 5), dtype=torch.float32)
    module = GroupNormAct(3, 6, backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for n in (2, 1):
        for added in (residual[:n], None):
            y, expected = compiled(x[:n], added), module(x[:n], added)
            torch.testing.assert_close(y, expected)
            assert y.stride() == expected.stride()
    for a, b in zip(gradients(compiled, x, residual), gradients(module, x, residual)):
        torch.testing.assert_close(a, b)
    program = torch.export.export(module, (x, residual))
    torch.testing.assert_close(program.module()(x, residual), module(x, residual))


def test_module(backend: str) -> None:
    x, weight, bias, residual = scene(dtype=torch.float32)
    module, norm = GroupNormAct(3, 6, eps=1e-3, backend=backend), nn.GroupNorm(3, 6, eps=1e-3)
    assert {k: v.tolist() for k, v in module.state_dict().items()} == {
        k: v.tolist() for k, v in norm.state_dict().items()
    }
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    module.load_state_dict(norm.state_dict())
    assert torch.equal(module(x, residual), run(x, weight, bias, residual, eps=1e-3, backend=backend))
    torch.testing.assert_close(module(x), F.relu(norm(x)))
    assert "3, 6, eps=0.001, activation=relu" in repr(module)
    assert GroupNormAct(3, 6, dtype=torch.float64).weight.dtype == torch.float64
    linear = GroupNormAct(3, 6, eps=1e-3, activation="none", backend=backend)
    linear.load_state_dict(norm.state_dict())
    torch.testing.assert_close(linear(x), norm(x))


X, PARAMETER = torch.zeros(2, 6, 3, 4), torch.zeros(6)
GOOD = {"x": X, "num_groups": 3, "weight": PARAMETER, "bias": PARAMETER}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X[0]}, r"x \(6, 3, 4\): expected \(N, C, H, W\) or \(N, C, X, Y, Z\)"),
        ({"x": X.long()}, r"x \(2, 6, 3, 4\): expected float32, .*, got torch.int64"),
        ({"x": X[..., :0]}, r"x \(2, 6, 3, 0\): expected .* no empty dimension but N"),
        ({"num_groups": 4}, r"num_groups 4: expected a divisor of the 6 channels"),
        ({"num_groups": 0}, r"num_groups 0: expected an integer of at least 1"),
        ({"num_groups": 1.5}, r"num_groups 1\.5: expected an integer of at least 1"),
        ({"num_groups": True}, r"num_groups True: expected an integer of at least 1"),
        ({"weight": PARAMETER[:3]}, r"weight \(3,\): expected \(6,\)$"),
        ({"weight": PARAMETER.int()}, r"weight \(6,\): expected float32, .*, got torch.int32"),
        ({"weight": PARAMETER.to("meta")}, r"weight \(6,\): expected device cpu as x has, got meta"),
        ({"bias": PARAMETER[None]}, r"bias \(1, 6\): expected \(6,\)$"),
        ({"bias": PARAMETER.to("meta")}, r"bias \(6,\): expected device cpu as x has, got meta"),
        ({"residual": X[:1]}, r"residual \(1, 6, 3, 4\): expected \(2, 6, 3, 4\)$"),
        ({"residual": X.half()}, r"residual .*: expected torch.float32 as x has, got torch.float16"),
        ({"residual": X.to("meta")}, r"residual .*: expected device cpu as x has, got meta"),
        ({"eps": 0.0}, r"eps 0\.0: expected a finite number above 0"),
        ({"eps": float("inf")}, r"eps inf: expected a finite number above 0"),
        ({"activation": "gelu"}, r"activation 'gelu': expected one of relu, none"),
        ({"backend": "cupy"}, "backend 'cupy': expected one of auto"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        group_norm_act(**(GOOD | changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
def test_wrong_types_are_named(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected a tensor "):
        group_norm_act(**(GOOD | {name: "no"}))


@pytest.mark.parametrize(
    "changes",
    [{"num_groups": 4}, {"num_channels": 0}, {"eps": -1.0}, {"activation": "gelu"}, {"backend": "gpu"}],
)
def test_bad_options_of_the_module_are_named(changes: dict) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(changes))} .*: expected"):
        GroupNormAct(**({"num_groups": 3, "num_channels": 6} | changes))
