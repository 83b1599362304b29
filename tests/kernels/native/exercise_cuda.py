"""Runs the CUDA kernels, emulated, forward and backward, on grids of a few blocks: options, dtypes, layouts, both
orders of blocks and threads. Results are checked elsewhere; here a sanitizer watches (sanitize.py).

To ThreadSanitizer each thread of each block costs about a millisecond: a few blocks must do."""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import emulation
import torch
from exercise import DTYPES, RNG, backward, randn

from bkind3d_kernels.geometry import all_pairs


def soft_argmax3d_cases() -> Iterator[Callable[[], None]]:
    contiguous, last = torch.contiguous_format, torch.channels_last_3d
    layouts = (
        (randn(1, 1, 1, 1, 1), contiguous),
        (randn(1, 1, 3, 20, 64), contiguous),
        (randn(1, 2, 5, 11, 13), contiguous),
        (randn(1, 34, 2, 3, 8), last),
    )
    for number, ((logits, layout), dtype) in enumerate(itertools.product(layouts, DTYPES)):
        logits = logits.to(dtype, memory_format=layout).requires_grad_()

        def case(logits=logits, covariance=number % 2 == 0) -> None:
            mean, peak, second, *_ = torch.ops.bkind3d_emulated.soft_argmax3d(logits, 0.7, covariance)
            backward(mean, peak, *([second] if covariance else []))

        yield case


def rasterize_edges_cases() -> Iterator[Callable[[], None]]:
    """Tiles that a map fills or not, more edges than a block lists, more maps than a launch takes."""
    shapes = ((1, 2, [(1, 1)]), (1, 5, [(33, 20), (8, 9)]), (2, 3, [(1 + i, 4) for i in range(17)]), (1, 25, [(9, 40)]))
    for (n, k, sizes), dtype in itertools.product(shapes, (torch.float32, torch.float64)):
        height, width = sizes[0]
        points = torch.rand(n, k, 2, generator=RNG) * torch.tensor([width, height]) * 1.4 - 0.2
        points[0, 0] = points[0, 1]  # an edge without length
        points = points.to(dtype).requires_grad_()
        edges = all_pairs(k)
        weights = (torch.rand(n, len(edges), generator=RNG) - 0.2).to(dtype).requires_grad_()

        def case(points=points, weights=weights, edges=edges, sizes=sizes) -> None:
            flat, sigmas = [length for size in sizes for length in size], [9.0] * len(sizes)
            backward(*torch.ops.bkind3d_emulated.rasterize_edges(points, weights, edges, flat, sigmas)[0])

        yield case


def unproject_cases() -> Iterator[Callable[[], None]]:
    """Groups of one lane and of several, runs, few views and many, each way of adding to the maps."""
    options = ("softmax", "zero"), ("weighted", "exclude"), ("max", "exclude")
    shapes = (1, 4, 8, (2, 4, 9)), (1, 5, 3, (1, 2, 3)), (1, 9, 20, (1, 1, 2))
    for number, ((n, m, c, volume), dtype) in enumerate(itertools.product(shapes, DTYPES)):
        option = options[number % 3]
        real = torch.float64 if dtype == torch.float64 else torch.float32
        features = randn(n, m, c, 5, 6).to(dtype).requires_grad_()
        q = torch.tensor([[0.2, 0.6, 0.3, 0.5], [0.7, 0.1, 0.4, 0.2], [0.0, 0.1, 0.0, 1.0]], dtype=real)
        q = q.expand(n, m, 3, 4).clone().requires_grad_()
        weights = randn(n, m, c).to(real).requires_grad_() if option[0] == "weighted" else None

        def case(features=features, q=q, weights=weights, rest=(list(volume), *option), number=number) -> None:
            torch.use_deterministic_algorithms(number % 2 == 0)
            backward(torch.ops.bkind3d_emulated.unproject(features, q, None, weights, *rest)[0])
            torch.use_deterministic_algorithms(False)

        yield case


def group_norm_act_cases() -> Iterator[Callable[[], None]]:
    """Groups that a block holds and slabs, packs of 16 bytes and of one element, each way to mask a gradient."""
    shapes = ((1, 1, 1, 1), 1), ((2, 8, 3, 5), 2), ((1, 6, 2, 3, 4), 3), ((1, 32, 24, 22), 1), ((1, 33, 16, 16), 1)
    ways = ("relu", False), ("relu", True), ("none", True)
    for number, ((shape, groups), dtype) in enumerate(itertools.product(shapes, DTYPES)):
        activation, more = ways[number % 3]
        real = torch.float64 if dtype == torch.float64 else torch.float32
        x = randn(*shape).to(dtype).requires_grad_()
        other = randn(*shape).to(dtype).requires_grad_() if more else None
        weight, bias = (randn(shape[1]).to(real).requires_grad_() for _ in range(2))

        def case(given=(x, weight, bias, other, groups, 1e-5, activation)) -> None:
            backward(torch.ops.bkind3d_emulated.group_norm_act(*given)[0])

        yield case


CASES = {
    "unproject": unproject_cases,
    "soft_argmax3d": soft_argmax3d_cases,
    "rasterize_edges": rasterize_edges_cases,
    "group_norm_act": group_norm_act_cases,
}


def main() -> None:
    library = emulation.load(Path(sys.argv[1]))
    assert set(CASES) == set(emulation.OPERATIONS)
    cases = [case for make in CASES.values() for case in make()]
    for number, case in enumerate(cases):
        library.emulation_descending(number % 2)
        case()
    print(f"{len(cases)} calls of emulated CUDA kernels forward and backward")


if __name__ == "__main__":
    main()
