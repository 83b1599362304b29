"""What does a call cost where there is nothing to compute?  python -m benchmarks.host_time --help

Public forward and backward of every operation on a problem so small that checks, Python, autograd and the allocation of
outputs are all of its time, and beside them what it could be at least: ``mul`` is torch's product of two tensors,
``function`` an ``autograd.Function`` around a product, and ``function, operators`` one around two operators of this
library, the soft-argmax's forward and backward, with no check and nothing before or after.

Checkouts, each LABEL or LABEL@FOLDER, are measured in processes of their own that take turns, call by call of the
table; a round is one turn of each. Time is CPU time of one thread, in microseconds a call: the median over rounds.
Backward is timed in a training step, as the sum of both less the forward pass.

    python -m benchmarks.host_time now 'before@../before' --out FILE.csv --raw FILE.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("checkout", "call", "forward_us", "both_us", "quartiles_us", "to_mul", "to_last", "rounds", "commit")
Call = tuple[Callable[[], Any], list[Any]]  # the forward pass, and what is differentiated


def calls() -> dict[str, Call]:
    """Every call on its tiny problem."""
    import torch

    import bkind3d_kernels as kernels
    import bkind3d_kernels.library

    assert Path(kernels.__file__).is_relative_to(Path.cwd()), kernels.__file__  # of the checkout, not of another
    if missing := kernels.library.reason("_cpu"):
        raise SystemExit(missing)
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).requires_grad_()

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Any, b: Any) -> Any:
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            a, b = ctx.saved_tensors
            return gradient * b, gradient * a

    forward, backward = torch.ops.bkind3d.soft_argmax3d.default, torch.ops.bkind3d.soft_argmax3d_backward.default

    class Operators(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                mean, peak, covariance, *kept = forward(x, 1.0, False)
            ctx.save_for_backward(x, mean, peak, covariance, *kept)
            return mean

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            x, mean, peak, *kept = ctx.saved_tensors
            with torch._C._AutoDispatchBelowAutograd():
                return backward(gradient, peak, None, x, 1.0, mean, *kept)

    a, b = leaf(8), leaf(8)
    grid = kernels.VoxelGrid.cube((0.0, 0.0, 3.0), 1.0, 3)
    views = torch.tensor([[4.0, 0, 2, 0], [0, 4, 2, 0], [0, 0, 1, 0]]).expand(1, 2, 3, 4).contiguous()
    maps, moved = leaf(1, 2, 4, 4, 4), views.clone().requires_grad_()
    volume, weight, bias = leaf(1, 4, 3, 3, 3), leaf(4), leaf(4)
    matrix, offsets = leaf(2, 4), leaf(2)
    points, strengths = leaf(1, 3, 2), torch.rand(3, generator=generator).requires_grad_()
    sizes, widths = [(4, 4)] * 5, [1.0] * 5
    return {
        "mul": (lambda: a * b, [a, b]),
        "function": (lambda: Product.apply(a, b), [a, b]),
        "function, operators": (lambda: Operators.apply(volume), [volume]),
        "unproject": (lambda: kernels.unproject(maps, views, grid), [maps]),
        "unproject, cameras too": (lambda: kernels.unproject(maps, moved, grid), [maps, moved]),
        "soft_argmax3d": (lambda: kernels.soft_argmax3d(volume, grid), [volume]),
        "linear_soft_argmax3d": (
            lambda: kernels.linear_soft_argmax3d(volume, matrix, offsets, grid),
            [volume, matrix, offsets],
        ),
        "rasterize_edges": (lambda: kernels.rasterize_edges(points, strengths, (4, 4), 1.0), [points, strengths]),
        "rasterize_edges, 5 maps": (
            lambda: kernels.rasterize_edges(points, strengths, sizes, widths),
            [points, strengths],
        ),
        "group_norm_act": (lambda: kernels.group_norm_act(volume, 2, weight, bias), [volume, weight, bias]),
    }


def work(repeats: int) -> None:
    """The process of one checkout: for each line that it reads, a call's name, CPU seconds of its two modes."""
    import torch

    torch.set_num_threads(1)
    made = calls()
    for name, (forward, leaves) in made.items():
        outputs = forward()
        outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
        cotangents = [torch.ones_like(output) for output in outputs]

        def both(forward: Any = forward, leaves: Any = leaves, cotangents: Any = cotangents) -> None:
            torch.autograd.grad(forward(), leaves, cotangents)

        made[name] = forward, both  # type: ignore[assignment]
    print(json.dumps(list(made)), flush=True)
    for line in sys.stdin:
        seconds = []
        for call in made[line.strip()]:
            call()  # type: ignore[operator]
            started = time.process_time()
            for _ in range(repeats):
                call()  # type: ignore[operator]
            seconds.append((time.process_time() - started) / repeats)
        print(json.dumps(seconds), flush=True)


