"""Files that appear only once they are complete: a reader never sees half of one."""

from __future__ import annotations

import glob
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A name beside a file to write its new content to, which takes the file's place once the block has ended well.

    Args:
        path: of the file.
        durable: the file is whole or absent even after a power cut.

    Raises:
        OSError: the file cannot be written; the error names ``path``, which that of a failed write does not.
    """
    remove_leftovers(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield scratch
        if durable:
            _flush(scratch)
        os.replace(scratch, path)
    except BaseException as error:
        scratch.unlink(missing_ok=True)
        if isinstance(error, OSError) and (error.filename is None or str(error.filename) == str(scratch)):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    if durable:
        _flush(path.parent)


def write_text(path: Path, content: str, *, durable: bool = False) -> None:
    """Write a text file."""
    with replacing(path, durable=durable) as scratch:
        scratch.write_text(content, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file of bytes."""
    with replacing(path) as scratch:
        scratch.write_bytes(content)


def write_json(path: Path, content: object) -> None:
    """Write what JSON can hold."""
    write_text(path, json.dumps(content, indent=1))


def flush_folder(folder: Path) -> None:
    """Have all files of a folder on the disk."""
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes have begun to write to a file."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        writer = leftover.name.split(".")[-3]
        if not (writer.isdecimal() and _is_running(int(writer))):
            leftover.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _flush(path: Path) -> None:
    """Have a file, or a folder's list of files, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
