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


def _load_file(path: Path) -> str | None:
    """Load a library that is there; why it cannot be, on one line, or None."""
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        words = str(error.__cause__ or error)  # the loader's own
        return f"{path.name} cannot be loaded into torch {torch.__version__}: {' '.join(words.split())}"
    return None


def _load(path: Path) -> str | None:
    """Load the library that defines the operators; why it cannot be, on one line, or None."""
    if not path.exists():
        if sys.platform == "win32":
            return f"{path.name} is not built: there is no build of the C++ kernels for Windows"
        return (
            f"{path.name} is not built: it is when bkind3d is installed where there is a C++ compiler; install g++ or "
            "clang++, then run pip install --no-build-isolation --no-deps --force-reinstall again"
        )
    if failed := _load_file(path):
        return failed
    try:
        registration.attach("bkind3d")
    except RuntimeError as error:
        return f"{path.name} was built from other sources than this package: {error}; install bkind3d again"
    return None


def _load_cuda(path: Path, definitions: str | None) -> str | None:
    """Load the CUDA kernels of the operators, unless there is a reason that these are not defined."""
    if torch.version.cuda is None:
        return f"the CUDA kernels need a CUDA build of torch, not {torch.__version__}"
    if not path.exists():
        return (
            f"{path.name} is not built: it is when bkind3d is installed where there is nvcc; install the CUDA toolkit, "
            "then run pip install --no-build-isolation --no-deps --force-reinstall again"
        )
    return f"{path.name} needs the C++ kernels: {definitions}" if definitions else _load_file(path)


# At import, once: torch.compile cannot trace the loading.
_REASONS = {"_cpu": _load(FOLDER / "_cpu.so")}
_REASONS["_cuda"] = _load_cuda(FOLDER / "_cuda.so", _REASONS["_cpu"])
_ARCHITECTURES = "" if _REASONS["_cuda"] else torch.ops.bkind3d.cuda_architectures()


def reason(name: str) -> str | None:
    """Why library ``name`` ("_cpu" or "_cuda") is not loaded, or None when it is."""
    return _REASONS[name]


def cpp_unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Why the C++ kernels cannot run on this device type and dtype, or None."""
    if (missing := reason("_cpu")) is not None:
        return missing
    if device != "cpu":
        return f"made for CPU tensors, not {device}"
    return None if dtype in FEATURE_DTYPES else f"{dtype} is not one of float32, bfloat16, float16, float64"


def runs_on(architectures: str, major: int, minor: int) -> bool:
    """Whether code for ``architectures``, such as "8.6 9.0+PTX", runs on a GPU of this compute capability.

    Machine code does on the same major version from its minor version on, PTX on everything later.
    """
    for name in architectures.split():
        own = tuple(int(part) for part in name.removesuffix("+PTX").rstrip("af").split("."))
        if own <= (major, minor) and (own[0] == major or name.endswith("+PTX")):
            return True
    return False


def cuda_unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Why the CUDA kernels cannot run on this device type and dtype, or None. The GPU is the current one."""
    if (missing := reason("_cuda")) is not None:
        return missing
    if device != "cuda":
        return f"made for CUDA tensors, not {device}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    if not runs_on(_ARCHITECTURES, gpu.major, gpu.minor):
        return f"_cuda.so was built for {_ARCHITECTURES}, and this GPU is {gpu.major}.{gpu.minor}"
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
    """Lines for ``python -m bkind3d_kernels.info``: the libraries, or what is missing, and what they are built for."""
    return [*_describe_cpu(), *_describe_cuda()]


def _describe_cpu() -> list[str]:
    if missing := reason("_cpu"):
        return [f"C++      {missing}"]
    try:
        chosen = instruction_set()
    except RuntimeError as error:
        chosen = f"error: {error}"
    variable = f"{ISA_VARIABLE} {os.environ.get(ISA_VARIABLE) or 'unset'}"
    return [f"C++      {FOLDER / '_cpu.so'}", f"         instruction set {chosen} ({variable})"]


def _describe_cuda() -> list[str]:
    if missing := reason("_cuda"):
        return [f"CUDA     {missing}"]
    return [f"CUDA     {FOLDER / '_cuda.so'}", f"         architectures {_ARCHITECTURES}"]
