"""``python -m bkind3d_kernels.info``: versions, what is built, and which backend each operation takes, with reasons."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from . import __version__, backends, library


def report() -> str:
    """The text that the command prints."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    names = [f"{torch.cuda.get_device_name(i)} (cuda:{i})" for i in range(torch.cuda.device_count())]
    variable = backends.ENVIRONMENT_VARIABLE
    lines = [
        f"bkind3d  {__version__}, {Path(__file__).resolve().parent}",
        f"python   {platform.python_version()} on {platform.platform()}",
        f"torch    {torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} CPU threads",
        f"devices  {', '.join(['cpu', *names])}",
        f"{variable}  {os.environ.get(variable) or 'unset'}",
        *library.describe(),
    ]
    for op in backends.OPERATIONS:
        for device in devices:
            lines.append(f"\n{op} on {device}, float32: {_pick(op, device)}")
            for line in backends.explain(op, device=device):
                lines.append(f"  {'+' if line.available else '-'} {line.backend:<10} {line.reason}")
    return "\n".join(lines)


def _pick(op: str, device: str) -> str:
    try:
        return backends.resolve(op, device=device)
    except (backends.BackendUnavailable, ValueError) as error:
        return f"error: {error}"


if __name__ == "__main__":
    print(report())
