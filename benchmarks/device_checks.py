"""Does every backend behave on this device?  python -m benchmarks.device_checks --device cuda --out FILE

Right numbers on small scenes are the matter of numerics.py; here are the properties that only a real device can show.
One row for each operation, backend (the reference is what they are compared with) and check:

- sizes: outputs and gradients of the operation's first workload, in every dtype and variant, against float64;
- determinism: with torch.use_deterministic_algorithms, repeated calls give equal outputs and gradients, to the bit;
- poison: memory that torch.empty returns holds NaN, and none comes through;
- strides: inputs and gradients of outputs that are not contiguous;
- empty batch: no samples give empty outputs and zero gradients;
- autocast: bfloat16 autocast changes no bit, forward or backward;
- compile: torch.compile(fullgraph=True) of forward and backward gives the same;
- CUDA graph: forward and backward captured once and replayed on other values;
- second stream: inputs made on another stream, results used on this one;
- second device: tensors on a GPU that is not the current one;
- huge: more than 2³¹ elements; parts of the result against the reference on these parts.

Exit status 1 if a row fails. On the CPU those that need a GPU are skipped, and torch.compile does not generate code.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bkind3d_kernels import explain
from bkind3d_kernels.backends import BACKENDS, OPERATIONS

from . import numerics, parts
from .measure import Skipped, largest_error
from .problems import Case, Problem, Workload, cotangents, operation

COLUMNS = ("device", "op", "backend", "check", "status", "reason", "seconds")
REPEATS = 6  # so that a race has a chance to show
CLOSE = 1e-4  # float32: sums in another order, in units of the largest magnitude
CLOSE_LOW = 2e-2  # bfloat16 and float16: a few roundings
SLEEP_CYCLES = 20_000_000  # about 10 ms of a GPU's clock
FEW = 3  # a huge problem is that many parts, repeated
PARTS_SEEN = 24  # of a huge problem
HUGE_ELEMENTS = 2**31


class Wrong(Exception):
    """A check found something; the message says what."""


@dataclass
class Trial:
    """A function of named tensors that take gradients, with values for them; its outputs' gradients are made once."""

    name: str
    leaves: dict[str, Tensor]
    call: Callable[..., list[Tensor]]
    cotangents: list[Tensor] | None = None

    def run(self, leaves: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Outputs and all gradients by name."""
        given = {name: value.detach().requires_grad_() for name, value in (leaves or self.leaves).items()}
        outputs = self.call(**given)
        if self.cotangents is None:
            self.cotangents = cotangents([o.detach() for o in outputs], outputs[0].dtype)
        gradients = torch.autograd.grad(outputs, list(given.values()), self.cotangents)
        values = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
        return values | {f"gradient of {name}": gradient for name, gradient in zip(given, gradients)}

    def compare(self, found: dict[str, Tensor], expected: dict[str, Tensor], *, exact: bool = False) -> None:
        """Raise :class:`Wrong` unless all is equal to the bit, or close."""
        for name, value in expected.items():
            got = found[name]
            where = f"{self.name}: {name}"
            if got.shape != value.shape or got.dtype != value.dtype:
                raise Wrong(f"{where} is {tuple(got.shape)} {got.dtype}, not {tuple(value.shape)} {value.dtype}")
            if exact and not torch.equal(got, value):
                count = int((got != value).sum())
                raise Wrong(f"{where} differs in {count} of {value.numel()} elements")
            error = largest_error([got], [value.double()])
            allowed = CLOSE if value.dtype in (torch.float32, torch.float64) else CLOSE_LOW
            if not error <= allowed:
                raise Wrong(f"{where} is off by {error:.1e} of the largest, {allowed:.0e} is allowed")


@dataclass(frozen=True)
class Subject:
    """An operation in one backend on one device."""

    op: str
    backend: str
    device: str

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def dtypes(self, *wanted: torch.dtype) -> list[torch.dtype]:
        return [dtype for dtype in wanted if dtype in operation(self.op).DTYPES]

    def scenes(self, dtype: torch.dtype = torch.float32) -> Iterator[Trial]:
        """Small problems with every option and all gradients."""
        for scene in numerics.scenes():
            if scene.op == self.op:
                name = f"{scene.options}, {str(dtype).removeprefix('torch.')}"
                yield Trial(name, scene.leaves(dtype, self.device), scene.function(self.backend, self.device))

    def cases(self, dtype: torch.dtype = torch.float32) -> Iterator[Case]:
        """The first workload in its variants; on the CPU the smallest."""
        module = operation(self.op)
        workload = module.WORKLOADS[0] if self.cuda else module.SMALLEST
        for variant in module.VARIANTS:
            yield Case(self.op, workload, variant, dtype, self.device)

    def workloads(self, dtype: torch.dtype = torch.float32) -> Iterator[Trial]:
        for case in self.cases(dtype):
            yield trial(case, self.backend, case.make())

    def all(self) -> Iterator[Trial]:
        yield from self.scenes()
        yield from self.workloads()

    def mixed(self) -> Iterator[Trial]:
        """Every option in float32, every variant in bfloat16 where the operation takes it."""
        yield from self.scenes()
        yield from self.workloads(*self.dtypes(torch.bfloat16))

    def need_cuda(self) -> None:
        if not self.cuda:
            raise Skipped("needs a GPU")


def trial(case: Case, backend: str, problem: Problem) -> Trial:
    """One backend on one problem of the benchmarks."""

    def call(**leaves: Tensor) -> list[Tensor]:
        return case.module.apply(problem.inputs | leaves, case.workload, backend)

    leaves = {name: problem.inputs[name] for name in problem.differentiable}
    dtype = str(case.dtype).removeprefix("torch.")
    return Trial(f"{case.workload.name}, {case.variant}, {dtype}", leaves, call)


@contextmanager
def deterministic() -> Iterator[None]:
    """Torch's deterministic mode; it also fills what torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# The checks. Each raises Wrong, or whatever the operation raises, when something is wrong; Skipped where it cannot run.


def sizes(subject: Subject) -> None:
    for dtype in operation(subject.op).DTYPES:
        for case in subject.cases(dtype):
            problem = case.make()
            measured, usual = trial(case, subject.backend, problem), trial(case, "reference", problem)
            exact = trial(replace(case, dtype=torch.float64), "reference", problem.double())
            found = measured.run()
            assert measured.cotangents is not None
            usual.cotangents = measured.cotangents
            exact.cotangents = [c.double() for c in measured.cotangents]
            expected, yardstick = exact.run(), usual.run()
            for name, value in expected.items():
                error = largest_error([found[name]], [value])
                geometry = any(part in name for part in numerics.GEOMETRY)
                least = numerics.TOLERANCES.get(dtype, (numerics.LEAST,) * 2)[geometry]
                allowed = max(least, 3 * largest_error([yardstick[name]], [value]))
                if not error <= allowed:
                    raise Wrong(f"{measured.name}: {name} is off by {error:.1e} of the largest, {allowed:.1e} allowed")


def determinism(subject: Subject) -> None:
    with deterministic():
        for each in (*subject.mixed(), *subject.workloads()):
            first = each.run()
            for _ in range(REPEATS - 1):
                each.compare(each.run(), first, exact=True)


def poison(subject: Subject) -> None:
    for each in subject.mixed():
        expected = each.run()
        with deterministic():
            filled = each.run()
        if subject.cuda:
            _leave_nan_behind()
        for found in (filled, each.run()):
            for name, value in found.items():
                if not value.isfinite().all():
                    raise Wrong(f"{each.name}: {name} holds memory that was not written")
            each.compare(found, expected)


def _leave_nan_behind() -> None:
    """Fill the blocks that the caching allocator will hand out next; where it is not deterministic, torch does not."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    blocks = [torch.full((count // 4,), math.nan, device="cuda") for count in [2**18] * 64 + [2**26] * 8]
    del blocks


def strides(subject: Subject) -> None:
    for each in subject.scenes():
        expected = each.run()
        assert each.cotangents is not None
        layouts: list[Callable[[Tensor], Tensor]] = [_every_second, _transposed]
        for layout in layouts:
            changed = replace(each, cotangents=[layout(c) for c in each.cotangents])
            each.compare(changed.run({name: layout(t.detach()) for name, t in each.leaves.items()}), expected)
        expanded = replace(each, cotangents=[torch.ones_like(c[:1, :1]).expand_as(c) for c in each.cotangents])
        filled = replace(each, cotangents=[torch.ones_like(c) for c in each.cotangents])
        each.compare(expanded.run(), filled.run())


def _every_second(tensor: Tensor) -> Tensor:
    """The same values, NaN in memory between them."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), math.nan)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def _transposed(tensor: Tensor) -> Tensor:
    """The same values, the last two dimensions swapped in memory."""
    return _every_second(tensor) if tensor.ndim < 2 else tensor.mT.contiguous().mT


def empty_batch(subject: Subject) -> None:
    dims, _ = _independent(subject.op, "N")
    case = Case(subject.op, operation(subject.op).SMALLEST, "", torch.float32, subject.device)
    for variant in operation(subject.op).VARIANTS:
        full = replace(case, variant=variant).make()
        problem = _select(full, dims, torch.empty(0, dtype=torch.int64, device=subject.device))
        each = trial(replace(case, variant=variant), subject.backend, problem)
        each.compare(each.run(), trial(case, "reference", problem).run(), exact=True)


def autocast(subject: Subject) -> None:
    eye = torch.eye(8, device=subject.device)
    for each in subject.mixed():
        with deterministic():
            expected = each.run()
            with torch.autocast(torch.device(subject.device).type, dtype=torch.bfloat16):
                if (eye @ eye).dtype != torch.bfloat16:
                    raise Wrong("autocast was not on")
                found = each.run()
        each.compare(found, expected, exact=True)


def compiled(subject: Subject) -> None:
    each = next(subject.scenes())
    torch.compiler.reset()
    call = torch.compile(each.call, fullgraph=True, backend="inductor" if subject.cuda else "aot_eager")
    expected = each.run()
    each.compare(replace(each, call=call).run(), expected)


def cuda_graph(subject: Subject) -> None:
    subject.need_cuda()
    for each in subject.all():
        static = {name: value.detach().clone() for name, value in each.leaves.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                each.run(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = each.run(static)
        for scale in (1.0, 0.9, 1.1):
            new = {name: scale * value.detach() for name, value in each.leaves.items()}
            for name, value in new.items():
                static[name].copy_(value)
            for value in captured.values():
                value.fill_(math.nan)  # so that a replay has to write all of it
            graph.replay()
            each.compare(captured, each.run(new))


def second_stream(subject: Subject) -> None:
    subject.need_cuda()
    for each in subject.all():
        expected = each.run()
        buffers = {name: torch.full_like(value, math.nan).detach() for name, value in each.leaves.items()}
        torch.cuda.synchronize()
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP_CYCLES)  # what runs on any other stream reads NaN
            for name, buffer in buffers.items():
                buffer.copy_(each.leaves[name].detach())
            found = each.run(buffers)
        current.wait_stream(side)
        for value in found.values():
            value.record_stream(current)
        each.compare(found, expected)


def second_device(subject: Subject) -> None:
    subject.need_cuda()
    if torch.cuda.device_count() < 2:
        raise Skipped("there is one GPU")
    other = replace(subject, device="cuda:1")
    for there, here in zip(other.scenes(), subject.scenes()):
        expected = {name: value.to("cuda:1") for name, value in here.run().items()}
        assert here.cotangents is not None
        there.cotangents = [c.to("cuda:1") for c in here.cotangents]
        here.compare(there.run(), expected)


def huge(subject: Subject) -> None:
    subject.need_cuda()
    workloads = getattr(operation(subject.op), "HUGE", ())
    if not workloads:
        raise Skipped(f"benchmarks/{subject.op}.py names no huge workload")
    with _alone():
        for workload, dtype, parameter in workloads:
            # The problem, its gradients, copies in another layout.
            needed, free = 6 * HUGE_ELEMENTS * dtype.itemsize, torch.cuda.mem_get_info()[0]
            if free < needed:
                raise Skipped(f"{workload.name}: about {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} are free")
            try:
                repeated(subject, workload, dtype, parameter)
            except torch.OutOfMemoryError:
                raise Skipped(f"{workload.name}: out of GPU memory") from None
            finally:
                gc.collect()
                torch.cuda.empty_cache()


def repeated(subject: Subject, workload: Workload, dtype: torch.dtype, parameter: str) -> None:
    """A few independent parts repeated many times: each part of the result must be that of the part alone in float64.

    In float32 the reference itself is off: by 0.4 % of a softmax's mean over 400³ voxels.
    """
    dims, out = _independent(subject.op, parameter)
    count = workload.parameters[parameter]
    index = torch.arange(count, device=subject.device) % FEW
    small = replace(workload, parameters=workload.parameters | {parameter: FEW})
    case = Case(subject.op, small, operation(subject.op).VARIANTS[0], dtype, subject.device)
    few = case.make()
    reference = trial(case, "reference", few)
    usual = reference.run()
    assert reference.cotangents is not None
    exact = trial(replace(case, dtype=torch.float64), "reference", few.double())
    exact.cotangents = [c.double() for c in reference.cotangents]
    expected = {name: value.to(usual[name].dtype) for name, value in exact.run().items()}
    many = trial(replace(case, workload=workload), subject.backend, _select(few, dims, index))
    many.cotangents = [c.index_select(out, index) for c in reference.cotangents]
    found = many.run()
    if max(value.numel() for value in found.values()) <= HUGE_ELEMENTS:
        raise Wrong(f"{workload.name} has too few elements to show anything")
    axes = {name: out for name in found if name.startswith("output")}
    axes |= {f"gradient of {name}": dims[name] for name in few.differentiable if name in dims}
    for part in sorted({round(i * (count - 1) / (PARTS_SEEN - 1)) for i in range(PARTS_SEEN)}):
        got = {name: found[name].select(axis, part) for name, axis in axes.items()}
        wanted = {name: expected[name].select(axis, part % FEW) for name, axis in axes.items()}
        replace(many, name=f"{workload.name}, part {part} of {count}").compare(got, wanted)


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time: each of them may need most of the memory."""
    with (Path(tempfile.gettempdir()) / f"bkind3d-huge-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _independent(op: str, parameter: str) -> tuple[dict[str, int], int]:
    slices = getattr(operation(op), "SLICES", {})
    if parameter not in slices:
        raise Skipped(f"benchmarks/{op}.py names no slices along {parameter}")
    return slices[parameter]


def _select(problem: Problem, dims: dict[str, int], index: Tensor) -> Problem:
    """Parts of a problem, by their index along the dimensions of its inputs."""
    inputs = {
        name: value.detach().index_select(dims[name], index) if name in dims else value
        for name, value in problem.inputs.items()
    }
    return Problem(inputs, problem.differentiable)


CHECKS: dict[str, Callable[[Subject], None]] = {
    "sizes": sizes,
    "strides": strides,
    "empty batch": empty_batch,
    "determinism": determinism,
    "poison": poison,
    "autocast": autocast,
    "CUDA graph": cuda_graph,
    "second stream": second_stream,
    "second device": second_device,
    "compile": compiled,
    "huge": huge,
}
# A process does one of these groups for one operation and backend; compilation takes about as long in each.
GROUPS = (
    ("sizes", "strides", "empty batch"),
    ("determinism", "poison", "autocast"),
    ("CUDA graph", "second stream", "second device", "compile", "huge"),
)


def subjects(device: str, ops: list[str], backends: list[str] | None) -> list[Subject]:
    """Every operation in every backend that runs on the device, or in those named; not the reference."""
    return [
        Subject(op, line.backend, device)
        for op in ops
        for line in explain(op, device=device)
        if line.available and line.backend in (backends or BACKENDS) and line.backend != "reference"
    ]


def rows(chosen: list[Subject], checks: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each subject and check."""
    for subject in chosen:
        lost: str | None = None
        for check in checks:
            row = {"device": subject.device, "op": subject.op, "backend": subject.backend, "check": check}
            if lost is not None:
                yield row | {"status": "failed", "reason": f"not run: the GPU was lost in {lost}"}
                continue
            start = time.monotonic()
            status, reason = _outcome(subject, CHECKS[check])
            if status == "failed" and subject.cuda and not _usable():
                lost = check
            yield row | {"status": status, "reason": reason, "seconds": f"{time.monotonic() - start:.1f}"}


def _outcome(subject: Subject, check: Callable[[Subject], None]) -> tuple[str, str]:
    try:
        check(subject)
    except Skipped as why:
        return "skipped", str(why)
    except Wrong as why:
        return "failed", str(why)
    except Exception as error:  # noqa: BLE001  a failure is a row, and the others go on
        return "failed", f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return "passed", ""


def _usable() -> bool:
    """Whether the GPU still answers this process: after an invalid access it never does again."""
    try:
        torch.cuda.synchronize()
        return bool(torch.ones((), device="cuda") == 1)
    except RuntimeError:
        return False


def table(found: list[dict[str, Any]]) -> str:
    """Operations and backends down, checks across."""
    checks = [check for check in CHECKS if any(row["check"] == check for row in found)]
    lines = [f"{'operation':<22}{'backend':<9}" + "".join(f"{check:>14}" for check in checks)]
    for key in dict.fromkeys((row["op"], row["backend"]) for row in found):
        own = {row["check"]: row["status"] for row in found if (row["op"], row["backend"]) == key}
        lines.append(f"{key[0]:<22}{key[1]:<9}" + "".join(f"{own.get(check, '-'):>14}" for check in checks))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run, write, print; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device_checks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="CSV file for the rows")
    parser.add_argument("--op", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="default: all")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="default: all that run but the reference")
    parser.add_argument("--check", nargs="+", choices=CHECKS, default=list(CHECKS), help="default: all")
    parser.add_argument("--jobs", type=int, help="processes at once; default 1 on the CPU, on CUDA most cores")
    parser.add_argument("--seconds", type=float, default=180, help="limit for processes of their own; default 180")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no GPU here", file=sys.stderr)
        return 2
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses to be deterministic
    chosen = subjects(options.device, options.op, options.backend)
    jobs = options.jobs or parts.default_jobs(options.device)
    source = rows(chosen, options.check)
    if jobs > 1:
        source = parts.rows(f"{__package__}.device_checks", _parts(chosen, options.check), jobs, options.seconds)
    found = parts.collect(source, options.out, COLUMNS)
    if not found:
        print(f"no backend but the reference runs on {options.device}")
        return 0
    print(table(found))
    for row in found:
        if row["status"] != "passed":
            print(f"{row['status']}: {row['op']} {row['backend']}, {row['check']}: {row['reason']}")
    return 1 if any(row["status"] == "failed" for row in found) else 0


def _parts(chosen: list[Subject], checks: list[str]) -> list[parts.Part]:
    """A process for each subject and group of checks."""
    groups = [tuple(check for check in group if check in checks) for group in GROUPS]
    return [
        parts.Part(
            ("--jobs", "1", "--device", s.device, "--op", s.op, "--backend", s.backend, "--check", *group),
            {"device": s.device, "op": s.op, "backend": s.backend, "check": f"one of {', '.join(group)}"},
        )
        for s in chosen
        for group in groups
        if group
    ]


if __name__ == "__main__":
    parts.leave(main())
