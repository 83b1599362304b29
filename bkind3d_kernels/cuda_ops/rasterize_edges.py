"""Edge maps by ``csrc/cuda/rasterize_edges.cu``."""

from ..cpp_ops.rasterize_edges import run
from ..library import cuda_unavailable as unavailable

__all__ = ["run", "unavailable"]
