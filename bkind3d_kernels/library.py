"""The shared libraries of compiled kernels: loaded once, and the reason kept where one cannot be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import registration
from .checks import FEATURE_DTYPES

FOLDER = Path(__file__).parent
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
ISA_VARIABLE = "BKIND3D_CPU_ISA"

_REASONS: dict[str, str | None] = {}


def reason(name: str) -> str | None:
    """Why library ``name`` ("_cpu") is not loaded, or None when it is. The first call loads it."""
    if name not in _REASONS:
        _REASONS[name] = _load(FOLDER / f"{name}.so")
    return _REASONS[name]


def _load(path: Path) -> str | None:
    if not path.exists():
        return (
            f"{path.name} is not built: no C++ compiler was found at installation; install g++ or clang++, then "
            "pip install --no-build-isolation again"
        )
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:  # the loader's own words, on one line
        return f"{path.name} cannot be loaded into torch {torch.__version__}: {' '.join(str(error).split())}"
    registration.attach("bkind3d")
    return None


def cpp_unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Why the C++ kernels cannot run on this device type and dtype, or None."""
    if (missing := reason("_cpu")) is not None:
        return missing
    if device != "cpu":
        return f"made for CPU tensors, not {device}"
    return None if dtype in FEATURE_DTYPES else f"{dtype} is not one of float32, bfloat16, float16, float64"


def instruction_set() -> str | None:
    """The instruction set that the C++ kernels use, one of :data:`INSTRUCTION_SETS`; None when they are not built.

    The best of the processor, or what the environment variable BKIND3D_CPU_ISA names when the library is loaded.
    """
    return None if reason("_cpu") else torch.ops.bkind3d.cpu_instruction_set()


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run the C++ kernels with another instruction set, for tests and measurements; for the whole process.

    Raises:
        RuntimeError: the processor does not have it, or no set has that name.
    """
    before = torch.ops.bkind3d.cpu_instruction_set()
    torch.ops.bkind3d.set_cpu_instruction_set(name)
    try:
        yield
    finally:
        torch.ops.bkind3d.set_cpu_instruction_set(before)


def describe() -> list[str]:
    """Lines for ``python -m bkind3d_kernels.info``."""
    missing = reason("_cpu")
    state = missing or f"{FOLDER / '_cpu.so'}, instruction set {instruction_set()}"
    return [f"C++      {state}", f"{ISA_VARIABLE}  {os.environ.get(ISA_VARIABLE) or 'unset'}"]
