"""The Triton edge maps beyond what every family holds: tiles, culling, several launches, determinism, indices."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from cases import rasterize_edges as cases
from measure import gradients
from switches import deterministic
from torch import Tensor

from bkind3d_kernels import explain, library, rasterize_edges, triton_ops

pytestmark = pytest.mark.skipif(triton_ops.MISSING is not None, reason=str(triton_ops.MISSING))
if triton_ops.MISSING is None:
    from bkind3d_kernels.triton_ops import rasterize_edges as kernels

DEVICE = "cpu" if triton_ops.INTERPRETED else "cuda"
OPERATORS = getattr(torch.ops, triton_ops.NAMESPACE)
TINY = torch.finfo(torch.float32).tiny
draw = partial(rasterize_edges, backend="triton")


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles as on a GPU, so that a map has several; of edges too."""
    monkeypatch.setattr(kernels, "TILE", (8, 16))
    monkeypatch.setattr(kernels, "SMALL_TILE", (8, 16))
    monkeypatch.setattr(kernels, "DOUBLE_TILE", (8, 16))
    monkeypatch.setattr(kernels, "GATHERED", 2)
    monkeypatch.setattr(kernels, "PREPARED", 32)
    monkeypatch.setattr(kernels, "POINTS", 4)
    monkeypatch.setattr(kernels, "COLLECTED", 8)


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def scene(*arguments, **options) -> list[Tensor]:
    return on_device(*cases.scene(*arguments, **options))


@pytest.mark.parametrize(("n", "k", "sizes", "sigma"), [(2, 5, [(9, 17), (16, 3)], 1.0), (1, 9, [(7, 33)], 3.0)])
def test_float32_against_exact_scores(n: int, k: int, sizes: list, sigma: float, small: None) -> None:
    """36 edges: 2 blocks."""
    problem = scene(n, k, sizes[0], dtype=torch.float32)
    cases.check_float32(OPERATORS, problem, sizes, sigma, lowest=(-87.33, -87.33), share=0)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("sigma", [0.3, 2.5, 20.0])
def test_culling_changes_no_bit(dtype: torch.dtype, sigma: float, small: None, monkeypatch) -> None:
    """Coinciding and far keypoints, edges twice, weights of all magnitudes; an infinite slack keeps all edges."""
    problem = *on_device(*cases.adversarial(int(10 * sigma), 1, 6, (13, 21), dtype)), [(13, 21)], [sigma]
    maps, winners = cases.forward(OPERATORS, *problem)
    monkeypatch.setitem(kernels.LIMITS, dtype, kernels.LIMITS[dtype]._replace(slack=float("inf")))
    expected_maps, expected_winners = cases.forward(OPERATORS, *problem)
    for got, expected in zip(maps + winners, expected_maps + expected_winners):
        assert torch.equal(got, expected)


