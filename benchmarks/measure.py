"""Time, memory and errors of one competitor on one problem.

Forward is timed without autograd (inference). Backward is timed in a training step: forward with autograd, then
`torch.autograd.grad` on that fresh graph, with the clock read between the two; "both" is the sum of the step's parts.
No graph is retained, so memory is freed on the way as in training.

On the CPU every competitor lives in a process of its own (`workers.py`), in which its memory is measured first; on CUDA
all share one process.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .problems import Case, Problem, cotangents, function

MIN_SECONDS = 0.02  # a shorter call is repeated on the CPU until this has passed
MAX_REPEATS = 200
FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2
SLACK_BYTES = 2**29  # address space beside tensors: thread stacks and arenas


class Skipped(Exception):
    """A competitor is not measured; the message says why."""


# Time


@functools.cache
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


Marks = tuple[Any, Any]  # of the beginning and the end of a call: seconds on the CPU, events on CUDA


class Clock:
    """Runs functions one after the other, each on the result of the one before, and marks when each begins and ends.

    On CUDA the marks are events, and the L2 cache is filled with zeros before each call. They are turned into
    :meth:`seconds` when many calls have been made, so that the device does not wait for the host after each.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.flush = _flush_buffer() if self.cuda else None

    def __call__(self, *functions: Callable[[Any], Any]) -> tuple[list[Marks], list[Any]]:
        result: Any = None
        results: list[Any] = []
        marks: list[Marks] = []
        for call in functions:
            if self.flush is not None:
                self.flush.zero_()
            start = self._mark()
            result = call(result)
            marks.append((start, self._mark()))
            results.append(result)
        return marks, results

    def seconds(self, marks: Iterable[Marks]) -> list[float]:
        """Length of each call, once all of them have ended."""
        if self.cuda:
            torch.cuda.synchronize()
            return [start.elapsed_time(end) / 1e3 for start, end in marks]
        return [end - start for start, end in marks]

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def repeats(seconds: float) -> int:
    """How often a call of this length is repeated in a round."""
    return max(1, min(MAX_REPEATS, math.ceil(MIN_SECONDS / max(seconds, 1e-9))))


# Errors


def largest_error(values: list[Tensor], truth: list[Tensor]) -> float:
    """Largest absolute difference, in units of the truth's largest magnitude; the worst over the tensors."""
    worst = 0.0
    for value, exact in zip(values, truth):
        if exact.numel():
            difference = (value.detach().to(exact.device).double() - exact).abs_().max().item()
            if math.isnan(difference):
                return math.nan
            worst = max(worst, difference / (exact.abs().max().item() or 1.0))
    return worst


@dataclass
class Truth:
    """Output and gradients of the reference in float64, on the same numbers."""

    outputs: list[Tensor]
    gradients: list[Tensor]

    @classmethod
    def of(cls, case: Case, problem: Problem | None = None) -> Truth:
        exact = (problem or case.make()).double()
        outputs = function(case, "reference", exact)()
        gradients = torch.autograd.grad(outputs, exact.leaves, cotangents([o.detach() for o in outputs], case.dtype))
        return cls([o.detach() for o in outputs], list(gradients))

    def save(self, path: Path) -> Path:
        torch.save((self.outputs, self.gradients), path)
        return path

    @classmethod
    def load(cls, path: Path) -> Truth:
        return cls(*torch.load(path, mmap=True))


# Memory


