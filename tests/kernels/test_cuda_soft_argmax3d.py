"""The CUDA kernel of soft_argmax3d, emulated on the CPU: what the tests of every backend do not reach."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import emulation
from torch import Tensor

from bkind3d_kernels import registration
from bkind3d_kernels.reference import soft_argmax3d as reference

pytestmark = pytest.mark.skipif(emulation.MISSING is not None, reason=str(emulation.MISSING))

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# One slab in packs of 16 bytes, several, lines that fit no pack, long lines, more keypoints than a block takes.
SHAPES = [(2, 3, 4, 5, 8), (1, 2, 11, 32, 32), (1, 2, 13, 27, 31), (1, 2, 1, 2, 5200), (2, 37, 4, 3, 7)]


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    emulation.load()


def logits_of(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def forward(logits: Tensor, temperature: float = 1.0, covariance: bool = True) -> tuple[Tensor, ...]:
    return torch.ops.bkind3d_emulated.soft_argmax3d(logits, temperature, covariance)


def backward(grads: tuple, logits: Tensor, temperature: float, outputs: tuple[Tensor, ...]) -> Tensor:
    mean, _, *rest = outputs
    return torch.ops.bkind3d_emulated.soft_argmax3d_backward(*grads, logits, temperature, mean, *rest)


def random_grads(n: int, j: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, ...]:
    """Of mean, peak and covariance; the last not symmetric."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, j, *s, generator=generator, dtype=torch.float64).to(dtype) for s in ((3,), (), (3, 3)))


def exact_gradient(logits: Tensor, temperature: float, grads: tuple[Tensor, ...]) -> Tensor:
    """That of the reference in the arithmetic of the logits' own dtype, as autograd gives it."""
    logits = logits.detach().clone().requires_grad_()
    outputs = reference.run(logits, temperature, True)
    return torch.autograd.grad(sum((o * g.to(o.dtype)).sum() for o, g in zip(outputs, grads)), logits)[0]


def compare(logits: Tensor, temperature: float) -> None:
    """Forward and backward against the reference in float64."""
    exact = logits.dtype == torch.float64
    rtol, atol = (1e-9, 1e-10) if exact else (1e-4, 1e-5)
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


def strided(logits: Tensor) -> dict[str, Tensor]:
    """The same values with other strides."""
    n, j, x, y, z = logits.shape
    wider = torch.full((n, j, x, y, z + 5), torch.nan, dtype=logits.dtype)
    wider[..., 2:-3] = logits
    spread = torch.full((n, j, x, y, 2 * z), torch.nan, dtype=logits.dtype)
    spread[..., ::2] = logits
    shifted = torch.full((logits.numel() + 1,), torch.nan, dtype=logits.dtype)[1:].view(logits.shape)
    shifted.copy_(logits)
    return {
        "channels last": logits.contiguous(memory_format=torch.channels_last_3d),
        "slice": wider[..., 2:-3],
        "every second": spread[..., ::2],
        "not aligned": shifted,
        "z first": logits.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2),
        "batch last": logits.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3),
    }


# ---- against the reference in float64 ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_strides(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = logits_of(*shape, dtype=dtype)
    compare(logits, 0.7)
    for view in strided(logits).values():
        compare(view, 1.0)


SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 31, 33, 48, 67])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 2),
    joints=st.sampled_from([1, 2, 17, 33]),
    shape=st.tuples(SIZES, SIZES, SIZES).filter(lambda s: s[0] * s[1] * s[2] < 6000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    last=st.booleans(),
)
def test_any_shape(n, joints, shape, temperature, dtype, last) -> None:
    logits = logits_of(n, joints, *shape, dtype=dtype)
    compare(logits.contiguous(memory_format=torch.channels_last_3d) if last else logits, temperature)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_of_each_dtype(dtype: torch.dtype, last: bool) -> None:
    logits = logits_of(2, 3, 20, 17, 24, dtype=dtype)
    logits = logits.contiguous(memory_format=torch.channels_last_3d) if last else logits
    grads = random_grads(2, 3, torch.float32)
    exact = (*reference.run(logits.double(), 0.8, True), exact_gradient(logits.double(), 0.8, grads))
    theirs = (*reference.run(logits, 0.8, True), exact_gradient(logits, 0.8, grads))
    outputs = forward(logits, 0.8)
    ours = (*outputs[:3], backward(grads, logits, 0.8, outputs))
    for e, a, b in zip(exact, ours, theirs):
        assert a.dtype == b.dtype
        unit = torch.finfo(torch.float32).eps * float(e.norm())
        assert float((a.double() - e).norm()) <= 2 * float((b.double() - e).norm()) + unit