@pytest.mark.skipif(not triton_ops.INTERPRETED, reason="counts calls of the interpreter")
def test_culling_visits_few_edges(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten short edges side by side in as many tiles: a tile is visited by its own and those next to it."""
    visits, lowest_bit = [], kernels._lowest_bit
    monkeypatch.setattr(kernels, "_lowest_bit", lambda bits: visits.append(bits) or lowest_bit(bits))
    x = 16 * torch.arange(10.0) + 4
    keypoints = torch.stack([torch.stack([x, x + 8], 1), torch.tensor([2.0, 6.0]).expand(10, 2)], -1).view(1, 20, 2)
    edges = torch.arange(20).view(10, 2)
    (image,), _ = cases.forward(OPERATORS, keypoints, torch.ones(1, 10), edges, [(8, 160)], [2.0])
    assert (image.view(8, 10, 16).amax((0, 2)) > 0.9).all()
    assert 10 <= len(visits) <= 30


@pytest.mark.parametrize("fixed", [False, True])
def test_float64_is_the_reference(fixed: bool, small: None) -> None:
    with deterministic(fixed):
        cases.check_float64(OPERATORS, scene(2, 6, (11, 18), spread=3.0), [(11, 18), (17, 7)], [2.0, 1.3])


@pytest.mark.parametrize("fixed", [False, True])
def test_float32_gradients_reach_float64(fixed: bool, small: None) -> None:
    """Summed in float32, within 1e-6 of the sum of magnitudes; winners are the same in this scene."""
    keypoints, weights, edges = scene(1, 5, (16, 40), dtype=torch.float32)
    options = [(16, 40)], [2.0]
    maps, winners = cases.forward(OPERATORS, keypoints, weights, edges, *options)
    grad = torch.rand_like(maps[0])
    results = [
        cases.backward(OPERATORS, [grad.to(d)], (keypoints.to(d), weights.to(d), edges), winners, *options, fixed)
        for d in cases.DTYPES
    ]
    for a, b in zip(*results):
        assert float((a - b).abs().max()) <= 1e-6 * float(maps[0].sum())


def test_deterministic_backward_needs_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """No atomic adds: the kernel that has them is not there; and any division into programs gives the same bits."""
    keypoints, weights, edges = scene(2, 5, (12, 20), dtype=torch.float32)
    run = cases.maps_of(OPERATORS, edges, [(12, 20), (5, 9)], [2.0, 1.0])
    monkeypatch.setattr(kernels, "_scatter", None)
    results = []
    for gathered in (2, 2**15):
        monkeypatch.setattr(kernels, "GATHERED", gathered)
        with deterministic():
            results.append(gradients(run, keypoints, weights))
    for a, b in zip(*results):
        assert a.abs().sum() > 0
        assert torch.equal(a, b)


@pytest.mark.parametrize("fixed", [False, True])
def test_more_maps_than_a_launch_takes(fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = scene(2, 4, (6, 7), dtype=torch.float32)
    options = [(6, 7), (3, 9), (8, 2), (5, 5), (1, 4)], [1.0, 2.0, 1.5, 0.7, 1.0]
    maps, winners = cases.forward(OPERATORS, *inputs, *options)
    backward = partial(cases.backward, OPERATORS, cases.random_grads(maps), inputs, winners, *options, fixed)
    expected = backward()
    monkeypatch.setattr(kernels, "MAPS", 2)
    split_maps, split_winners = cases.forward(OPERATORS, *inputs, *options)
    for a, b in zip(split_maps + split_winners, maps + winners):
        assert torch.equal(a, b)
    for a, b in zip(backward(), expected):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(library.reason("_cpu") is not None, reason=str(library.reason("_cpu")))
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_agrees_with_cpp(dtype: torch.dtype, small: None) -> None:
    """Also where nothing is drawn, and for what is left of ties."""
    options = [(10, 19), (19, 4)], [1.5, 2.5]
    inputs = cases.adversarial(5, 1, 5, (10, 19), dtype)
    maps, winners = cases.forward(OPERATORS, *on_device(*inputs), *options)
    expected, indices = cases.forward(torch.ops.bkind3d, *(t.cpu() for t in inputs), *options)
    rtol = 1e-5 if dtype == torch.float32 else 1e-11
    for a, b in zip(maps, expected):
        torch.testing.assert_close(a.cpu(), b, rtol=rtol, atol=TINY)
    got, indices = (torch.cat([w.flatten() for w in each]).cpu() for each in (winners, indices))
    assert got.dtype == indices.dtype
    assert ((got < 0) == (indices < 0)).all()
    assert int((got != indices).sum()) <= 0.02 * len(got)


def test_more_than_int16_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer, since interpreted they take long; the last edge wins where the first does not."""
    monkeypatch.setattr(kernels, "INT16_EDGES", 40)
    keypoints = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [0.0, 2.0], [3.0, 2.0]]])
    edges = torch.tensor([[0, 1]] * 40 + [[2, 3]])
    weights = torch.zeros(1, 41)
    weights[0, 0], weights[0, -1] = 1.0, 0.5
    inputs, options = (keypoints, weights, edges), ([(3, 4)], [1.0])
    maps, winners = cases.forward(OPERATORS, *inputs, *options)
    assert winners[0].dtype == torch.int32
    assert winners[0][0, :, 0].tolist() == [0, 0, 40]
    _, grad_weights = cases.backward(OPERATORS, [torch.ones_like(maps[0])], inputs, winners, *options)
    assert grad_weights.nonzero().tolist() == [[0, 0], [0, 40]]
    assert float(grad_weights[0, -1]) == pytest.approx(4.0)


@pytest.mark.parametrize("deterministic", [False, True])
def test_indices_out_of_range_touch_no_memory(deterministic: bool) -> None:
    """Not checked on a GPU: such an edge is NaN, and such a winner has no gradient."""
    keypoints, weights = torch.rand(2, 3, 2), torch.ones(2, 2)
    edges = torch.tensor([[0, 1], [2, 2**40]])
    maps, winners = OPERATORS.rasterize_edges(keypoints, weights, edges, [3, 4], [1.0])
    assert maps[0].isnan().all()
    assert (winners == 1).all()
    winners = torch.tensor([0, 2, 32000, -1, -32000, 2]).repeat(4).to(torch.int16)
    edges[1, 1] = -7
    arguments = [torch.ones(2, 3, 4)], keypoints, weights, edges, winners, [3, 4], [1.0], deterministic
    grad_keypoints, grad_weights = OPERATORS.rasterize_edges_backward(*arguments)
    assert grad_keypoints.isfinite().all()
    assert (grad_weights[:, 0] > 0).all()
    assert (grad_weights[:, 1] == 0).all()


def test_forward_mode_is_refused() -> None:
    keypoints, weights, _ = scene(1, 3)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda k: draw(k, weights, (6, 6), 2.0), (keypoints,), (torch.ones_like(keypoints),))


def test_half_precision_is_refused_with_the_reason() -> None:
    reasons = {line.backend: line.reason for line in explain("rasterize_edges", device=DEVICE, dtype=torch.bfloat16)}
    assert "torch.bfloat16 is not one of float32, float64" in reasons["triton"]
