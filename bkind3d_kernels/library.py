"""The shared libraries of compiled kernels: loaded once, and the reason kept where one cannot be."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import registration
from .checks import FEATURE_DTYPES

FOLDER = Path(__file__).parent
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
ISA_VARIABLE = "BKIND3D_CPU_ISA"


def _load(path: Path) -> str | None:
    """Load a library; why it cannot be, on one line, or None."""
    if not path.exists():
        if sys.platform == "win32":
            return f"{path.name} is not built: there is no build of the C++ kernels for Windows"
        return (
            f"{path.name} is not built: it is when bkind3d is installed where there is a C++ compiler; install g++ or "
            "clang++, then run pip install --no-build-isolation --no-deps --force-reinstall again"
        )
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        words = str(error.__cause__ or error)  # the loader's own
        return f"{path.name} cannot be loaded into torch {torch.__version__}: {' '.join(words.split())}"
    try:
        registration.attach("bkind3d")
    except RuntimeError as error:
        return f"{path.name} was built from other sources than this package: {error}; install bkind3d again"
    return None


# At import, once: torch.compile cannot trace the loading.
_REASONS = {"_cpu": _load(FOLDER / "_cpu.so")}


def reason(name: str) -> str | None:
    """Why library ``name`` ("_cpu") is not loaded, or None when it is."""
    return _REASONS[name]


def cpp_unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Why the C++ kernels cannot run on this device type and dtype, or None."""
    if (missing := reason("_cpu")) is not None:
        return missing
    if device != "cpu":
        return f"made for CPU tensors, not {device}"
    return None if dtype in FEATURE_DTYPES else f"{dtype} is not one of float32, bfloat16, float16, float64"


def instruction_set() -> str | None:
    """The instruction set that the C++ kernels use, one of :data:`INSTRUCTION_SETS`; None when they are not built.

    The best of the processor, or what the environment variable BKIND3D_CPU_ISA names at the first call.

    Raises:
        RuntimeError: the variable names no set, or one that the processor does not have.
    """
    return None if reason("_cpu") else torch.ops.bkind3d.cpu_instruction_set()


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run the C++ kernels with another instruction set, for tests and measurements; for the whole process.

    Raises:
        RuntimeError: the processor does not have it, no set has that name, or the kernels are not built.
    """
    if missing := reason("_cpu"):
        raise RuntimeError(missing)
    before = torch.ops.bkind3d.cpu_instruction_set()
    torch.ops.bkind3d.set_cpu_instruction_set(name)
    try:
        yield
    finally:
        torch.ops.bkind3d.set_cpu_instruction_set(before)


def describe() -> list[str]:
    """Lines for ``python -m bkind3d_kernels.info``: the library, or what is missing, and the instruction set."""
    if missing := reason("_cpu"):
        return [f"C++      {missing}"]
    try:
        chosen = instruction_set()
    except RuntimeError as error:
        chosen = f"error: {error}"
    variable = f"{ISA_VARIABLE} {os.environ.get(ISA_VARIABLE) or 'unset'}"
    return [f"C++      {FOLDER / '_cpu.so'}", f"         instruction set {chosen} ({variable})"]
