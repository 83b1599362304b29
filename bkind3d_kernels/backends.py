"""Which implementation of an operation runs, and why.

A backend of an operation is one module, ``bkind3d_kernels.<folder>.<stem>``, with two functions:

- ``unavailable(device, dtype)`` returns None when the backend can run on that device type and dtype, else the reason;
- ``run(...)`` computes the operation; its signature is that of ``reference/<stem>.py``.

Modules are found by their place when the package is imported: a backend is added by adding files. A folder whose
modules need something that is not installed says so in ``MISSING``, and none of them is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

OPERATIONS = ("unproject", "soft_argmax3d", "linear_soft_argmax3d", "rasterize_edges", "group_norm_act")
ENVIRONMENT_VARIABLE = "BKIND3D_BACKEND"


class Backend(NamedTuple):
    """A backend's folder of implementations and what it is, for messages."""

    folder: str
    description: str


# In the order in which "auto" tries them; docs/benchmarks.md says where another one would be faster.
BACKENDS = {
    "cuda": Backend("cuda_ops", "CUDA kernels for CUDA tensors"),
    "cpp": Backend("cpp_ops", "C++ kernels for CPU tensors"),
    "triton": Backend("triton_ops", "Triton kernels for CUDA tensors"),  # interpreted on CPU tensors, in tests
    "reference": Backend("reference", "plain PyTorch, any device"),
}


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run this call; the message gives the reason."""


class Availability(NamedTuple):
    """One line of :func:`explain`."""

    backend: str
    available: bool
    reason: str


def operations_of(backend: str) -> tuple[str, ...]:
    """The operations that have a module in the folder of ``backend``, whether or not it can run here."""
    package = f"{__package__}.{BACKENDS[backend].folder}"
    if importlib.util.find_spec(package) is None:
        return ()
    return tuple(op for op in OPERATIONS if importlib.util.find_spec(f"{package}.{op}") is not None)


def _find(op: str, backend: str) -> ModuleType | str:
    package = f"{__package__}.{BACKENDS[backend].folder}"
    if op not in operations_of(backend):
        return f"this operation has no {BACKENDS[backend].description}"
    missing = getattr(importlib.import_module(package), "MISSING", None)
    return missing or importlib.import_module(f"{package}.{op}")


_MODULES: dict[tuple[str, str], ModuleType | str] = {}  # or why there is none


def load() -> None:
    """Import every implementation that is there. Called once, by the package."""
    for op in OPERATIONS:
        for backend in BACKENDS:
            _MODULES[op, backend] = _find(op, backend)


def _reason(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run ``op``, or None when it can."""
    module = _MODULES[op, backend]
    return module if isinstance(module, str) else module.unavailable(device, dtype)


def _check_op(op: str) -> None:
    if op not in OPERATIONS:
        raise ValueError(f"op {op!r}: expected one of {', '.join(OPERATIONS)}")


def check_name(backend: str, source: str = "backend") -> None:
    """Raise unless ``backend``, given by ``source``, is "auto" or the name of a backend."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"{source} {backend!r}: expected one of auto, {', '.join(BACKENDS)}")


_KEY = os.environ.encodekey(ENVIRONMENT_VARIABLE)


def _environment() -> str | None:
    """The value of the environment variable now; None where it is not set."""
    # os.environ.get raises and catches an exception then, which is a twentieth of a small problem's time.
    if not torch.compiler.is_compiling() and _KEY not in os.environ._data:  # type: ignore[attr-defined]
        return None
    return os.environ.get(ENVIRONMENT_VARIABLE)


def _requested(backend: str) -> tuple[str, str]:
    """The backend that argument and environment ask for, and where it was said."""
    source = "backend"
    if backend == "auto":
        backend, source = _environment() or "auto", ENVIRONMENT_VARIABLE
    check_name(backend, source)
    return backend, source


def resolve(
    op: str, backend: str = "auto", *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> str:
    """Name of the backend that runs ``op`` on tensors of this device and dtype.

    Args:
        op: one of :data:`OPERATIONS`.
        backend: a name in :data:`BACKENDS`, or "auto". With "auto" the environment variable BKIND3D_BACKEND decides,
            read at each call, and if it is unset the first of them that can run.
        device: device of the features, logits or keypoints.
        dtype: their dtype.

    Raises:
        ValueError: unknown operation or backend name (argument or environment variable).
        BackendUnavailable: the backend that was named cannot run this call. Never a silent fallback.

    Example:
        >>> from bkind3d_kernels import resolve
        >>> resolve("unproject", "reference")
        'reference'
    """
    _check_op(op)
    backend, source = _requested(backend)
    kind = device if isinstance(device, str) else device.type
    if backend != "auto":
        reason = _reason(op, backend, kind, dtype)
        if reason is not None:
            raise BackendUnavailable(f"{source} {backend!r} cannot run {op}: {reason}")
        return backend
    for name in BACKENDS:
        if _reason(op, name, kind, dtype) is None:
            return name
    raise BackendUnavailable(f"no backend can run {op} on {kind} with {dtype}")


def explain(op: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[Availability]:
    """Every backend of ``op``, in the order of "auto", whether it can run on this device and dtype, and why not.

    Example:
        >>> from bkind3d_kernels import explain
        >>> explain("unproject")[-1]
        Availability(backend='reference', available=True, reason='plain PyTorch, any device')
    """
    _check_op(op)
    kind = device if isinstance(device, str) else device.type
    lines = []
    for name in BACKENDS:
        reason = _reason(op, name, kind, dtype)
        lines.append(Availability(name, reason is None, reason or BACKENDS[name].description))
    return lines


def implementation(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """The function that computes ``op``, after :func:`resolve`."""
    module = _MODULES[op, resolve(op, backend, device=device, dtype=dtype)]
    assert not isinstance(module, str)  # resolve() has said so
    return module.run
