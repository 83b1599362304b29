"""Pairs of frames (t, t + gap) for training."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bkind3d.data.cached import FrameCache
from bkind3d.data.window import HALF, distances_to, look
from bkind3d.errors import InputError

LATEST = 0.1  # of the gap that frame t + gap may come late


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


def pair_rows(clock: np.ndarray, gap_frames: int) -> np.ndarray:
    """Rows of the moments that make pairs, (P, 2): of t, and of the first moment at or after t + gap.

    That one may come up to a tenth of the gap late, so that recordings of which only some moments were kept have pairs
    too; it never comes early, and where all moments were kept it comes exactly.

    Args:
        clock: (T,) increasing numbers of the moments.
        gap_frames: distance, in numbers of that clock.
    """
    later = np.searchsorted(clock, clock + gap_frames)
    earlier = np.flatnonzero(later < len(clock))
    late = clock[later[earlier]] - clock[earlier] - gap_frames
    earlier = earlier[late <= gap_frames * LATEST]
    return np.stack([earlier, later[earlier]], axis=1)


def require_pairs(name: str, clock: np.ndarray, fps: float, gap: str | int) -> np.ndarray:
    """As :func:`pair_rows`, of a recording that must have pairs.

    Raises:
        InputError: as :func:`gap_in_frames`, or no two moments are that far apart.
    """
    try:
        gap_frames = gap_in_frames(gap, fps, int(clock[-1] - clock[0]) + 1)
    except InputError as error:
        raise InputError(f"recording {name!r}: {error}") from None
    rows = pair_rows(clock, gap_frames)
    if not len(rows):
        step = int(np.median(np.diff(clock)))
        raise InputError(
            f"recording {name!r}: gap: no two of its moments are {gap_frames} frames apart (most are {step}); keep "
            "more of its moments, or choose another gap"
        )
    return rows


class PairDataset(Dataset[tuple[Tensor, ...]]):
    """Pairs of frames t and t + gap of all cameras, from a cache; no pair reaches over a recording's end.

    Item: images (2, M, 3, H, W) uint8, and the projections of the recording's cameras (M, 3, 4) float32, from the world
    to pixels of these images. With ``masks`` the projections are of each frame, (2, M, 3, 4), and two things follow:
    the masks of the body (2, M, H, W) uint8, 0 to 255, and each pixel's distance to it, (2, M, H, W) float32, pixels.
    Items of the first recording come first, by t. Frames are opened on first use, so the data set may be pickled or
    inherited by worker processes.

    Args:
        cache: the frame cache.
        recordings: names of the recordings to draw from.
        gap_frames: distance of the two frames on the recordings' clock, see :func:`gap_in_frames` and
            :func:`pair_rows`.
        reverse: give frame t + gap first and frame t second.
        masks: give the masks of the body too.
        window: with masks, side of the windows that follow the body, pixels; 0 gives whole frames.

    Raises:
        InputError: a recording is unknown, too short for the gap, without two moments so far apart, of another frame
            rate than the first, or without the masks that are asked for.
    """

    def __init__(
        self,
        cache: FrameCache,
        recordings: list[str],
        gap_frames: int,
        *,
        reverse: bool = False,
        masks: bool = False,
        window: int = 0,
    ) -> None:
        if not recordings:
            raise InputError("pairs: no recording to draw from; give at least one the split 'train' or 'both'")
        self.recordings = [cache.recording(name) for name in recordings]
        self.gap_frames = gap_frames
        self.reverse = reverse
        self.masks = masks
        self.window = window
        first = self.recordings[0]
        for recording in self.recordings:
            if abs(recording.fps / first.fps - 1) > 0.01:
                raise InputError(
                    f"recordings {first.name!r} and {recording.name!r} run at {first.fps:.6g} and {recording.fps:.6g} "
                    "frames per second: one gap in frames would mean two gaps in time"
                )
            if masks and recording.masks_path is None:
                raise InputError(f"recording {recording.name!r}: the cache was built without masks of the body")
        self._rows = [require_pairs(row.name, row.clock, row.fps, gap_frames) for row in self.recordings]
        self._ends = list(accumulate(len(rows) for rows in self._rows))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        place, *rows = self.locate(index)
        recording = self.recordings[place]
        if self.reverse:
            rows = rows[::-1]
        if not self.masks:
            pair = np.stack([recording.frames[row] for row in rows])  # (2, M, H, W, 3)
            return torch.from_numpy(pair).permute(0, 1, 4, 2, 3).contiguous(), recording.projections
        pair, masks, projections = look(recording, np.array(rows), self.window)
        images = torch.from_numpy(pair).permute(0, 1, 4, 2, 3).contiguous()
        return images, projections, torch.from_numpy(masks), torch.from_numpy(distances_to(masks > HALF))

    def locate(self, index: int) -> tuple[int, int, int]:
        """Which recording (its place in ``recordings``) an item is of, and which of its rows are t and t + gap."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        index %= len(self)
        place = bisect_right(self._ends, index)
        earlier, later = self._rows[place][index - (self._ends[place - 1] if place else 0)].tolist()
        return place, earlier, later
