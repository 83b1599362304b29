"""The machine: what it is, and its measured speeds."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import bkind3d_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "bkind3d")


def cpu_name() -> str:
    """Name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def slug(device: str) -> str:
    """Short name of the machine, for a folder."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}-{os.cpu_count()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def memory_available() -> int:
    """Bytes that new tensors may take without swapping."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert match is not None
    return int(match[1]) * 1024


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(device: str) -> dict[str, Any]:
    """What a reader needs in order to compare."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "gpu_memory": torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None,
        "cuda": torch.version.cuda,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_available": memory_available(),
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "packages": {package: _version(package) for package in PACKAGES},
        "kernels": str(Path(bkind3d_kernels.__file__).resolve().parent),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("COMMIT"),
        "dirty": None if changes is None else bool(changes),
    }


def _fastest(call: Callable[[], object], synchronize: Callable[[], object], rounds: int = 7) -> float:
    """Seconds of the fastest of several calls."""
    times = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def rates(device: str) -> dict[str, float]:
    """Measured bytes and floating-point operations per second, the best of several calls each.

    copy: a tensor far larger than the caches to another, bytes read and written. read: its sum. fill: zeros written to
    memory touched before. fill_fresh: zeros written to newly allocated memory (on CUDA the allocator keeps memory, so
    this is fill). flops: float32 matrix product of operands that fit into the caches, two operations per multiply-add.
    """
    cuda = device == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    size = 2**30 if cuda else 2**28
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    side, products = (8192, 4) if cuda else (384, 20)  # the CPU's operands take 0.6 MB each
    a, b = torch.rand(side, side, device=device), torch.rand(side, side, device=device)
    c = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(products):
            torch.mm(a, b, out=c)

    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        fill = size / _fastest(target.zero_, synchronize)
        return {
            "copy": 2 * size / _fastest(lambda: target.copy_(source), synchronize),
            "read": size / _fastest(source.sum, synchronize),
            "fill": fill,
            "fill_fresh": fill if cuda else size / _fastest(lambda: torch.ones(size // 4), synchronize),
            "flops": products * 2 * side**3 / _fastest(multiply, synchronize),
        }
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