# ---- precision ----


@pytest.mark.parametrize("last", [False, True])
def test_sharp_peak_far_from_the_centre(last: bool) -> None:
    x = torch.arange(48, dtype=torch.float64)
    d2 = [(x - c) ** 2 for c in (44.3, 3.7, 46.1)]
    distance = d2[0].view(-1, 1, 1) + d2[1].view(-1, 1) + d2[2]
    for width in (0.3, 1.0):
        logits = (-distance / (2 * width**2)).float().expand(1, 2, 48, 48, 48) + 1000.0
        logits = logits.contiguous(memory_format=torch.channels_last_3d) if last else logits.contiguous()
        mean, peak, covariance, *_ = forward(logits)
        exact = reference.run(logits.double(), 1.0, True)
        torch.testing.assert_close(mean.double(), exact[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(peak.double(), exact[1], rtol=1e-5, atol=0)
        torch.testing.assert_close(covariance.double(), exact[2], rtol=1e-5, atol=1e-6 * width**2)


def test_a_broad_maximum_far_from_the_largest_logit() -> None:
    """The mass is in a corner, the single largest voxel in the opposite one."""
    logits = torch.full((1, 1, 48, 48, 48), -30.0)
    logits[..., 2:8, 3:9, 40:46] = logits_of(6, 6, 6, scale=0.1)
    logits[..., 47, 47, 0] = 0.5
    compare(logits, 1.0)


def test_flat_volume() -> None:
    mean, peak, covariance, _, total, argmax = forward(torch.full((1, 1, 96, 64, 64), -123.0))
    torch.testing.assert_close(mean[0, 0], torch.tensor([47.5, 31.5, 31.5]), rtol=0, atol=2e-5)
    sizes = torch.tensor([96.0, 64.0, 64.0])
    torch.testing.assert_close(covariance[0, 0], torch.diag(sizes**2 - 1) / 12, rtol=1e-6, atol=1e-3)
    assert peak.item() == pytest.approx(1 / (96 * 64 * 64))
    assert (total.item(), argmax.item()) == (pytest.approx(96 * 64 * 64), 0)


# ---- special values: as the reference has them ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (9, 32, 40)])
@pytest.mark.parametrize("last", [False, True])
def test_masked_infinite_and_nan_logits(shape: tuple[int, int, int], dtype: torch.dtype, last: bool) -> None:
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
    logits = logits.contiguous(memory_format=torch.channels_last_3d) if last else logits
    outputs = forward(logits)
    wide = logits if dtype == torch.float64 else logits.float()
    for got, expected in zip(outputs, reference.run(wide, 1.0, True)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    grads = random_grads(1, 8, outputs[0].dtype)
    got, expected = backward(grads, logits, 1.0, outputs), exact_gradient(logits, 1.0, grads)
    tolerance = max(1e-4, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert not got.flatten(2)[0, 0, ::3].any()


@pytest.mark.parametrize(
    "places", [[(0, 0, 3), (0, 0, 9)], [(1, 2, 3), (8, 2, 1)], [(12, 32, 47)], [(5, 5, 46), (5, 5, 47)]]
)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("descending", [False, True])
def test_argmax_is_the_lowest_index(places: list[tuple[int, int, int]], last: bool, descending: bool) -> None:
    logits = torch.zeros(1, 2, 13, 33, 48)
    for x, y, z in places:
        logits[0, 1, x, y, z] = 1.5
    logits = logits.contiguous(memory_format=torch.channels_last_3d) if last else logits
    with emulation.order(descending=descending):
        *_, maximum, _, argmax = forward(logits)
    assert argmax.tolist() == [[0, int(logits[0, 1].flatten().argmax())]]
    assert maximum[0, 1] == 1.5


# ---- memory, order, registration ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 8), (0, 3, 4, 5, 6), (2, 3, 21, 7, 41)])
@pytest.mark.parametrize("covariance", [False, True])
def test_every_element_is_written_as_the_fakes_declare(
    poisoned: None, shape: tuple[int, ...], dtype: torch.dtype, covariance: bool
) -> None:
    for logits in strided(logits_of(*shape, dtype=dtype)).values():
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
        assert ((outputs[5] >= 0) & (outputs[5] < max(1, logits[0, 0].numel() if shape[0] else 1))).all()


@pytest.mark.parametrize("last", [False, True])
def test_the_order_of_blocks_and_threads_changes_nothing(last: bool) -> None:
    logits = logits_of(1, 3, 20, 20, 32)
    logits = logits.contiguous(memory_format=torch.channels_last_3d) if last else logits
    results = []
    for descending in (False, True):
        with emulation.order(descending=descending):
            outputs = forward(logits)
            results.append((*outputs, backward(random_grads(1, 3, torch.float32), logits, 1.0, outputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_gradients_of_any_strides_and_dtype() -> None:
    logits = logits_of(2, 3, 5, 6, 20)
    outputs = forward(logits)
    mean, peak, covariance = random_grads(2, 3, torch.float32)
    expected = backward((mean, peak, covariance), logits, 1.0, outputs)
    turned = mean.double().transpose(0, 1).contiguous().transpose(0, 1)
    other = turned, peak.t().contiguous().t(), covariance.mT.clone().mT
    assert torch.equal(backward(other, logits, 1.0, outputs), expected)
    without = backward((mean, peak, None), logits, 1.0, forward(logits, covariance=False))
    zeros = torch.zeros_like(covariance)
    torch.testing.assert_close(without, backward((mean, peak, zeros), logits, 1.0, outputs))


@pytest.mark.parametrize("shape", [(2, 2, 2, 3, 4), (2, 2, 2, 3, 5)])
@pytest.mark.parametrize("last", [False, True])
def test_gradcheck_of_all_outputs(shape: tuple[int, ...], last: bool) -> None:
    logits = logits_of(*shape, scale=1.0, dtype=torch.float64)
    logits = logits.contiguous(memory_format=torch.channels_last_3d) if last else logits
    assert torch.autograd.gradcheck(lambda x: forward(x, 0.5)[:3], logits.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: forward(x, 1.0, False)[:2], logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("covariance", [False, True])
def test_opcheck(dtype: torch.dtype, covariance: bool) -> None:
    operators = torch.ops.bkind3d_emulated
    for view in list(strided(logits_of(2, 3, 4, 5, 8, dtype=dtype)).values())[::2]:
        torch.library.opcheck(operators.soft_argmax3d.default, (view.clone().requires_grad_(), 0.7, covariance))
        outputs = forward(view, 0.7, covariance)
        mean, peak, second = random_grads(2, 3, outputs[0].dtype)
        arguments = mean.transpose(0, 1).contiguous().transpose(0, 1), peak, second if covariance else None
        torch.library.opcheck(
            operators.soft_argmax3d_backward.default, (*arguments, view, 0.7, outputs[0], *outputs[2:])
        )


def test_bad_arguments_of_the_operator_are_refused() -> None:
    logits = logits_of(1, 2, 2, 2, 2)
    outputs = forward(logits)
    with pytest.raises(RuntimeError, match="logits: expected"):
        forward(logits[0])
    with pytest.raises(RuntimeError, match="logits: expected"):
        forward(logits.int())
    with pytest.raises(RuntimeError, match="logits: expected no empty dimension"):
        forward(logits[..., :0])
    with pytest.raises(RuntimeError, match=r"logits: expected fewer than 2\^31 voxels"):
        forward(logits[..., :1].expand(1, 2, 2, 2, 2**29))
    with pytest.raises(RuntimeError, match="grad_peak: expected 2 elements"):
        backward((outputs[0], outputs[1][:, :1], outputs[2]), logits, 1.0, outputs)
    with pytest.raises(RuntimeError, match=r"argmax: expected \(N, J\) int64"):
        backward(outputs[:3], logits, 1.0, (*outputs[:5], outputs[5].int()))
