"""The Triton kernels of soft_argmax3d: what the tests of every backend do not reach."""

import itertools

import pytest
import torch
from torch import Tensor

from bkind3d_kernels import registration, triton_ops
from bkind3d_kernels.reference import soft_argmax3d as reference

pytestmark = pytest.mark.skipif(triton_ops.MISSING is not None, reason=str(triton_ops.MISSING))
if triton_ops.MISSING is None:
    from bkind3d_kernels.triton_ops import soft_argmax3d as kernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICE = "cpu" if triton_ops.INTERPRETED else "cuda"
INFINITY = float("inf")


def logits_of(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    values = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype)


def last(logits: Tensor) -> Tensor:
    return logits.contiguous(memory_format=torch.channels_last_3d)


def forward(logits: Tensor, temperature: float = 1.0, covariance: bool = True) -> tuple[Tensor, ...]:
    return torch.ops.bkind3d_triton.soft_argmax3d(logits, temperature, covariance)


def backward(grads: tuple[Tensor | None, ...], logits: Tensor, temperature: float, outputs: tuple[Tensor, ...]):
    mean, _, *rest = outputs
    return torch.ops.bkind3d_triton.soft_argmax3d_backward(*grads, logits, temperature, mean, *rest)


def random_grads(n: int, j: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, ...]:
    """Of mean, peak and covariance; the last not symmetric."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (3,), (), (3, 3)
    return tuple(torch.randn(n, j, *s, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for s in shapes)


def exact_gradient(logits: Tensor, temperature: float, grads: tuple[Tensor, ...]) -> Tensor:
    """That of the reference in the arithmetic of the logits' own dtype, as autograd gives it."""
    logits = logits.detach().clone().requires_grad_()
    outputs = reference.run(logits, temperature, True)
    return torch.autograd.grad(sum((o * g.to(o.dtype)).sum() for o, g in zip(outputs, grads)), logits)[0]


def compare(logits: Tensor, temperature: float = 1.0, rtol: float = 1e-4, atol: float = 1e-5) -> None:
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


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch):
    """Sets the tile, so that a volume has several, and merges two tiles of a row at a time."""

    def use(w: int, x: int, joints: int) -> None:
        monkeypatch.setattr(kernels, "_tile", lambda *_: kernels.Tile(w, x, joints))
        monkeypatch.setattr(kernels, "MERGED", 2)

    return use


# ---- tiles ----


@pytest.mark.parametrize("layout", ["rows", "last"])
@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((1, 1, 5, 3, 7), (8, 2, 1)),  # 3 by 3 tiles, borders in both directions, lines that they cut
        ((2, 3, 3, 2, 4), (8, 4, 2)),  # a tile of keypoints with one too many, planes that fit exactly
        ((1, 2, 4, 4, 4), (4, 1, 4)),
        ((1, 1, 9, 1, 1), (2, 4, 1)),
    ],
)
def test_tiles_of_any_shape(tiled, shape: tuple[int, ...], tile: tuple[int, ...], layout: str) -> None:
    tiled(*tile)
    logits = logits_of(*shape, dtype=torch.float64)
    compare(last(logits) if layout == "last" else logits, 0.7, 1e-9, 1e-10)


@pytest.mark.parametrize("index", ["int32", "int64"])
def test_the_tiles_of_a_gpu(monkeypatch: pytest.MonkeyPatch, index: str) -> None:
    for layout, itemsize in itertools.product(("rows", "small", "last", "few"), (2, 4, 8)):
        for backward_, double in itertools.product((False, True), (False, True)):
            tile = kernels.device_tile(layout, itemsize, kernels.VOXELS[backward_, double])
            assert tile.w * tile.x * tile.joints == kernels.VOXELS[backward_, double]
    monkeypatch.setattr(kernels, "_tile", lambda *_: kernels.device_tile("rows", 4, 8192))
    monkeypatch.setattr(kernels, "NARROW", 2**31 if index == "int32" else 0)
    compare(logits_of(1, 2, 20, 30, 31))
    monkeypatch.setattr(kernels, "_tile", lambda *_: kernels.device_tile("last", 4, 4096))
    compare(last(logits_of(1, 33, 5, 5, 9)))


def test_more_samples_than_a_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "GRID", 2)
    compare(logits_of(5, 2, 3, 2, 4, dtype=torch.float64), 1.0, 1e-9, 1e-10)


