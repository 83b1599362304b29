"""Scenes, layouts, shapes and bad arguments for the tests of unproject, and its reference in the operator's form.

A family is named by its namespace: bkind3d (C++), bkind3d_emulated (CUDA) or bkind3d_triton (interpreted, where a call
takes a tenth of a second or more, and the lists are short).
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import scenes
import torch
from torch import Tensor

from bkind3d_kernels.reference import unproject as reference

OPTIONS = list(itertools.product(["softmax", "mean", "sum", "max", "weighted"], ["zero", "exclude"]))
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALVES]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}

# (N, M, C, map, volume).
SHAPES = {
    # Channels below, at and above a vector's width, of every remainder; M unrolled and not.
    "bkind3d": [
        (2, 4, 3, (9, 8), (6, 5, 7)),
        (1, 1, 1, (1, 1), (3, 2, 3)),
        (1, 4, 32, (12, 16), (8, 6, 40)),
        (2, 9, 70, (7, 9), (3, 5, 37)),
        (1, 3, 15, (12, 10), (4, 5, 20)),
        (1, 7, 16, (5, 11), (4, 5, 21)),
        (1, 2, 129, (4, 3), (2, 2, 65)),
    ],
    # Channels: one, no pack, packs of 4 and of 8, a voxel for a whole warp, more than a warp. Views: a chunk, several,
    # more than are projected at once. Maps: pixel, row, column. Volumes flat in z or x, long.
    "bkind3d_emulated": [
        (2, 4, 3, (9, 8), (6, 5, 7)),
        (1, 1, 1, (1, 1), (3, 2, 3)),
        (2, 4, 32, (12, 16), (5, 9, 9)),
        (1, 9, 20, (7, 1), (3, 5, 6)),
        (1, 6, 8, (5, 11), (2, 19, 1)),
        (1, 2, 132, (1, 3), (2, 2, 5)),
        (1, 33, 1, (6, 6), (1, 3, 34)),
        (1, 3, 68, (8, 9), (9, 7, 2)),
    ],
}
# Small: channels in packs and not, several chunks of views, no sample.
SMALL = {
    "bkind3d": [(2, 3, 8, (4, 6), (2, 3, 5)), (2, 5, 3, (4, 6), (2, 3, 5)), (0, 3, 8, (4, 6), (2, 3, 5))],
    "bkind3d_emulated": [(2, 3, 8, (4, 6), (2, 3, 5)), (2, 5, 3, (4, 6), (2, 3, 5)), (0, 3, 8, (4, 6), (2, 3, 5))],
    "bkind3d_triton": [(1, 2, 3, (1, 5), (3, 4, 2))],
}
# With a dtype. Channels: several vectors and a rest; packs and none.
LAYOUTS = {
    "bkind3d": [((2, 3, 19, (6, 7), (3, 4, 18)), dtype) for dtype in (torch.float32, torch.bfloat16)],
    "bkind3d_emulated": [
        ((2, 3, c, (6, 7), (3, 4, 9)), dtype) for c in (8, 7) for dtype in (torch.float32, torch.bfloat16)
    ],
    "bkind3d_triton": [((1, 2, 3, (4, 5), (3, 4, 2)), torch.float64)],
}
SAMPLES = {
    "bkind3d": (2, 3, 5, (4, 6), (2, 3, 5)),
    "bkind3d_emulated": (2, 3, 4, (4, 6), (2, 3, 5)),
    "bkind3d_triton": (1, 2, 3, (4, 5), (2, 3, 2)),
}


def shapes(family: str, dtype: torch.dtype, aggregation: str) -> list[tuple]:
    """To hold a family against the reference. In Triton: views in a loop and, with "softmax" alone, unrolled."""
    if family != "bkind3d_triton":
        return SHAPES[family]
    if dtype in HALVES:
        return [(1, 4, 8, (7, 9), (3, 5, 4))]
    return [(1, m, c, (7, 9), (3, 5, 4)) for m, c in ((5, 6), (3, 3))[: 2 if aggregation == "softmax" else 1]]


def scene(n=1, m=3, c=2, size=(5, 6), shape=(3, 4, 2), dtype=torch.float64, seed=0, grids=None, radius=1.2):
    """Features rounded to ``dtype`` but in float64, projections, grid, mask and weights (N, M, C), all float64.

    A grid for each sample, or as many as ``grids`` says.
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, m, c, *size, generator=generator).to(dtype).double()
    projections = scenes.projections(n, m, size, generator, radius)
    weights = torch.rand(n, m, c, generator=generator).double() + 0.1
    mask = torch.rand(n, m, generator=generator) > 0.15
    return features, projections, scenes.grid(shape, generator, n if grids is None else grids), mask, weights


