"""How fast, how large and how exact are the operations?

Every competitor is measured on every workload, forward, backward and both together: `reference` (plain PyTorch),
`compile` (torch.compile of it), `published` (the algorithm of the published code), the algorithms of other projects
that compute the same function, and every other backend that can run here. Written as they come to the results folder:
results.csv (one row per operation, workload, variant, mode and competitor), raw.csv (every round), machine.json, and at
the end summary.md and plots. What is not measured has a row that says why. See docs/benchmarks.md.

  python -m benchmarks                                   everything, on the CPU, in about 12 minutes
  python -m benchmarks --quick                           the smallest workload of each operation, under a minute
  python -m benchmarks --op unproject --workload paper   one workload
  python -m benchmarks --device cuda --budget-seconds 300
  python -m benchmarks --redraw FOLDER                   summary and plots again, from results.csv alone
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from bkind3d_kernels.backends import OPERATIONS

from . import machine, plots, summary
from .problems import competitors, known_competitors, operation
from .suite import Settings, Suite, cases, with_defaults

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def parser() -> argparse.ArgumentParser:
    names = [f"{op}: {', '.join(w.name for w in operation(op).WORKLOADS)}" for op in OPERATIONS]
    variants = sorted({variant for op in OPERATIONS for variant in operation(op).VARIANTS})
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="workloads\n  " + "\n  ".join(names),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--op", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="operations; default all")
    made.add_argument("--workload", nargs="+", default=[], metavar="NAME", help="workloads by name; default all")
    made.add_argument(
        "--variant",
        nargs="+",
        choices=variants,
        default=[],
        help="default: the usual one, others on the first workload",
    )
    made.add_argument("--competitor", nargs="+", choices=known_competitors(), default=[], help="default: all that run")
    made.add_argument("--no-sweeps", action="store_true", help="leave the scaling sweeps out")
    made.add_argument("--quick", action="store_true", help="smallest workload of each operation, few rounds")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--dtype", choices=DTYPES, default="float32", help="of features and logits; default float32")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads; default torch's")
    made.add_argument("--rounds", type=int, default=15, help="rounds at most (at least 3 are made); default 15")
    made.add_argument("--budget-seconds", type=float, default=720, help="time for everything; default 720")
    made.add_argument("--memory-limit-gb", type=float, help="for one call; default 8, on CUDA what is free")
    made.add_argument("--out", type=Path, help="results folder; default benchmarks/results/<date>-<machine>")
    made.add_argument("--force", action="store_true", help="write into a folder that holds something already")
    made.add_argument("--redraw", type=Path, metavar="FOLDER", help="only draw and summarise an earlier run again")
    return made


def memory_limit(device: str, gigabytes: float | None) -> int:
    """Bytes that one call may need."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
        return min(free, int(gigabytes * 1e9)) if gigabytes else free
    return min(int((gigabytes or 8.0) * 1e9), int(0.7 * machine.memory_available()))


def draw(folder: Path) -> None:
    """Summary and plots of a results folder."""
    summary.write(folder)
    try:
        plots.draw(folder)
    except ModuleNotFoundError as error:
        print(f"no plots: {error}; draw them elsewhere with --redraw {folder}")


def main(arguments: list[str] | None = None) -> int:
    """Run, and return the exit status: 1 if something failed, 2 if the request makes no sense."""
    started = time.monotonic()
    options = parser().parse_args(arguments)
    if options.redraw is not None:
        draw(options.redraw)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no GPU here", file=sys.stderr)
        return 2
    day = time.strftime("%Y-%m-%d")
    out = options.out or RESULTS / f"{day}-{machine.slug(options.device)}"
    if out.exists() and any(out.iterdir()) and not options.force:
        print(f"{out} holds results already: choose another folder with --out, or --force", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    settings = with_defaults(
        Settings(
            device=options.device,
            dtype=DTYPES[options.dtype],
            threads=options.threads,
            rounds=options.rounds,
            budget=options.budget_seconds,
            memory_limit=memory_limit(options.device, options.memory_limit_gb),
            ops=tuple(options.op),
            workloads=tuple(options.workload),
            competitors=tuple(options.competitor),
            variants=tuple(options.variant),
            sweeps=not options.no_sweeps,
            quick=options.quick,
        )
    )
    listed = cases(settings)
    if not listed:
        print("no workload has that name: see --help", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    description = machine.describe(options.device)
    rates = machine.rates(options.device)
    asked = {name: value for name, value in vars(options).items() if name not in ("out", "force", "redraw")}
    absent = {
        op: {name: why for name, why in competitors(op, settings.device, settings.dtype).items() if why is not None}
        for op in settings.ops
    }
    record = description | {"rates": rates, "unavailable": absent, "options": asked}
    (out / "machine.json").write_text(json.dumps(record, indent=2) + "\n")
    suite = Suite(settings, rates, out, started)
    with tempfile.TemporaryDirectory() as cache:
        # Compilation is measured, so nothing may be found compiled.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = cache
        try:
            suite.run(listed)
        except KeyboardInterrupt:
            print("interrupted; what was measured is kept")
            return 130
        finally:
            draw(out)
    print(f"{out}: {time.monotonic() - started:.0f} s")
    return 1 if suite.failed else 0


if __name__ == "__main__":
    sys.exit(main())
