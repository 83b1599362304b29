"""The largest volume that trains: python -m benchmarks.largest_volume --device cuda --out FILE

For each competitor the largest side of a cube of voxels, a multiple of 16, for which forward and backward of
`unproject` fit into memory: one sample, four views, 32 channels, maps of 64² pixels. The side is doubled until it does
not fit, or cuDNN refuses it, then bisected. The last voxels of each volume are compared with the reference's, so that
nothing counts that fits and is wrong. One row for each competitor; where its share of the time ran out, the side is a
lower bound.

torch.compile compiles again at each size; it and other projects' algorithms are left out unless they are named.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bkind3d_kernels import VoxelGrid, unproject

from . import parts
from .measure import CpuMemory, CudaMemory, largest_error, limit_address_space, out_of_memory
from .problems import Case, Workload, competitors, function, known_competitors, known_peers, operation

COLUMNS = ("device", "dtype", "competitor", "status", "side", "too_large", "peak_bytes", "step_s", "reason")
STEP, FIRST, LAST = 16, 32, 2048
VARIANT = "channels-last"
TAIL = 2  # voxels along each axis at the end of memory
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class OutOfTime(Exception):
    """The next volume would take longer than what is left."""


class Search:
    """One competitor on ever larger volumes.

    Args:
        competitor: its name.
        dtype: of the features.
        device: "cpu" or "cuda".
        limit: bytes that a step may take.
        seconds: no step begins that is expected to end later.
    """

    def __init__(self, competitor: str, dtype: torch.dtype, device: str, limit: int, seconds: float) -> None:
        self.competitor, self.dtype, self.device, self.limit = competitor, dtype, device, limit
        self.deadline = time.monotonic() + seconds
        self.best, self.too_large = 0, LAST + STEP
        self.peak, self.seconds = 0, 0.0  # of the best
        self.refusal = ""  # of cuDNN, where it was not memory that set the limit

    def run(self) -> dict[str, Any]:
        """The row of this competitor."""
        row: dict[str, Any] = {"device": self.device, "competitor": self.competitor}
        row["dtype"] = str(self.dtype).removeprefix("torch.")
        status, reason = "measured", ""
        try:
            while self.too_large - self.best > STEP:
                self._try(self._next())
        except OutOfTime:
            status, reason = "lower bound", "its share of the time is used up"
        except Exception as error:  # noqa: BLE001  a failure is a row, and the others go on
            status, reason = "failed", f"{type(error).__name__}: {error}".splitlines()[0][:300]
        reason = reason or self.refusal
        row |= {
            "status": status,
            "reason": reason,
            "side": self.best,
            "too_large": self.too_large if self.too_large <= LAST else "",
        }
        return row | {"peak_bytes": self.peak, "step_s": f"{self.seconds:.3g}"}

    def _next(self) -> int:
        if self.too_large > LAST:
            return min(LAST, max(FIRST, 2 * self.best))
        return (self.best + self.too_large) // 2 // STEP * STEP

    def _try(self, side: int) -> None:
        expected = self.seconds * (side / self.best) ** 3 if self.best else 0.0
        if time.monotonic() + expected > self.deadline:
            raise OutOfTime
        parameters = operation("unproject").BASE | {"volume": (side,) * 3}
        case = Case("unproject", Workload(f"side-{side}", parameters), VARIANT, self.dtype, self.device)
        least = 2 * math.prod((parameters["C"], side, side, side)) * self.dtype.itemsize  # the volume and its gradient
        fits = least <= self.limit and self._fits(case)
        if fits:
            self.best = side
        else:
            self.too_large = side
            gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _fits(self, case: Case) -> bool:
        if self.device == "cpu":
            limit_address_space(self.limit)
        try:
            if not self.best:
                _step(case, self.competitor)  # the first call compiles and loads
            self.peak, self.seconds = _step(case, self.competitor)
            return True
        except Exception as error:
            if "CUDNN_STATUS_NOT_SUPPORTED" in str(error):
                self.refusal = str(error).splitlines()[0][:300]
                return False
            if out_of_memory(error):
                return False
            raise
        finally:
            if self.device == "cpu":
                limit_address_space(None)


def _step(case: Case, competitor: str) -> tuple[int, float]:
    """Peak bytes and seconds of one training step."""
    memory = CudaMemory() if case.device == "cuda" else CpuMemory()
    problem = case.make()
    call = function(case, competitor, problem)
    memory.start()
    start = time.monotonic()
    (volume,) = call()
    torch.autograd.grad(volume, problem.leaves, torch.ones_like(volume))
    peak = memory.peak()  # on CUDA it waits for the step to end
    seconds = time.monotonic() - start
    with torch.no_grad():
        _check_tail(volume, problem.inputs)
    return peak, seconds


def _check_tail(volume: Tensor, inputs: dict[str, Any]) -> None:
    """Raise RuntimeError unless the last voxels are the reference's."""
    affine, shape = inputs["grid"].affine.double(), inputs["grid"].shape
    first = torch.tensor([[s - TAIL] for s in shape], dtype=affine.dtype, device=affine.device)
    end = VoxelGrid(torch.cat([affine[..., :3], affine[..., :3] @ first + affine[..., 3:]], dim=-1), (TAIL,) * 3)
    exact = unproject(inputs["features"].double(), inputs["projections"].double(), end, backend="reference")
    error = largest_error([volume[..., -TAIL:, -TAIL:, -TAIL:]], [exact])
    if not error <= 1e-2:
        raise RuntimeError(f"the last voxels of a side of {shape[0]} are off by {error:.1e} of the largest")


def main(arguments: list[str] | None = None) -> int:
    """Run, write, print; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.largest_volume",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the features; default float32")
    parser.add_argument(
        "--competitor", nargs="+", choices=known_competitors(), help="default: all but compile and the peers"
    )
    parser.add_argument("--memory-limit-gb", type=float, help="default 1, on CUDA what is free")
    parser.add_argument("--seconds", type=float, default=60, help="for all competitors together; default 60")
    parser.add_argument("--out", type=Path, help="CSV file for the rows")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no GPU here", file=sys.stderr)
        return 2
    limit = int((options.memory_limit_gb or 1.0) * 1e9)
    if options.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        limit = min(free, limit) if options.memory_limit_gb else free
        torch.cuda.set_per_process_memory_fraction(limit / total)
    available = competitors("unproject", options.device, DTYPES[options.dtype], VARIANT)
    named = options.competitor or [name for name in available if name not in ("compile", *known_peers())]
    # Compiled kernels first: they take least time, and what they leave is the others'.
    chosen = [name for name in reversed(available) if name in named and available[name] is None]
    deadline = time.monotonic() + options.seconds

    def rows() -> Any:
        for index, name in enumerate(chosen):
            share = (deadline - time.monotonic()) / (len(chosen) - index)
            row = Search(name, DTYPES[options.dtype], options.device, limit, share).run()
            print(
                f"{name}: {row['status']}, {row['side']}³ voxels, {int(row['peak_bytes']) / 1e9:.3g} GB, "
                f"{row['step_s']} s a step {row['reason']}",
                flush=True,
            )
            yield row

    found = parts.collect(rows(), options.out, COLUMNS)
    return 1 if any(row["status"] == "failed" for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
