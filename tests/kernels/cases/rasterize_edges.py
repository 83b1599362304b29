"""Scenes, layouts, checks and bad arguments for the tests of rasterize_edges.

A family is named by its namespace: bkind3d (C++), bkind3d_emulated (CUDA) or bkind3d_triton (interpreted, where a call
takes a tenth of a second or more, and scenes are small).
"""

from collections.abc import Callable
from typing import Any

import torch
from measure import gradients
from torch import Tensor

from bkind3d_kernels.geometry import all_pairs, rescale_points
from bkind3d_kernels.reference import rasterize_edges as reference
from bkind3d_kernels.reference.rasterize_edges import squared_distance

DTYPES = [torch.float32, torch.float64]
LOWEST = {torch.float32: -87.33, torch.float64: -708.0}  # scores, about the logarithm of the smallest normal number


def scene(n=2, k=4, size=(7, 9), seed=0, spread=1.5, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Keypoints, some outside the map, weights (N, E) of both signs, and all pairs as edges."""
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([size[1], size[0]], dtype=torch.float64)
    keypoints = extent * (0.5 + spread * (torch.rand(n, k, 2, generator=generator).double() - 0.5))
    weights = torch.rand(n, k * (k - 1) // 2, generator=generator).double() * 1.5 - 0.3
    return keypoints.to(dtype), weights.to(dtype), all_pairs(k)


def with_a_point(n: int, k: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A scene in float64 of positive weights, whose last edge is a keypoint."""
    keypoints, weights, edges = scene(n, k, size)
    weights = torch.cat([weights.abs() + 0.1, weights[:, :1].abs() + 0.2], 1)
    return keypoints, weights, torch.cat([edges, torch.tensor([[k - 1, k - 1]])])


def adversarial(seed: int, n: int, k: int, size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A scene with coinciding keypoints, some on a pixel and some far away; edges twice; weights of all magnitudes."""
    keypoints, weights, edges = scene(n, k, size, seed)
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


def nearly_equal(n: int, ends: list[list[float]]) -> tuple[Tensor, Tensor, Tensor]:
    """Edges that differ in their last bits: no bound may decide between them."""
    generator = torch.Generator().manual_seed(0)
    base = torch.tensor([ends]) + torch.rand(n, 1, 2, generator=generator)
    keypoints = torch.cat([base + 1e-5 * torch.randn(n, 2, 2, generator=generator) for _ in range(6)], dim=1)
    edges = torch.tensor([[2 * i + a, 2 * j + b] for i in range(6) for j in range(6) for a, b in ((0, 1), (1, 0))])
    return keypoints, 1 + 1e-6 * torch.randn(n, len(edges), generator=generator), edges


def flat(sizes: list[tuple[int, int]]) -> list[int]:
    return [length for size in sizes for length in size]


def forward(operators: Any, keypoints: Tensor, weights: Tensor, edges: Tensor, sizes, sigmas: list[float]):
    """Maps, and winners in the shapes of the maps."""
    maps, winners = operators.rasterize_edges(keypoints, weights, edges, flat(sizes), sigmas)
    return maps, [w.view(m.shape) for w, m in zip(winners.split([m.numel() for m in maps]), maps)]


def backward(operators: Any, grads: list[Tensor], inputs: tuple, winners, sizes, sigmas, deterministic=False) -> tuple:
    """Gradients of keypoints and weights, from winners in the shapes of the maps."""
    joined = torch.cat([w.flatten() for w in winners])
    return operators.rasterize_edges_backward(grads, *inputs, joined, flat(sizes), sigmas, deterministic)


def maps_of(operators: Any, edges: Tensor, sizes, sigmas: list[float]) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """The maps alone, of keypoints and weights."""
    return lambda keypoints, weights: operators.rasterize_edges(keypoints, weights, edges, flat(sizes), sigmas)[0]


def reference_maps(edges: Tensor, sizes, sigmas: list[float]) -> Callable[[Tensor, Tensor], list[Tensor]]:
    return lambda keypoints, weights: reference.run(keypoints, weights, edges, sizes, sigmas)


def random_grads(maps: list[Tensor], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m.shape, generator=generator, dtype=torch.float64).to(m) for m in maps]


def exact_scores(keypoints: Tensor, weights: Tensor, edges: Tensor, sizes, sigma: float, index: int) -> Tensor:
    """log w - d²/σ² in float64 of every edge at every pixel of map `index`, (N, E, H, W); -inf where w <= 0."""
    h, w = sizes[index]
    points = rescale_points(keypoints.double(), sizes[0], sizes[index])
    y, x = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    a, b = points[:, edges[:, 0], None, None], points[:, edges[:, 1], None, None]
    distance = squared_distance(torch.stack([x, y], dim=-1).to(points), a, b)
    logs = torch.where(weights > 0, weights.double(), 0).log()
    return logs[..., None, None] - distance / sigma**2


def check_float32(operators: Any, problem: tuple, sizes, sigma: float, lowest=(-87.4, -87.3), share=0.02) -> None:
    """Values, and winners, against exact scores: where winners differ, the scores do so by rounding only.

    Nothing is drawn below a score within ``lowest``; winners differ at two pixels and a share of them at most.
    """
    maps, winners = forward(operators, *problem, sizes, [sigma] * len(sizes))
    differing = 0
    for index, (image, winner) in enumerate(zip(maps, winners)):
        scores = exact_scores(*problem, sizes, sigma, index)
        best, expected = scores.max(1)
        torch.testing.assert_close(image.double(), best.exp(), rtol=1e-4, atol=1e-5)
        drawn = winner >= 0
        assert (drawn | (best < lowest[1])).all()
        assert (~drawn | (best >= lowest[0])).all()
        got = scores.gather(1, winner.long().clamp(min=0)[:, None])[:, 0]
        assert ((best - got)[drawn] <= 1e-4 * (1 + best[drawn].abs())).all()
        differing += int((drawn & (winner != expected)).sum())
    assert differing <= 2 + share * sum(m.numel() for m in maps)


def check_float64(operators: Any, problem: tuple, sizes, sigmas: list[float]) -> None:
    """Maps and gradients are those of the reference."""
    keypoints, weights, edges = problem
    run, exact = maps_of(operators, edges, sizes, sigmas), reference_maps(edges, sizes, sigmas)
    for a, b in zip(run(keypoints, weights), exact(keypoints, weights)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(gradients(run, keypoints, weights), gradients(exact, keypoints, weights)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def check_not_finite(operators: Any, dtype: torch.dtype) -> None:
    """Such a sample is NaN altogether, from the first edge that is; so are the gradients of that edge."""
    keypoints, weights, edges = scene(6, 5, (20, 37), dtype=dtype)
    keypoints[1, 3, 0] = torch.nan
    keypoints[2, 4, 1] = torch.inf
    weights[3, 6] = torch.nan
    weights[4, 2] = -torch.inf
    weights[5, :] = torch.nan
    inputs = keypoints, weights, edges
    (image,), (winner,) = forward(operators, *inputs, [(20, 37)], [2.0])
    for index, edge in ((1, 2), (2, 3), (3, 6), (5, 0)):
        assert image[index].isnan().all()
        assert (winner[index] == edge).all()
    assert image[[0, 4]].isfinite().all()
    points, own = backward(operators, [torch.ones_like(image)], inputs, [winner], [(20, 37)], [2.0])
    assert points[[0, 4]].isfinite().all()
    assert own[[0, 4]].isfinite().all()
    a, b = edges[2].tolist()
    assert points[1, [a, b]].isnan().all()
    assert points[1].isnan().any(-1).sum() == 2
    assert own[1].isnan().sum() == 1


def check_more_than_int16(operators: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Edges without ties, the last of them the strongest by far; the inputs, for more."""
    keypoints, _, edges = scene(1, 260, (20, 24), spread=0.9, dtype=torch.float32)
    assert len(edges) > 2**15
    weights = 1e-3 * (1 + torch.rand(1, len(edges), generator=torch.Generator().manual_seed(0)))
    weights[0, -1] = 1.0
    inputs, options = (keypoints, weights, edges), ([(20, 24)], [2.0])
    (image,), (winner,) = forward(operators, *inputs, *options)
    assert winner.dtype == torch.int32
    assert (winner == len(edges) - 1).any()
    scores = exact_scores(*inputs, options[0], 2.0, 0)
    torch.testing.assert_close(image.double(), scores.amax(1).exp(), rtol=1e-4, atol=1e-5)
    points, own = backward(operators, [torch.ones_like(image)], inputs, [winner], *options)
    value = torch.zeros(len(edges), dtype=torch.float64)
    value.index_add_(0, winner.flatten().long(), image.flatten().double())
    torch.testing.assert_close(own[0].double() * weights[0], value, rtol=1e-4, atol=1e-7)
    assert points.isfinite().all()
    return inputs


# ---- what the tests of the operators take, for each family ----

# (N, K, size) of a scene with a point, sizes, sigmas.
GRADCHECK = {
    "bkind3d": ((2, 5, (9, 19)), [(9, 19), (13, 5)], [1.4, 2.0]),
    "bkind3d_emulated": ((2, 5, (9, 19)), [(9, 19), (13, 5)], [1.4, 2.0]),
    "bkind3d_triton": ((1, 3, (3, 4)), [(3, 4)], [1.4]),
}
GRADIENTS = {
    "bkind3d": ((2, 9, (40, 33)), [(40, 33), (17, 70)], [1.5, 3.0]),
    "bkind3d_emulated": ((2, 9, (40, 33)), [(40, 33), (17, 70)], [1.5, 3.0]),
    "bkind3d_triton": ((1, 5, (16, 40)), [(16, 40)], [2.0]),
}
STRIDES = {
    "bkind3d": (2, 6, (37, 21)),
    "bkind3d_emulated": (2, 6, (37, 21)),
    "bkind3d_triton": (2, 3, (11, 7)),
}
WRITTEN = {
    "bkind3d": ([(7, 9), (1, 1), (17, 3), (40, 33)], [1.0, 0.5, 2.0, 0.3]),
    "bkind3d_emulated": ([(7, 9), (1, 1), (17, 3), (40, 33)], [1.0, 0.5, 2.0, 0.3]),
    "bkind3d_triton": ([(7, 9), (1, 1), (9, 3)], [1.0, 0.5, 2.0]),
}
OPCHECK = {
    "bkind3d": [(16, 20), (5, 33)],
    "bkind3d_emulated": [(9, 7), (5, 5)],
    "bkind3d_triton": [(6, 7), (5, 3)],
}
LAYOUTS = ["contiguous", "strided", "expanded"]


def sample(layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A scene in one of LAYOUTS."""
    keypoints, weights, edges = scene(2, 4, (16, 20), dtype=dtype)
    if layout == "strided":
        keypoints = torch.stack([keypoints, keypoints], dim=-1)[..., 0]
        weights = weights.T.contiguous().T
        edges = edges.T.contiguous().T
    if layout == "expanded":
        keypoints, weights = keypoints[:1].expand(2, -1, -1), weights[:1].expand(2, -1)
    return keypoints, weights, edges


# ---- bad arguments of the operators ----

GOOD = {
    "keypoints": torch.zeros(2, 4, 2),
    "weights": torch.ones(2, 6),
    "edges": all_pairs(4),
    "sizes": [4, 4],
    "sigmas": [1.0],
}
# What every family refuses, and the part of the message that all share: the shape is named by Triton's.
SHAPE = r"( \([\d, ]+\))?: expected "
KEYPOINTS = rf"keypoints{SHAPE}\(N, K, 2\) float32 or float64"
WEIGHTS = rf"weights{SHAPE}\(N, E\) in the dtype of the keypoints"
EDGES = rf"edges{SHAPE}\(E, 2\) int64"
POSITIVE = r"sizes.* and sigmas.*: expected positive numbers"
BAD = [
    ({"keypoints": torch.zeros(2, 4, 3)}, KEYPOINTS),
    ({"keypoints": torch.zeros(2, 4, 2).half()}, KEYPOINTS),
    ({"weights": torch.ones(2, 5)}, WEIGHTS),
    ({"weights": torch.ones(1, 6)}, WEIGHTS),
    ({"weights": torch.ones(2, 6).double()}, WEIGHTS),
    ({"edges": all_pairs(4).int()}, EDGES),
    ({"edges": torch.zeros(6, 3).long()}, EDGES),
    ({"sizes": [4, 4, 4]}, r"sizes.*: expected \(H, W\) for each"),
    ({"sizes": [], "sigmas": []}, r"sizes.*: expected \(H, W\) for each"),
    ({"sizes": [0, 4]}, POSITIVE),
    ({"sigmas": [float("nan")]}, POSITIVE),
    ({"sizes": [1, 2**22]}, "sizes.*: expected (less than 2.22 pixels a side|positive numbers, and sides below)"),
]
MAPS, WINNERS = "grad_maps: expected ", r"winners( \(\d+,\))?: expected "
# Gradients of the maps and winners, for GOOD.
BAD_GRADIENTS = [
    ([], torch.zeros(32).short(), MAPS),
    ([torch.ones(2, 4, 5)], torch.zeros(32).short(), MAPS),
    ([torch.ones(2, 4, 4).double()], torch.zeros(32).short(), MAPS),
    ([torch.ones(2, 4, 4)], torch.zeros(31).short(), WINNERS),
    ([torch.ones(2, 4, 4)], torch.zeros(32).int(), WINNERS),
    ([torch.ones(2, 4, 4)], torch.zeros(64).short()[::2], WINNERS),
]
