"""The operations in plain PyTorch: the specification that every other backend is measured against."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Plain PyTorch runs on every device, in the dtypes of the contract."""
    return None if dtype in DTYPES else f"{dtype} is not one of float32, bfloat16, float16, float64"
