"""Files of NumPy's arrays, as large inside as they say and as a file of their size may be, and without pickles."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bkind3d.documents import broken_file
from bkind3d.errors import InputError

_ROOM, _RATIO = 256 << 20, 40  # bytes of content that any file may have, and for each byte of the file


def read_npz(path: Path, required: Sequence[str]) -> dict[str, np.ndarray]:
    """Read all arrays of an npz file.

    Args:
        path: of the file.
        required: names of arrays that must be there.

    Raises:
        InputError: it cannot be read, is no npz file, lacks an array, holds objects, or more than a file of its size
            should.
    """
    with broken_file(f"{path}: not an npz file of arrays"):
        limit = _ROOM + _RATIO * path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            if sum(member.file_size for member in members) > limit:
                raise ValueError(f"holds more than {limit >> 20} MiB")
            arrays = {member.filename.removesuffix(".npy"): _read_member(archive, member) for member in members}
    missing = [name for name in required if name not in arrays]
    if missing:
        raise InputError(f"{path}: lacks {missing[0]!r}; expected {', '.join(required)}")
    return arrays


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array, once its header says no more than the archive holds: numpy makes room for what the header says."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize > member.file_size:
            raise ValueError(f"{member.filename} says that it is {dtype} {shape}")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def map_npy(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Map a file of bytes, which must be of that shape, read-only.

    Raises:
        InputError: it is not there, damaged, or of another shape.
    """
    with broken_file(f"{path}: damaged; remove it, and it is made again"):
        array = np.load(path, mmap_mode="r")
        if array.shape != shape or array.dtype != np.uint8:
            raise InputError(
                f"{path}: damaged ({array.dtype} {array.shape} in place of uint8 {shape}); remove it, and "
                "it is made again"
            )
        return array
