"""A camera's video files: one, or chunks whose names end with the number of their first frame."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bkind3d.data.ledger import Ledger
from bkind3d.data.video import VideoInfo, read_frames, recall_video
from bkind3d.errors import InputError
from bkind3d.tables import times


@dataclass(frozen=True)
class VideoFootage:
    """A camera's video files, increasing in the numbers of their frames; all of one image size."""

    files: tuple[VideoInfo, ...]

    @property
    def parts(self) -> list[tuple[int, Path]]:
        """Each file, with the number of its first frame."""
        return [(file.first, file.path) for file in self.files]

    @property
    def frames(self) -> int:
        """Number of frames in all files."""
        return sum(file.frames for file in self.files)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.files[0].width, self.files[0].height

    def read(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The frames of those increasing numbers, each with its number; files without any are not opened.

        Raises:
            InputError: as :func:`read_frames`.
        """
        for file in self.files:
            wanted = numbers[(numbers >= file.first) & (numbers <= file.last)]
            if len(wanted):
                for frame, number in zip(read_frames(file, wanted - file.first), wanted.tolist()):
                    yield number, frame


def probe_chunks(
    camera: str, paths: tuple[Path, ...], numbers: np.ndarray | None, ledger: Ledger | None
) -> VideoFootage:
    """The chunks that hold the frames of those numbers, or all of them, which must then be without a gap."""
    chunks = sorted((first_number(path), path) for path in paths)
    firsts = np.array([first for first, _ in chunks])
    if numbers is None:
        numbers, even = np.append(firsts[1:] - 1, firsts[-1]), True  # each file up to the next
    else:
        even = False
    places = np.searchsorted(firsts, numbers, side="right") - 1
    if places[0] < 0:
        raise InputError(
            f"camera {camera!r}: frame {numbers[0]} is in no file: {chunks[0][1]}, the first, starts at {firsts[0]}; "
            "a chunk before it is missing"
        )
    files: list[VideoInfo] = []
    for place in np.unique(places).tolist():
        first, path = chunks[place]
        file = replace(recall_video(path, ledger, even=even), first=first)
        needed = numbers[places == place][-1]
        after = chunks[place + 1][1].name if place + 1 < len(chunks) else "no other file"
        if needed > file.last:
            raise InputError(
                f"camera {camera!r}: frame {needed} is in no file: {path} ends with frame {file.last}, {after} "
                f"follows; {_chunk_from(path, file.last + 1)} is missing"
            )
        if place + 1 < len(chunks) and file.last >= firsts[place + 1]:
            raise InputError(f"{path}: reaches to frame {file.last}, but {after} starts before that")
        if files and (file.width, file.height) != (files[0].width, files[0].height):
            size, other = times((file.width, file.height)), times((files[0].width, files[0].height))
            raise InputError(f"{path}: is {size}, {files[0].path.name} is {other}")
        files.append(file)
    return VideoFootage(tuple(files))


def first_number(path: Path) -> int:
    """Number of a chunk's first frame, from the end of its name."""
    match = re.search(r"\d+$", path.stem)
    if match is None:
        raise InputError(f"{path}: a chunk's name must end with the number of its first frame, as in film-3500.mp4")
    return int(match[0])


def _chunk_from(path: Path, first: int) -> str:
    """Name of the chunk that starts with that frame."""
    return re.sub(r"\d+$", str(first), path.stem) + path.suffix
