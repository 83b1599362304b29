"""Files that appear only once they are complete: a reader never sees half of one."""

from __future__ import annotations

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
    """
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield scratch
        if durable:
            _flush(scratch)
        os.replace(scratch, path)
        if durable:
            _flush(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


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


def _flush(path: Path) -> None:
    """Have a file, or a folder's list of files, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
