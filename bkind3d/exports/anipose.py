"""Anipose's 3D poses, ``pose-3d/<name>.csv``, which keypoint-moseq and movement read too.

Of each keypoint ``_x``, ``_y``, ``_z``, ``_error``, ``_ncams`` and ``_score``, in this order; then the rotation
``M_ij`` and the origin ``center_i`` of a turned world, which is not turned here; and the frame's number ``fnum``. The
format has no place for units and frame rate.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bkind3d.exports.plain import cells
from bkind3d.exports.track import Files, Track
from bkind3d.files import write_text
from bkind3d.tables import csv_text


def files(track: Track) -> Files:
    """``<recording>.csv``."""
    return {f"{track.poses.recording}.csv": lambda path: write(track, path)}


def write(track: Track, path: Path) -> None:
    """Write a row for every frame from the first to the last: tools count rows, and some do not read ``fnum``."""
    poses = track.poses
    absent = np.full_like(poses.confidence, np.nan)
    found = np.isfinite(poses.positions).all(axis=2)
    views = np.where(found & bool(poses.cameras), len(poses.cameras), np.nan)
    error = absent if poses.reprojection_error is None else poses.reprojection_error
    values = np.concatenate(
        [poses.positions, np.stack([error, views, poses.confidence], axis=2)], axis=2, dtype=np.float64
    )
    parts = ("x", "y", "z", "error", "ncams", "score")
    columns = [f"{name}_{part}" for name in poses.names for part in parts]
    columns += [f"M_{i}{j}" for i in range(3) for j in range(3)] + [f"center_{i}" for i in range(3)] + ["fnum"]
    world = [*np.eye(3).ravel().tolist(), 0.0, 0.0, 0.0]
    table = track.gapless(values).reshape(-1, len(poses.names) * len(parts))
    rows = ([*cells(row), *world, int(poses.frames[0]) + k] for k, row in enumerate(table))
    write_text(path, csv_text([columns, *rows]))
