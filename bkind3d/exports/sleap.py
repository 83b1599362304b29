"""Files of SLEAP's: sleap-anipose's 3D points, and an analysis file of each camera."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from bkind3d.exports.track import Files, Track, placed
from bkind3d.hdf5 import new_hdf5
from bkind3d.poses import INDIVIDUAL


def points_files(track: Track) -> Files:
    """``<recording>.h5``."""
    return {f"{track.poses.recording}.h5": lambda path: write_points(track, path)}


def write_points(track: Track, path: Path) -> None:
    """Write sleap-anipose's ``tracks`` (F, 1, J, 3) and ``frames``, the range from the first frame to after the last.

    keypoint-moseq reads ``point_scores`` (F, 1, J) beside them. Units, frame rate and the names of the keypoints, for
    which the format has no place, are attributes of ``tracks``.
    """
    poses = track.poses
    with new_hdf5(path) as file:
        tracks = _dataset(file, "tracks", track.gapless(poses.positions)[:, None])
        tracks.attrs["Description"] = "Shape: (n_frames, n_tracks, n_nodes, 3)."
        tracks.attrs["units"], tracks.attrs["fps"], tracks.attrs["node_names"] = poses.units, poses.fps, poses.names
        _dataset(file, "point_scores", track.gapless(poses.confidence)[:, None])
        frames = _dataset(file, "frames", np.array([poses.frames[0], poses.frames[-1] + 1]))
        frames.attrs["Description"] = "Range, inclusive to exclusive, of frames triangulated over."


def analysis_files(track: Track) -> Files:
    """``<recording>/<camera>/<recording>.analysis.h5``: sleap-anipose's session folder."""
    assert track.views is not None
    name = track.poses.recording
    return {
        f"{name}/{camera}/{name}.analysis.h5": partial(write_analysis, track, m)
        for m, camera in enumerate(track.views.cameras.names)
    }


def write_analysis(track: Track, m: int, path: Path) -> None:
    """Write SLEAP's analysis file of the reprojections in camera m, stored column by column as MATLAB reads them.

    A column is a frame of the camera's own video, from its first on; NaN where there is no pose or the camera does not
    show the keypoint. The scores are the confidence of the keypoints in 3D, the same in all views.
    """
    assert track.views is not None
    poses, views = track.poses, track.views
    pixels, seen = views.reprojected(m, poses.positions)
    rows = views.frames[:, m]
    tracks = placed(pixels, rows).transpose(2, 1, 0)[None]  # (1, 2, J, T)
    scores = placed(np.where(seen, poses.confidence, np.nan), rows).T[None]  # (1, J, T)
    shown = np.isfinite(tracks).any(axis=(1, 2))  # (1, T)
    means = np.nansum(scores, axis=1) / np.maximum(np.isfinite(scores).sum(axis=1), 1)
    edges = [(poses.names[i], poses.names[j]) for i, j in track.edges]
    with new_hdf5(path) as file:
        _dataset(file, "tracks", tracks)
        _dataset(file, "point_scores", scores)
        _dataset(file, "track_occupancy", shown.T.astype(np.uint8))
        _dataset(file, "instance_scores", np.where(shown, means, np.nan))
        _dataset(file, "tracking_scores", np.where(shown, 1.0, np.nan))
        file["track_names"] = np.array([INDIVIDUAL], dtype="S")
        file["node_names"] = np.array(poses.names, dtype="S")
        file["edge_names"] = np.array(edges, dtype="S").reshape(-1, 2)
        file["edge_inds"] = np.asarray(track.edges, dtype=np.int64).reshape(-1, 2)
        file["labels_path"], file["video_path"], file["video_ind"] = "", views.videos[m], 0
        file["provenance"] = json.dumps({"source_software": "bkind3d", "recording": poses.recording, "fps": poses.fps})


def _dataset(file: h5py.File, name: str, values: np.ndarray) -> h5py.Dataset:
    return file.create_dataset(name, data=values, compression="gzip", compression_opts=1)
