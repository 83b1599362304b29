"""The Triton edge maps beyond what every backend passes: tiles, culling, winners, several launches, determinism."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from measure import gradients, saved_elements
from test_cpp_rasterize_edges import adversarial, exact_scores, flat, sample, scene
from torch import Tensor

from bkind3d_kernels import explain, library, rasterize_edges, triton_ops
from bkind3d_kernels.geometry import all_pairs

pytestmark = pytest.mark.skipif(triton_ops.MISSING is not None, reason=str(triton_ops.MISSING))
if triton_ops.MISSING is None:
    from bkind3d_kernels.triton_ops import rasterize_edges as kernels

DEVICE = "cpu" if triton_ops.INTERPRETED else "cuda"
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


def forward(keypoints: Tensor, weights: Tensor, edges: Tensor, sizes: list[tuple[int, int]], sigmas: list[float]):
    """Maps, and winners in the shapes of the maps."""
    inputs = on_device(keypoints, weights, edges)
    maps, winners = torch.ops.bkind3d_triton.rasterize_edges(*inputs, flat(sizes), sigmas)
    return maps, [w.view(m.shape) for w, m in zip(winners.split([m.numel() for m in maps]), maps)]


@pytest.mark.parametrize(("n", "k", "sizes", "sigma"), [(2, 5, [(9, 17), (16, 3)], 1.0), (1, 9, [(7, 33)], 3.0)])
def test_float32_against_exact_scores(n: int, k: int, sizes: list, sigma: float, small: None) -> None:
    """Values, and winners: at the pixels where they differ, scores do so by rounding only. 36 edges: 2 blocks."""
    keypoints, weights, edges = on_device(*scene(n, k, sizes[0]))
    maps, winners = forward(keypoints, weights, edges, sizes, [sigma] * len(sizes))
    for index, (image, winner) in enumerate(zip(maps, winners)):
        scores = exact_scores(keypoints, weights, edges, sizes, sigma, index)
        best, expected = scores.max(1)
        torch.testing.assert_close(image.double(), best.exp(), rtol=1e-4, atol=1e-5)
        drawn = winner >= 0
        assert (drawn == (best >= -87.33)).all()
        got = scores.gather(1, winner.long().clamp(min=0)[:, None])[:, 0]
        assert ((best - got)[drawn] <= 1e-4 * (1 + best[drawn].abs())).all()
        assert int((drawn & (winner != expected)).sum()) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.3, 2.5, 20.0])
def test_culling_changes_no_bit(dtype: torch.dtype, sigma: float, small: None, monkeypatch) -> None:
    """Coinciding and far keypoints, edges twice, weights of all magnitudes; an infinite slack keeps all edges."""
    problem = *adversarial(int(10 * sigma), 1, 6, (13, 21), dtype), [(13, 21)], [sigma]
    maps, winners = forward(*problem)
    monkeypatch.setitem(kernels.LIMITS, dtype, kernels.LIMITS[dtype]._replace(slack=float("inf")))
    expected_maps, expected_winners = forward(*problem)
    for got, expected in zip(maps + winners, expected_maps + expected_winners):
        assert torch.equal(got, expected)


@pytest.mark.skipif(not triton_ops.INTERPRETED, reason="counts calls of the interpreter")
def test_culling_visits_few_edges(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten short edges side by side in as many tiles: a tile is visited by its own and those next to it."""
    visits, lowest_bit = [], kernels._lowest_bit
    monkeypatch.setattr(kernels, "_lowest_bit", lambda bits: visits.append(bits) or lowest_bit(bits))
    x = 16 * torch.arange(10.0) + 4
    keypoints = torch.stack([torch.stack([x, x + 8], 1), torch.tensor([2.0, 6.0]).expand(10, 2)], -1).view(1, 20, 2)
    (image,), _ = forward(keypoints, torch.ones(1, 10), torch.arange(20).view(10, 2), [(8, 160)], [2.0])
    assert (image.view(8, 10, 16).amax((0, 2)) > 0.9).all()
    assert 10 <= len(visits) <= 30


