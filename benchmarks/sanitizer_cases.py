"""A short program for compute-sanitizer: every operation and backend, forward and backward, on tiny shapes.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitizer_cases --device cuda

The same scenes as in numerics.py, in float32 and bfloat16, in torch's default and in its deterministic mode. Under the
sanitizer each launch is slow: no scene begins after --seconds, and the last line says how many were run. Numbers are
not looked at here.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from itertools import zip_longest

import torch

from bkind3d_kernels.backends import BACKENDS, OPERATIONS

from .device_checks import Subject, Trial, deterministic, subjects


def cases(subject: Subject) -> Iterator[tuple[Subject, Trial]]:
    """Of one operation and backend, float32 first."""
    for dtype in subject.dtypes(torch.float32, torch.bfloat16):
        for trial in subject.scenes(dtype):
            yield subject, trial


def main(arguments: list[str] | None = None) -> int:
    """Run what fits into the time; the exit status is 2 where nothing can run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sanitizer_cases",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--op", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="default: all")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="default: all that run but the reference")
    parser.add_argument("--seconds", type=float, default=60, help="no scene begins later; default 60")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    chosen = subjects(options.device, options.op, options.backend)
    # In turn, so that a short time still has some of each.
    turns = zip_longest(*(cases(subject) for subject in chosen))
    listed = [case for turn in turns for case in turn if case is not None]
    done = 0
    for subject, trial in listed:
        if time.monotonic() - started > options.seconds:
            break
        trial.run()
        with deterministic():
            trial.run()
        if subject.cuda:
            torch.cuda.synchronize()
        done += 1
        print(f"{subject.op} {subject.backend}: {trial.name}", flush=True)
    print(f"{done} of {len(listed)} scenes in {time.monotonic() - started:.0f} s")
    return 0 if done else 2


if __name__ == "__main__":
    sys.exit(main())
