"""Do the blobs of tests/bkind3d/layouts.py lie where the cached cameras project the truth?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from layouts import HEIGHT, WIDTH

from bkind3d.data import FrameCache, Project, build_cache, load_project, load_truth


def open_dataset(path: Path) -> tuple[Project, FrameCache]:
    """A project and its cache at the size of the raw images, so that a raw pixel is a network pixel."""
    project = load_project(path)
    return project, build_cache(project, HEIGHT, WIDTH, path.parent / "cache", crop="none", progress=False)


def centers_of_blobs(frames: np.ndarray) -> np.ndarray:
    """(..., H, W, 3) to (..., 3, 2): the brightness-weighted mean pixel of each channel, noise below a tenth cut."""
    weight = np.moveaxis(np.where(frames > 25, frames, 0).astype(float), -1, -3)  # (..., 3, H, W)
    rows, columns = np.mgrid[: weight.shape[-2], : weight.shape[-1]]
    mass = weight.sum((-2, -1))
    return np.stack([(weight * columns).sum((-2, -1)), (weight * rows).sum((-2, -1))], axis=-1) / mass[..., None]


def farthest(path: Path, drawn: tuple[str, ...]) -> float:
    """Greatest distance in pixels between a blob and its joint, over all recordings, moments, cameras and joints."""
    project, cache = open_dataset(path)
    worst = 0.0
    for recording in project.recordings:
        truth, entry = load_truth(recording, project), cache.recording(recording.name)
        points = torch.from_numpy(truth.points3d[:, [truth.names.index(name) for name in drawn]])
        expected = entry.cameras.project(points)[0].transpose(0, 1)  # (T, M, 3, 2)
        found = centers_of_blobs(np.array(entry.frames))
        assert found.shape == expected.shape
        worst = max(worst, float(np.linalg.norm(found - expected.numpy(), axis=-1).max()))
    return worst
