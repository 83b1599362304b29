"""DANNCE's predictions, ``save_data_AVG.mat``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.io import savemat

from bkind3d.exports.track import Files, Track
from bkind3d.files import replacing


def files(track: Track) -> Files:
    """``<recording>/save_data_AVG.mat``: the name that DANNCE's tools look for."""
    return {f"{track.poses.recording}/save_data_AVG.mat": lambda path: write(track, path)}


def write(track: Track, path: Path) -> None:
    """Write ``pred`` (F, 3, J), ``p_max`` (F, J), ``sampleID`` (1, F), numbers on the recording's clock, and metadata.

    ``data`` (F, 3, J), where DANNCE has the true joints, is NaN.
    """
    poses = track.poses
    pred = poses.positions.astype(np.float64).transpose(0, 2, 1)
    content = {
        "pred": pred,
        "data": np.full_like(pred, np.nan),
        "p_max": poses.confidence.astype(np.float64),
        "sampleID": poses.frames.astype(np.float64),
        "metadata": {
            "source_software": "bkind3d",
            "units": poses.units,
            "fps": poses.fps,
            "keypoints": np.array(poses.names, dtype=object),
        },
    }
    with replacing(path) as scratch:
        savemat(scratch, content, appendmat=False, do_compression=True)
