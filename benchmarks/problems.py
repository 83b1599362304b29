"""What is measured: workloads, inputs, competitors and floors, for every operation alike.

An operation is one module of this package, named like the operation, with

- ``WORKLOADS``: :class:`Workload` objects, those of the paper and of other projects first, then the scaling sweeps;
- ``BASE``: parameters of the workload around which the sweeps vary one parameter at a time;
- ``SMALLEST``: the workload that warms up a fresh process;
- ``DTYPES``: those it takes;
- ``SLICES``, for ``device_checks``: for each parameter along which parts of the problem do not depend on each other,
  the inputs' dimensions of that size, by name, and that of the outputs;
- ``HUGE``, likewise: (workload, dtype, parameter of ``SLICES``) with more than 2³¹ elements;
- ``VARIANTS``: names of input variants, the default first;
- ``make(workload, variant, dtype, device)``: a :class:`Problem`;
- ``apply(inputs, workload, backend)``: the operation of the library, a list of output tensors;
- ``published(inputs, workload)``: a function without arguments that does the same as the published code does it;
- ``PUBLISHED``: the variants that the published code has;
- ``published_bytes(workload)``: memory that the published algorithm needs at least for forward and backward;
- ``PEERS``: :class:`Peer` objects by name, the algorithms of other projects;
- ``floor(workload, variant, mode, itemsize)``: a :class:`Floor`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bkind3d_kernels import backends, explain

MODES = ("forward", "backward", "both")
BASELINES = ("reference", "compile", "published")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXP = 20  # operations of one exp: range reduction, a polynomial of degree 5 as multiply-adds, the scaling by 2^n

Function = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Workload:
    """Sizes of one problem.

    A point of a sweep is measured without the compiled competitor and without variants; what is made for a GPU is left
    out on the CPU unless it is named.
    """

    name: str
    parameters: dict[str, Any] = field(hash=False)
    sweep: bool = False
    gpu: bool = False

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["parameters"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def shape(self) -> str:
        """One line such as "N=1 M=4 C=32 map=64x64 volume=64x64x64"."""

        def text(value: Any) -> str:
            return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

        return " ".join(f"{key}={text(value)}" for key, value in self.parameters.items())


@dataclass
class Problem:
    """Inputs of one workload; the named ones are leaves that require a gradient."""

    inputs: dict[str, Any]
    differentiable: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in self.differentiable:
            self.inputs[name].requires_grad_()

    @property
    def leaves(self) -> list[Tensor]:
        return [self.inputs[name] for name in self.differentiable]

    def double(self) -> Problem:
        """The same numbers in float64."""
        inputs = {
            name: value.detach().double() if isinstance(value, Tensor) else value.to(dtype=torch.float64)
            for name, value in self.inputs.items()
        }
        return Problem(inputs, self.differentiable)


@dataclass(frozen=True)
class Floor:
    """Bytes that must cross the memory bus and floating-point operations that must be done, whatever the algorithm."""

    read: int
    written: int
    operations: int

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.read + other.read, self.written + other.written, self.operations + other.operations)

    def seconds(self, rates: dict[str, float]) -> float:
        """Bytes at the speed of a copy, operations at that of a matrix product in cache; the larger of the two."""
        return max((self.read + self.written) / rates["copy"], self.operations / rates["flops"])

    def fresh_seconds(self, rates: dict[str, float]) -> float:
        """The same where every result is written to memory that the process touches for the first time."""
        return max(self.read / rates["read"] + self.written / rates["fill_fresh"], self.operations / rates["flops"])


@dataclass(frozen=True)
class Peer:
    """The algorithm of another project, as a competitor.

    Attributes:
        title: What the project is called.
        make: (inputs, workload) to a function without arguments.
        needed_bytes: Memory that it needs at least for forward and backward.
        variants: Those of the operation that it computes.
        package: The package that it calls, if it calls one.
    """

    title: str
    make: Callable[[dict[str, Any], Workload], Function]
    needed_bytes: Callable[[Workload], int]
    variants: tuple[str, ...]
    package: str | None = None

    @property
    def reason(self) -> str | None:
        """Why it cannot run here, or None if it can."""
        absent = self.package is not None and importlib.util.find_spec(self.package) is None
        return f"{self.package} is not installed" if absent else None


@dataclass(frozen=True)
class Case:
    """One workload in one variant, dtype and device."""

    op: str
    workload: Workload
    variant: str
    dtype: torch.dtype
    device: str

    @property
    def module(self) -> ModuleType:
        return operation(self.op)

    @property
    def label(self) -> str:
        return f"{self.op} {self.workload.name} {self.variant}"

    def make(self) -> Problem:
        return self.module.make(self.workload, self.variant, self.dtype, self.device)

    def floor(self, mode: str) -> Floor:
        return self.module.floor(self.workload, self.variant, mode, self.dtype.itemsize)


def operation(op: str) -> ModuleType:
    """The module of this package that describes an operation."""
    return importlib.import_module(f"{__package__}.{op}")


def competitors(op: str, device: str, dtype: torch.dtype, variant: str | None = None) -> dict[str, str | None]:
    """Every competitor and why it cannot run here, or None if it can; with a variant, those that compute it."""
    module = operation(op)
    found: dict[str, str | None] = dict.fromkeys(BASELINES)
    if variant is not None and variant not in module.PUBLISHED:
        del found["published"]
    found |= {name: peer.reason for name, peer in module.PEERS.items() if variant in (None, *peer.variants)}
    for line in explain(op, device=device, dtype=dtype):
        if line.backend == "triton" and device == "cpu" and line.available:
            found["triton"] = "interpreted on CPU tensors: for tests of its numbers, there is no speed to measure"
        elif line.backend != "reference":
            found[line.backend] = None if line.available else line.reason
    return found


def known_peers() -> dict[str, Peer]:
    return {name: peer for op in backends.OPERATIONS for name, peer in operation(op).PEERS.items()}


def known_competitors() -> list[str]:
    return [*BASELINES, *known_peers(), *(name for name in backends.BACKENDS if name != "reference")]


def function(case: Case, competitor: str, problem: Problem) -> Function:
    """The call that is measured."""
    workload = case.workload
    if competitor == "published":
        return case.module.published(problem.inputs, workload)
    if competitor in case.module.PEERS:
        return case.module.PEERS[competitor].make(problem.inputs, workload)
    apply = case.module.apply
    if competitor == "compile":
        compiled, backend = torch.compile(apply, fullgraph=True, dynamic=False), "reference"
        return lambda: compiled(problem.inputs, workload, backend)
    return lambda: apply(problem.inputs, workload, competitor)


def needed_bytes(case: Case, competitor: str) -> int | None:
    """Memory that a competitor needs at least, where that is known beforehand."""
    if competitor == "published":
        return case.module.published_bytes(case.workload)
    peer = case.module.PEERS.get(competitor)
    return peer.needed_bytes(case.workload) if peer else None


def cotangents(outputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Random gradients of the outputs in their memory layout, of numbers that ``dtype`` can hold."""
    device = outputs[0].device
    generator = torch.Generator(device).manual_seed(1)
    return [
        torch.empty_like(o).copy_(torch.randn(o.shape, generator=generator, device=device).to(dtype)) for o in outputs
    ]
