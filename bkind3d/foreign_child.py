"""What a child process does with binary files of strangers; see :mod:`bkind3d.foreign`, which starts it.

It is run as a script and imports nothing of this package. A request is a line of JSON on standard input: ``kind``,
``path``, ``bytes`` (how much the content may be, and the process may grow by) and ``seconds`` of the processor. The
answer on standard output is the length of a header, the header in JSON, and the arrays' bytes one after another. Who
runs out of time is ended by the kernel; a crash ends nothing but this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

DEPTH, NODES = 16, 100_000  # of nested structs, cells and groups
PLAIN = "biufcSU"  # kinds of dtype that are sent


class TooMuch(Exception):
    """The file is not of a size or form that anybody needs."""


class Tree:
    """Nested dictionaries, lists, texts and arrays as JSON, and the arrays beside it."""

    def __init__(self, limit: int) -> None:
        self.arrays: list[np.ndarray] = []
        self.left, self.nodes = limit, 0

    def node(self, value: Any, depth: int = 0) -> list[Any]:
        """One value: a tag and what belongs to it. What has no plain form (functions, objects) is None."""
        self.nodes += 1
        if depth > DEPTH or self.nodes > NODES:
            raise TooMuch(f"nested deeper than {DEPTH}" if depth > DEPTH else f"more than {NODES} parts")
        if isinstance(value, dict):
            return ["dict", {str(key): self.node(item, depth + 1) for key, item in value.items()}]
        if isinstance(value, list | tuple):
            return ["list", [self.node(item, depth + 1) for item in value]]
        if isinstance(value, str):
            return ["text", value]
        if isinstance(value, np.ndarray) and value.dtype == object:
            return ["list", [self.node(item, depth + 1) for item in value.ravel()]]
        if isinstance(value, np.ndarray | np.generic | int | float):
            array = np.asarray(value)
            if array.dtype.kind in PLAIN:
                return self._array(array)
        return ["none"]

    def _array(self, array: np.ndarray) -> list[Any]:
        self.left -= array.nbytes
        if self.left < 0:
            raise TooMuch("holds more numbers than a file of its size should")
        self.arrays.append(np.ascontiguousarray(array))
        return ["array", array.dtype.str, array.shape]


# --- kinds of files -----------------------------------------------------------------------------------------------


def read_mat(path: str, limit: int) -> Any:
    """A MATLAB file: structs are dictionaries, cells lists, texts texts; arrays in MATLAB's orientation."""
    import h5py
    import scipy.io

    if h5py.is_hdf5(path):  # version 7.3
        with h5py.File(path) as file:
            require_size(file, limit)
            return {name: matlab(file, file[name]) for name in file if not name.startswith("#")}
    content = scipy.io.loadmat(path, simplify_cells=True)
    return {name: value for name, value in content.items() if not name.startswith("__")}


def matlab(file: Any, item: Any, depth: int = 0) -> Any:
    """A MATLAB value in HDF5, which holds arrays with their axes reversed and cells as references."""
    import h5py

    if depth > DEPTH:
        raise TooMuch(f"nested deeper than {DEPTH}")
    if isinstance(item, h5py.Group):
        return {name: matlab(file, item[name], depth + 1) for name in item if not name.startswith("#")}
    if item.dtype == h5py.ref_dtype:
        return [matlab(file, file[reference], depth + 1) for reference in item[()].T.ravel()]
    kind = item.attrs.get("MATLAB_class", b"")
    kind = kind.decode("ascii", "replace") if isinstance(kind, bytes) else str(kind)
    if item.attrs.get("MATLAB_empty"):
        return "" if kind == "char" else np.zeros(0)
    value = np.asarray(item[()]).T
    if kind == "char" and value.dtype.kind in "iu":
        return "".join(chr(int(code)) for code in value.ravel())
    return value


def read_hdf5(path: str, limit: int) -> Any:
    """An HDF5 file: groups are dictionaries."""
    import h5py

    with h5py.File(path) as file:
        require_size(file, limit)
        return plain_group(file)


def plain_group(group: Any, depth: int = 0) -> dict[str, Any]:
    """A group as a dictionary."""
    import h5py

    if depth > DEPTH:
        raise TooMuch(f"nested deeper than {DEPTH}")
    return {
        name: plain_group(item, depth + 1) if isinstance(item, h5py.Group) else np.asarray(item[()])
        for name, item in group.items()
    }


def read_netcdf(path: str, limit: int) -> Any:
    """A netCDF-4 file: of each variable its dims and data, and the attributes of the whole."""
    import h5py
    import xarray

    with h5py.File(path) as file:
        require_size(file, limit)
    with xarray.open_dataset(path, engine="h5netcdf", decode_timedelta=False, phony_dims="sort") as opened:
        data = opened.load()
    variables = {
        str(name): {"dims": [str(dim) for dim in variable.dims], "data": variable.values}
        for name, variable in data.variables.items()
    }
    return {"variables": variables, "attributes": dict(data.attrs)}


def require_size(file: Any, limit: int) -> None:
    """Refuse a file whose arrays say that they are larger than it could need."""
    import h5py

    total, seen = 0, 0

    def add(name: str, item: Any) -> None:
        nonlocal total, seen
        seen += 1
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            total += item.size * max(1, item.dtype.itemsize)
        if total > limit or seen > NODES:
            raise TooMuch(f"says that it holds more than {limit / 1e6:.0f} MB, or {NODES} arrays")

    file.visititems(add)


READERS: dict[str, Callable[[str, int], Any]] = {"mat": read_mat, "hdf5": read_hdf5, "netcdf": read_netcdf}
LIBRARIES = {"mat": ("h5py", "scipy.io"), "hdf5": ("h5py",), "netcdf": ("h5py", "xarray", "h5netcdf")}


# --- requests -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limits(room: int, seconds: float) -> Iterator[None]:
    """Memory that the process may grow by, and time of the processor after which it is ended."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    with contextlib.suppress(OSError, ValueError):  # a system that does not know this limit still has the other one
        resource.setrlimit(resource.RLIMIT_AS, (virtual_memory() + room, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def virtual_memory() -> int:
    """Bytes of address space of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 33


def answer(request: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Header and arrays: the content of a file, or why it cannot be had, in one line."""
    for library in LIBRARIES[request["kind"]]:
        __import__(library)  # which takes its own time and memory
    tree = Tree(request["bytes"])
    try:
        with limits(3 * request["bytes"], request["seconds"]):
            return {"content": tree.node(READERS[request["kind"]](request["path"], request["bytes"]))}, tree.arrays
    except MemoryError:
        return {"error": "needs more memory than a file of its size should"}, []
    except Exception as error:  # noqa: BLE001, a library may make anything of a broken file
        words = " ".join(str(error).split())[:200]
        return {"error": words or type(error).__name__}, []


def main() -> None:
    """Answer until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes no file
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where libraries print
    for line in sys.stdin.buffer:
        header, arrays = answer(json.loads(line))
        text = json.dumps(header).encode()
        out.write(len(text).to_bytes(8, "big") + text)
        for array in arrays:
            out.write(array.tobytes())
        out.flush()


if __name__ == "__main__":
    main()
