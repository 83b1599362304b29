"""Unprojection by ``csrc/cuda/unproject.cu``."""

from ..cpp_ops.unproject import run
from ..library import cuda_unavailable as unavailable

__all__ = ["run", "unavailable"]
