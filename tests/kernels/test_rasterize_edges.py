from functools import partial

import numpy as np
import oracle
import pytest
import torch
from cases.rasterize_edges import scene
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import gradients, saved_elements
from torch import Tensor

from bkind3d_kernels import EdgeRasterizer, rasterize_edges
from bkind3d_kernels.geometry import all_pairs, rescale_points
from bkind3d_kernels.reference import rasterize_edges as reference


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 2),
    k=st.integers(2, 4),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    sigma=st.sampled_from([0.3, 1.0, 2.5]),
    shared=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_oracle(n, k, size, sigma, shared, seed) -> None:
    keypoints, weights, _ = scene(n, k, size, seed)
    weights = weights[:1].expand_as(weights) if shared else weights
    expected = oracle.rasterize_edges(keypoints.numpy(), weights.numpy(), all_pairs(k).numpy(), size, sigma)
    got = rasterize_edges(keypoints, weights[0] if shared else weights, size, sigma)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("edges", [None, torch.tensor([[2, 0], [1, 3], [3, 3]])])
def test_gradcheck(shared: bool, edges: Tensor | None, backend: str) -> None:
    keypoints, _, _ = scene(n=2, k=4, size=(4, 5), spread=2.5)
    count = 6 if edges is None else len(edges)
    weights = torch.rand(*([] if shared else [2]), count, generator=torch.Generator().manual_seed(1)).double() + 0.2
    weights[..., 1] = -0.5

    def function(keypoints: Tensor, weights: Tensor) -> list[Tensor]:
        sizes, sigmas = [(4, 5), (8, 3)], [1.2, 2.0]
        return rasterize_edges(keypoints, weights, sizes, sigmas, edges=edges, backend=backend)

    inputs = keypoints.requires_grad_(), weights.requires_grad_()
    # Interpreted, only the product with a random vector: the whole Jacobian would take minutes.
    assert torch.autograd.gradcheck(function, inputs, fast_mode=backend == "triton")
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_profile_of_one_edge(backend: str) -> None:
    keypoints = torch.tensor([[[2.0, 3.0], [6.0, 3.0]]])
    image = rasterize_edges(keypoints, torch.tensor([0.8]), (7, 9), 1.5, backend=backend)[0]
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")
    d2 = (y - 3) ** 2 + (x - x.clamp(2, 6)) ** 2
    torch.testing.assert_close(image, 0.8 * torch.exp(-d2 / 1.5**2))


def test_first_coordinate_is_x(backend: str) -> None:
    point = torch.tensor([[[5.0, 1.0], [5.0, 1.0]]])
    image = rasterize_edges(point, torch.ones(1), (4, 8), 0.5, backend=backend)[0]
    assert image.argmax().item() == 1 * 8 + 5


def test_several_sizes_follow_the_pixel_centre_rule(backend: str) -> None:
    keypoints, weights, _ = scene(size=(8, 8))
    sizes, sigmas = [(8, 8), (16, 12), (33, 20), (4, 32)], [1.0, 1.5, 2.0, 2.0]
    maps = rasterize_edges(keypoints, weights, sizes, sigmas, backend=backend)
    for image, size, sigma in zip(maps, sizes, sigmas):
        alone = rasterize_edges(rescale_points(keypoints, (8, 8), size), weights, size, sigma, backend=backend)
        assert image.shape == (2, *size)
        torch.testing.assert_close(image, alone, rtol=1e-10, atol=1e-12)


def test_arbitrary_edges(backend: str) -> None:
    keypoints, _, _ = scene(k=5)
    pairs = all_pairs(5)
    chosen = torch.tensor([7, 2])
    full = torch.zeros(10, dtype=torch.float64)
    full[chosen] = torch.tensor([0.9, 0.4], dtype=torch.float64)
    expected = rasterize_edges(keypoints, full, (7, 9), 1.0, backend=backend)
    weights = torch.tensor([0.9, 0.4], dtype=torch.float64)
    got = rasterize_edges(keypoints, weights, (7, 9), 1.0, edges=pairs[chosen].flip(1), backend=backend)
    torch.testing.assert_close(got, expected)


