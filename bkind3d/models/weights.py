"""Reads weight files that users bring along."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bkind3d.errors import InputError


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .pth, .pt or .safetensors file, onto the CPU.

    Raises:
        InputError: The file is missing, unreadable, or holds something else than named tensors.
    """
    if not path.is_file():
        raise InputError(f'{path}: no such weights file; give a file, or "none"')
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu")
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, EOFError) as error:
        raise InputError(f"{path}: not a readable state dict ({str(error).splitlines()[0]})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: expected a state dict of tensors, got {type(state).__name__}")
    return state
