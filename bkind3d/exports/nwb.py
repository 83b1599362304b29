"""Neurodata Without Borders, with its extension for poses, ndx-pose."""

from __future__ import annotations

import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bkind3d.exports.track import Files, Track
from bkind3d.hdf5 import new_hdf5

METRES = {"m": 1.0, "cm": 1e-2, "mm": 1e-3, "um": 1e-6}


def files(track: Track) -> Files:
    """``<recording>.nwb``."""
    return {f"{track.poses.recording}.nwb": lambda path: write(track, path)}


def write(track: Track, path: Path) -> None:
    """Write a ``PoseEstimation`` with a series for each keypoint, in the processing module ``behavior``.

    Positions are stored in the project's units, with the factor to metres that the format asks for.
    """
    import ndx_pose  # of the extra `export`
    import pynwb

    assert track.start is not None
    poses = track.poses
    content = pynwb.NWBFile(
        session_description=f"3D keypoints of recording {poses.recording}, discovered without labels",
        identifier=str(uuid.uuid4()),
        session_start_time=track.start,
    )
    skeleton = ndx_pose.Skeleton(name="skeleton", nodes=poses.names, edges=track.edges.astype(np.uint8))
    series: list[Any] = []
    for j, name in enumerate(poses.names):
        series.append(
            ndx_pose.PoseEstimationSeries(
                name=name,
                description=f"Position of keypoint {name}.",
                data=poses.positions[:, j],
                unit="meters",
                conversion=METRES[poses.units],
                reference_frame="The origin and axes of the cameras' calibration.",
                timestamps=poses.time if j == 0 else series[0],
                confidence=poses.confidence[:, j],
                confidence_definition="Largest probability of the keypoint's heatmap, a mean over views where each "
                "view has its own.",
            )
        )
    estimation = ndx_pose.PoseEstimation(
        name="PoseEstimation",
        pose_estimation_series=series,
        description="Keypoints discovered by self-supervision in calibrated views.",
        scorer="BKinD-3D",
        source_software="bkind3d",
        source_software_version=version("bkind3d"),
        skeleton=skeleton,
    )
    module = content.create_processing_module(name="behavior", description="Keypoints of the body.")
    module.add([ndx_pose.Skeletons(skeletons=[skeleton]), estimation])
    with new_hdf5(path) as file:
        pynwb.NWBHDF5IO(file=file, mode="w").write(content)
