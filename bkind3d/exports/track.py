"""What every format is written from: the poses of one recording under the user's names, and its cameras."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from bkind3d.cameras import Cameras
from bkind3d.poses import Poses

# The files of a format by their names below its folder, each with what writes it to a path.
Files = dict[str, Callable[[Path], None]]


@dataclass(frozen=True, eq=False)
class Views:
    """The cameras of a recording as they filmed it.

    Args:
        cameras: with lens distortion, of the videos' size.
        frames: (F, M) number of each moment's frame in each camera's own footage.
        videos: M names of that footage.
    """

    cameras: Cameras
    frames: np.ndarray
    videos: list[str]

    def reprojected(self, m: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keypoints in the video of camera m: pixels (F, J, 2), NaN where it does not show them, and which it does.

        Args:
            m: number of the camera.
            positions: (F, J, 3), world units.
        """
        points, camera = torch.as_tensor(positions, dtype=torch.float64), self.cameras.select([self.cameras.names[m]])
        seen = (camera.in_view(points)[0] & torch.isfinite(points).all(-1)).numpy()
        return np.where(seen[..., None], camera.project(points)[0][0].numpy(), np.nan), seen


@dataclass(frozen=True, eq=False)
class Track:
    """One recording.

    Args:
        poses: with the names that the user gave the keypoints.
        edges: (E, 2) active edges.
        views: its cameras, where the format asks for them.
        start: when the recording began, where the format asks for it.
    """

    poses: Poses
    edges: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    views: Views | None = None
    start: datetime | None = None

    def gapless(self, values: np.ndarray) -> np.ndarray:
        """Values (F, ...) with a row for every number of the clock from first to last, NaN where there is none."""
        return placed(values, self.poses.frames - self.poses.frames[0])


def placed(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Values (F, ...) at their rows (F,) of an array that ends with the last of them, NaN elsewhere."""
    found = np.full((int(rows.max()) + 1, *values.shape[1:]), np.nan)
    found[rows] = values
    return found
