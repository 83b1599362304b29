"""The CUDA kernels and their faces as C++ on the CPU (cuda_emulation.h): operators of the namespace
``bkind3d_emulated``, for tests.

Built with ninja when a source has changed, once for each sanitizer that is asked for.
"""

import ctypes
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ninja
import torch
from filelock import FileLock  # torch depends on it
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from bkind3d_kernels import registration

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
NAMESPACE = "bkind3d_emulated"
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
SOURCES = [*KERNELS, *(path.with_suffix(".cpp") for path in KERNELS)]  # and their faces
OPERATIONS = tuple(path.stem for path in KERNELS)
COMPILER = shutil.which("g++")
MISSING = None if COMPILER and sys.platform == "linux" and platform.machine() == "x86_64" else "needs g++ on x86-64"
SANITIZERS = {
    "": "",
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": "-fsanitize=thread",
}
FLAGS = [
    "-std=c++20",
    "-g1",  # lines for the sanitizers' reports
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-unknown-pragmas",
]


def build(target: str, sanitizer: str = "") -> Path:
    """``emulation.so`` or the program ``probe``, with a sanitizer of :data:`SANITIZERS`."""
    folder = ROOT / "build/tests/emulation" / (sanitizer or "plain")
    flags = [
        *FLAGS,
        "-O1" if sanitizer else "-O2",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{HERE}",
        f"-I{ROOT}",
    ]
    flags += [word for path in include_paths() for word in ("-isystem", path)]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-ltorch"]
    instrument = SANITIZERS[sanitizer]
    lines = [
        f"flags = {shlex.join(flags)}",
        "rule compile",
        f"  command = {COMPILER} -MD -MF $out.d $flags $more -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {COMPILER} {instrument} $in $more -o $out",
        f"build cuda_emulation.o: compile {HERE / 'cuda_emulation.cpp'}",
        f"  more = {f'-DEMULATION_{sanitizer.upper()}' if sanitizer else ''}",
    ]
    for path in [*SOURCES, HERE / "emulation_probe.cu"]:
        lines.append(f"build {path.name}.o: compile {path}")
        lines.append(f"  more = {instrument} -include cuda_emulation.h -x c++")
    lines += [
        f"build emulation.so: link {' '.join(f'{path.name}.o' for path in SOURCES)} cuda_emulation.o",
        f"  more = -shared {shlex.join(libraries)}",
        "build probe: link emulation_probe.cu.o cuda_emulation.o",
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # the processes of a test run share the folder
        (folder / "build.ninja").write_text("\n".join(lines))
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "--quiet", "-C", str(folder), target], check=True)
    return folder / target


@cache
def load(path: Path | None = None) -> ctypes.CDLL:
    """Load the library, built here if no path is given, and give its operators what those of every family have."""
    path = path or build("emulation.so")
    for op in OPERATIONS:
        for name in (op, f"{op}_backward"):
            torch.library.define(f"{NAMESPACE}::{name}", registration.SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
    torch.ops.load_library(str(path))
    registration.attach(NAMESPACE, OPERATIONS)
    return ctypes.CDLL(str(path))


def _unproject(features: Any, q: Any, shape: Any, aggregation: str, unseen: str, mask: Any, weights: Any) -> Any:
    return registration.call(NAMESPACE, "unproject", features, q, mask, weights, shape, aggregation, unseen)


def _soft_argmax3d(logits: Tensor, temperature: float, covariance: bool) -> Any:
    mean, peak, second, *_ = registration.call(NAMESPACE, "soft_argmax3d", logits, temperature, covariance)
    return mean, peak, second if covariance else None


def _rasterize_edges(keypoints: Tensor, weights: Tensor, edges: Tensor, sizes: Any, sigmas: Any) -> Any:
    flat = [length for size in sizes for length in size]
    return registration.call(NAMESPACE, "rasterize_edges", keypoints, weights, edges, flat, sigmas)[0]


def _group_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, groups: int, eps: float, activation: str
) -> Tensor:
    return registration.call(NAMESPACE, "group_norm_act", x, weight, bias, residual, groups, eps, activation)[0]


_RUN = {
    "unproject": _unproject,
    "soft_argmax3d": _soft_argmax3d,
    "rasterize_edges": _rasterize_edges,
    "group_norm_act": _group_norm_act,
}


def backend(op: str) -> Any:
    """What bkind3d_kernels/cuda_ops has for an operation, for CPU tensors."""
    load()
    return SimpleNamespace(unavailable=lambda device, dtype: None, run=_RUN[op])


@contextmanager
def order(*, descending: bool) -> Iterator[None]:
    """Blocks, and the threads of a block, run from the last to the first."""
    library = load()
    library.emulation_descending(int(descending))
    try:
        yield
    finally:
        library.emulation_descending(0)
