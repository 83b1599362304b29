"""The operations in Triton for CUDA tensors, as operators of the namespace ``bkind3d_triton``.

With TRITON_INTERPRET=1 set before this package is imported the same kernels are interpreted, on CPU tensors: for tests,
thousands of times slower than any other backend.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module, util
from typing import Any

import torch
from torch import Tensor

from .. import registration
from ..checks import FEATURE_DTYPES

NAMESPACE = "bkind3d_triton"
OLDEST = (3, 6)


def _missing() -> str | None:
    if util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (CUDA builds of torch bring it along)"
    version = import_module("triton").__version__  # distributions that have it go by several names
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"Triton {version} is too old: {'.'.join(map(str, OLDEST))} or newer is needed"
    return None


MISSING = _missing()  # why no module of this folder can be imported, or None
INTERPRETED = False
if MISSING is None:
    import triton

    INTERPRETED = bool(triton.knobs.runtime.interpret)


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on this device type and dtype, or None."""
    if INTERPRETED and device != "cpu":
        return f"TRITON_INTERPRET is set: interpreted on CPU tensors, not {device}"
    if not INTERPRETED and device != "cuda":
        return f"made for CUDA tensors, not {device}"
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    return None if dtype in FEATURE_DTYPES else f"{dtype} is not one of float32, bfloat16, float16, float64"


def define(op: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
    """Make the operators ``op`` and ``op_backward`` of these two functions, with everything that goes around them."""
    for name, function in ((op, forward), (f"{op}_backward", backward)):
        qualified = f"{NAMESPACE}::{name}"
        torch.library.define(qualified, registration.SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "CPU" if INTERPRETED else "CUDA", function)
    registration.attach(NAMESPACE, (op,))


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Around each launch: Triton launches on the current device, which need not be the tensor's."""
    return nullcontext() if INTERPRETED else torch.cuda.device(tensor.device)


def double_bits(value: float) -> int:
    """The bits of a double, as an integer argument: Triton rounds a floating one to float."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched for one dtype and configuration, to be compiled ahead of time.

    Attributes:
        name: dtype, options and configuration, in a few words.
        kernel: the jitted function.
        types: Triton's type of each argument that is not constant, such as "*fp32", "i32", "i64", "fp32".
        constants: value of each ``tl.constexpr`` argument, and None for absent tensors.
        aligned: arguments whose address or value the launcher knows to be divisible by 16.
        warps: num_warps.
        stages: num_stages.
        programs: how many programs a multiprocessor must hold at once, by registers and shared memory.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 2
    programs: int = 2
