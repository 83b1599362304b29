"""The working volume as the cameras see it, drawn into a frame of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bkind3d.cameras import Cameras
from bkind3d.data import Project, RecordingInfo, Volume, load_truth
from bkind3d.data.volume import BOX_EDGES
from bkind3d.errors import InputError
from bkind3d.files import replacing

_EDGE_SAMPLES = 64


def draw_volume(project: Project, recordings: dict[str, RecordingInfo], volume: Volume, out: Path) -> list[Path]:
    """Draw the volume's box into frame 0 of the first recording, one ``volume_<camera>.png`` per camera.

    The lower face is yellow, a red line points up from the centre; true joints are magenta dots.
    """
    recording = project.recordings[0]
    joints = np.zeros((0, 3)) if recording.truth is None else load_truth(recording, project).points3d[0]
    paths = []
    for index, camera in enumerate(project.cameras.names):
        frame = _first_frame(recordings[recording.name], camera)
        path = out / f"volume_{camera}.png"
        figure = _volume_figure(frame, project.cameras_of(recording), index, volume, project.up, joints)
        try:
            out.mkdir(parents=True, exist_ok=True)
            with replacing(path) as scratch:
                figure.savefig(scratch, format="png")
        except OSError as error:
            raise InputError(f"{path}: the picture cannot be written ({error.strerror})") from None
        paths.append(path)
    return paths


def _first_frame(info: RecordingInfo, camera: str) -> np.ndarray:
    """The recording's first moment in that camera, (H, W, 3) uint8."""
    number = info.index.frames[0, info.index.cameras.index(camera)]
    ((_, frame),) = info.footage[camera].read(np.array([number]))
    return frame


def _volume_figure(
    frame: np.ndarray, cameras: Cameras, index: int, volume: Volume, up: tuple, joints: np.ndarray
) -> Figure:
    height, width = frame.shape[:2]
    inches = 8.0 / max(height, width)
    figure = Figure(figsize=(width * inches, height * inches), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(frame)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.set_axis_off()
    corners = volume.corners()
    vertical = int(torch.tensor(up).abs().argmax())
    upwards = up[vertical] > 0
    for start, end in BOX_EDGES:
        on_ground = all((corner >> vertical & 1) != upwards for corner in (start, end))
        line = _projected_line(cameras, index, corners[start], corners[end])
        axes.plot(*line.T, color="yellow" if on_ground else "cyan", linewidth=2.0 if on_ground else 1.2)
    center = torch.tensor(volume.center, dtype=torch.float64)
    direction = torch.tensor(up, dtype=torch.float64)
    top = center + direction / direction.norm() * max(volume.size) / 4
    arrow = _projected_line(cameras, index, center, top)
    axes.plot(*arrow.T, color="red", linewidth=2)
    axes.plot(*arrow[:1].T, "o", color="red", markersize=5)
    points = torch.from_numpy(joints)
    pixels = cameras.project(points)[0][index]
    axes.plot(*pixels[cameras.in_view(points)[index]].T, ".", color="magenta", markersize=3)
    axes.text(
        0.02,
        0.98,
        f"{cameras.names[index]}   yellow: lower face, red: up",
        transform=axes.transAxes,
        va="top",
        color="black",
        backgroundcolor="white",
    )
    return figure


def _projected_line(cameras: Cameras, index: int, start: Tensor, end: Tensor) -> np.ndarray:
    """Raw pixels (S, 2) along a straight line in the world; NaN where the camera does not see it."""
    points = start + torch.linspace(0, 1, _EDGE_SAMPLES, dtype=torch.float64)[:, None] * (end - start)
    pixels, _ = cameras.project(points)
    return torch.where(cameras.in_view(points)[index][:, None], pixels[index], torch.nan).numpy()