def test_nothing_drawn_is_zero_with_zero_gradients(backend: str) -> None:
    keypoints, _, _ = scene()
    for weights in (torch.zeros(6).double(), -torch.ones(6).double()):
        assert not rasterize_edges(keypoints, weights, (7, 9), 1.0, backend=backend).any()
        run = partial(rasterize_edges, size=(7, 9), sigma=1.0, backend=backend)
        assert all(not g.any() for g in gradients(run, keypoints, weights))


@pytest.mark.parametrize(("n", "k"), [(0, 3), (2, 1), (2, 0)])
def test_empty(n: int, k: int, backend: str) -> None:
    keypoints = torch.zeros(n, k, 2, requires_grad=True)
    weights = torch.ones(k * (k - 1) // 2, requires_grad=True)
    maps = rasterize_edges(keypoints, weights, [(3, 4), (5, 6)], [1.0, 1.0], backend=backend)
    assert [tuple(m.shape) for m in maps] == [(n, 3, 4), (n, 5, 6)]
    assert not any(m.any() for m in maps)
    sum(m.sum() for m in maps).backward()
    assert keypoints.grad is not None
    assert weights.grad is not None


def test_ties_go_to_the_lowest_index(backend: str) -> None:
    """Twice the same edge, then its reverse: the first gets the gradient. The same where edges share an end."""
    keypoints = torch.tensor([[[1.2, 1.1], [4.7, 3.9], [1.2, 1.1]]])
    edges = torch.tensor([[0, 1], [0, 1], [2, 1]])
    weights = torch.ones(3, requires_grad=True)
    rasterize_edges(keypoints, weights, (6, 7), 1.0, edges=edges, backend=backend).sum().backward()
    assert weights.grad is not None
    assert weights.grad[0] > 1
    assert weights.grad[1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-12, 1e-8, 1e-5, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_short_segments_are_points_with_finite_gradients(length: float, dtype: torch.dtype, backend: str) -> None:
    # Around the origin, where such lengths are representable; the map's first pixel lies on the segment.
    keypoints = torch.tensor([[[0.0, 0.0], [length, -length]]], dtype=dtype, requires_grad=True)
    weights = torch.ones(1, dtype=dtype, requires_grad=True)
    image = rasterize_edges(keypoints, weights, (4, 5), 1.5, backend=backend)
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    torch.testing.assert_close(image[0], torch.exp(-(x**2 + y**2) / 2.25).to(dtype), atol=2 * length + 1e-6, rtol=0)
    image.sum().backward()
    assert keypoints.grad is not None
    assert keypoints.grad.isfinite().all()
    # Pushing both ends along x raises the map as much as moving one point would.
    moved = (2 * x / 2.25 * torch.exp(-(x**2 + y**2) / 2.25)).sum()
    assert keypoints.grad[0, :, 0].sum().item() == pytest.approx(float(moved), rel=1e-2)


def test_far_keypoints_keep_their_precision_and_gradient(backend: str) -> None:
    """An end at 1e5 pixels: float32 still draws the segment near the other end to 1e-4."""
    keypoints = torch.tensor([[[20.25, 11.5], [1e5, 3e4]], [[-3e4, 1e5], [20.25, 11.5]]])
    run = partial(rasterize_edges, size=(24, 32), sigma=1.5, backend=backend)
    weights = torch.ones(1)
    torch.testing.assert_close(run(keypoints, weights).double(), run(keypoints.double(), weights), rtol=0, atol=1e-4)
    gradient, _ = gradients(run, keypoints, weights)
    exact, _ = gradients(run, keypoints.double(), weights)
    assert gradient.isfinite().all()
    assert (gradient != 0).all()
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-2, atol=1e-4)


def test_a_point_just_outside_is_pulled_in(backend: str) -> None:
    keypoints = torch.tensor([[[-2.0, 3.0], [-2.0, 3.0]]], requires_grad=True)
    rasterize_edges(keypoints, torch.ones(1), (7, 7), 2.0, backend=backend).sum().backward()
    assert keypoints.grad is not None
    assert (keypoints.grad[..., 0].sum() > 0.1).all()


def test_nan_keypoints_are_seen(backend: str) -> None:
    keypoints, weights, _ = scene(n=2)
    keypoints[0, 2, 0] = torch.nan
    image = rasterize_edges(keypoints, weights.abs(), (7, 9), 1.0, backend=backend)
    assert image[0].isnan().all()
    assert image[1].isfinite().all()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_against_float64(weight_dtype: torch.dtype, backend: str) -> None:
    keypoints, weights, _ = scene(n=3, k=6, size=(24, 20))
    weights = weights.to(weight_dtype)
    run = partial(rasterize_edges, size=[(24, 20), (48, 64)], sigma=[1.0, 1.7], backend=backend)
    for a, b in zip(run(keypoints.float(), weights), run(keypoints, weights.double())):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    got, exact = gradients(run, keypoints.float(), weights), gradients(run, keypoints, weights.double())
    assert got[1].dtype == weight_dtype
    for a, b, eps in zip(got, exact, (1e-3, max(1e-3, torch.finfo(weight_dtype).eps))):
        assert float((a.double() - b).norm() / b.norm()) < eps


def test_every_element_is_written(backend: str, poisoned: None) -> None:
    keypoints, weights, _ = scene()
    run = partial(rasterize_edges, size=[(7, 9), (3, 5)], sigma=[1.0, 1.0], backend=backend)
    assert all(m.isfinite().all() for m in run(keypoints, weights))
    assert all(g.isfinite().all() for g in gradients(run, keypoints, weights))


def test_strides(backend: str) -> None:
    keypoints, weights, _ = scene()
    run = partial(rasterize_edges, size=(7, 9), sigma=1.0, backend=backend)
    strided = torch.stack([keypoints, keypoints], dim=-1)[..., 0]
    transposed = weights.T.contiguous().T
    assert strided.stride() != keypoints.stride()
    assert transposed.stride() != weights.stride()
    assert torch.equal(run(strided, transposed), run(keypoints, weights))


@pytest.mark.parametrize("elements", [1, 64, 10**9])
def test_chunks_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keypoints, weights, _ = scene(k=6)
    run = partial(rasterize_edges, size=(7, 9), sigma=1.0, backend="reference")
    expected = (run(keypoints, weights), *gradients(run, keypoints, weights))
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", elements)
    for a, b in zip((run(keypoints, weights), *gradients(run, keypoints, weights)), expected):
        assert torch.equal(a, b)


def test_nothing_of_size_edges_times_pixels_is_kept() -> None:
    keypoints = (32 * torch.rand(2, 30, 2)).requires_grad_()
    weights = torch.rand(435, requires_grad=True)
    with saved_elements() as kept:
        rasterize_edges(keypoints, weights, (32, 32), 1.0, backend="reference")
    assert kept
    assert sum(kept) < 40 * 2 * 32 * 32  # of 435 edges


def test_module_is_the_function(backend: str) -> None:
    keypoints, weights, _ = scene()
    edges = torch.tensor([[0, 1], [2, 3]])
    module = EdgeRasterizer([(7, 9), (14, 18)], [1.0, 2.0], edges=edges, backend=backend)
    expected = rasterize_edges(keypoints, weights[:, :2], [(7, 9), (14, 18)], [1.0, 2.0], edges=edges, backend=backend)
    for a, b in zip(module(keypoints, weights[:, :2]), expected):
        assert torch.equal(a, b)
    assert "size=[(7, 9), (14, 18)], sigma=[1.0, 2.0], edges=(2, 2)" in repr(module)
    assert not module.state_dict()
    assert module.to("meta").edges.device.type == "meta"


KEYPOINTS, WEIGHTS = torch.zeros(2, 4, 2), torch.ones(6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keypoints": KEYPOINTS[0]}, r"keypoints \(4, 2\): expected \(N, K, 2\)"),
        ({"keypoints": torch.zeros(2, 4, 3)}, r"keypoints \(2, 4, 3\): expected \(N, K, 2\)$"),
        ({"keypoints": KEYPOINTS.bfloat16()}, r"keypoints \(2, 4, 2\): expected .*, got torch.bfloat16"),
        ({"weights": WEIGHTS[:5]}, r"weights \(5,\): expected \(6,\) or \(2, 6\), a weight for each edge"),
        ({"weights": torch.ones(3, 6)}, r"weights \(3, 6\): expected \(6,\) or \(2, 6\), a"),
        ({"weights": WEIGHTS.long()}, r"weights \(6,\): expected float32, .*, got torch.int64"),
        ({"weights": WEIGHTS.to("meta")}, r"weights \(6,\): expected device cpu as keypoints has, got meta"),
        ({"size": (8, 0)}, r"size \(8, 0\): expected \(H, W\) of at least 1, or a sequence of them"),
        ({"size": 8}, r"size 8: expected \(H, W\)"),
        ({"size": ()}, r"size \(\): expected \(H, W\)"),
        ({"size": (8, 8, 8)}, r"size \(8, 8, 8\): expected \(H, W\)"),
        ({"size": [(8, 8), (4,)]}, r"size \[\(8, 8\), \(4,\)\]: expected \(H, W\)"),
        ({"size": (8.0, 8.0)}, r"size \(8\.0, 8\.0\): expected \(H, W\)"),
        ({"sigma": 0.0}, r"sigma 0\.0: expected a finite number above 0"),
        ({"sigma": float("inf")}, "sigma inf: expected a finite number above 0"),
        ({"sigma": torch.tensor(-1.0)}, r"sigma -1\.0: expected a finite number above 0"),
        ({"sigma": torch.ones(2)}, r"sigma \(2,\), torch.float32: expected a number above 0 or a floating tensor \(\)"),
        ({"sigma": torch.tensor(1.0, requires_grad=True)}, "sigma: no gradient goes to it; expected a number"),
        ({"sigma": [1.0]}, r"sigma \[1\.0\]: expected a finite number above 0"),
        ({"size": [(8, 8), (4, 4)]}, r"sigma 1\.0: expected a sequence of 2 numbers, one for each size"),
        ({"size": [(8, 8)], "sigma": [1.0, 2.0]}, r"sigma \[1\.0, 2\.0\]: expected a sequence of 1 numbers"),
        ({"edges": torch.zeros(6, 3).long()}, r"edges \(6, 3\): expected \(E, 2\)$"),
        ({"edges": torch.zeros(6, 2)}, r"edges \(6, 2\): expected int64, got torch.float32"),
        ({"edges": [(0, 1), (2, 4)]}, r"edges \(2, 2\): expected keypoint indices 0 to 3, found 0 to 4"),
        ({"edges": all_pairs(4) + 1}, r"edges \(6, 2\): expected keypoint indices 0 to 3, found 1 to 4"),
        ({"edges": all_pairs(4) - 1}, r"edges \(6, 2\): expected keypoint indices 0 to 3, found -1 to 2"),
        ({"edges": all_pairs(4).to("meta")}, r"edges \(6, 2\): expected device cpu as keypoints has, got meta"),
        ({"backend": "cupy"}, "backend 'cupy': expected one of auto"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    arguments = {"keypoints": KEYPOINTS, "weights": WEIGHTS, "size": (8, 8), "sigma": 1.0} | changes
    with pytest.raises(ValueError, match=message) as caught:
        rasterize_edges(**arguments)
    assert "\n" not in str(caught.value)
    if changes.keys() <= {"size", "sigma"}:
        with pytest.raises(ValueError, match=message):
            EdgeRasterizer(arguments["size"], arguments["sigma"])


@pytest.mark.parametrize("name", ["keypoints", "weights", "edges"])
def test_wrong_types_are_named(name: str) -> None:
    arguments = {"keypoints": KEYPOINTS, "weights": WEIGHTS, "size": (8, 8), "sigma": 1.0, name: [1]}
    with pytest.raises(TypeError, match=f"{name}: expected a tensor"):
        rasterize_edges(**arguments)


def test_edges_may_be_a_list_of_pairs_and_sigma_a_tensor() -> None:
    keypoints, pairs = 6 * torch.rand(2, 4, 2), [(0, 1), [2, 3]]
    run = partial(rasterize_edges, keypoints, torch.ones(2), (5, 6))
    expected = run(1.5, edges=torch.tensor(pairs))
    assert expected.max() > 0.1
    assert torch.equal(run(torch.tensor(1.5), edges=pairs), expected)
    module = EdgeRasterizer((5, 6), 1.5, edges=pairs)
    assert torch.equal(module(keypoints, torch.ones(2)), expected)
    for wrong in ([(0, 1, 2)], [0, 1], [(0, 1.5)]):
        with pytest.raises(TypeError, match=r"edges: expected a tensor \(E, 2\) or a list of index pairs, got"):
            run(1.5, edges=wrong)
    assert not rasterize_edges(keypoints, torch.ones(0), (5, 6), 1.5, edges=[]).any()
