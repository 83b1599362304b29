"""Numbers of the launches and kernels of more than one operation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}
NARROW = 2**31 - 1  # the largest offset in 32 bits


@triton.jit
def as_double(bits):
    """A number given as the bits of a double, as scalar arguments are rounded to float."""
    return bits.to(tl.float64, bitcast=True)
