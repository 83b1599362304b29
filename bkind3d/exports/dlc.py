"""DeepLabCut's tables: the reprojections of each camera, and the 3D points.

Three lines of head, ``scorer``, ``bodyparts`` and ``coords``, then a row for each frame of the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bkind3d.exports.plain import cells
from bkind3d.exports.track import Files, Track, placed
from bkind3d.files import write_text
from bkind3d.tables import csv_text

SCORER = "DLC_bkind3d"


def files(track: Track) -> Files:
    """``<recording>/<camera>DLC_bkind3d.csv`` of each camera, and ``<recording>/<recording>_DLC_3D.csv``."""
    assert track.views is not None
    name = track.poses.recording
    found: Files = {
        f"{name}/{camera}{SCORER}.csv": partial(write_view, track, m)
        for m, camera in enumerate(track.views.cameras.names)
    }
    return found | {f"{name}/{name}_DLC_3D.csv": partial(write_points, track)}


def write_view(track: Track, m: int, path: Path) -> None:
    """Write the reprojections in camera m, frame by frame of its own video.

    The likelihood is the confidence of the keypoint in 3D, the same in all views; x and y are empty and it is 0 where
    the camera does not show the keypoint.
    """
    assert track.views is not None
    pixels, seen = track.views.reprojected(m, track.poses.positions)
    likelihood = np.where(seen, track.poses.confidence, 0.0)
    values = placed(np.concatenate([pixels, likelihood[..., None]], axis=2), track.views.frames[:, m])
    values[..., 2] = np.nan_to_num(values[..., 2])
    _write(path, track.poses.names, ("x", "y", "likelihood"), values, 0)


def write_points(track: Track, path: Path) -> None:
    """Write the 3D points, numbered as on the recording's clock; the table has no place for the confidence."""
    first = int(track.poses.frames[0])
    _write(path, track.poses.names, ("x", "y", "z"), track.gapless(track.poses.positions), first)


def _write(path: Path, names: Sequence[str], coordinates: Sequence[str], values: np.ndarray, first: int) -> None:
    count = len(names) * len(coordinates)
    head = [
        ["scorer", *[SCORER] * count],
        ["bodyparts", *(name for name in names for _ in coordinates)],
        ["coords", *[*coordinates] * len(names)],
    ]
    rows = ([first + k, *cells(row)] for k, row in enumerate(values.reshape(len(values), count)))
    write_text(path, csv_text([*head, *rows]))