@pytest.mark.parametrize("deterministic", [False, True])
def test_float64_gradients_are_those_of_the_reference(deterministic: bool, small: None) -> None:
    keypoints, weights, _ = on_device(*scene(2, 6, (11, 18), spread=3.0, dtype=torch.float64))
    sizes, sigmas = [(11, 18), (17, 7)], [2.0, 1.3]
    torch.use_deterministic_algorithms(deterministic)
    try:
        got = gradients(partial(draw, size=sizes, sigma=sigmas), keypoints, weights)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = gradients(partial(rasterize_edges, size=sizes, sigma=sigmas, backend="reference"), keypoints, weights)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("deterministic", [False, True])
def test_float32_gradients_reach_float64(deterministic: bool, small: None) -> None:
    """Summed in float32, within 1e-6 of the sum of magnitudes; winners are the same in this scene."""
    keypoints, weights, edges = on_device(*scene(1, 5, (16, 40)))
    maps, winners = forward(keypoints, weights, edges, [(16, 40)], [2.0])
    grads = [torch.rand_like(maps[0])]
    results = [
        torch.ops.bkind3d_triton.rasterize_edges_backward(
            [g.to(dtype) for g in grads],
            keypoints.to(dtype),
            weights.to(dtype),
            edges,
            winners[0].flatten(),
            [16, 40],
            [2.0],
            deterministic,
        )
        for dtype in (torch.float32, torch.float64)
    ]
    for a, b in zip(*results):
        assert float((a - b).abs().max()) <= 1e-6 * float(maps[0].sum())


def test_full_gradcheck() -> None:
    keypoints, weights, edges = on_device(*scene(1, 3, (3, 4), dtype=torch.float64))
    weights = weights.abs() + 0.1
    edges = torch.cat([edges, torch.tensor([[2, 2]])])
    weights = torch.cat([weights, weights[:, :1]], 1)
    function = partial(draw, size=(3, 4), sigma=1.4, edges=edges)
    assert torch.autograd.gradcheck(function, (keypoints.requires_grad_(), weights.requires_grad_()))


def test_deterministic_backward_needs_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """No atomic adds: the kernel that has them is not there; and any division into programs gives the same bits."""
    keypoints, weights, _ = on_device(*scene(2, 5, (12, 20)))
    run = partial(draw, size=[(12, 20), (5, 9)], sigma=[2.0, 1.0])
    monkeypatch.setattr(kernels, "_scatter", None)
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for gathered in (2, 2**15):
            monkeypatch.setattr(kernels, "GATHERED", gathered)
            results.append(gradients(run, keypoints, weights))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*results):
        assert a.abs().sum() > 0
        assert torch.equal(a, b)


