"""The C++ kernel of soft_argmax3d: what the tests of every backend do not reach."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkind3d_kernels import library, registration
from bkind3d_kernels.reference import soft_argmax3d as reference

pytestmark = pytest.mark.skipif(library.reason("_cpu") is not None, reason=str(library.reason("_cpu")))


def available(name: str) -> bool:
    try:
        with library.use_instruction_set(name):
            return True
    except RuntimeError:
        return False


SETS = [] if library.reason("_cpu") else [name for name in library.INSTRUCTION_SETS if available(name)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_instruction_set(request.param):
        yield request.param


def logits_of(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def forward(logits: Tensor, temperature: float = 1.0, covariance: bool = True) -> tuple[Tensor, ...]:
    return torch.ops.bkind3d.soft_argmax3d(logits, temperature, covariance)


def backward(grads: tuple[Tensor, ...], logits: Tensor, temperature: float, outputs: tuple[Tensor, ...]) -> Tensor:
    mean, _, *rest = outputs
    return torch.ops.bkind3d.soft_argmax3d_backward(*grads, logits, temperature, mean, *rest)


def random_grads(n: int, j: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Of mean, peak and covariance; the last not symmetric."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, j, *s, generator=generator, dtype=torch.float64).to(dtype) for s in ((3,), (), (3, 3)))


def exact_gradient(logits: Tensor, temperature: float, grads: tuple[Tensor, ...]) -> Tensor:
    """That of the reference in the arithmetic of the logits' own dtype, as autograd gives it."""
    logits = logits.detach().clone().requires_grad_()
    outputs = reference.run(logits, temperature, True)
    return torch.autograd.grad(sum((o * g.to(o.dtype)).sum() for o, g in zip(outputs, grads)), logits)[0]


def compare(logits: Tensor, temperature: float, rtol: float, atol: float) -> None:
    """Forward and backward against the reference in float64."""
    outputs = forward(logits, temperature)
    for got, expected in zip(outputs, reference.run(logits.double(), temperature, True)):
        size = max(1.0, float(expected.abs().max()))  # of a covariance, whose entries off the diagonal may be near 0
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol * size)
    grads = random_grads(*logits.shape[:2], outputs[0].dtype)
    got = backward(grads, logits, temperature, outputs)
    expected = exact_gradient(logits.double(), temperature, grads)
    # Where one voxel has nearly all the weight its gradient is a difference of equal terms.
    cancelled = 16 * torch.finfo(outputs[0].dtype).eps / temperature * float(outputs[1].max())
    atol = atol * float(expected.abs().max()) + cancelled
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol)


# ---- against the reference in float64 ----


SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 31, 33, 48, 67])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 2),
    joints=st.sampled_from([1, 2, 17]),
    shape=st.tuples(SIZES, SIZES, SIZES).filter(lambda s: s[0] * s[1] * s[2] < 20000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    name=st.sampled_from(SETS or ["baseline"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    last=st.booleans(),
)
def test_any_shape(n, joints, shape, temperature, name, dtype, last) -> None:
    logits = logits_of(n, joints, *shape, dtype=dtype)
    if last:
        logits = logits.contiguous(memory_format=torch.channels_last_3d)
    exact = dtype == torch.float64
    with library.use_instruction_set(name):
        compare(logits, temperature, 1e-9 if exact else 1e-4, 1e-10 if exact else 2e-5)


@pytest.mark.parametrize("shape", [(1, 1, 2500), (2, 3, 1025), (3, 2, 1024), (1, 4100, 1), (65, 40, 33)])
def test_long_lines_and_several_slabs(isa: str, shape: tuple[int, int, int]) -> None:
    compare(logits_of(1, 2, *shape), 1.0, 1e-4, 1e-5)
    compare(logits_of(1, 2, *shape, dtype=torch.float64), 0.7, 1e-9, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_of_each_dtype(isa: str, dtype: torch.dtype) -> None:
    logits = logits_of(2, 3, 20, 17, 23, dtype=dtype)
    grads = random_grads(2, 3, torch.float32)
    exact = (*reference.run(logits.double(), 0.8, True), exact_gradient(logits.double(), 0.8, grads))
    theirs = (*reference.run(logits, 0.8, True), exact_gradient(logits, 0.8, grads))
    outputs = forward(logits, 0.8)
    ours = (*outputs[:3], backward(grads, logits, 0.8, outputs))
    for e, a, b in zip(exact, ours, theirs):
        assert a.dtype == b.dtype
        unit = torch.finfo(torch.float32).eps * float(e.norm())
        assert float((a.double() - e).norm()) <= 2 * float((b.double() - e).norm()) + unit


@pytest.mark.parametrize("last", [False, True])
def test_gradients_larger_than_the_caches(isa: str, last: bool) -> None:
    """More than 8 MB, written past the caches: blocks that begin anywhere in a cache line."""
    logits = logits_of(1, 3, 83, 101, 99)
    logits = logits.contiguous(memory_format=torch.channels_last_3d) if last else logits
    compare(logits, 1.0, 1e-3, 1e-5)
    half = logits_of(1, 6, 83, 101, 99, dtype=torch.bfloat16)
    grads = random_grads(1, 6, torch.float32)
    expected = exact_gradient(half.double(), 1.0, grads)
    got = backward(grads, half, 1.0, forward(half))
    assert float((got.double() - expected).norm() / expected.norm()) < torch.finfo(torch.bfloat16).eps


# ---- precision ----


def test_sharp_peak_far_from_the_centre(isa: str) -> None:
    x = torch.arange(96, dtype=torch.float64)
    centre = torch.tensor([90.3, 3.7, 88.1], dtype=torch.float64)
    d2 = [(x - c) ** 2 for c in centre]
    distance = d2[0].view(-1, 1, 1) + d2[1].view(-1, 1) + d2[2]
    for width in (0.3, 1.0):
        logits = (-distance / (2 * width**2)).float()[None, None] + 1000.0
        mean, peak, covariance, *_ = forward(logits)
        exact = reference.run(logits.double(), 1.0, True)
        torch.testing.assert_close(mean.double(), exact[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(peak.double(), exact[1], rtol=1e-5, atol=0)
        torch.testing.assert_close(covariance.double(), exact[2], rtol=1e-5, atol=1e-6 * width**2)


def test_a_broad_maximum_far_from_the_largest_logit(isa: str) -> None:
    """The mass is in a corner, the single largest voxel in the opposite one."""
    logits = torch.full((1, 1, 80, 80, 80), -30.0)
    logits[..., 2:8, 3:9, 70:76] = logits_of(6, 6, 6, scale=0.1)
    logits[..., 79, 79, 0] = 0.5
    compare(logits, 1.0, 1e-5, 1e-5)


@pytest.mark.parametrize("fill", [0.0, -123.0])
def test_flat_large_volume(isa: str, fill: float) -> None:
    size = 192
    mean, peak, covariance, _, total, argmax = forward(torch.full((1, 1, size, size, size), fill))
    torch.testing.assert_close(mean, torch.full((1, 1, 3), (size - 1) / 2), rtol=0, atol=1e-4)
    torch.testing.assert_close(covariance[0, 0], torch.eye(3) * (size**2 - 1) / 12, rtol=1e-6, atol=1e-3)
    assert peak.item() == pytest.approx(size**-3)
    assert (total.item(), argmax.item()) == (pytest.approx(size**3), 0)


def test_noisy_large_volume(isa: str) -> None:
    logits = logits_of(1, 1, 192, 192, 192, scale=1.0)
    mean, _, covariance = reference.run(logits.double(), 1.0, True)
    outputs = forward(logits)
    torch.testing.assert_close(outputs[0].double(), mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs[2].double(), covariance, rtol=1e-5, atol=0.03)


# ---- special values: as the reference has them ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 9, 35), (40, 33, 50)])
def test_masked_infinite_and_nan_logits(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    logits = logits_of(1, 8, *shape, dtype=dtype)
    flat = logits.view(8, -1)
    infinity = float("inf")
    flat[0, ::3] = -infinity
    flat[1, :-1] = -infinity  # one voxel is left
    flat[2] = -infinity
    flat[3, -1] = infinity
    flat[4, 0] = float("nan")
    flat[5, -1] = float("nan")
    flat[6] = float("nan")
    flat[7] = -infinity
    flat[7, -1] = float("nan")
    outputs = forward(logits)
    wide = logits if dtype == torch.float64 else logits.float()
    for got, expected in zip(outputs, reference.run(wide, 1.0, True)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    grads = random_grads(1, 8, outputs[0].dtype)
    got, expected = backward(grads, logits, 1.0, outputs), exact_gradient(logits, 1.0, grads)
    tolerance = max(1e-4, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert not got.view(8, -1)[0, ::3].any()


@pytest.mark.parametrize(
    "places", [[(0, 0, 3), (0, 0, 9)], [(1, 2, 3), (30, 2, 1)], [(39, 32, 49)], [(5, 5, 48), (5, 5, 49)]]
)
@pytest.mark.parametrize("last", [False, True])
def test_argmax_is_the_lowest_index(isa: str, places: list[tuple[int, int, int]], last: bool) -> None:
    logits = torch.zeros(2, 3, 40, 33, 50)
    for x, y, z in places:
        logits[1, 2, x, y, z] = 1.5
    if last:
        logits = logits.contiguous(memory_format=torch.channels_last_3d)
    *_, maximum, total, argmax = forward(logits)
    assert argmax.tolist() == [[0, 0, 0], [0, 0, int(logits[1, 2].flatten().argmax())]]
    assert maximum[1, 2] == 1.5
    count = 40 * 33 * 50 - len(places)
    assert total[1, 2].item() == pytest.approx(len(places) + count * torch.tensor(-1.5).exp().item())


# ---- memory ----


def strided(logits: Tensor) -> dict[str, Tensor]:
    """The same values with other strides."""
    n, j, x, y, z = logits.shape
    wider = torch.full((n, j, x, y, z + 5), torch.nan, dtype=logits.dtype)
    wider[..., 2:-3] = logits
    spread = torch.full((n, j, x, y, 2 * z), torch.nan, dtype=logits.dtype)
    spread[..., ::2] = logits
    return {
        "channels last": logits.contiguous(memory_format=torch.channels_last_3d),
        "slice": wider[..., 2:-3],
        "every second": spread[..., ::2],
        "z first": logits.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2),
        "x and y exchanged": logits.transpose(2, 3).contiguous().transpose(2, 3),
        "batch last": logits.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 9, 7, 21), (1, 19, 6, 5, 4), (2, 2, 35, 33, 50)])
def test_any_strides_give_the_same_bits(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = logits_of(*shape, dtype=dtype)
    expected = forward(logits)
    grads = random_grads(*shape[:2], expected[0].dtype)
    gradient = backward(grads, logits, 1.0, expected)
    for name, view in strided(logits).items():
        outputs = forward(view)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected)), name
        got = backward(grads, view, 1.0, outputs)
        assert got.is_contiguous()
        assert torch.equal(got, gradient), name


def test_expanded_logits(isa: str) -> None:
    logits = logits_of(1, 1, 5, 1, 37).expand(3, 2, 5, 4, 37)
    for a, b in zip(forward(logits), forward(logits.contiguous())):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_any_strides_and_dtype(isa: str, dtype: torch.dtype) -> None:
    logits = logits_of(2, 3, 5, 6, 20, dtype=dtype)
    outputs = forward(logits)
    mean, peak, covariance = random_grads(2, 3, torch.float32)
    expected = backward((mean, peak, covariance), logits, 1.0, outputs)
    other = (
        mean.double().transpose(0, 1).contiguous().transpose(0, 1),
        peak.t().contiguous().t(),
        covariance.mT.clone().mT,
    )
    assert torch.equal(backward(other, logits, 1.0, outputs), expected)
    ones = torch.ones(()), torch.ones((), dtype=torch.bfloat16), torch.ones((), dtype=torch.float64)
    shapes = (2, 3, 3), (2, 3), (2, 3, 3, 3)
    expanded = tuple(o.expand(s) for o, s in zip(ones, shapes))
    dense = tuple(torch.ones(s) for s in shapes)
    assert torch.equal(backward(expanded, logits, 1.0, outputs), backward(dense, logits, 1.0, outputs))
    without = backward((mean, peak, None), logits, 1.0, forward(logits, covariance=False))
    zeros = torch.zeros_like(covariance)
    torch.testing.assert_close(without, backward((mean, peak, zeros), logits, 1.0, outputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (0, 3, 4, 5, 6), (2, 3, 31, 37, 41)])
@pytest.mark.parametrize("covariance", [False, True])
def test_every_element_is_written_as_the_fakes_declare(
    isa: str, poisoned: None, shape: tuple[int, ...], dtype: torch.dtype, covariance: bool
) -> None:
    logits = logits_of(*shape, dtype=dtype)
    outputs = forward(logits, 1.0, covariance)
    fake, fake_backward = registration._OPERATORS["soft_argmax3d"][:2]
    grads = list(random_grads(*shape[:2], outputs[0].dtype))
    if not covariance:
        grads[2] = None
    gradient = backward(grads, logits, 1.0, outputs)
    expected = (*fake(logits, 1.0, covariance), fake_backward(None, None, None, logits, 1.0, *[None] * 5))
    for got, declared in zip((*outputs, gradient), expected):
        assert (got.shape, got.dtype, got.stride()) == (declared.shape, declared.dtype, declared.stride())
        assert got.isfinite().all()
    assert (outputs[5] >= 0).all()


def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for logits in (logits_of(1, 2, 67, 40, 50), logits_of(2, 3, 33, 40, 50, dtype=torch.bfloat16)):
                for view in (logits, logits.contiguous(memory_format=torch.channels_last_3d)):
                    outputs = forward(view)
                    gradient = backward(random_grads(*logits.shape[:2], torch.float32), view, 1.0, outputs)
                    results.append((*outputs, gradient))
    finally:
        torch.set_num_threads(before)
    for group in (results[i::4] for i in range(4)):
        for other in group[1:]:
            assert all(torch.equal(a, b) for a, b in zip(group[0], other))


# ---- autograd and the operator's registration ----


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_gradcheck_of_all_outputs(isa: str, last: bool, temperature: float) -> None:
    logits = logits_of(2, 2, 2, 3, 5, scale=1.0, dtype=torch.float64)
    logits = logits.contiguous(memory_format=torch.channels_last_3d) if last else logits
    assert torch.autograd.gradcheck(lambda x: forward(x, temperature)[:3], logits.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: forward(x, temperature, False)[:2], logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("covariance", [False, True])
def test_opcheck(dtype: torch.dtype, covariance: bool) -> None:
    logits = logits_of(2, 3, 4, 5, 6, dtype=dtype)
    for view in (logits, *strided(logits).values()):
        torch.library.opcheck(torch.ops.bkind3d.soft_argmax3d.default, (view, 0.7, covariance))
        torch.library.opcheck(
            torch.ops.bkind3d.soft_argmax3d.default, (view.detach().clone().requires_grad_(), 0.7, covariance)
        )
        outputs = forward(view, 0.7, covariance)
        mean, peak, second = random_grads(2, 3, outputs[0].dtype)
        arguments = mean.transpose(0, 1).contiguous().transpose(0, 1), peak, second if covariance else None
        torch.library.opcheck(
            torch.ops.bkind3d.soft_argmax3d_backward.default,
            (*arguments, view, 0.7, outputs[0], *outputs[2:]),
        )


def test_no_second_derivative() -> None:
    logits = logits_of(1, 1, 2, 2, 2, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(forward(logits)[0].square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_bad_arguments_of_the_operator_are_refused() -> None:
    logits = logits_of(1, 2, 2, 2, 2)
    outputs = forward(logits)
    with pytest.raises(RuntimeError, match="logits: expected"):
        forward(logits[0])
    with pytest.raises(RuntimeError, match="logits: expected"):
        forward(logits.int())
    with pytest.raises(RuntimeError, match="grad_peak: expected 2 elements"):
        backward((outputs[0], outputs[1][:, :1], outputs[2]), logits, 1.0, outputs)