class Checkout:
    """A process that makes the calls with the package of one checkout."""

    def __init__(self, text: str, repeats: int) -> None:
        self.label, _, folder = text.partition("@")
        root = Path(folder).resolve() if folder else ROOT
        if not (root / "bkind3d_kernels").is_dir():
            raise SystemExit(f"{text}: expected a checkout of this repository at {root}")
        git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        self.commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", "--repeats", str(repeats)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            cwd=root,
        )
        self.names: list[str] = self._answer()
        self.seconds: dict[str, list[list[float]]] = {name: [] for name in self.names}

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.label}: its process ended with status {self.process.wait()}")
        return json.loads(line)

    def measure(self, name: str) -> None:
        """One turn of one call."""
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        self.seconds[name].append(self._answer())

    def median(self, name: str, mode: int = 1) -> float:
        """Microseconds of the forward pass (mode 0) or of both (mode 1)."""
        return 1e6 * statistics.median(turn[mode] for turn in self.seconds[name])


def main() -> None:
    """Time, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", default=["now"], help="LABEL or LABEL@FOLDER")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--repeats", type=int, default=300, help="of each call in a round")
    parser.add_argument("--out", type=Path, help="CSV file; printed only when left out")
    parser.add_argument("--raw", type=Path, help="JSON file for every round")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.repeats)
        return
    from benchmarks.tables import write_csv

    checkouts = [Checkout(text, arguments.repeats) for text in arguments.checkouts]
    for name in checkouts[0].names:
        for checkout in checkouts:
            checkout.measure(name)  # first calls load and allocate
            checkout.seconds[name].clear()
    for _ in range(arguments.rounds):
        for name in checkouts[0].names:
            for checkout in checkouts:
                checkout.measure(name)
    last, rows = checkouts[-1], []
    print(f"{'checkout':>12} {'call':>24} {'forward':>9} {'both':>9} {'/ mul':>7} {'/ ' + last.label:>9}")
    for checkout in checkouts:
        for name in checkout.names:
            forward, both = checkout.median(name, 0), checkout.median(name)
            low, _, high = statistics.quantiles([1e6 * turn[1] for turn in checkout.seconds[name]], n=4)
            to_mul, to_last = both / checkout.median("mul"), both / last.median(name)
            rows.append(
                {
                    "checkout": checkout.label,
                    "call": name,
                    "forward_us": f"{forward:.1f}",
                    "both_us": f"{both:.1f}",
                    "quartiles_us": f"{low:.1f} {high:.1f}",
                    "to_mul": f"{to_mul:.2f}",
                    "to_last": f"{to_last:.3f}",
                    "rounds": arguments.rounds,
                    "commit": checkout.commit,
                }
            )
            print(f"{checkout.label:>12} {name:>24} {forward:9.1f} {both:9.1f} {to_mul:7.2f} {to_last:9.3f}")
    if arguments.out:
        write_csv(arguments.out, COLUMNS, rows)
    if arguments.raw:
        arguments.raw.write_text(json.dumps({checkout.label: checkout.seconds for checkout in checkouts}, indent=1))


if __name__ == "__main__":
    main()