@pytest.mark.parametrize("deterministic", [False, True])
def test_more_maps_than_a_launch_takes(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    keypoints, weights, edges = on_device(*scene(2, 4, (6, 7)))
    sizes, sigmas = [(6, 7), (3, 9), (8, 2), (5, 5), (1, 4)], [1.0, 2.0, 1.5, 0.7, 1.0]
    maps, winners = torch.ops.bkind3d_triton.rasterize_edges(keypoints, weights, edges, flat(sizes), sigmas)
    grads = [torch.randn_like(m) for m in maps]
    backward = partial(
        torch.ops.bkind3d_triton.rasterize_edges_backward,
        *(grads, keypoints, weights, edges, winners, flat(sizes), sigmas, deterministic),
    )
    expected = backward()
    monkeypatch.setattr(kernels, "MAPS", 2)
    split = torch.ops.bkind3d_triton.rasterize_edges(keypoints, weights, edges, flat(sizes), sigmas)
    for a, b in zip((*split[0], split[1]), (*maps, winners)):
        assert torch.equal(a, b)
    for a, b in zip(backward(), expected):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(library.reason("_cpu") is not None, reason=str(library.reason("_cpu")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_cpp(dtype: torch.dtype, small: None) -> None:
    """Also where nothing is drawn, and for what is left of ties."""
    problem = *adversarial(5, 1, 5, (10, 19), dtype), [(10, 19), (19, 4)], [1.5, 2.5]
    keypoints, weights, edges, sizes, sigmas = problem
    maps, winners = forward(*problem)
    expected, indices = torch.ops.bkind3d.rasterize_edges(
        *(t.cpu() for t in (keypoints, weights, edges)), flat(sizes), sigmas
    )
    rtol = 1e-5 if dtype == torch.float32 else 1e-11
    for a, b in zip(maps, expected):
        torch.testing.assert_close(a.cpu(), b, rtol=rtol, atol=TINY)
    got = torch.cat([w.flatten() for w in winners]).cpu()
    assert got.dtype == indices.dtype
    assert ((got < 0) == (indices < 0)).all()
    assert int((got != indices).sum()) <= 0.02 * len(got)


@pytest.mark.parametrize("far", [1e4, 1e10])
def test_both_ends_far_outside(far: float) -> None:
    """A line across the map between ends far away: values and gradients of float32 inputs as those in float64."""
    direction = torch.tensor([0.8, 0.6], dtype=torch.float64)
    ends = torch.stack([-far * direction, 0.7 * far * direction]) + torch.tensor([30.0, 20.0], dtype=torch.float64)
    keypoints = ends[None].float()
    run = partial(draw, size=(40, 60), sigma=2.0)
    image, exact = run(keypoints, torch.ones(1)), run(keypoints.double(), torch.ones(1))
    torch.testing.assert_close(image.double(), exact, rtol=1e-4, atol=1e-5)
    got, expected = (gradients(run, k, torch.ones(1))[0] for k in (keypoints, keypoints.double()))
    assert float((got - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_below_the_smallest_normal_number_nothing_is_drawn(dtype: torch.dtype) -> None:
    lowest = {torch.float32: -87.33, torch.float64: -708.0}[dtype]
    keypoints = torch.zeros(1, 2, 2, dtype=dtype)
    (image,), (winner,) = forward(keypoints, torch.ones(1, 1, dtype=dtype), all_pairs(2), [(1, 64)], [1.0])
    score = -(torch.arange(64).double() ** 2)
    assert (winner[0, 0] == torch.where(score >= lowest, 0, -1)).all()
    assert (image[0, 0, score < lowest] == 0).all()
    drawn = score >= lowest
    torch.testing.assert_close(image[0, 0, drawn].double(), score[drawn].exp(), rtol=1e-5, atol=0)


def test_weights_of_any_magnitude() -> None:
    keypoints, _, edges = scene(1, 3, (12, 12))
    weights = torch.tensor([1e-37, 1e-20, 1.0, 1e20, 1e37, torch.inf])[:, None].expand(-1, 3)
    (maps,), _ = forward(keypoints.expand(6, -1, -1), weights, edges, [(12, 12)], [9.0])
    unit = maps[2].double()
    for image, weight in zip(maps[:5], weights[:, 0]):
        near = image > 0
        torch.testing.assert_close(image[near].double() / float(weight), unit[near], rtol=2e-5, atol=0)
    assert (maps[5] == torch.inf).all()


@pytest.mark.parametrize("weight", [1e37, 1e-30])
def test_gradient_of_extreme_weights(weight: float) -> None:
    """dL/dw = exp(−d²/σ²) whatever w is: on the segment, 1."""
    keypoints = torch.tensor([[[0.0, 0.0], [3.0, 0.0]]])
    weights = torch.tensor([weight], requires_grad=True)
    draw(keypoints, weights, (1, 4), 1.0).sum().mul(100).backward()
    torch.testing.assert_close(weights.grad, torch.tensor([400.0]))


def test_more_than_int16_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer, since interpreted they take long; the last edge wins where the first does not."""
    monkeypatch.setattr(kernels, "INT16_EDGES", 40)
    keypoints = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [0.0, 2.0], [3.0, 2.0]]])
    edges = torch.tensor([[0, 1]] * 40 + [[2, 3]])
    weights = torch.zeros(1, 41)
    weights[0, 0], weights[0, -1] = 1.0, 0.5
    maps, winners = torch.ops.bkind3d_triton.rasterize_edges(keypoints, weights, edges, [3, 4], [1.0])
    assert winners.dtype == torch.int32
    assert winners.view(3, 4)[:, 0].tolist() == [0, 0, 40]
    arguments = [torch.ones_like(maps[0])], keypoints, weights, edges, winners, [3, 4], [1.0], False
    _, grad_weights = torch.ops.bkind3d_triton.rasterize_edges_backward(*arguments)
    assert grad_weights.nonzero().tolist() == [[0, 0], [0, 40]]
    assert float(grad_weights[0, -1]) == pytest.approx(4.0)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("n", "k", "edges"), [(0, 3, 3), (2, 0, 0), (2, 2, 0), (2, 2, 1)])
def test_every_element_is_written(n: int, k: int, edges: int, deterministic: bool, poisoned: None) -> None:
    keypoints, pairs = 5 * torch.rand(n, k, 2), all_pairs(max(k, 2))[:edges].to(DEVICE)
    weights = torch.rand(n, edges)
    sizes, sigmas = [(7, 9), (1, 1), (9, 3)], [1.0, 0.5, 2.0]
    maps, winners = forward(keypoints, weights, pairs, sizes, sigmas)
    for image, winner, size in zip(maps, winners, sizes):
        assert image.shape == (n, *size)
        assert image.isfinite().all()
        assert ((winner >= -1) & (winner < edges)).all()
    flat_winners = torch.cat([w.flatten() for w in winners])
    arguments = keypoints, weights, pairs, flat_winners, flat(sizes), sigmas, deterministic
    grads = torch.ops.bkind3d_triton.rasterize_edges_backward([torch.ones_like(m) for m in maps], *arguments)
    assert [g.shape for g in grads] == [keypoints.shape, weights.shape]
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_any_strides(deterministic: bool) -> None:
    keypoints, weights, edges = on_device(*scene(2, 3, (11, 7)))
    _, winners = torch.ops.bkind3d_triton.rasterize_edges(keypoints, weights, edges, [11, 7], [2.0])
    dense = torch.randn(2, 11, 7)
    arguments = keypoints, weights, edges, winners, [11, 7], [2.0], deterministic
    for strided in (
        dense.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([dense, dense], dim=-1)[..., 0],
        torch.tensor(0.7).expand(2, 11, 7),
        dense[:, :1].expand(-1, 11, -1),
    ):
        assert not strided.is_contiguous()
        got = torch.ops.bkind3d_triton.rasterize_edges_backward([strided], *arguments)
        expected = torch.ops.bkind3d_triton.rasterize_edges_backward([strided.contiguous()], *arguments)
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("what", ["keypoint", "weight", "undrawn"])
def test_nan_is_seen_in_map_and_gradient(what: str, deterministic: bool) -> None:
    """Of the first edge that has it, also if that is not drawn."""
    keypoints, weights, edges = scene(2, 4)
    weights = weights.abs() + 0.1
    (keypoints[0, 2] if what != "weight" else weights[0, 4:5])[:1] = torch.nan
    if what == "undrawn":
        weights[0, 1] = -1.0
    maps, (winner,) = forward(keypoints, weights, edges, [(16, 20)], [1.0])
    assert maps[0][0].isnan().all()
    assert maps[0][1].isfinite().all()
    assert (winner[0] == (4 if what == "weight" else 1)).all()
    grads = torch.ops.bkind3d_triton.rasterize_edges_backward(
        [torch.ones_like(maps[0])],
        *on_device(keypoints, weights, edges),
        winner.flatten(),
        [16, 20],
        [1.0],
        deterministic,
    )
    assert grads[0][0].isnan().any()
    assert grads[0][1].isfinite().all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_indices_out_of_range_touch_no_memory(deterministic: bool) -> None:
    """Not checked on a GPU: such an edge is NaN, and such a winner has no gradient."""
    keypoints, weights = torch.rand(2, 3, 2), torch.ones(2, 2)
    edges = torch.tensor([[0, 1], [2, 2**40]])
    maps, winners = torch.ops.bkind3d_triton.rasterize_edges(keypoints, weights, edges, [3, 4], [1.0])
    assert maps[0].isnan().all()
    assert (winners == 1).all()
    winners = torch.tensor([0, 2, 32000, -1, -32000, 2]).repeat(4).to(torch.int16)
    edges[1, 1] = -7
    arguments = [torch.ones(2, 3, 4)], keypoints, weights, edges, winners, [3, 4], [1.0], deterministic
    grad_keypoints, grad_weights = torch.ops.bkind3d_triton.rasterize_edges_backward(*arguments)
    assert grad_keypoints.isfinite().all()
    assert (grad_weights[:, 0] > 0).all()
    assert (grad_weights[:, 1] == 0).all()


def test_saved_for_backward_are_inputs_and_winners() -> None:
    keypoints, weights, _ = on_device(*scene(2, 5))
    with saved_elements() as kept:
        draw(keypoints.requires_grad_(), weights.requires_grad_(), (16, 20), 1.0)
    assert sorted(kept) == sorted([keypoints.numel(), weights.numel(), 2 * 10, 2 * 16 * 20])


def test_derivatives_that_there_are_not_raise() -> None:
    keypoints, weights, _ = on_device(*scene(1, 3, dtype=torch.float64))
    image = draw(keypoints.requires_grad_(), weights, (6, 6), 2.0)
    (gradient,) = torch.autograd.grad(image.sum(), keypoints, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda k: draw(k, weights, (6, 6), 2.0), (keypoints,), (torch.ones_like(keypoints),))


@pytest.mark.parametrize("layout", ["contiguous", "strided", "expanded"])
def test_opcheck(layout: str) -> None:
    keypoints, weights, edges = on_device(*sample(layout))
    inputs = keypoints.detach().requires_grad_(), weights.detach().requires_grad_()
    torch.library.opcheck(torch.ops.bkind3d_triton.rasterize_edges, (*inputs, edges, [6, 7, 5, 3], [1.0, 2.0]))


@pytest.mark.parametrize("layout", ["contiguous", "strided", "expanded"])
def test_opcheck_of_backward(layout: str) -> None:
    keypoints, weights, edges = on_device(*sample(layout))
    maps, winners = torch.ops.bkind3d_triton.rasterize_edges(keypoints, weights, edges, [6, 7, 5, 3], [1.0, 2.0])
    grads = [torch.randn_like(m) for m in maps]
    if layout == "strided":
        grads = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads]
    if layout == "expanded":
        grads = [torch.ones(()).expand(m.shape) for m in maps]
    arguments = grads, keypoints, weights, edges, winners, [6, 7, 5, 3], [1.0, 2.0], False
    torch.library.opcheck(torch.ops.bkind3d_triton.rasterize_edges_backward, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keypoints": torch.zeros(2, 4, 3)}, r"keypoints \(2, 4, 3\): expected"),
        ({"keypoints": torch.zeros(2, 4, 2).half()}, "keypoints .*: expected"),
        ({"weights": torch.ones(2, 5)}, r"weights \(2, 5\): expected"),
        ({"weights": torch.ones(2, 6).double()}, "weights .*: expected"),
        ({"edges": all_pairs(4).int()}, r"edges \(6, 2\): expected"),
        ({"sizes": [4, 4, 4]}, "sizes .*: expected"),
        ({"sizes": [0, 4]}, "sizes .* and sigmas .*: expected positive numbers"),
        ({"sizes": [1, 2**22]}, "sides below"),
        ({"sigmas": [float("nan")]}, "sizes .* and sigmas .*: expected positive numbers"),
    ],
)
def test_the_operator_checks_what_it_relies_on(changes: dict, message: str) -> None:
    arguments = {
        "keypoints": torch.zeros(2, 4, 2),
        "weights": torch.ones(2, 6),
        "edges": all_pairs(4),
        "sizes": [4, 4],
        "sigmas": [1.0],
    } | changes
    arguments = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        torch.ops.bkind3d_triton.rasterize_edges(*arguments.values())


@pytest.mark.parametrize(
    ("grads", "winners", "message"),
    [
        ([], torch.zeros(32).short(), "grad_maps"),
        ([torch.ones(2, 4, 5)], torch.zeros(32).short(), "grad_maps"),
        ([torch.ones(2, 4, 4).double()], torch.zeros(32).short(), "grad_maps"),
        ([torch.ones(2, 4, 4)], torch.zeros(31).short(), "winners"),
        ([torch.ones(2, 4, 4)], torch.zeros(32).int(), "winners"),
        ([torch.ones(2, 4, 4)], torch.zeros(64).short()[::2], "winners"),
    ],
)
def test_backward_checks_what_it_relies_on(grads: list[Tensor], winners: Tensor, message: str) -> None:
    arguments = [torch.zeros(2, 4, 2), torch.ones(2, 6), all_pairs(4).to(DEVICE), winners.to(DEVICE)]
    with pytest.raises(ValueError, match=message):
        torch.ops.bkind3d_triton.rasterize_edges_backward(on_device(*grads), *arguments, [4, 4], [1.0], False)


def test_half_precision_is_refused_with_the_reason() -> None:
    reasons = {line.backend: line.reason for line in explain("rasterize_edges", device=DEVICE, dtype=torch.bfloat16)}
    assert "torch.bfloat16 is not one of float32, float64" in reasons["triton"]
