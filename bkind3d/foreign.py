"""Binary files of strangers, read in a child process: MATLAB, HDF5 and netCDF.

The libraries that read these formats crash, hang, or take all memory on some broken files. The child has a limit of
time and memory that follows from the size of the file; it sends back plain arrays and texts, no pickle. One child reads
many files, and ends with this process; a new one takes its place when a file has ended it.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from bkind3d.errors import InputError

_SCRIPT = Path(__file__).with_name("foreign_child.py")
_ROOM, _RATIO = 128 << 20, 40  # bytes of content that any file may have, and for each byte of the file
_SECONDS, _RATE = 1.2, 4 << 20  # of the processor that any file may take, and bytes of the file per second more
_PATIENCE = 60.0  # seconds on the clock on top, for a slow disk or a busy machine
_HEADER = 64 << 20  # bytes

_ENDED = {
    signal.SIGPROF: "reading it takes too long for a file of its size",
    signal.SIGKILL: "reading it takes too much memory or time",
}


def read_mat(path: Path | str) -> dict[str, Any]:
    """Read a MATLAB file, version 5 to 7.3.

    Returns:
        Variables by name: structs are dictionaries, cells and arrays of structs lists, texts ``str``, functions and
        objects None. Arrays are in MATLAB's orientation; those of files before 7.3 come without axes of length 1.

    Raises:
        InputError: it is missing, no MATLAB file, broken, or larger inside than a file of its size should be.
    """
    return _read("mat", Path(path), "MATLAB")


def read_hdf5(path: Path | str) -> dict[str, Any]:
    """Read an HDF5 file: groups are dictionaries, data sets arrays.

    Raises:
        InputError: as :func:`read_mat`.
    """
    return _read("hdf5", Path(path), "HDF5")


def read_netcdf(path: Path | str) -> dict[str, Any]:
    """Read a netCDF-4 file: ``variables`` by name, each with its ``dims`` and ``data``, and ``attributes``.

    Raises:
        InputError: as :func:`read_mat`.
    """
    return _read("netcdf", Path(path), "netCDF")


def is_hdf5(path: Path) -> bool:
    """Whether a file begins as HDF5 files do, or does so after a block of the user's own, such as MATLAB's header."""
    try:
        with path.open("rb") as file:
            head = file.read(2048 + 8)
        return any(head[at : at + 8] == b"\x89HDF\r\n\x1a\n" for at in (0, 512, 1024, 2048))
    except OSError:
        return False


class _Broken(Exception):
    """The child has ended, or does not answer."""


class _Child:
    """A process that reads files."""

    def __init__(self) -> None:
        quiet = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | quiet,
        )

    def ask(self, request: dict[str, Any], patience: float) -> Any:
        """The content of a file; raises _Broken, or InputError with what the child says about the file."""
        assert self.process.stdin is not None
        deadline = time.monotonic() + patience
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise _Broken from error
        length = int.from_bytes(self._receive(8, deadline), "big")
        if length > _HEADER:
            raise InputError("has too many parts")
        header = json.loads(bytes(self._receive(length, deadline)))
        if "error" in header:
            raise InputError(header["error"])
        return self._value(header["content"], request["bytes"], deadline)

    def _value(self, node: list[Any], limit: int, deadline: float) -> Any:
        tag = node[0]
        if tag == "dict":
            return {key: self._value(item, limit, deadline) for key, item in node[1].items()}
        if tag == "list":
            return [self._value(item, limit, deadline) for item in node[1]]
        if tag == "array":
            dtype, shape = np.dtype(node[1]), tuple(node[2])
            size = dtype.itemsize * math.prod(shape)
            if dtype.hasobject or size > limit:
                raise InputError("holds what cannot be sent")
            return np.frombuffer(self._receive(size, deadline), dtype).reshape(shape)
        return node[1] if tag == "text" else None

    def _receive(self, size: int, deadline: float) -> bytearray:
        assert self.process.stdout is not None
        descriptor, data, there = self.process.stdout.fileno(), bytearray(size), 0
        while there < size:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise _Broken
            got = os.readv(descriptor, [memoryview(data)[there:]])
            if not got:
                raise _Broken
            there += got
        return data

    def end(self) -> str:
        """End the process; says why it has ended if it had."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            code = self.process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except OSError:
                continue  # what was still to be written has no reader
        return _ENDED.get(signal.Signals(-code), "it crashes the library that reads it") if code < 0 else "broken"


_child: _Child | None = None
_lock = threading.Lock()


def _read(kind: str, path: Path, name: str) -> Any:
    global _child
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    size = path.stat().st_size
    seconds = _SECONDS + size / _RATE
    request = {"kind": kind, "path": str(path.absolute()), "bytes": _ROOM + _RATIO * size, "seconds": seconds}
    with _lock:
        if _child is None or _child.process.poll() is not None:
            _child = _Child()
        try:
            return _child.ask(request, _PATIENCE + 4 * seconds)
        except _Broken:
            reason = _child.end()
            _child = None
        except InputError as error:
            reason = str(error)
        except BaseException:  # Ctrl-C: what the child still sends belongs to no one
            _child.process.kill()
            _child.end()
            _child = None
            raise
    raise InputError(f"{path}: not a readable {name} file ({reason})")


def _end() -> None:
    """End the child with this process."""
    global _child
    if _child is not None:
        _child.process.kill()
        _child.end()
        _child = None


def _forget() -> None:
    """In a fork: the child belongs to the other process."""
    global _child, _lock
    _child, _lock = None, threading.Lock()


atexit.register(_end)
os.register_at_fork(after_in_child=_forget)
