"""Pairs of frames (t, t + gap) for training."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bkind3d.data.cache import CachedRecording, FrameCache
from bkind3d.errors import InputError


def gap_in_frames(gap: str | int, fps: float, frames: int | None = None) -> int:
    """The gap between the frames of a pair, as the nearest whole number of frames; nothing is resampled.

    Args:
        gap: seconds or milliseconds with their unit ("0.4 s", "400 ms"), or a number of frames (12, "12", "12 frames").
        fps: frames per second. The effective gap is the result divided by it.
        frames: length of the recording, when the gap is to be checked against it.

    Raises:
        InputError: the gap is not understood, rounds to no frame at all, or leaves no pair in the recording.
    """
    count = _parse_gap(gap, fps)
    if count < 1:
        raise InputError(
            f"gap: {gap!r} is {count} frames at {fps:.6g} frames per second; the two frames of a pair must differ"
        )
    if frames is not None and count >= frames:
        raise InputError(f"gap: {gap!r} is {count} frames, but the recording has only {frames}; choose a shorter gap")
    return count


def _parse_gap(gap: str | int, fps: float) -> int:
    text = str(gap).strip()
    unit = next((unit for unit in ("frames", "frame", "ms", "s") if text.endswith(unit)), "")
    try:
        value = float(text.removesuffix(unit))
    except ValueError:
        value = math.nan
    if isinstance(gap, bool) or not math.isfinite(value):
        raise InputError(f"gap: {gap!r} is not understood; give seconds ('0.4 s') or a whole number of frames (12)")
    if unit in ("s", "ms"):
        return round(value * fps * (1e-3 if unit == "ms" else 1))
    if value != int(value):
        raise InputError(f"gap: {gap!r} has no unit; give seconds as '{gap} s', or a whole number of frames")
    return int(value)


def _require_pairs(recording: CachedRecording, gap_frames: int) -> None:
    try:
        gap_in_frames(gap_frames, recording.fps, len(recording))
    except InputError as error:
        raise InputError(f"recording {recording.name!r}: {error}") from None


class PairDataset(Dataset[Tensor]):
    """Pairs of frames t and t + gap of all cameras, from a cache; no pair reaches over a recording's end.

    Item: (2, M, 3, H, W) uint8. Items of the first recording come first, by t. Frames are opened on first use, so the
    data set may be pickled or inherited by worker processes.

    Args:
        cache: the frame cache.
        recordings: names of the recordings to draw from.
        gap_frames: distance of the two frames, see :func:`gap_in_frames`.
        reverse: give frame t + gap first and frame t second.

    Raises:
        InputError: a recording is unknown, too short for the gap, or of another frame rate than the first.
    """

    def __init__(self, cache: FrameCache, recordings: list[str], gap_frames: int, *, reverse: bool = False) -> None:
        if not recordings:
            raise InputError("pairs: no recording to draw from; give at least one the split 'train' or 'both'")
        self.recordings = [cache.recording(name) for name in recordings]
        self.gap_frames = gap_frames
        self.reverse = reverse
        first = self.recordings[0]
        for recording in self.recordings:
            _require_pairs(recording, gap_frames)
            if abs(recording.fps / first.fps - 1) > 0.01:
                raise InputError(
                    f"recordings {first.name!r} and {recording.name!r} run at {first.fps:.6g} and {recording.fps:.6g} "
                    "frames per second: one gap in frames would mean two gaps in time"
                )
        self._ends = list(accumulate(len(recording) - gap_frames for recording in self.recordings))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Tensor:
        recording, t = self.locate(index)
        frames = self.recordings[recording].frames
        times = (t + self.gap_frames, t) if self.reverse else (t, t + self.gap_frames)
        pair = np.stack([frames[time] for time in times])  # (2, M, H, W, 3)
        return torch.from_numpy(pair).permute(0, 1, 4, 2, 3).contiguous()

    def locate(self, index: int) -> tuple[int, int]:
        """Which recording (its place in ``recordings``) and which frame t an item starts at."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        index %= len(self)
        recording = bisect_right(self._ends, index)
        return recording, index - (self._ends[recording - 1] if recording else 0)