def geometry_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of matrices and weights beside features of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operands(n, m, c, size, shape, dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, q, mask and weights for the operators."""
    features, projections, grid, mask, weights = scene(n, m, c, size, shape, dtype, seed)
    geometry = geometry_of(dtype)
    return features.to(dtype), grid.voxel_to_pixel(projections).to(geometry), mask, weights.to(geometry)


def only(weights: Tensor, aggregation: str) -> Tensor | None:
    return weights if aggregation == "weighted" else None


def reference_operator(features, q, mask, weights, shape, aggregation, unseen) -> tuple[Tensor, Tensor]:
    return reference.run(features, q, shape, aggregation, unseen, mask, weights)


def random_gradient(features: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Of the volume, always the same, in the dtype of the features."""
    size = features.shape[0], features.shape[2], *shape
    return torch.randn(size, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(features.dtype)


def evaluate(
    operator: Callable[..., Any],
    features: Tensor,
    q: Tensor,
    mask: Tensor,
    weights: Tensor,
    shape: tuple[int, int, int],
    aggregation: str,
    unseen: str,
    gradient: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Volume, counts, and the gradients of what requires one, for a gradient of the volume."""
    features, q, weights = (t.detach().clone().requires_grad_() for t in (features, q, weights))
    given = only(weights, aggregation)
    volume, counts = operator(features, q, mask, given, list(shape), aggregation, unseen)
    gradient = random_gradient(features, shape) if gradient is None else gradient
    leaves = [t for t in (features, q, given) if t is not None]
    return volume.detach(), counts, *torch.autograd.grad(volume, leaves, gradient.to(volume))


def exact(features: Tensor, q: Tensor, mask: Tensor, weights: Tensor, shape, aggregation, unseen, gradient=None):
    """What :func:`evaluate` returns, of the reference in float64."""
    gradient = random_gradient(features, shape) if gradient is None else gradient
    inputs = features.double(), q.double(), mask, weights.double()
    return evaluate(reference_operator, *inputs, shape, aggregation, unseen, gradient)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp(min=1))


def errors(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """Of the volume and of each gradient; counts have none."""
    assert torch.equal(got[1], expected[1])
    return [relative(a, b) for a, b in zip((got[0], *got[2:]), (expected[0], *expected[2:]), strict=True)]


def check(operators: Any, problem: tuple) -> None:
    """Against the reference in float64; half formats also against the errors of the reference in the same dtype."""
    dtype, aggregation = problem[0].dtype, problem[-2]
    got, expected = evaluate(operators.unproject, *problem), exact(*problem)
    given = dtype, dtype, geometry_of(dtype), geometry_of(dtype)  # volume, and gradients of features, q and weights
    assert [t.dtype for t in (got[0], *got[2:])] == list(given[: len(got) - 1])
    tolerances = [TOLERANCES[d] for d in given]
    if aggregation == "max" and dtype != torch.float64 and operators.name != "bkind3d_triton":
        # Its gradient jumps where two views come within rounding of each other; in small volumes none do.
        tolerances[1:] = [0.02, 0.02, 0.02]
    ours = errors(got, expected)
    assert all(error < tolerance for error, tolerance in zip(ours, tolerances)), ours
    if dtype in HALVES:
        theirs = errors(evaluate(reference_operator, *problem), expected)
        assert all(a <= 2 * b + 1e-6 for a, b in zip(ours, theirs)), (ours, theirs)


def layouts(features: Tensor) -> dict[str, Tensor]:
    """The same values in several memory layouts."""
    n, m, _, h, w = features.shape
    last = features.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (n, m))
    wide = torch.zeros(n, m, h + 3, w + 2, features.shape[2] + 5, dtype=features.dtype)
    cut = wide.permute(0, 1, 4, 2, 3)[:, :, 2:-3, 1 : h + 1, 2:]
    cut.copy_(features)
    return {
        "contiguous": features.contiguous(),
        "channels last": last,
        "cut out of channels last": cut,
        "transposed": features.transpose(3, 4).contiguous().transpose(3, 4),
        "strided": torch.stack([features, features], dim=-1)[..., 0],
    }


def gradient_layouts(gradient: Tensor) -> list[Tensor]:
    """The same values in several memory layouts."""
    return [
        gradient.contiguous(),
        gradient.contiguous(memory_format=torch.channels_last_3d),
        torch.stack([gradient, gradient], dim=2)[:, :, 0],
    ]


def samples(family: str) -> Iterator[tuple]:
    """Arguments of the operator: layouts, options, dtypes and an empty batch."""
    n, m, c, size, shape = SAMPLES[family]
    for name, aggregation, unseen, dtype in [
        ("contiguous", "softmax", "zero", torch.float64),
        ("cut out of channels last", "softmax", "exclude", torch.float32),
        ("transposed", "weighted", "exclude", torch.float64),
        ("strided", "max", "zero", torch.bfloat16),
        ("channels last", "mean", "exclude", torch.float32),
    ]:
        features, q, mask, weights = operands(n, m, c, size, shape, dtype)
        q = torch.stack([q, q], dim=-1)[..., 0]
        expanded = only(weights[..., :1].expand(n, m, c), aggregation)
        yield layouts(features)[name], q, mask, expanded, list(shape), aggregation, unseen
    yield torch.zeros(0, 2, 3, 4, 4), torch.zeros(0, 2, 3, 4), None, None, [2, 2, 2], "softmax", "zero"


# ---- bad arguments of the operators ----

FEATURES, Q, MASK = torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 3, 3, 4), torch.ones(2, 3, dtype=torch.bool)
GOOD = dict(features=FEATURES, q=Q, mask=None, weights=None, shape=[2, 2, 2], aggregation="sum", unseen="zero")
WEIGHTED = r"view_weights: expected (\(N, M, C\) )?with aggregation 'weighted'"
# What every family refuses, and the part of the message that all share.
BAD = [
    ({"features": FEATURES[0]}, r"features: expected \(N, M, C, H, W\)"),
    ({"features": FEATURES[:, :0], "q": Q[:, :0]}, "features: expected 1 to 255 views"),
    ({"features": FEATURES[:, :1].expand(2, 256, 4, 5, 6)}, "features: expected 1 to 255 views"),
    ({"features": FEATURES[:, :, :0]}, "features: expected 1 to 255 views(,| and) no empty dimension"),
    ({"q": Q[:, :2]}, r"q: expected \(N, M, 3, 4\)"),
    ({"mask": MASK.float()}, r"view_mask: expected \(N, M\) bool"),
    ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"view_mask: expected \(N, M\) bool"),
    ({"weights": FEATURES[..., 0, 0]}, WEIGHTED),
    ({"aggregation": "weighted"}, WEIGHTED),
    ({"aggregation": "weighted", "weights": FEATURES[..., 0, :2]}, r"view_weights: expected \(N, M, C\)"),
    ({"features": FEATURES.int()}, "features: expected float32, float64, bfloat16 or float16"),
    ({"mask": MASK.mT}, r"view_mask: expected \(N, M\) bool"),
    ({"aggregation": "weighted", "weights": torch.ones(4, 3, 2)}, r"view_weights: expected \(N, M, C\)"),
    ({"shape": [2, 2]}, "shape: expected three integers"),
    ({"shape": [2, -2, 2]}, "shape: expected (lengths|three integers) below"),
    ({"aggregation": "median"}, "aggregation 'median': expected (one of )?softmax"),
    ({"unseen": "nan"}, "unseen 'nan': expected zero or exclude"),
]
# What one family alone refuses, or in words of its own.
BAD_FOR = {
    "bkind3d": [
        ({"features": FEATURES[:, :, :1, :1, :1].expand(2, 3, 1, 1, 2**25)}, "features: one map of .* is too large")
    ],
    "bkind3d_emulated": [({"shape": [2**11, 2**11, 2**9]}, "shape: too many voxels")],
    "bkind3d_triton": [
        ({"shape": [2**11, 2**11, 2**9]}, "shape: expected fewer than 2.31 voxels"),
        ({"features": FEATURES[..., :1].expand(2, 3, 4, 5, 2**27)}, "features: one map of .* is too large"),
        ({"features": FEATURES[:, :, :1, :1, :1].expand(2, 3, 1, 1, 2**25)}, "features: expected maps narrower"),
    ],
}
