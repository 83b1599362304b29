"""3D soft-argmax by ``csrc/cuda/soft_argmax3d.cu``."""

from ..cpp_ops.soft_argmax3d import run
from ..library import cuda_unavailable as unavailable

__all__ = ["run", "unavailable"]
