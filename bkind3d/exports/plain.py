"""A table for everything else: one row for each moment, with units in the names of its columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bkind3d.exports.track import Files, Track
from bkind3d.files import write_text
from bkind3d.tables import csv_text


def files(track: Track) -> Files:
    """``<recording>.csv``: ``frame``, ``time_s``, and of each keypoint ``<name>_x_mm``, ... and its confidence."""
    return {f"{track.poses.recording}.csv": lambda path: write(track, path)}


def write(track: Track, path: Path) -> None:
    """Write the table; a missing keypoint has empty cells."""
    poses = track.poses
    columns = ["frame", "time_s"]
    for name in poses.names:
        columns += [*(f"{name}_{axis}_{poses.units}" for axis in "xyz"), f"{name}_confidence"]
    values = np.concatenate([poses.positions, poses.confidence[..., None]], axis=2).reshape(len(poses.frames), -1)
    rows = (
        [frame, f"{time:.6f}", *cells(row)]
        for frame, time, row in zip(poses.frames.tolist(), poses.time, values, strict=True)
    )
    write_text(path, csv_text([columns, *rows]))


def cells(values: np.ndarray) -> list[float | None]:
    """Numbers (K,) float32 in as few digits as tell them apart, None where there is none."""
    return [float(str(value)) if np.isfinite(value) else None for value in values.astype(np.float32)]
