"""HDF5 files, made in memory: where a disk is full, the library that writes them ends the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import h5py

from bkind3d.files import write_bytes

if TYPE_CHECKING:
    import xarray


@contextmanager
def new_hdf5(path: Path) -> Iterator[h5py.File]:
    """A new file, which takes its name once the block has ended well.

    Raises:
        OSError: it cannot be written; the error names ``path``.
    """
    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        yield file
        file.flush()
        content = file.id.get_file_image()
    write_bytes(path, content)


def write_netcdf(path: Path, content: xarray.Dataset) -> None:
    """Write a data set as netCDF-4.

    Raises:
        OSError: it cannot be written; the error names ``path``.
    """
    memory = BytesIO()
    content.to_netcdf(memory, engine="h5netcdf")
    write_bytes(path, memory.getvalue())
