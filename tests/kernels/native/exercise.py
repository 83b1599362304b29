"""Runs the C++ backend of all operations, forward and backward, on small shapes: options, dtypes, layouts, instruction
sets, thread counts. Results are checked elsewhere; here a sanitizer watches (sanitize.py)."""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bkind3d_kernels import (
    VoxelGrid,
    group_norm_act,
    library,
    linear_soft_argmax3d,
    rasterize_edges,
    soft_argmax3d,
    unproject,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
AGGREGATIONS = ("softmax", "mean", "sum", "max", "weighted")
RNG = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=RNG)


def backward(*outputs: Tensor) -> None:
    """From gradients that are whole, and from such that are one number in memory."""
    kept = [x for x in outputs if x.requires_grad]
    torch.autograd.backward(kept, [torch.randn_like(x) for x in kept], retain_graph=True)
    sum(x.double().sum() for x in kept).backward()  # type: ignore[union-attr]


def layouts(x: Tensor) -> Iterator[Tensor]:
    """The same numbers: contiguous, with the channels last, and as the end of a larger tensor."""
    yield x
    yield x.movedim(2, -1).contiguous().movedim(-1, 2)
    padded = torch.empty([size + 1 for size in x.shape], dtype=x.dtype)
    view = padded[tuple(slice(1, None) for _ in x.shape)]
    view.copy_(x)
    yield view


def cameras(n: int, m: int) -> Tensor:
    """Projections that see the grid in part, and one from within it."""
    p = torch.tensor([[4.0, 0.0, 3.0, 9.0], [0.0, 4.0, 2.0, 6.0], [0.0, 0.0, 1.0, 3.0]]).expand(n, m, 3, 4).clone()
    p += 0.3 * randn(n, m, 3, 4)
    p[:, -1, 2, 3] = 0.1
    return p


def unproject_cases() -> Iterator[Callable[[], None]]:
    grid = VoxelGrid.box((0.0, 0.0, 0.0), (2.0, 2.0, 2.0), (5, 4, 19))
    options = itertools.product(AGGREGATIONS, ("zero", "exclude"), DTYPES, ((1, 3, 1), (1, 4, 33), (2, 7, 16)))
    for number, (aggregation, unseen, dtype, (n, m, c)) in enumerate(options):
        features = list(layouts(randn(n, m, c, 5, 7).to(dtype)))[number % 3].requires_grad_()
        real = torch.float64 if dtype == torch.float64 else torch.float32
        p = cameras(n, m).to(real).requires_grad_()
        mask = torch.rand(n, m, generator=RNG) < 0.8 if number % 2 else None
        weights = torch.rand(n, m, c, generator=RNG).to(real).requires_grad_() if aggregation == "weighted" else None

        def case(features=features, p=p, aggregation=aggregation, unseen=unseen, mask=mask, weights=weights) -> None:
            volume, _ = unproject(
                features,
                p,
                grid,
                aggregation=aggregation,
                unseen=unseen,
                view_mask=mask,
                view_weights=weights,
                return_counts=True,
                backend="cpp",
            )
            backward(volume)

        yield case


def soft_argmax3d_cases() -> Iterator[Callable[[], None]]:
    shapes = ((1, 1, 1, 1, 1), (2, 3, 5, 4, 7), (1, 18, 3, 2, 33), (1, 2, 36, 35, 34), (1, 2, 2, 2, 2100))
    for number, (shape, dtype, more) in enumerate(itertools.product(shapes, DTYPES, (False, True))):
        grid = VoxelGrid.box((0.1, 0.2, 0.3), (2.0, 2.0, 2.0), shape[2:])
        logits = randn(*shape).to(dtype)
        if number % 3 == 1:
            logits = logits.to(memory_format=torch.channels_last_3d)
        if number % 3 == 2:
            logits = list(layouts(logits))[2]
        logits.requires_grad_()

        def case(logits=logits, grid=grid, more=more) -> None:
            outputs = soft_argmax3d(
                logits, grid, temperature=0.7, return_peak=more, return_covariance=more, backend="cpp"
            )
            backward(*(outputs if more else [outputs]))

        yield case