def test_common_sizes_are_offset_in_32_bits() -> None:
    logits = torch.empty(1, device="meta").expand(2, 30, 128, 128, 128)
    assert logits[0].numel() < kernels.NARROW
    for shape, wide in (((2, 30, 128, 128, 128), False), ((1, 30, 512, 512, 512), True)):
        for memory in (torch.empty(shape, device="meta"), last(torch.empty(shape, device="meta"))):
            arguments = kernels._over_tiles(memory, 1.0, False, backward=False).arguments
            native = kernels._voxel_stride(memory)
            assert (arguments["INDEX"] == kernels.tl.int64) == (wide and native != 1)


# ---- precision ----


@pytest.mark.parametrize("width", [0.15, 0.3, 1.0])
def test_sharp_peak_far_from_the_centre(tiled, width: float) -> None:
    tiled(4096, 8, 1)
    x = torch.arange(64, dtype=torch.float64)
    d2 = [(x - c) ** 2 for c in (60.3, 3.7, 56.1)]
    logits = (-(d2[0].view(-1, 1, 1) + d2[1].view(-1, 1) + d2[2]) / (2 * width**2)).float()[None, None] + 1000.0
    mean, peak, covariance, *_ = forward(logits.to(DEVICE))
    exact = reference.run(logits.to(DEVICE).double(), 1.0, True)
    torch.testing.assert_close(mean.double(), exact[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(peak.double(), exact[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(covariance.double(), exact[2], rtol=1e-5, atol=1e-6 * width**2)


def test_a_broad_maximum_far_from_the_largest_logit(tiled) -> None:
    """The mass is in a corner, the single largest voxel in the opposite one."""
    tiled(4096, 16, 1)
    logits = torch.full((1, 1, 64, 64, 64), -30.0, device=DEVICE)
    logits[..., 2:8, 3:9, 54:60] = logits_of(6, 6, 6, scale=0.1)
    logits[..., 63, 63, 0] = 0.5
    compare(logits, 1.0, 1e-5, 1e-5)


@pytest.mark.parametrize("fill", [0.0, -123.0])
def test_flat_large_volume(fill: float) -> None:
    size = 128
    mean, peak, covariance, _, total, argmax = forward(torch.full((1, 1, size, size, size), fill, device=DEVICE))
    torch.testing.assert_close(mean.cpu(), torch.full((1, 1, 3), (size - 1) / 2), rtol=0, atol=1e-4)
    torch.testing.assert_close(covariance[0, 0].cpu(), torch.eye(3) * (size**2 - 1) / 12, rtol=1e-6, atol=1e-3)
    assert peak.item() == pytest.approx(size**-3)
    assert (total.item(), argmax.item()) == (pytest.approx(size**3), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_of_each_dtype(dtype: torch.dtype) -> None:
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


# ---- special values: as the reference has them ----


@pytest.mark.filterwarnings("ignore:All-NaN")  # by the interpreter's maximum
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [(64, 4, 8), (8, 2, 8)])
def test_masked_infinite_and_nan_logits(tiled, tile: tuple[int, ...], dtype: torch.dtype) -> None:
    tiled(*tile)
    logits = logits_of(1, 8, 3, 5, 4, dtype=dtype)
    flat = logits.view(8, -1)
    flat[0, ::3] = -INFINITY
    flat[1, :-1] = -INFINITY  # one voxel is left
    flat[2] = -INFINITY
    flat[3, -1] = INFINITY
    flat[4, 0] = float("nan")
    flat[5, -1] = float("nan")
    flat[6] = float("nan")
    flat[7] = -INFINITY
    flat[7, -1] = float("nan")
    outputs = forward(logits)
    wide = logits if dtype == torch.float64 else logits.float()
    for got, expected in zip(outputs, reference.run(wide, 1.0, True)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert ((outputs[5] >= 0) & (outputs[5] < 60)).all()
    grads = random_grads(1, 8, outputs[0].dtype)
    got, expected = backward(grads, logits, 1.0, outputs), exact_gradient(logits, 1.0, grads)
    tolerance = max(1e-4, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert not got.view(8, -1)[0, ::3].any()


@pytest.mark.parametrize(
    "places",
    [
        [(0, 0, 3), (0, 0, 9)],
        [(0, 4, 9), (1, 0, 0)],  # the higher place in the first tile, the lower in the fourth
        [(0, 3, 5), (1, 0, 0)],  # the higher place in the first tile, the lower in the third, merged later
        [(0, 4, 9), (3, 0, 0)],
        [(4, 4, 9)],
        [],
    ],
)
@pytest.mark.parametrize("layout", ["rows", "last"])
def test_argmax_is_the_lowest_index(tiled, places: list[tuple[int, int, int]], layout: str) -> None:
    tiled(16, 2, 2)
    logits = torch.zeros(1, 2, 5, 5, 10, device=DEVICE)
    for x, y, z in places:
        logits[0, 1, x, y, z] = 1.5
    expected = int(logits[0, 1].flatten().argmax())
    *_, maximum, total, argmax = outputs = forward(last(logits) if layout == "last" else logits)
    assert argmax.tolist() == [[0, expected]]
    assert maximum[0, 1] == 1.5 * bool(places)
    count = 250 - len(places)
    weight = float(torch.tensor(-1.5).exp()) if places else 1.0
    assert total[0, 1].item() == pytest.approx(len(places) + count * weight)
    nothing = torch.zeros_like(outputs[0]), torch.ones_like(outputs[1]), None
    gradient = backward(nothing, logits, 1.0, outputs)[0, 1].flatten()
    assert int(gradient.argmax()) == expected
    assert int((gradient > 0).sum()) == 1


# ---- memory ----


def strided(logits: Tensor) -> dict[str, Tensor]:
    """The same values with other strides."""
    n, j, x, y, z = logits.shape
    wider = torch.full((n, j, x, y, z + 5), torch.nan, dtype=logits.dtype, device=logits.device)
    wider[..., 2:-3] = logits
    samples = torch.full((2 * n, j + 1, x, y, z), torch.nan, dtype=logits.dtype, device=logits.device)
    samples[::2, 1:] = logits
    keypoints = last(samples.new_full((n, 2 + j, x, y, z), torch.nan))
    keypoints[:, 1:-1] = logits
    return {
        "channels last": last(logits),
        "slice": wider[..., 2:-3],
        "slice of samples and keypoints": samples[::2, 1:],
        "slice of channels last": keypoints[:, 1:-1],
        "z first": logits.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2),
        "x and y exchanged": logits.transpose(2, 3).contiguous().transpose(2, 3),
        "batch last": logits.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3),
    }


NATIVE = ["channels last", "slice of samples and keypoints", "slice of channels last"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_give_the_same(dtype: torch.dtype) -> None:
    logits = logits_of(2, 3, 4, 5, 6, dtype=dtype)
    expected = forward(logits)
    grads = random_grads(2, 3, expected[0].dtype)
    gradient = backward(grads, logits, 1.0, expected)
    for name, view in strided(logits).items():
        assert (kernels._coalesced(view) is view) == (name in NATIVE), name
        outputs = forward(view)
        for a, b in zip((*outputs, backward(grads, view, 1.0, outputs)), (*expected, gradient)):
            assert a.is_contiguous(), name
            torch.testing.assert_close(a, b, msg=name)


def test_voxel_strides() -> None:
    def stride(*shape: int, dims: tuple[int, ...] = (0, 1, 2, 3, 4)) -> int | None:
        return kernels._voxel_stride(torch.empty(shape).permute(dims))

    assert stride(2, 3, 4, 5, 6) == 1
    assert stride(2, 4, 5, 6, 3, dims=(0, 4, 1, 2, 3)) == 3
    assert stride(2, 3, 1, 1, 1) == 1
    assert stride(2, 4, 5, 1, 3, dims=(0, 4, 1, 2, 3)) == 3
    assert stride(2, 3, 4, 6, 5, dims=(0, 1, 2, 4, 3)) is None
    assert stride(2, 3, 1, 1, 6, dims=(0, 1, 4, 2, 3)) == 1


def test_expanded_logits() -> None:
    logits = logits_of(1, 1, 5, 1, 7).expand(3, 2, 5, 4, 7)
    for a, b in zip(forward(logits), forward(logits.contiguous())):
        assert torch.equal(a, b)


def test_gradients_of_any_strides_and_dtype() -> None:
    logits = logits_of(2, 3, 3, 4, 5)
    outputs = forward(logits)
    mean, peak, covariance = random_grads(2, 3, torch.float32)
    expected = backward((mean, peak, covariance), logits, 1.0, outputs)
    other = mean.double().transpose(0, 1).contiguous().transpose(0, 1), peak.t().contiguous().t(), covariance.mT
    assert torch.equal(backward((*other[:2], other[2].contiguous().mT), logits, 1.0, outputs), expected)
    without = backward((mean, peak, None), logits, 1.0, forward(logits, covariance=False))
    zeros = torch.zeros_like(covariance)
    torch.testing.assert_close(without, backward((mean, peak, zeros), logits, 1.0, outputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (0, 3, 4, 5, 6)])
@pytest.mark.parametrize("covariance", [False, True])
def test_every_element_is_written_as_the_fakes_declare(
    tiled, poisoned: None, shape: tuple[int, ...], dtype: torch.dtype, covariance: bool
) -> None:
    tiled(16, 4, 4)
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


# ---- autograd and the operator's registration ----


@pytest.mark.parametrize("layout", ["rows", "last"])
def test_gradcheck_of_all_outputs(layout: str) -> None:
    logits = logits_of(1, 2, 2, 1, 3, scale=1.0, dtype=torch.float64)
    logits = last(logits) if layout == "last" else logits
    assert torch.autograd.gradcheck(lambda x: forward(x, 0.5)[:3], logits.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: forward(x, 1.0, False)[:2], logits, fast_mode=True)


@pytest.mark.parametrize("covariance", [False, True])
def test_opcheck(covariance: bool) -> None:
    logits = logits_of(1, 3, 2, 3, 4)
    for view in (logits, *(strided(logits)[name] for name in ("channels last", "slice", "x and y exchanged"))):
        leaf = view.detach().clone().requires_grad_()
        torch.library.opcheck(torch.ops.bkind3d_triton.soft_argmax3d.default, (leaf, 0.7, covariance))
        outputs = forward(view, 0.7, covariance)
        mean, peak, second = random_grads(1, 3, outputs[0].dtype)
        torch.library.opcheck(
            torch.ops.bkind3d_triton.soft_argmax3d_backward.default,
            (mean, peak, second if covariance else None, view, 0.7, outputs[0], *outputs[2:]),
        )


def test_no_second_derivative() -> None:
    logits = logits_of(1, 1, 2, 2, 2, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(forward(logits)[0].square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_bad_arguments_of_the_operator_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(1, 2, 2, 2, 2)
    outputs = forward(logits)
    good = outputs[0], outputs[1], outputs[2]
    for bad in (logits[0], logits[:, :0], logits[..., :0], logits.int()):
        with pytest.raises(ValueError, match=r"logits.*: expected"):
            forward(bad)
        with pytest.raises(ValueError, match=r"logits.*: expected"):
            backward(good, bad, 1.0, outputs)
    for position, name in enumerate(("grad_mean", "grad_peak", "grad_covariance")):
        changed = [g[:, :1] if i == position else g for i, g in enumerate(good)]
        with pytest.raises(ValueError, match=rf"{name} \(1, 1.* expected \(1, 2"):
            backward(changed, logits, 1.0, outputs)
    for position, name in ((0, "mean"), (2, "covariance"), (3, "maximum"), (4, "total"), (5, "argmax")):
        changed = [o[:, :1] if i == position else o for i, o in enumerate(outputs)]
        with pytest.raises(ValueError, match=rf"{name} \(1, 1.* expected \(1, 2"):
            backward(good, logits, 1.0, changed)
    with pytest.raises(ValueError, match=r"grad_mean .* on meta: expected"):
        kernels._backward(good[0].to("meta"), *good[1:], logits, 1.0, outputs[0], *outputs[2:])
    monkeypatch.setattr(kernels, "GRID", 1)
    with pytest.raises(ValueError, match="J up to 1"):
        forward(logits)


@pytest.mark.parametrize("temperature", [0.0, -1.0, INFINITY, float("nan")])
def test_temperatures_that_the_operators_refuse(temperature: float) -> None:
    logits = logits_of(1, 2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"temperature .*: expected a finite number above 0"):
        forward(logits, temperature)
    with pytest.raises(ValueError, match=r"temperature .*: expected a finite number above 0"):
        backward(random_grads(1, 2, torch.float32), logits, temperature, forward(logits))


@pytest.mark.parametrize(("side", "backward_", "joints"), [(15, True, 8), (16, True, 32), (15, False, 32)])
def test_halves_stored_one_by_one_have_few_keypoints(
    side: int, backward_: bool, joints: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile of 32 keypoints of planes of odd size spilled kilobytes a thread."""
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    logits = last(torch.empty(1, 30, 8, side, side, dtype=torch.bfloat16, device="meta"))
    assert kernels._tile(logits, backward_).joints == joints
    assert kernels._tile(logits.float(), backward_).joints == 32
