"""movement's poses, under the user's names, in the layout of its versions from 0.17 on or of those before."""

from __future__ import annotations

from pathlib import Path

from bkind3d.exports.track import Files, Track
from bkind3d.hdf5 import write_netcdf

PLURAL = {"keypoint": "keypoints", "individual": "individuals"}


def files(track: Track) -> Files:
    """``<recording>.nc`` as :meth:`bkind3d.poses.Poses.save` writes it: dimensions ``keypoint`` and ``individual``."""
    return {f"{track.poses.recording}.nc": track.poses.save}


def files_before(track: Track) -> Files:
    """``<recording>.nc`` with the dimensions ``keypoints`` and ``individuals``."""
    return {f"{track.poses.recording}.nc": lambda path: write_before(track, path)}


def write_before(track: Track, path: Path) -> None:
    """Write the poses with the dimensions of movement before 0.17."""
    write_netcdf(path, track.poses.to_xarray().rename(PLURAL))
