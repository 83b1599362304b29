"""The CUDA kernels of rasterize_edges, emulated on the CPU: what the tests of every backend do not reach."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import gradients
from native import emulation
from test_cpp_rasterize_edges import adversarial, exact_scores, flat, scene
from torch import Tensor

from bkind3d_kernels.geometry import all_pairs, rescale_points
from bkind3d_kernels.reference import rasterize_edges as reference

pytestmark = pytest.mark.skipif(emulation.MISSING is not None, reason=str(emulation.MISSING))

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    emulation.load()


@contextmanager
def no_culling() -> Iterator[None]:
    library = emulation.load()
    library.rasterize_edges_culling(0)
    try:
        yield
    finally:
        library.rasterize_edges_culling(1)


def forward(keypoints: Tensor, weights: Tensor, edges: Tensor, sizes: list[tuple[int, int]], sigmas: list[float]):
    """Maps, and winners in the shapes of the maps."""
    maps, winners = torch.ops.bkind3d_emulated.rasterize_edges(keypoints, weights, edges, flat(sizes), sigmas)
    return maps, [w.view(m.shape) for w, m in zip(winners.split([m.numel() for m in maps]), maps)]


def backward(grads: list[Tensor], inputs: tuple[Tensor, ...], winners: list[Tensor], sizes, sigmas) -> tuple:
    joined = torch.cat([w.flatten() for w in winners])
    run = torch.ops.bkind3d_emulated.rasterize_edges_backward
    return run(grads, *inputs, joined, flat(sizes), sigmas, False)


def maps_of(keypoints: Tensor, weights: Tensor, *, edges: Tensor, sizes, sigmas) -> list[Tensor]:
    return emulation.backend("rasterize_edges").run(keypoints, weights, edges, sizes, sigmas)


def reference_maps(keypoints: Tensor, weights: Tensor, *, edges: Tensor, sizes, sigmas) -> list[Tensor]:
    return reference.run(keypoints, weights, edges, sizes, sigmas)


def random_grads(maps: list[Tensor], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m.shape, generator=generator, dtype=torch.float64).to(m.dtype) for m in maps]


# ---- against the reference in float64 ----

SIZES = st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3),
    k=st.integers(2, 9),
    sizes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3),
    sigma=st.sampled_from([0.3, 1.0, 3.0, 20.0]),
    seed=st.integers(0, 2**16),
)
def test_float32_against_exact_scores(n, k, sizes, sigma, seed) -> None:
    """Values, and winners: at the pixels where they differ, the scores do so by rounding only."""
    keypoints, weights, edges = scene(n, k, sizes[0], seed)
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


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 3),
    k=st.integers(2, 7),
    sizes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3),
    sigma=st.sampled_from([0.7, 2.0, 8.0]),
    seed=st.integers(0, 2**16),
)
def test_float64_is_the_reference(n, k, sizes, sigma, seed) -> None:
    keypoints, weights, edges = scene(n, k, sizes[0], seed, spread=3.0, dtype=torch.float64)
    options = {"edges": edges, "sizes": sizes, "sigmas": [sigma] * len(sizes)}
    for a, b in zip(maps_of(keypoints, weights, **options), reference_maps(keypoints, weights, **options)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    got = gradients(partial(maps_of, **options), keypoints, weights)
    for a, b in zip(got, gradients(partial(reference_maps, **options), keypoints, weights)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("count", [16, 17, 35])
def test_more_maps_than_one_launch_takes(count: int) -> None:
    keypoints, weights, edges = scene(2, 5, (9, 11), dtype=torch.float64)
    sizes = [(9, 11), *((1 + 5 * i % 37, 1 + 7 * i % 41) for i in range(count - 1))]
    options = {"edges": edges, "sizes": sizes, "sigmas": [1.0 + 0.1 * i for i in range(count)]}
    run, exact = partial(maps_of, **options), partial(reference_maps, **options)
    for a, b in zip(run(keypoints, weights), exact(keypoints, weights)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(gradients(run, keypoints, weights), gradients(exact, keypoints, weights)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_gradcheck() -> None:
    keypoints, weights, edges = scene(2, 5, (9, 19), dtype=torch.float64)
    weights = torch.cat([weights.abs() + 0.1, weights[:, :1].abs() + 0.2], 1)
    edges = torch.cat([edges, torch.tensor([[3, 3]])])
    function = partial(maps_of, edges=edges, sizes=[(9, 19), (13, 5)], sigmas=[1.4, 2.0])
    assert torch.autograd.gradcheck(function, (keypoints.requires_grad_(), weights.requires_grad_()))


def test_float32_gradients() -> None:
    keypoints, weights, edges = scene(2, 9, (40, 33))
    options = {"edges": edges, "sizes": [(40, 33), (17, 70)], "sigmas": [1.5, 3.0]}
    inputs = keypoints, weights, edges
    maps, winners = forward(*inputs, options["sizes"], options["sigmas"])
    grads = random_grads(maps)
    got = backward(grads, inputs, winners, options["sizes"], options["sigmas"])
    exact = [x.double().requires_grad_() for x in (keypoints, weights)]
    expected = torch.autograd.grad(
        sum((m * g).sum() for m, g in zip(reference_maps(*exact, **options), grads)),
        exact,
    )
    for a, b in zip(got, expected):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())


# ---- culling, rounds, order: not a bit ----


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 2),
    k=st.integers(2, 12),
    sizes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=2),
    sigma=st.floats(0.05, 40.0),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(DTYPES),
    hostile=st.booleans(),
)
def test_culling_changes_no_bit(n, k, sizes, sigma, seed, dtype, hostile) -> None:
    scene_ = adversarial(seed, n, k, sizes[0], dtype) if hostile else scene(n, k, sizes[0], seed, dtype=dtype)
    maps, winners = forward(*scene_, sizes, [sigma] * len(sizes))
    with no_culling():
        expected_maps, expected_winners = forward(*scene_, sizes, [sigma] * len(sizes))
    for got, expected in zip(maps + winners, expected_maps + expected_winners):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("sigma", [0.5, 4.0, 60.0])
def test_culling_changes_no_bit_among_nearly_equal_edges(sigma: float) -> None:
    """Edges that differ in their last bits, in a wide map: no bound may decide between them."""
    generator = torch.Generator().manual_seed(0)
    base = torch.tensor([[[3.0, 60.0], [90.0, 21.0]]]) + torch.rand(2, 1, 2, generator=generator)
    keypoints = torch.cat([base + 1e-5 * torch.randn(2, 2, 2, generator=generator) for _ in range(6)], dim=1)
    edges = torch.tensor([[2 * i + a, 2 * j + b] for i in range(6) for j in range(6) for a, b in ((0, 1), (1, 0))])
    weights = 1 + 1e-6 * torch.randn(2, len(edges), generator=generator)
    got = forward(keypoints, weights, edges, [(96, 96)], [sigma])
    with no_culling():
        expected = forward(keypoints, weights, edges, [(96, 96)], [sigma])
    assert torch.equal(got[0][0], expected[0][0])
    assert torch.equal(got[1][0], expected[1][0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 127, 128, 129, 255, 256, 257, 700])
def test_rounds(count: int, dtype: torch.dtype) -> None:
    """Without culling a block lists every edge: as many rounds as it takes, and ties across them."""
    keypoints, _, _ = scene(1, 30, (19, 21), dtype=dtype)
    generator = torch.Generator().manual_seed(count)
    edges = torch.randint(0, 30, (count, 2), generator=generator)
    edges[count // 2 :] = edges[: count - count // 2].clone()  # twice the same: a tie goes to the first
    weights = torch.ones(1, count, dtype=dtype)
    with no_culling():
        (image,), (winner,) = forward(keypoints, weights, edges, [(19, 21)], [1.7])
    scores = exact_scores(keypoints, weights, edges, [(19, 21)], 1.7, 0)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(image.double(), scores.amax(1).exp(), rtol=tolerance, atol=tolerance)
    same = (edges[None] == edges[:, None]).all(-1)
    first = same.int().argmax(1)
    drawn = winner[winner >= 0].long()
    assert torch.equal(first[drawn], drawn)


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_blocks_and_threads_changes_no_bit(dtype: torch.dtype) -> None:
    keypoints, weights, edges = scene(3, 12, (70, 50), dtype=dtype)
    sizes, sigmas = [(70, 50), (8, 8), (33, 67)], [2.0, 1.0, 3.0]
    results = []
    for descending in (False, True, False):
        with emulation.order(descending=descending):
            maps, winners = forward(keypoints, weights, edges, sizes, sigmas)
            grads = backward(random_grads(maps), (keypoints, weights, edges), winners, sizes, sigmas)
            results.append([*maps, *winners, *grads])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_ties_and_zero_length() -> None:
    """A point, twice; the same segment both ways: the first of them wins everywhere."""
    keypoints = torch.tensor([[[4.0, 5.0], [4.0, 5.0], [20.5, 17.0], [30.0, 3.0]]])
    for pairs, points in (([[0, 1], [1, 0], [0, 0]], True), ([[2, 3], [2, 3], [2, 3]], False)):
        (image,), (winner,) = forward(keypoints, torch.ones(1, 3), torch.tensor(pairs), [(33, 40)], [6.0])
        assert ((winner == 0) | ((winner == -1) & (image == 0))).all()
        assert image.max() == 1 or not points


@pytest.mark.parametrize("count", [2, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_between_edges_that_end_in_a_tile_and_edges_that_do_not(count: int, dtype: torch.dtype) -> None:
    """On one line: where both are, the first of them wins, be it the long or the short one. No number is rounded."""
    keypoints = torch.tensor([[[3.0, 5.0], [19.0, 5.0], [-40.0, 5.0], [88.0, 5.0]]], dtype=dtype)
    for long in (0, 1):
        edges = torch.tensor([[0, 1], [2, 3]]).roll(long, 0).repeat(count // 2, 1)
        with no_culling():
            _, (winner,) = forward(keypoints, torch.ones(1, count, dtype=dtype), edges, [(11, 35)], [4.0])
        assert (winner[..., 3:20] == 0).all()
        assert (winner[..., :3] == 1 - long).all()
        assert (winner[..., 20:] == 1 - long).all()


# ---- special values ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinite_keypoints_and_weights(dtype: torch.dtype) -> None:
    """Such a sample is NaN altogether, from the first edge that is; so are the gradients of that edge."""
    keypoints, weights, edges = scene(6, 5, (20, 37), dtype=dtype)
    keypoints[1, 3, 0] = torch.nan
    keypoints[2, 4, 1] = torch.inf
    weights[3, 6] = torch.nan
    weights[4, 2] = -torch.inf
    weights[5, :] = torch.nan
    inputs = keypoints, weights, edges
    for context in (no_culling, partial(emulation.order, descending=False)):
        with context():
            (image,), (winner,) = forward(*inputs, [(20, 37)], [2.0])
        for sample, edge in ((1, 2), (2, 3), (3, 6), (5, 0)):
            assert image[sample].isnan().all()
            assert (winner[sample] == edge).all()
        assert image[[0, 4]].isfinite().all()
    points, own = backward([torch.ones_like(image)], inputs, [winner], [(20, 37)], [2.0])
    assert points[[0, 4]].isfinite().all()
    assert own[[0, 4]].isfinite().all()
    a, b = edges[2].tolist()
    assert points[1, [a, b]].isnan().all()
    assert points[1].isnan().any(-1).sum() == 2
    assert own[1].isnan().sum() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_weight(dtype: torch.dtype) -> None:
    keypoints = torch.tensor([[[1.0, 1.0], [7.0, 1.0], [3.0, 6.0]]], dtype=dtype)
    weights = torch.tensor([[1.0, torch.inf, 0.5]], dtype=dtype)
    (image,), (winner,) = forward(keypoints, weights, all_pairs(3), [(9, 9)], [1.0])
    assert (image == torch.inf).all()
    assert (winner == 1).all()


def test_an_edge_of_no_keypoint_is_nan() -> None:
    """Indices are not checked on a GPU: nothing outside of the keypoints is read or written."""
    keypoints = torch.rand(2, 3, 2)
    edges = torch.tensor([[0, 1], [1, 3], [-1, 2], [0, 2]])
    (image,), (winner,) = forward(keypoints, torch.ones(2, 4), edges, [(5, 6)], [1.0])
    assert image.isnan().all()
    assert (winner == 1).all()
    points, weights = backward(
        [torch.ones_like(image)], (keypoints, torch.ones(2, 4), edges), [winner], [(5, 6)], [1.0]
    )
    assert points[:, 1].isnan().all()
    assert (points[:, [0, 2]] == 0).all()
    assert weights.isnan().sum() == 2


def test_winners_out_of_range_are_left_out() -> None:
    keypoints, weights, edges = scene(1, 3, (5, 6))
    winner = torch.tensor([-7, 3, 30000] * 10, dtype=torch.int16)
    grads = backward([torch.ones(1, 5, 6)], (keypoints, weights, edges), [winner], [(5, 6)], [1.0])
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("far", [1e4, 1e7])
def test_both_ends_far_outside(far: float) -> None:
    direction = torch.tensor([0.8, 0.6], dtype=torch.float64)
    ends = torch.stack([-far * direction, 0.7 * far * direction]) + torch.tensor([30.0, 20.0], dtype=torch.float64)
    keypoints = ends[None].float()
    run = partial(maps_of, edges=all_pairs(2), sizes=[(40, 60)], sigmas=[2.0])
    (image,), (exact,) = run(keypoints, torch.ones(1, 1)), run(keypoints.double(), torch.ones(1, 1).double())
    assert image.max() > 0.99
    torch.testing.assert_close(image.double(), exact, rtol=1e-4, atol=1e-5)
    got = gradients(run, keypoints, torch.ones(1, 1))[0]
    expected = gradients(run, keypoints.double(), torch.ones(1, 1).double())[0]
    assert float((got - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-30


@pytest.mark.parametrize("dtype", DTYPES)
def test_below_the_smallest_normal_number_nothing_is_drawn(dtype: torch.dtype) -> None:
    lowest = {torch.float32: -87.33, torch.float64: -708.0}[dtype]
    keypoints = torch.zeros(1, 2, 2, dtype=dtype)
    (image,), (winner,) = forward(keypoints, torch.ones(1, 1, dtype=dtype), all_pairs(2), [(1, 64)], [1.0])
    score = -(torch.arange(64).double() ** 2)
    drawn = score >= lowest
    assert (winner[0, 0] == torch.where(drawn, 0, -1)).all()
    assert (image[0, 0, ~drawn] == 0).all()
    torch.testing.assert_close(image[0, 0, drawn].double(), score[drawn].exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("weight", [1e37, 1e-30])
def test_gradient_of_extreme_weights(weight: float) -> None:
    """dL/dw = exp(−d²/σ²) whatever w is: on the segment, 1."""
    keypoints, weights = torch.tensor([[[0.0, 0.0], [3.0, 0.0]]]), torch.tensor([[weight]])
    maps, winners = forward(keypoints, weights, all_pairs(2), [(1, 4)], [1.0])
    own = backward([torch.full_like(maps[0], 100)], (keypoints, weights, all_pairs(2)), winners, [(1, 4)], [1.0])[1]
    torch.testing.assert_close(own, torch.tensor([[400.0]]))


# ---- winners, memory, strides, what is refused ----


def test_more_than_int16_edges() -> None:
    keypoints, _, edges = scene(1, 260, (20, 24), spread=0.9)
    assert len(edges) > 2**15
    weights = 1e-3 * (1 + torch.rand(1, len(edges), generator=torch.Generator().manual_seed(0)))  # no ties
    weights[0, -1] = 1.0
    sizes, sigmas = [(20, 24)], [2.0]
    (image,), (winner,) = forward(keypoints, weights, edges, sizes, sigmas)
    assert winner.dtype == torch.int32
    assert (winner == len(edges) - 1).any()
    scores = exact_scores(keypoints, weights, edges, sizes, 2.0, 0)
    torch.testing.assert_close(image.double(), scores.amax(1).exp(), rtol=1e-4, atol=1e-5)
    points, own = backward([torch.ones_like(image)], (keypoints, weights, edges), [winner], sizes, sigmas)
    value = torch.zeros(len(edges), dtype=torch.float64)
    value.index_add_(0, winner.flatten().long(), image.flatten().double())
    torch.testing.assert_close(own[0].double() * weights[0], value, rtol=1e-4, atol=1e-7)
    assert points.isfinite().all()


def test_winners_are_int16_up_to_their_limit() -> None:
    edges = torch.zeros(2**15, 2, dtype=torch.int64)
    edges[-1] = 1
    keypoints = torch.tensor([[[1e6, 1e6], [1.0, 1.0]]])
    _, (winner,) = forward(keypoints, torch.ones(1, 2**15), edges, [(2, 2)], [1.0])
    assert winner.dtype == torch.int16
    assert (winner == 2**15 - 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "edges"), [(0, 3, 3), (2, 0, 0), (2, 2, 0), (2, 2, 1), (1, 9, 36)])
def test_every_element_is_written(n: int, k: int, edges: int, dtype: torch.dtype, poisoned: None) -> None:
    keypoints, pairs = 5 * torch.rand(n, k, 2, dtype=dtype), all_pairs(max(k, 2))[:edges]
    weights = torch.rand(n, edges, dtype=dtype)
    sizes, sigmas = [(7, 9), (1, 1), (17, 3), (40, 33)], [1.0, 0.5, 2.0, 0.3]
    maps, winners = forward(keypoints, weights, pairs, sizes, sigmas)
    for image, winner, size in zip(maps, winners, sizes):
        assert image.shape == (n, *size)
        assert image.isfinite().all()
        assert ((winner >= -1) & (winner < edges)).all()
    grads = backward([torch.ones_like(m) for m in maps], (keypoints, weights, pairs), winners, sizes, sigmas)
    assert [g.shape for g in grads] == [keypoints.shape, weights.shape]
    assert all(g.isfinite().all() for g in grads)


def test_strides() -> None:
    keypoints, weights, edges = scene(2, 6, (37, 21))
    sizes, sigmas = [(37, 21)], [2.0]
    maps, winners = forward(keypoints, weights, edges, sizes, sigmas)
    strided = (
        torch.stack([keypoints, keypoints], dim=-1)[..., 0],
        weights.T.contiguous().T,
        torch.stack([edges.flip(1), edges], dim=-1).flip(1)[..., 0],
    )
    for got, expected in zip(forward(*strided, sizes, sigmas), (maps, winners)):
        assert torch.equal(got[0], expected[0])
    dense = random_grads(maps)[0]
    for grad in (
        dense.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([dense, dense], dim=-1)[..., 0],
        torch.tensor(0.7).expand(2, 37, 21),
        dense[:, :1].expand(-1, 37, -1),
    ):
        assert not grad.is_contiguous()
        expected = backward([grad.contiguous()], (keypoints, weights, edges), winners, sizes, sigmas)
        for a, b in zip(backward([grad], strided, winners, sizes, sigmas), expected):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype: torch.dtype) -> None:
    keypoints, weights, edges = scene(2, 4, (9, 7), dtype=dtype)
    strided = torch.stack([keypoints, keypoints], dim=-1)[..., 0]
    for inputs in ((keypoints, weights), (strided, weights.T.contiguous().T)):
        arguments = (*(x.detach().requires_grad_() for x in inputs), edges, [9, 7, 5, 5], [1.0, 2.0])
        torch.library.opcheck(torch.ops.bkind3d_emulated.rasterize_edges.default, arguments)


def test_keypoints_are_of_the_first_map() -> None:
    keypoints, weights, edges = scene(1, 4, (10, 12), dtype=torch.float64)
    sizes = [(10, 12), (33, 20)]
    (_, image), _ = forward(keypoints, weights, edges, sizes, [1.0, 2.0])
    moved = rescale_points(keypoints, *sizes)
    (expected,), _ = forward(moved, weights, edges, sizes[1:], [2.0])
    torch.testing.assert_close(image, expected, rtol=1e-10, atol=1e-12)


ARGUMENTS = {
    "keypoints": torch.zeros(2, 4, 2),
    "weights": torch.ones(2, 6),
    "edges": all_pairs(4),
    "sizes": [4, 4],
    "sigmas": [1.0],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keypoints": torch.zeros(2, 4, 3)}, "keypoints: expected"),
        ({"keypoints": torch.zeros(2, 4, 2).half()}, "keypoints: expected"),
        ({"weights": torch.ones(2, 5)}, "weights: expected"),
        ({"weights": torch.ones(1, 6)}, "weights: expected"),
        ({"weights": torch.ones(2, 6).double()}, "weights: expected"),
        ({"edges": all_pairs(4).int()}, "edges: expected"),
        ({"edges": torch.zeros(6, 3).long()}, "edges: expected"),
        ({"sizes": [4, 4, 4]}, "sizes: expected"),
        ({"sizes": [], "sigmas": []}, "sizes: expected"),
        ({"sizes": [0, 4]}, "sizes and sigmas: expected"),
        ({"sigmas": [float("nan")]}, "sizes and sigmas: expected"),
        ({"sizes": [1, 2**22]}, "sizes: expected less than"),
    ],
)
def test_bad_input_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bkind3d_emulated.rasterize_edges(*(ARGUMENTS | changes).values())


@pytest.mark.parametrize(
    ("grads", "winners", "message"),
    [
        ([], torch.zeros(32).short(), "grad_maps: expected"),
        ([torch.zeros(2, 4, 5)], torch.zeros(32).short(), "grad_maps: expected"),
        ([torch.zeros(2, 4, 4).double()], torch.zeros(32).short(), "grad_maps: expected"),
        ([torch.zeros(2, 4, 4)], torch.zeros(31).short(), "winners: expected"),
        ([torch.zeros(2, 4, 4)], torch.zeros(32).int(), "winners: expected"),
        ([torch.zeros(2, 4, 4)], torch.zeros(64).short()[::2], "winners: expected"),
    ],
)
def test_bad_gradients_are_refused(grads: list[Tensor], winners: Tensor, message: str) -> None:
    keypoints, weights, edges, sizes, sigmas = ARGUMENTS.values()
    run = torch.ops.bkind3d_emulated.rasterize_edges_backward
    with pytest.raises(RuntimeError, match=message):
        run(grads, keypoints, weights, edges, winners, sizes, sigmas, False)
