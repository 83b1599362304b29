"""Group normalisation with a residual and a ReLU by ``csrc/cuda/group_norm_act.cu``."""

from ..cpp_ops.group_norm_act import run
from ..library import cuda_unavailable as unavailable

__all__ = ["run", "unavailable"]
