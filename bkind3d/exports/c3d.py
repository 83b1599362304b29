"""C3D, the format of motion capture: Mokka, Visual3D, OpenSim and MATLAB toolboxes read it."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path

import numpy as np

from bkind3d.exports.track import Files, Track
from bkind3d.files import replacing

LONGEST = 65535  # frames: the header counts them in 16 bits


def files(track: Track) -> Files:
    """``<recording>.c3d``; longer recordings in parts of 65535 frames, ``<recording>-<first frame>.c3d``."""
    poses = track.poses
    first, last = int(poses.frames[0]), int(poses.frames[-1])
    if last - first < LONGEST:
        return {f"{poses.recording}.c3d": partial(write, track, first, last)}
    return {
        f"{poses.recording}-{start}.c3d": partial(write, track, start, min(start + LONGEST - 1, last))
        for start in range(first, last + 1, LONGEST)
    }


def write(track: Track, first: int, last: int, path: Path) -> None:
    """Write the points of the frames from first to last, and their confidence as analog channels of the same rate.

    A missing point has the residual -1, as the format asks for. Frames keep their numbers where the header can count
    that far, and begin at 0 else.
    """
    import ezc3d  # of the extra `export`

    poses, part = track.poses, slice(first - int(track.poses.frames[0]), last + 1 - int(track.poses.frames[0]))
    positions = track.gapless(poses.positions)[part].transpose(2, 1, 0)  # (3, J, T)
    missing = ~np.isfinite(positions).all(axis=0, keepdims=True)  # (1, J, T)
    confidence = np.nan_to_num(track.gapless(poses.confidence)[part]).T[None]
    file = ezc3d.c3d()
    file["header"]["points"]["first_frame"] = first if last < LONGEST else 0
    for group, labels in (("POINT", poses.names), ("ANALOG", [f"{name}_confidence" for name in poses.names])):
        file["parameters"][group]["RATE"]["value"] = [poses.fps]
        file["parameters"][group]["LABELS"]["value"] = labels
    file["parameters"]["POINT"]["UNITS"]["value"] = [poses.units]
    file["data"]["points"] = np.concatenate([positions, np.ones_like(missing, dtype=np.float64)])
    file["data"]["meta_points"]["residuals"] = np.where(missing, -1.0, 0.0)
    file["data"]["meta_points"]["camera_masks"] = np.zeros((7, *missing.shape[1:]), dtype=bool)
    file["data"]["analogs"] = confidence
    with replacing(path) as scratch:
        written = scratch.with_name(f"{scratch.name}.c3d")  # the only ending that the library writes to
        try:
            file.write(str(written))
            _check_whole(written, 4 * (positions.size // 3 * 4 + confidence.size))
            written.replace(scratch)
        finally:
            written.unlink(missing_ok=True)


def _check_whole(path: Path, data: int) -> None:
    """Raise where a file has fewer bytes than its header and ``data``: the library tells of no write that failed."""
    with path.open("rb") as file:
        block = int.from_bytes(file.read(18)[16:], "little")  # where the data begins, in blocks of 512, counted from 1
    if path.stat().st_size < 512 * max(block - 1, 1) + data:
        raise OSError(errno.EIO, "the disk is full or its file system failed")
