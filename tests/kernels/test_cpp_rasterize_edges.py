"""The C++ edge maps beyond what every backend passes: instruction sets, culling, winners, threads, layouts."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import gradients, saved_elements
from torch import Tensor

from bkind3d_kernels import library, rasterize_edges
from bkind3d_kernels.geometry import all_pairs, rescale_points
from bkind3d_kernels.reference.rasterize_edges import squared_distance

pytestmark = pytest.mark.skipif(library.reason("_cpu") is not None, reason=str(library.reason("_cpu")))


def available_sets() -> list[str]:
    best = library.instruction_set()
    return [] if best is None else list(library.INSTRUCTION_SETS[: library.INSTRUCTION_SETS.index(best) + 1])


@pytest.fixture(params=available_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.use_instruction_set(request.param):
        yield request.param


@contextmanager
def no_culling() -> Iterator[None]:
    torch.ops.bkind3d.set_rasterize_edges_culling(False)
    try:
        yield
    finally:
        torch.ops.bkind3d.set_rasterize_edges_culling(True)


def flat(sizes: list[tuple[int, int]]) -> list[int]:
    return [length for size in sizes for length in size]


def forward(keypoints: Tensor, weights: Tensor, edges: Tensor, sizes: list[tuple[int, int]], sigmas: list[float]):
    """Maps, and winners in the shapes of the maps."""
    maps, winners = torch.ops.bkind3d.rasterize_edges(keypoints, weights, edges, flat(sizes), sigmas)
    return maps, [w.view(m.shape) for w, m in zip(winners.split([m.numel() for m in maps]), maps)]


def scene(n=2, k=5, size=(16, 20), seed=0, spread=1.5, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Keypoints, weights of both signs, and edges."""
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([size[1], size[0]], dtype=torch.float64)
    keypoints = extent * (0.5 + spread * (torch.rand(n, k, 2, generator=generator).double() - 0.5))
    weights = torch.rand(n, k * (k - 1) // 2, generator=generator).double() * 1.5 - 0.3
    return keypoints.to(dtype), weights.to(dtype), all_pairs(k)


def adversarial(seed: int, n: int, k: int, size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A scene with coinciding keypoints, some on a pixel and some far away; edges twice; weights of all magnitudes."""
    keypoints, weights, edges = scene(n, k, size, seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 6, (n, k, 1), generator=generator)
    keypoints = torch.where(kind == 1, keypoints.round(), keypoints)
    keypoints = torch.where(kind == 2, keypoints[:, :1], keypoints)
    keypoints = torch.where(kind == 3, 1e4 * (keypoints - keypoints.mean(1, keepdim=True)), keypoints)
    edges = torch.cat([edges, edges.flip(0), edges[:1].repeat(2, 1), torch.zeros(1, 2, dtype=torch.int64)])
    weights = torch.rand(n, len(edges), generator=generator).double() - 0.1
    magnitude = torch.randint(0, 6, weights.shape, generator=generator)
    weights = torch.where(magnitude == 1, 1e-30 * weights, torch.where(magnitude == 2, 1e30 * weights, weights))
    weights = torch.where(magnitude == 3, torch.ones(()).double(), weights)  # ties
    return keypoints.to(dtype), weights.to(dtype), edges


def exact_scores(keypoints: Tensor, weights: Tensor, edges: Tensor, sizes, sigma: float, index: int) -> Tensor:
    """log w - d²/σ² in float64 of every edge at every pixel of map `index`, (N, E, H, W); -inf where w <= 0."""
    h, w = sizes[index]
    points = rescale_points(keypoints.double(), sizes[0], sizes[index])
    y, x = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    a, b = points[:, edges[:, 0], None, None], points[:, edges[:, 1], None, None]
    distance = squared_distance(torch.stack([x, y], dim=-1), a, b)
    logs = torch.where(weights > 0, weights.double(), 0).log()
    return logs[..., None, None] - distance / sigma**2


SIZES = st.sampled_from([1, 2, 3, 7, 8, 9, 13, 16, 17, 31, 33, 40])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3),
    k=st.integers(2, 9),
    sizes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3),
    sigma=st.sampled_from([0.3, 1.0, 3.0, 20.0]),
    seed=st.integers(0, 2**16),
    name=st.sampled_from(available_sets() or ["none"]),
)
def test_float32_against_exact_scores(n, k, sizes, sigma, seed, name) -> None:
    """Values, and winners: at the pixels where they differ, the scores do so by rounding only."""
    keypoints, weights, edges = scene(n, k, sizes[0], seed)
    with library.use_instruction_set(name):
        maps, winners = forward(keypoints, weights, edges, sizes, [sigma] * len(sizes))
    differing = 0
    for index, (image, winner) in enumerate(zip(maps, winners)):
        scores = exact_scores(keypoints, weights, edges, sizes, sigma, index)
        best, expected = scores.max(1)
        torch.testing.assert_close(image.double(), best.exp(), rtol=1e-4, atol=1e-5)
        drawn = winner >= 0
        assert (drawn | (best < -87.3)).all()
        assert (~drawn | (best > -87.4)).all()
        got = scores.gather(1, winner.long().clamp(min=0)[:, None])[:, 0]
        assert ((best - got)[drawn] <= 1e-4 * (1 + best[drawn].abs())).all()
        differing += int((drawn & (winner != expected)).sum())
    assert differing <= 2 + 0.02 * sum(m.numel() for m in maps)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 2),
    k=st.integers(2, 12),
    sizes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=2),
    sigma=st.floats(0.05, 40.0),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    hostile=st.booleans(),
    name=st.sampled_from(available_sets() or ["none"]),
)
def test_culling_changes_no_bit(n, k, sizes, sigma, seed, dtype, hostile, name) -> None:
    scene_ = adversarial(seed, n, k, sizes[0], dtype) if hostile else scene(n, k, sizes[0], seed, dtype=dtype)
    with library.use_instruction_set(name):
        maps, winners = forward(*scene_, sizes, [sigma] * len(sizes))
        with no_culling():
            expected_maps, expected_winners = forward(*scene_, sizes, [sigma] * len(sizes))
    for got, expected in zip(maps + winners, expected_maps + expected_winners):
        assert torch.equal(got, expected)


def test_culling_changes_no_bit_among_nearly_equal_edges(isa: str) -> None:
    """Edges that differ in their last bits, in a wide map: no bound may decide between them."""
    generator = torch.Generator().manual_seed(0)
    for sigma in (0.5, 4.0, 60.0):
        base = torch.tensor([[[3.0, 90.0], [120.0, 31.0]]]) + torch.rand(8, 1, 2, generator=generator)
        keypoints = torch.cat([base + 1e-5 * torch.randn(8, 2, 2, generator=generator) for _ in range(6)], dim=1)
        edges = torch.tensor([[2 * i + a, 2 * j + b] for i in range(6) for j in range(6) for a, b in ((0, 1), (1, 0))])
        weights = 1 + 1e-6 * torch.randn(8, len(edges), generator=generator)
        got = forward(keypoints, weights, edges, [(128, 128)], [sigma])
        with no_culling():
            expected = forward(keypoints, weights, edges, [(128, 128)], [sigma])
        assert torch.equal(got[0][0], expected[0][0])
        assert torch.equal(got[1][0], expected[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_instruction_sets_agree(dtype: torch.dtype) -> None:
    keypoints, weights, _ = scene(3, 8, (33, 41), dtype=dtype)
    run = partial(rasterize_edges, size=[(33, 41), (70, 19)], sigma=[1.5, 3.0], backend="cpp")
    results = []
    for name in available_sets():
        with library.use_instruction_set(name):
            results.append([*run(keypoints, weights), *gradients(run, keypoints, weights)])
    rtol = 1e-4 if dtype == torch.float32 else 1e-12
    for result in results[1:]:
        for a, b in zip(result, results[0]):
            assert float((a - b).norm()) <= rtol * float(b.norm())


def test_gradcheck(isa: str) -> None:
    keypoints, weights, edges = scene(2, 5, (9, 19), dtype=torch.float64)
    weights = weights.abs() + 0.1
    edges = torch.cat([edges, torch.tensor([[3, 3]])])
    weights = torch.cat([weights, weights[:, :1]], 1)
    function = partial(rasterize_edges, size=[(9, 19), (13, 5)], sigma=[1.4, 2.0], edges=edges, backend="cpp")
    assert torch.autograd.gradcheck(function, (keypoints.requires_grad_(), weights.requires_grad_()))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3),
    k=st.integers(2, 7),
    sizes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3),
    sigma=st.sampled_from([0.7, 2.0, 8.0]),
    seed=st.integers(0, 2**16),
    name=st.sampled_from(available_sets() or ["none"]),
)
def test_float64_gradients_are_those_of_the_reference(n, k, sizes, sigma, seed, name) -> None:
    keypoints, weights, _ = scene(n, k, sizes[0], seed, spread=3.0, dtype=torch.float64)
    run = partial(rasterize_edges, size=sizes, sigma=[sigma] * len(sizes))
    with library.use_instruction_set(name):
        got = gradients(partial(run, backend="cpp"), keypoints, weights)
    for a, b in zip(got, gradients(partial(run, backend="reference"), keypoints, weights)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_hostile_gradients_are_finite_and_those_of_the_reference(isa: str) -> None:
    """Without ties, whose gradient may go to either edge once rounding differs: each edge alone."""
    keypoints, _, edges = adversarial(3, 2, 8, (21, 34), torch.float64)
    for edge in edges.unique(dim=0):
        run = partial(rasterize_edges, size=[(21, 34), (9, 9)], sigma=[1.5, 3.0], edges=edge[None])
        weights = torch.full((2, 1), 0.7, dtype=torch.float64)
        got = gradients(partial(run, backend="cpp"), keypoints, weights)
        for a, b in zip(got, gradients(partial(run, backend="reference"), keypoints, weights)):
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("far", [1e4, 1e7, 1e10])
def test_both_ends_far_outside(far: float, isa: str) -> None:
    """A line across the map between ends far away: values and gradients of float32 inputs as those in float64."""
    direction = torch.tensor([0.8, 0.6], dtype=torch.float64)
    ends = torch.stack([-far * direction, 0.7 * far * direction]) + torch.tensor([30.0, 20.0], dtype=torch.float64)
    keypoints = ends[None].float()
    run = partial(rasterize_edges, size=(40, 60), sigma=2.0, backend="cpp")
    image, exact = run(keypoints, torch.ones(1)), run(keypoints.double(), torch.ones(1))
    torch.testing.assert_close(image.double(), exact, rtol=1e-4, atol=1e-5)
    got, expected = (gradients(run, k, torch.ones(1))[0] for k in (keypoints, keypoints.double()))
    assert float((got - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_below_the_smallest_normal_number_nothing_is_drawn(dtype: torch.dtype, isa: str) -> None:
    lowest = {torch.float32: -87.33, torch.float64: -708.0}[dtype]
    keypoints = torch.zeros(1, 2, 2, dtype=dtype)
    (image,), (winner,) = forward(keypoints, torch.ones(1, 1, dtype=dtype), all_pairs(2), [(1, 64)], [1.0])
    score = -(torch.arange(64).double() ** 2)
    assert (winner[0, 0] == torch.where(score >= lowest, 0, -1)).all()
    assert (image[0, 0, score < lowest] == 0).all()
    drawn = score >= lowest
    torch.testing.assert_close(image[0, 0, drawn].double(), score[drawn].exp(), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(
        rasterize_edges(keypoints.requires_grad_(), torch.ones(1, dtype=dtype), (1, 64), 1.0, backend="cpp")[..., 10:]
        .double()
        .sum(),
        keypoints,
    )
    assert bool((gradient == 0).all()) == (dtype == torch.float32)


def test_weights_of_any_magnitude(isa: str) -> None:
    keypoints, _, edges = scene(1, 3, (12, 12))
    keypoints = keypoints.expand(5, -1, -1)
    weights = torch.tensor([1e-37, 1e-20, 1.0, 1e20, 1e37])[:, None].expand(-1, 3)
    (maps,), _ = forward(keypoints, weights, edges, [(12, 12)], [9.0])
    unit = maps[2].double()
    for image, weight in zip(maps, weights[:, 0]):
        near = image > 0
        torch.testing.assert_close(image[near].double() / float(weight), unit[near], rtol=2e-5, atol=0)


def test_more_than_int16_edges(isa: str) -> None:
    keypoints, _, edges = scene(1, 260, (20, 24), spread=0.9)
    assert len(edges) > 2**15
    weights = 1e-3 * (1 + torch.rand(1, len(edges), generator=torch.Generator().manual_seed(0)))  # no ties
    weights[0, -1] = 1.0
    (image,), (winner,) = forward(keypoints, weights, edges, [(20, 24)], [2.0])
    assert winner.dtype == torch.int32
    alone = rasterize_edges(keypoints[:, edges[-1]], torch.ones(1), (20, 24), 2.0, backend="reference")
    torch.testing.assert_close(image, torch.maximum(image, alone))
    assert (winner == len(edges) - 1).any()
    run = partial(rasterize_edges, size=(20, 24), sigma=2.0)
    got, expected = (gradients(partial(run, backend=b), keypoints.double(), weights) for b in ("cpp", "reference"))
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_number_of_threads_changes_no_bit(dtype: torch.dtype, isa: str) -> None:
    keypoints, weights, _ = scene(3, 12, (70, 50), dtype=dtype)
    run = partial(rasterize_edges, size=[(70, 50), (8, 8), (131, 67)], sigma=[2.0, 1.0, 3.0], backend="cpp")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for _ in range(3):
                results.append([*run(keypoints, weights), *gradients(run, keypoints, weights)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(result, results[0]):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("n", "k", "edges"), [(0, 3, 3), (2, 0, 0), (2, 2, 0), (2, 2, 1)])
def test_every_element_is_written(n: int, k: int, edges: int, poisoned: None, isa: str) -> None:
    keypoints, pairs = 5 * torch.rand(n, k, 2), all_pairs(max(k, 2))[:edges]
    weights = torch.rand(n, edges)
    sizes, sigmas = [(7, 9), (1, 1), (17, 3)], [1.0, 0.5, 2.0]
    maps, winners = forward(keypoints, weights, pairs, sizes, sigmas)
    for image, winner, size in zip(maps, winners, sizes):
        assert image.shape == (n, *size)
        assert image.isfinite().all()
        assert ((winner >= -1) & (winner < edges)).all()
    grads = torch.ops.bkind3d.rasterize_edges_backward(
        [torch.ones_like(m) for m in maps],
        keypoints,
        weights,
        pairs,
        torch.cat([w.flatten() for w in winners]),
        flat(sizes),
        sigmas,
        True,
    )
    assert [g.shape for g in grads] == [keypoints.shape, weights.shape]
    assert all(g.isfinite().all() for g in grads)


def test_gradients_of_any_strides(isa: str) -> None:
    keypoints, weights, _ = scene(2, 6, (37, 21))
    keypoints.requires_grad_()
    weights.requires_grad_()
    image = rasterize_edges(keypoints, weights, (37, 21), 2.0, backend="cpp")
    dense = torch.randn(2, 37, 21)
    backward = partial(torch.autograd.grad, image, (keypoints, weights), retain_graph=True)
    for strided in (
        dense.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([dense, dense], dim=-1)[..., 0],
        torch.tensor(0.7).expand(2, 37, 21),
        dense[:, :1].expand(-1, 37, -1),
        dense[:, :, :1].expand(-1, -1, 21),
    ):
        assert not strided.is_contiguous()
        for a, b in zip(backward(strided), backward(strided.contiguous())):
            assert torch.equal(a, b)


def test_one_map_of_several_differentiated(isa: str) -> None:
    """The others get no gradient at all; and maps may be changed in place, since backward does not read them."""
    keypoints, weights, _ = scene(2, 5)
    inputs = keypoints.requires_grad_(), weights.requires_grad_()
    sizes = [(16, 20), (32, 40), (8, 9)]
    maps = rasterize_edges(*inputs, sizes, [1.0, 2.0, 1.5], backend="cpp")
    alone = rasterize_edges(*inputs, [sizes[0], sizes[1]], [1.0, 2.0], backend="cpp")[1]
    maps[1].mul_(2)
    for a, b in zip(torch.autograd.grad(maps[1].sum(), inputs), torch.autograd.grad(2 * alone.sum(), inputs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("what", ["keypoint", "weight"])
def test_nan_is_seen_in_map_and_gradient(what: str, isa: str) -> None:
    keypoints, weights, _ = scene(2, 4)
    (keypoints[0, 2] if what == "keypoint" else weights[0, 4:5])[:1] = torch.nan
    keypoints.requires_grad_()
    image = rasterize_edges(keypoints, weights, (16, 20), 1.0, backend="cpp")
    assert image[0].isnan().all()
    assert image[1].isfinite().all()
    (gradient,) = torch.autograd.grad(image.sum(), keypoints)
    assert gradient[0].isnan().any()
    assert gradient[1].isfinite().all()


def test_saved_for_backward_are_inputs_and_winners() -> None:
    keypoints, weights, _ = scene(2, 5)
    with saved_elements() as kept:
        rasterize_edges(keypoints.requires_grad_(), weights.requires_grad_(), (16, 20), 1.0, backend="cpp")
    assert sorted(kept) == sorted([keypoints.numel(), weights.numel(), 2 * 10, 2 * 16 * 20])


def test_second_derivative_raises() -> None:
    keypoints, weights, _ = scene(1, 3, dtype=torch.float64)
    keypoints.requires_grad_()
    image = rasterize_edges(keypoints, weights, (6, 6), 2.0, backend="cpp")
    (gradient,) = torch.autograd.grad(image.sum(), keypoints, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


SAMPLES = ["contiguous", "strided", "expanded"]


def sample(layout: str) -> tuple[Tensor, Tensor, Tensor]:
    keypoints, weights, edges = scene(2, 4)
    if layout == "strided":
        keypoints = torch.stack([keypoints, keypoints], dim=-1)[..., 0]
        weights = weights.T.contiguous().T
        edges = edges.T.contiguous().T
    if layout == "expanded":
        keypoints, weights = keypoints[:1].expand(2, -1, -1), weights[:1].expand(2, -1)
    return keypoints, weights, edges


@pytest.mark.parametrize("layout", SAMPLES)
def test_opcheck(layout: str) -> None:
    keypoints, weights, edges = sample(layout)
    inputs = keypoints.detach().requires_grad_(), weights.detach().requires_grad_()
    torch.library.opcheck(torch.ops.bkind3d.rasterize_edges, (*inputs, edges, [16, 20, 5, 33], [1.0, 2.0]))


@pytest.mark.parametrize("layout", SAMPLES)
def test_opcheck_of_backward(layout: str) -> None:
    keypoints, weights, edges = sample(layout)
    maps, winners = torch.ops.bkind3d.rasterize_edges(keypoints, weights, edges, [16, 20, 5, 33], [1.0, 2.0])
    grads = [torch.randn_like(m) for m in maps]
    if layout == "strided":
        grads = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads]
    if layout == "expanded":
        grads = [torch.ones(()).expand(m.shape) for m in maps]
    arguments = grads, keypoints, weights, edges, winners, [16, 20, 5, 33], [1.0, 2.0], False
    torch.library.opcheck(torch.ops.bkind3d.rasterize_edges_backward, arguments)


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    keypoints, weights, _ = scene(2, 4)
    run = partial(rasterize_edges, size=[(16, 20), (5, 33)], sigma=[1.0, 2.0], backend="cpp")
    compiled = torch.compile(run, fullgraph=True)
    for a, b in zip(compiled(keypoints, weights), run(keypoints, weights)):
        assert torch.equal(a, b)
    for a, b in zip(gradients(compiled, keypoints, weights), gradients(run, keypoints, weights)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keypoints": torch.zeros(2, 4, 3)}, "keypoints: expected"),
        ({"keypoints": torch.zeros(2, 4, 2).half()}, "keypoints: expected"),
        ({"weights": torch.ones(2, 5)}, "weights: expected"),
        ({"weights": torch.ones(2, 6).double()}, "weights: expected"),
        ({"edges": all_pairs(4) + 1}, "edges: expected keypoint indices 0 to 3, found 4"),
        ({"edges": all_pairs(4).int()}, "edges: expected"),
        ({"sizes": [4, 4, 4]}, "sizes: expected"),
        ({"sizes": [0, 4]}, "sizes and sigmas: expected"),
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
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bkind3d.rasterize_edges(*arguments.values())


@pytest.mark.parametrize("weight", [1e37, 1e-30])
def test_gradient_of_extreme_weights(weight: float) -> None:
    """dL/dw = exp(−d²/σ²) whatever w is: on the segment, 1."""
    keypoints = torch.tensor([[[0.0, 0.0], [3.0, 0.0]]])
    weights = torch.tensor([weight], requires_grad=True)
    rasterize_edges(keypoints, weights, (1, 4), 1.0, backend="cpp").sum().mul(100).backward()
    torch.testing.assert_close(weights.grad, torch.tensor([400.0]))
