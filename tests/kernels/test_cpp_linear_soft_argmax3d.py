"""The C++ kernel of linear_soft_argmax3d: what the tests of every backend do not reach."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkind3d_kernels import library, registration
from bkind3d_kernels.reference import linear_soft_argmax3d as reference

pytestmark = pytest.mark.skipif(library.reason("_cpu") is not None, reason=str(library.reason("_cpu")))


def available(name: str) -> bool:
    try:
        with library.use_instruction_set(name):
            return True
    except RuntimeError:
        return False


SETS = [] if library.reason("_cpu") else [name for name in library.INSTRUCTION_SETS if available(name)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
Inputs = tuple[Tensor, Tensor, Tensor | None]


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_instruction_set(request.param):
        yield request.param


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def last(features: Tensor) -> Tensor:
    return features.contiguous(memory_format=torch.channels_last_3d)


def inputs(
    n: int, c: int, j: int, *shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Features with the channels last, weight and bias; the logits have a deviation of about ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, c, *shape, generator=generator, dtype=torch.float64)
    weight = scale * c**-0.5 * torch.randn(j, c, generator=generator, dtype=torch.float64)
    bias = torch.randn(j, generator=generator, dtype=torch.float64)
    return last(features.to(dtype)), weight.to(arithmetic(dtype)), bias.to(arithmetic(dtype))


def forward(given: Inputs, temperature: float = 1.0, covariance: bool = True) -> tuple[Tensor, ...]:
    return torch.ops.bkind3d.linear_soft_argmax3d(*given, temperature, covariance)


def backward(
    grads: tuple[Tensor | None, ...],
    given: Inputs,
    temperature: float,
    outputs: tuple[Tensor, ...],
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    mean, _, *rest = outputs
    return torch.ops.bkind3d.linear_soft_argmax3d_backward(*grads, *given, temperature, mean, *rest, *needs)


def random_grads(n: int, j: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Of mean, peak and covariance; the last not symmetric."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, j, *s, generator=generator, dtype=torch.float64).to(dtype) for s in ((3,), (), (3, 3)))


def exact_gradients(given: Inputs, temperature: float, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Those of the reference in the arithmetic of the dtypes given, as autograd gives them."""
    features, weight = (t.detach().clone().requires_grad_() for t in given[:2])
    outputs = reference.run(features, weight, given[2], temperature, True)
    return torch.autograd.grad(sum((o * g.to(o.dtype)).sum() for o, g in zip(outputs, grads)), (features, weight))


def double(given: Inputs) -> Inputs:
    return tuple(None if t is None else t.double() for t in given)


def compare(given: Inputs, temperature: float, rtol: float, atol: float) -> None:
    """Forward and backward against the reference in float64."""
    outputs = forward(given, temperature)
    for got, expected in zip(outputs, reference.run(*double(given), temperature, True)):
        size = max(1.0, float(expected.abs().max()))  # of a covariance, whose entries off the diagonal may be near 0
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol * size)
    grads = random_grads(*outputs[1].shape, outputs[0].dtype)
    # Where one voxel has nearly all the weight its gradient is a difference of equal terms.
    cancelled = 32 * torch.finfo(outputs[0].dtype).eps / temperature * float(outputs[1].max())
    features, weight = backward(grads, given, temperature, outputs)
    exact = exact_gradients(double(given), temperature, grads)
    size = float(exact[0].abs().max())
    torch.testing.assert_close(features.double(), exact[0], rtol=rtol, atol=atol * size + cancelled)
    # One of the weight is a sum over the voxels of terms of either sign.
    terms = float(exact[0].norm()) * float(given[0].double().abs().amax())
    torch.testing.assert_close(weight.double(), exact[1], rtol=rtol, atol=atol * terms + cancelled)


# ---- against the reference in float64 ----


SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 31, 33, 48, 67])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 2),
    channels=st.sampled_from([1, 3, 8, 16, 17, 32, 45]),
    joints=st.sampled_from([1, 2, 8, 15, 17, 33]),
    shape=st.tuples(SIZES, SIZES, SIZES).filter(lambda s: s[0] * s[1] * s[2] < 8000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    name=st.sampled_from(SETS or ["baseline"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    contiguous=st.booleans(),
)
def test_any_shape(n, channels, joints, shape, temperature, name, dtype, contiguous) -> None:
    features, *parameters = inputs(n, channels, joints, *shape, dtype=dtype)
    given = (features.contiguous() if contiguous else features, *parameters)
    exact = dtype == torch.float64
    with library.use_instruction_set(name):
        compare(given, temperature, 1e-9 if exact else 1e-4, 1e-10 if exact else 2e-5)


@pytest.mark.parametrize(
    ("channels", "joints", "shape"),
    [(16, 4, (1, 1, 2500)), (16, 3, (3, 2, 1025)), (8, 2, (1, 4100, 1)), (4, 2, (65, 40, 33))],
)
def test_long_lines_and_several_slabs(isa: str, channels: int, joints: int, shape: tuple[int, int, int]) -> None:
    compare(inputs(1, channels, joints, *shape), 1.0, 1e-4, 1e-5)
    compare(inputs(1, channels, joints, *shape, dtype=torch.float64), 0.7, 1e-9, 1e-10)


@pytest.mark.parametrize(("channels", "joints"), [(300, 3), (5, 130), (128, 70)])
def test_many_channels_and_joints(isa: str, channels: int, joints: int) -> None:
    compare(inputs(1, channels, joints, 5, 6, 7), 1.0, 1e-4, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_of_each_dtype(isa: str, dtype: torch.dtype) -> None:
    given = inputs(2, 12, 3, 20, 17, 23, dtype=dtype)
    grads = random_grads(2, 3, torch.float32)
    exact = (*reference.run(*double(given), 0.8, True), *exact_gradients(double(given), 0.8, grads))
    theirs = (*reference.run(*given, 0.8, True), *exact_gradients(given, 0.8, grads))
    outputs = forward(given, 0.8)
    ours = (*outputs[:3], *backward(grads, given, 0.8, outputs))
    for e, a, b in zip(exact, ours, theirs):
        assert a.dtype == b.dtype
        # The reference takes its products in float64: what float32 rounds is allowed on top, of terms 20 times the sum.
        unit = 20 * torch.finfo(torch.float32).eps * float(e.norm())
        assert float((a.double() - e).norm()) <= 2 * float((b.double() - e).norm()) + unit


@pytest.mark.parametrize("channels", [16, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_larger_than_the_caches(isa: str, channels: int, dtype: torch.dtype) -> None:
    """More than 8 MB, written past the caches: rows that begin anywhere in a cache line."""
    given = inputs(1, channels, 2, 71, 67, 59, dtype=dtype)
    assert given[0].numel() * dtype.itemsize > 8 << 20
    grads = random_grads(1, 2, torch.float32)
    exact = exact_gradients(double(given), 1.0, grads)
    for got, expected in zip(backward(grads, given, 1.0, forward(given)), exact):
        assert float((got.double() - expected).norm() / expected.norm()) < max(torch.finfo(got.dtype).eps, 1e-4)


# ---- precision ----


def test_sharp_peak_far_from_the_centre(isa: str) -> None:
    x = torch.arange(96, dtype=torch.float64)
    d2 = [(x - c) ** 2 for c in (90.3, 3.7, 88.1)]
    distance = d2[0].view(-1, 1, 1) + d2[1].view(-1, 1) + d2[2]
    features = last(torch.stack([-distance, torch.full_like(distance, 1000.0)]).float()[None])
    weight = torch.tensor([[1 / (2 * width**2), 1.0] for width in (0.3, 1.0)])
    mean, peak, covariance, *_ = forward((features, weight, None))
    exact = reference.run(features.double(), weight.double(), None, 1.0, True)
    # Logits near 1000 are rounded to 6e-5: in the peak and in weights of 0.1 voxels² of variance.
    torch.testing.assert_close(mean.double(), exact[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(peak.double(), exact[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(covariance.double(), exact[2], rtol=2e-4, atol=2e-5)


def test_a_broad_maximum_far_from_the_largest_logit(isa: str) -> None:
    """The mass is in a corner, the single largest voxel in the opposite one."""
    features = torch.full((1, 1, 80, 80, 80), -30.0)
    features[..., 2:8, 3:9, 70:76] = 0.1 * torch.randn(6, 6, 6, generator=torch.Generator().manual_seed(0))
    features[..., 79, 79, 0] = 0.5
    compare((last(features), torch.ones(1, 1), None), 1.0, 1e-5, 1e-5)


def test_flat_large_volume(isa: str) -> None:
    size = 160
    features = torch.ones(1, 1, size, size, size)
    mean, peak, covariance, _, total, argmax = forward((features, torch.full((1, 1), 7.0), None))
    torch.testing.assert_close(mean, torch.full((1, 1, 3), (size - 1) / 2), rtol=0, atol=1e-4)
    torch.testing.assert_close(covariance[0, 0], torch.eye(3) * (size**2 - 1) / 12, rtol=1e-6, atol=1e-3)
    assert peak.item() == pytest.approx(size**-3)
    assert (total.item(), argmax.item()) == (pytest.approx(size**3), 0)


# ---- special values: as the reference has them ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (20, 33, 50)])
def test_infinite_and_nan_logits(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """One channel for each joint, so that a logit is what the channel holds."""
    features, _, _ = inputs(1, 8, 8, *shape, dtype=dtype)
    flat = features.contiguous().view(8, -1)
    infinity = float("inf")
    # A product with 0 of another channel would be NaN: each of these is a sample of its own.
    rows = [flat[i].clone() for i in range(8)]
    rows[0][::3] = -infinity
    rows[1][:-1] = -infinity  # one voxel is left
    rows[2][:] = -infinity
    rows[3][-1] = infinity
    rows[4][0] = float("nan")
    rows[5][-1] = float("nan")
    rows[6][:] = float("nan")
    rows[7][:] = -infinity
    rows[7][-1] = float("nan")
    given = torch.stack(rows).view(8, 1, *shape), torch.ones(1, 1, dtype=arithmetic(dtype)), None
    outputs = forward(given)
    for got, expected in zip(outputs, reference.run(*given, 1.0, True)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    grads = random_grads(8, 1, outputs[0].dtype)
    got, expected = backward(grads, given, 1.0, outputs)[0], exact_gradients(given, 1.0, grads)[0]
    tolerance = max(1e-4, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert not got[0].flatten()[::3].any()


@pytest.mark.parametrize("places", [[(0, 0, 3), (0, 0, 9)], [(1, 2, 3), (30, 2, 1)], [(39, 32, 49)]])
def test_argmax_is_the_lowest_index(isa: str, places: list[tuple[int, int, int]]) -> None:
    features = torch.zeros(2, 3, 40, 33, 50)
    for x, y, z in places:
        features[1, 2, x, y, z] = 1.5
    *_, maximum, total, argmax = forward((last(features), torch.eye(3), None))
    assert argmax.tolist() == [[0, 0, 0], [0, 0, int(features[1, 2].flatten().argmax())]]
    assert maximum[1, 2] == 1.5
    count = 40 * 33 * 50 - len(places)
    assert total[1, 2].item() == pytest.approx(len(places) + count * torch.tensor(-1.5).exp().item())


# ---- memory ----


def strided(features: Tensor) -> dict[str, Tensor]:
    """The same values with other strides."""
    n, c, x, y, z = features.shape
    wider = torch.full((n, x, y, z, c + 5), torch.nan, dtype=features.dtype)
    wider[..., 2:-3] = features.permute(0, 2, 3, 4, 1)
    spread = torch.full((n, c, x, y, 2 * z), torch.nan, dtype=features.dtype)
    spread[..., ::2] = features
    padded = torch.full((n, c, x, y, z + 3), torch.nan, dtype=features.dtype)
    padded[..., 1:-2] = features
    return {
        "contiguous": features.contiguous(),
        "a slice of the channels": wider[..., 2:-3].permute(0, 4, 1, 2, 3),
        "every second": spread[..., ::2],
        "a slice along z": last(padded)[..., 1:-2],
        "z first": features.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2),
        "x and y exchanged": features.permute(0, 3, 2, 4, 1).contiguous().permute(0, 4, 2, 1, 3),
        "batch last": features.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "c", "j", "shape"), [(2, 16, 3, (9, 7, 21)), (1, 19, 17, (6, 5, 4)), (2, 32, 2, (15, 33, 50))]
)
def test_any_strides_give_the_same_bits(
    isa: str, n: int, c: int, j: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    given = inputs(n, c, j, *shape, dtype=dtype)
    expected = forward(given)
    grads = random_grads(n, j, expected[0].dtype)
    gradients = backward(grads, given, 1.0, expected)
    for name, view in strided(given[0]).items():
        other = (view, given[1].t().contiguous().t(), torch.stack([given[2], given[2]], 1)[:, 0])
        outputs = forward(other)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected)), name
        assert all(torch.equal(a, b) for a, b in zip(backward(grads, other, 1.0, outputs), gradients)), name


def test_expanded_features(isa: str) -> None:
    features, weight, bias = inputs(1, 1, 2, 5, 1, 37)
    features = features.expand(3, 6, 5, 4, 37)
    weight = weight.expand(2, 6)
    given = features.contiguous(), weight.contiguous(), bias
    outputs = forward(given)
    for a, b in zip(forward((features, weight, bias)), outputs):
        assert torch.equal(a, b)
    grads = random_grads(3, 2, torch.float32)
    for a, b in zip(backward(grads, (features, weight, bias), 1.0, outputs), backward(grads, given, 1.0, outputs)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_any_strides_and_dtype(isa: str, dtype: torch.dtype) -> None:
    given = inputs(2, 5, 3, 5, 6, 20, dtype=dtype)
    outputs = forward(given)
    mean, peak, covariance = random_grads(2, 3, torch.float32)
    expected = backward((mean, peak, covariance), given, 1.0, outputs)
    other = (
        mean.double().transpose(0, 1).contiguous().transpose(0, 1),
        peak.t().contiguous().t(),
        covariance.mT.clone().mT,
    )
    assert all(map(torch.equal, backward(other, given, 1.0, outputs), expected))
    without = backward((mean, peak, None), given, 1.0, forward(given, covariance=False))
    zeros = torch.zeros_like(covariance)
    torch.testing.assert_close(without, backward((mean, peak, zeros), given, 1.0, outputs))
    for needs in ((True, False), (False, True), (False, False)):
        for got, whole, need in zip(backward(other, given, 1.0, outputs, needs), expected, needs):
            assert torch.equal(got, whole) if need else got.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (0, 3, 4, 5, 6), (2, 17, 31, 37, 21), (2, 1, 1, 3, 1)])
@pytest.mark.parametrize("covariance", [False, True])
def test_every_element_is_written_as_the_fakes_declare(
    isa: str, poisoned: None, shape: tuple[int, ...], dtype: torch.dtype, covariance: bool
) -> None:
    given = inputs(*shape[:2], 3, *shape[2:], dtype=dtype)
    outputs = forward(given, 1.0, covariance)
    fake, fake_backward = registration._OPERATORS["linear_soft_argmax3d"][:2]
    grads = list(random_grads(shape[0], 3, outputs[0].dtype))
    if not covariance:
        grads[2] = None
    for needs in ((True, True), (False, False)):
        gradients = backward(grads, given, 1.0, outputs, needs)
        declared = (*fake(*given, 1.0, covariance), *fake_backward(*[None] * 3, *given, 1.0, *[None] * 5, *needs))
        for a, b in zip((*outputs, *gradients), declared):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            assert a.isfinite().all()
    assert (outputs[5] >= 0).all()


def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    before = torch.get_num_threads()
    calls = [
        inputs(1, 16, 2, 67, 40, 25),
        inputs(2, 7, 17, 33, 40, 15, dtype=torch.bfloat16),
    ]
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for given in calls:
                outputs = forward(given)
                grads = random_grads(*outputs[1].shape, torch.float32)
                results.append((*outputs, *backward(grads, given, 1.0, outputs)))
    finally:
        torch.set_num_threads(before)
    for group in (results[i :: len(calls)] for i in range(len(calls))):
        for other in group[1:]:
            assert all(torch.equal(a, b) for a, b in zip(group[0], other))


# ---- autograd and the operator's registration ----


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_gradcheck_of_all_outputs(isa: str, contiguous: bool, temperature: float) -> None:
    features, *parameters = inputs(2, 3, 2, 2, 3, 5, scale=1.0, dtype=torch.float64)
    features = features.contiguous() if contiguous else features
    leaves = [t.detach().clone().requires_grad_() for t in (features, *parameters)]
    assert torch.autograd.gradcheck(lambda *x: forward(x, temperature)[:3], leaves)
    assert torch.autograd.gradcheck(lambda *x: forward((*x, None), temperature, False)[:2], leaves[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("covariance", [False, True])
def test_opcheck(dtype: torch.dtype, covariance: bool) -> None:
    features, weight, bias = inputs(2, 3, 2, 4, 5, 6, dtype=dtype)
    for view in (features, *strided(features).values()):
        given = view, weight.t().contiguous().t(), bias if covariance else None
        torch.library.opcheck(torch.ops.bkind3d.linear_soft_argmax3d.default, (*given, 0.7, covariance))
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in given]
        torch.library.opcheck(torch.ops.bkind3d.linear_soft_argmax3d.default, (*leaves, 0.7, covariance))
        outputs = forward(given, 0.7, covariance)
        mean, peak, second = random_grads(2, 2, outputs[0].dtype)
        grads = mean.transpose(0, 1).contiguous().transpose(0, 1), peak, second if covariance else None
        torch.library.opcheck(
            torch.ops.bkind3d.linear_soft_argmax3d_backward.default,
            (*grads, *given, 0.7, outputs[0], *outputs[2:], covariance, True),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.zeros(3, 2, 2, 2)}, r"features: expected \(N, C, X, Y, Z\)"),
        ({0: torch.zeros(1, 3, 2, 2, 2).int()}, "features: expected float32, float64, bfloat16 or float16"),
        ({0: torch.zeros(1, 3, 2, 0, 2)}, "features: expected no empty dimension but N"),
        ({0: torch.zeros(1, 0, 2, 2, 2)}, "features: expected no empty dimension but N"),
        ({1: torch.zeros(2, 4)}, r"weight: expected \(J, C\), float32"),
        ({1: torch.zeros(0, 3)}, r"weight: expected \(J, C\), float32"),
        ({1: torch.zeros(2, 3).double()}, r"weight: expected \(J, C\), float32"),
        ({2: torch.zeros(3)}, r"bias: expected \(J,\) in the dtype of the weight"),
        ({2: torch.zeros(2).half()}, r"bias: expected \(J,\) in the dtype of the weight"),
    ],
)
def test_the_operator_checks_what_its_loops_rely_on(changes: dict[int, Tensor], message: str) -> None:
    good = [torch.zeros(1, 3, 2, 2, 2), torch.zeros(2, 3), torch.zeros(2)]
    given = tuple(changes.get(i, t) for i, t in enumerate(good))
    with pytest.raises(RuntimeError, match=message):
        forward(given)
    outputs = forward(tuple(good))
    with pytest.raises(RuntimeError, match=message):
        backward(random_grads(1, 2, torch.float32), given, 1.0, outputs)
    with pytest.raises(RuntimeError, match="grad_peak: expected 2 elements"):
        backward((outputs[0], outputs[1][:, :1], outputs[2]), tuple(good), 1.0, outputs)