class CpuMemory:
    """Peak resident memory of this process, from /proc; Linux alone."""

    def start(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
        self.base = self._read("VmRSS")

    def now(self) -> int:
        return self._read("VmRSS") - self.base

    def peak(self) -> int:
        return self._read("VmHWM") - self.base

    @staticmethod
    def _read(name: str) -> int:
        match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert match is not None
        return int(match[1]) * 1024


class CudaMemory:
    """Peak memory of the caching allocator."""

    def start(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.base = torch.cuda.memory_allocated()

    def now(self) -> int:
        return torch.cuda.memory_allocated() - self.base

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.base


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that there was no memory, on the CPU or on a GPU."""
    text = str(error)
    lack = "allocate memory" in text or "bad_alloc" in text
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or lack


@dataclass
class Probe:
    """What one unhurried call of each mode takes: peak bytes above the inputs, seconds, seconds of compilation."""

    peak: dict[str, int]
    seconds: dict[str, float]
    compilation: dict[str, float]


class Contestant:
    """One competitor on one problem, in this process; the problem may be shared with others."""

    def __init__(self, case: Case, competitor: str, problem: Problem | None = None) -> None:
        self.case, self.competitor = case, competitor
        self.problem, self.clock = problem or case.make(), Clock(case.device)
        self.call = function(case, competitor, self.problem)
        self.cotangents: list[Tensor] | None = None
        self.last: tuple[list[Tensor], tuple[Tensor, ...]] | None = None

    def _forward(self, _: Any = None) -> list[Tensor]:
        with torch.no_grad():
            return self.call()

    def _training_forward(self, _: Any = None) -> list[Tensor]:
        return self.call()

    def _backward(self, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        if self.cotangents is None:
            self.cotangents = cotangents([o.detach() for o in outputs], self.case.dtype)
        return torch.autograd.grad(outputs, self.problem.leaves, self.cotangents)

    def probe(self, limit: int) -> Probe:
        """Warm up, then measure memory in one call of each mode, of which none may need more than ``limit`` bytes."""
        if self.case.device == "cuda":
            compilation = self._first_calls()
            memory: CpuMemory | CudaMemory = CudaMemory()
        else:
            _set_malloc_thresholds(2**16)  # what is freed goes back at once, and is not counted as used
            compilation = self._first_calls() if self.competitor == "compile" else self._warm_up()
            memory = CpuMemory()
            limit_address_space(limit)
        try:
            return self._probe(memory, compilation)
        finally:
            if self.case.device == "cpu":
                limit_address_space(None)
                _set_malloc_thresholds(2**25)  # where glibc's own adaptation ends when large blocks are freed

    def _probe(self, memory: CpuMemory | CudaMemory, compilation: dict[str, float]) -> Probe:
        memory.start()
        forward, result = self.clock(self._forward)
        peak = {"forward": memory.peak()}
        del result
        memory.start()
        training, (outputs,) = self.clock(self._training_forward)
        first, held = memory.peak(), memory.now()
        if self.cotangents is None:
            self.cotangents = cotangents([o.detach() for o in outputs], self.case.dtype)
        memory.start()
        backward, _gradients = self.clock(lambda _: self._backward(outputs))
        peak["backward"] = memory.peak()
        peak["both"] = max(first, held + peak["backward"])
        alone, first_part, second_part = self.clock.seconds([*forward, *training, *backward])
        seconds = {"forward": alone, "backward": second_part, "both": first_part + second_part}
        return Probe(peak, seconds, compilation)

    def _warm_up(self) -> dict[str, float]:
        """Load libraries and start threads, on a tiny problem."""
        small = self.case.module.SMALLEST
        tiny = Contestant(replace(self.case, workload=small), self.competitor)
        for _ in range(2):
            tiny.round()
        return {}

    def _first_calls(self) -> dict[str, float]:
        """Wall time of the first call of each mode, where a compiler works in it: torch's or Triton's."""
        if self.competitor == "compile":
            importlib.import_module("torch._inductor.compile_fx")
            torch.compiler.reset()
        start = time.perf_counter()
        self._forward()
        middle = time.perf_counter()
        self._backward(self._training_forward())
        end = time.perf_counter()
        compiles = self.competitor in ("compile", "triton")
        return {"forward": middle - start, "both": end - middle} if compiles else {}

    def round(self, repeats: int = 1) -> dict[str, float]:
        """Seconds of each mode over some repeats: the mean of wall times on the CPU, the median of events on CUDA."""
        forward: list[Marks] = []
        steps: list[Marks] = []  # forward and backward of each training step in turn
        for _ in range(repeats):
            forward += self.clock(self._forward)[0]
        for _ in range(repeats):
            self.last = None
            marks, (outputs, gradients) = self.clock(self._training_forward, self._backward)
            steps += marks
            self.last = [o.detach() for o in outputs], gradients
            del outputs, gradients
        parts = self.clock.seconds(steps)
        backward, both = parts[1::2], [sum(pair) for pair in zip(parts[::2], parts[1::2])]
        average = statistics.median if self.clock.cuda else statistics.fmean
        times = {"forward": self.clock.seconds(forward), "backward": backward, "both": both}
        return {mode: average(seconds) for mode, seconds in times.items()}

    def do_bench(self) -> float | None:
        """Median seconds of the forward pass by `triton.testing.do_bench`: a second clock; None without Triton."""
        try:
            from triton.testing import do_bench
        except ImportError:
            return None
        return do_bench(self._forward, warmup=5, rep=25, return_mode="median") / 1e3

    def errors(self, truth: Truth | Path) -> dict[str, Any]:
        """Errors of the last round."""
        assert self.last is not None
        truth = truth if isinstance(truth, Truth) else Truth.load(truth)
        outputs, gradients = self.last
        each = {
            name: largest_error([value], [exact])
            for name, value, exact in zip(self.problem.differentiable, gradients, truth.gradients)
        }
        return {
            "error_output": largest_error(outputs, truth.outputs),
            "error_gradient": largest_error(list(gradients), truth.gradients),
            "error_gradients": "; ".join(f"{name} {error:.1e}" for name, error in each.items()),
        }

    def close(self) -> None:
        """Let go of every tensor."""
        self.__dict__.clear()


def _set_malloc_thresholds(size: int) -> None:
    """From which size blocks are mapped by themselves, and freed at once (glibc alone)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, size)
        mallopt(m_trim_threshold, 2 * size)


def limit_address_space(more: int | None) -> None:
    """Let this process take so many more bytes, or as many as it likes."""
    limit = resource.RLIM_INFINITY
    if more is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + more + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