def linear_soft_argmax3d_cases() -> Iterator[Callable[[], None]]:
    shapes = ((1, 1, 1, 1, 1), (2, 16, 5, 4, 7), (1, 18, 3, 2, 33), (1, 8, 36, 35, 34), (1, 3, 2, 2, 2100))
    for number, (shape, dtype, more) in enumerate(itertools.product(shapes, DTYPES, (False, True))):
        grid = VoxelGrid.box((0.1, 0.2, 0.3), (2.0, 2.0, 2.0), shape[2:])
        features = list(layouts(randn(*shape).to(dtype)))[number % 3]
        if number % 3 == 1:
            features = features.to(memory_format=torch.channels_last_3d)
        joints = (2, 17)[number % 2]
        weight, bias = randn(joints, shape[1]).requires_grad_(), randn(joints) if more else None
        features.requires_grad_(number % 4 != 3)

        def case(features=features, weight=weight, bias=bias, grid=grid, more=more) -> None:
            outputs = linear_soft_argmax3d(
                features, weight, bias, grid, return_peak=more, return_covariance=more, backend="cpp"
            )
            backward(*(outputs if more else [outputs]))

        yield case


def rasterize_edges_cases() -> Iterator[Callable[[], None]]:
    sizes = ([(1, 1)], [(8, 8)], [(37, 53), (19, 27), (5, 7)], [(130, 70)])
    for size, dtype, k in itertools.product(sizes, (torch.float32, torch.float64), (2, 3, 12)):
        h, w = size[0]
        points = torch.rand(2, k, 2, generator=RNG) * torch.tensor([w, h]) * 1.4 - 0.2
        points[0, 0] = points[0, 1]  # an edge without length
        points[1, 0] = 1e4
        points = points.to(dtype).requires_grad_()
        weights = (torch.rand(2, k * (k - 1) // 2, generator=RNG) - 0.2).to(dtype).requires_grad_()

        def case(points=points, weights=weights, size=size) -> None:
            backward(*rasterize_edges(points, weights, size, [1.5 + i for i in range(len(size))], backend="cpp"))

        yield case
    # More edges than an int16 counts.
    points = (torch.rand(1, 270, 2, generator=RNG) * 20).requires_grad_()
    weights = torch.rand(270 * 269 // 2, generator=RNG).requires_grad_()
    yield lambda: backward(rasterize_edges(points, weights, (9, 11), 1.0, backend="cpp"))


def group_norm_act_cases() -> Iterator[Callable[[], None]]:
    shapes = ((1, 1, 1, 1), (2, 32, 5, 7), (1, 6, 35, 34), (2, 45, 3, 4, 5), (1, 24, 20, 21, 22))
    options = itertools.product(shapes, DTYPES, (False, True), ("relu", "none"))
    for number, (shape, dtype, more, activation) in enumerate(options):
        x = list(layouts(randn(*shape).to(dtype)))[number % 3].requires_grad_(number % 5 != 4)
        other = list(layouts(randn(*shape).to(dtype)))[number // 2 % 3].requires_grad_() if more else None
        weight, bias = (randn(shape[1]).requires_grad_() for _ in range(2))
        groups = 3 if shape[1] % 3 == 0 else 1

        def case(x=x, other=other, weight=weight, bias=bias, groups=groups, activation=activation) -> None:
            backward(group_norm_act(x, groups, weight, bias, residual=other, activation=activation, backend="cpp"))

        yield case


def sets() -> list[str]:
    best = library.INSTRUCTION_SETS.index(str(library.instruction_set()))
    return list(library.INSTRUCTION_SETS[: best + 1])


def main() -> None:
    assert Path(library.FOLDER).is_relative_to(sys.argv[1]), f"{library.FOLDER} is not the build under test"
    assert library.reason("_cpu") is None, library.reason("_cpu")
    threads_of_calls = [int(threads) for threads in sys.argv[2:]]
    count = 0
    for make in (
        unproject_cases,
        soft_argmax3d_cases,
        linear_soft_argmax3d_cases,
        rasterize_edges_cases,
        group_norm_act_cases,
    ):
        cases = list(make())
        for name, threads in itertools.product(sets(), threads_of_calls):
            torch.set_num_threads(threads)
            with library.use_instruction_set(name):
                for case in cases:
                    case()
                    count += 1
                torch.use_deterministic_algorithms(True)
                cases[0]()
                torch.use_deterministic_algorithms(False)
    print(f"{count} calls forward and backward, instruction sets {', '.join(sets())}, threads {threads_of_calls}")


if __name__ == "__main__":
    main()
