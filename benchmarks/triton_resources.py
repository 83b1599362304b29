"""What every Triton kernel needs of a multiprocessor, compiled ahead of time: no GPU is needed.

    python -m benchmarks.triton_resources                         # a table
    python -m benchmarks.triton_resources --op unproject --arch 90
    python -m benchmarks.triton_resources --write docs/triton.md  # renew the table of the page

Every kernel is compiled in each of its variants (dtype, options, configuration) for sm_80, sm_90 and sm_100. The table
has registers per thread, shared memory, bytes of stack (spilled registers, if any) and how many programs of a
multiprocessor fit beside how many the kernel's head asks for. Exit status 1 if a variant spills or fits too few.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from bkind3d_kernels import triton_ops
from bkind3d_kernels.backends import operations_of

OPERATIONS = operations_of("triton")
ARCHITECTURES = (80, 90, 100)
# Of one multiprocessor; its 64 Ki registers, 64 warps and 32 programs are the same for all three.
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32
BEGIN, END = "<!-- begin: python -m benchmarks.triton_resources --write -->", "<!-- end -->"


@dataclass(frozen=True)
class Row:
    """One variant on one architecture."""

    op: str
    kernel: str
    variant: str
    arch: int
    warps: int
    registers: int
    shared: int
    stack: int
    fit: int
    wanted: int

    @property
    def fault(self) -> str | None:
        """What is wrong, or None."""
        if self.stack:
            return f"{self.stack} bytes of stack"
        return f"{self.fit} programs fit, {self.wanted} are wanted" if self.fit < self.wanted else None


def fit(arch: int, warps: int, registers: int, shared: int) -> int:
    """Programs that a multiprocessor holds at once: registers come 256 at a time to a warp, shared has 1 KiB more."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // per_warp // warps
    return min(by_registers, SHARED[arch] // (shared + 1024), WARPS // warps, PROGRAMS)


def variants(op: str) -> list[Any]:
    """Those of one operation."""
    return list(import_module(f"bkind3d_kernels.triton_ops.{op}").variants())


def measure(task: tuple[str, int, int]) -> Row:
    """Compile one variant, by its position, for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    op, position, arch = task
    variant = variants(op)[position]
    names = variant.kernel.arg_names
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    signature = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.kernel, signature, constants, attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        command = [str(tool), "-res-usage", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    registers, stack = int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])
    shared = compiled.metadata.shared
    return Row(
        op,
        variant.kernel.__name__,
        variant.name,
        arch,
        variant.warps,
        registers,
        shared,
        stack,
        fit(arch, variant.warps, registers, shared),
        variant.programs,
    )


def rows(ops: Iterable[str] = OPERATIONS, architectures: Iterable[int] = ARCHITECTURES) -> list[Row]:
    """All of them, compiled on every core."""
    if triton_ops.MISSING:
        sys.exit(triton_ops.MISSING)
    if triton_ops.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    tasks = [(op, i, arch) for op in ops for i in range(len(variants(op))) for arch in architectures]
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(measure, tasks, chunksize=4))


def table(found: list[Row]) -> str:
    """In Markdown: a row for each variant, the architectures side by side."""
    architectures = list(dict.fromkeys(row.arch for row in found))
    heads = [f"sm_{arch}: registers, shared, programs" for arch in architectures]
    lines = [
        " | ".join(["", "kernel", "variant", "warps", *heads, ""]).strip(),
        "|" + "---|" * (3 + len(heads)),
    ]
    for key in dict.fromkeys((row.kernel, row.variant, row.warps) for row in found):
        own = [row for row in found if (row.kernel, row.variant, row.warps) == key]
        cells = [f"{r.registers}, {r.shared}, {r.fit} ≥ {r.wanted}" for r in own]
        lines.append(" | ".join(["", f"`{key[0]}`", key[1], str(key[2]), *cells, ""]).strip())
    return "\n".join(lines)


def renewed(page: str, found: list[Row]) -> str:
    """The text of a page with its table replaced."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(found)}\n{END}{after}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_resources", description=__doc__)
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, width=100)
    parser.add_argument("--op", action="append", choices=OPERATIONS, help="default: all")
    parser.add_argument("--arch", action="append", type=int, choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="renew the table of this page")
    parser.add_argument("--csv", action="store_true", help="print rows of comma-separated values instead")
    options = parser.parse_args()
    found = rows(options.op or OPERATIONS, options.arch or ARCHITECTURES)
    if options.csv:
        print(",".join(asdict(found[0])))
        for row in found:
            print(",".join(f'"{value}"' for value in astuple(row)))
    else:
        print(table(found))
    if options.write:
        options.write.write_text(renewed(options.write.read_text(), found))
    faults = [f"{row.kernel} {row.variant} sm_{row.arch}: {row.fault}" for row in found if row.fault]
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
