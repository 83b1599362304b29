"""The index of a recording: which frame of each camera shows which moment, and when that moment was.

Where all cameras of a recording run in step from some frame on, offsets say the same and no file is needed. Where
cameras dropped frames of their own, or only some frames were kept, an npz file says it moment by moment: ``frames``
(T, M), ``cameras`` (M,), ``clock`` (T,) and ``fps``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bkind3d.data.arrays import read_npz
from bkind3d.documents import broken_file
from bkind3d.errors import InputError, brief

_ARRAYS = ("frames", "cameras", "clock", "fps")
_LARGEST = 1 << 40


@dataclass(frozen=True, eq=False)
class Index:
    """The moments of a recording.

    Args:
        cameras: M names.
        frames: (T, M) int64, the number of the frame that each camera's source has of each moment.
        clock: (T,) int64, increasing: each moment's number on the recording's own clock. Numbers may be left out where
            moments were, so that a distance in time is a difference of numbers, not of rows.
        fps: numbers per second of that clock.

    Raises:
        InputError: shapes that do not fit, a negative frame number, a clock that does not increase, or no rate.
    """

    cameras: tuple[str, ...]
    frames: np.ndarray
    clock: np.ndarray
    fps: float

    def __post_init__(self) -> None:
        moments = len(self.clock)
        if self.frames.shape != (moments, len(self.cameras)) or self.clock.shape != (moments,) or not moments:
            raise InputError(
                f"frames {self.frames.shape} must be (moments, {len(self.cameras)} cameras), clock {self.clock.shape} "
                "(moments,), and at least one moment is needed"
            )
        for name in ("frames", "clock"):
            if not np.issubdtype(getattr(self, name).dtype, np.integer):
                raise InputError(f"{name} must hold whole numbers, not {getattr(self, name).dtype}")
            if np.abs(getattr(self, name).astype(np.float64)).max() > _LARGEST:
                raise InputError(f"{name} must hold numbers of frames, none above {_LARGEST}")
            object.__setattr__(self, name, getattr(self, name).astype(np.int64))
        if (self.frames < 0).any():
            row, place = np.argwhere(self.frames < 0)[0]
            where = f"frames[{row}] of camera {self.cameras[place]!r}"
            raise InputError(f"{where} is {self.frames[row, place]}; frames are counted from 0")
        late = np.flatnonzero(np.diff(self.clock) <= 0)
        if len(late):
            before, after = self.clock[late[0] : late[0] + 2]
            raise InputError(f"clock[{late[0] + 1}] is {after}, after {before}; the clock must increase")
        if not (np.isfinite(self.fps) and self.fps > 0):
            raise InputError(f"fps must be a number above 0, not {self.fps}")

    @classmethod
    def in_step(cls, cameras: tuple[str, ...], offsets: list[int], moments: int, fps: float) -> Index:
        """The index of cameras that run in step, each from the frame number in ``offsets`` on."""
        clock = np.arange(moments)
        return cls(cameras, clock[:, None] + np.array(offsets, dtype=np.int64), clock, fps)


def save_index(path: Path | str, index: Index) -> None:
    """Write the index of a recording."""
    np.savez_compressed(path, frames=index.frames, cameras=np.array(index.cameras), clock=index.clock, fps=index.fps)


def load_index(path: Path, cameras: tuple[str, ...]) -> Index:
    """Read the index of a recording, its columns in the order of ``cameras``.

    Raises:
        InputError: the file cannot be read, lacks an array, has other cameras, or :class:`Index` refuses it.
    """
    arrays = read_npz(path, _ARRAYS)
    names = [str(name) for name in np.atleast_1d(arrays["cameras"])]
    if sorted(names) != sorted(cameras):
        raise InputError(f"{path}: its cameras are {brief(', '.join(names))}; the recording has {', '.join(cameras)}")
    try:
        with broken_file("not an index"):
            index = Index(tuple(names), arrays["frames"], arrays["clock"], float(arrays["fps"]))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    order = [names.index(camera) for camera in cameras]
    return Index(cameras, index.frames[:, order], index.clock, index.fps)
