"""A simulated laboratory: cameras around an arena, an animal in it, and the files that a real rig would leave."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bkind3d.cameras import Cameras
from bkind3d.data.truth import Truth
from bkind3d.data.volume import Volume
from bkind3d.errors import InputError
from bkind3d.processes import call_each
from bkind3d.sims.simulate.body import EDGES, JOINTS
from bkind3d.sims.simulate.motion import Animation, animate
from bkind3d.sims.simulate.render import SUPERSAMPLE, Film, View
from bkind3d.sims.studio import Ring, check_settings, h264_video, new_rig, place_cameras, rim, write_project

VOLUME = Volume(center=(0.0, 0.0, 0.3), size=(1.2, 1.2, 0.6))  # metres
RING = Ring(
    radius=(1.7, 2.1),
    heights=(0.65, 1.25),
    wobble=0.12,
    target=(0.0, 0.0, 0.14),
    miss=0.03,
    framed=rim((0.62, 0.0), (0.527, 0.40)),
)
_FEW_PICTURES = 400  # below this, starting worker processes costs more than it saves
_REPORT_EVERY = 20  # pictures between two updates of the progress bar


@dataclass(frozen=True)
class _Shot:
    """One video to be made: self-contained, so that any process can make it."""

    path: Path
    cameras: Cameras  # of length 1
    animation: Animation
    fps: int
    crf: int
    room_seed: int
    sensor_seed: int


def simulate_rig(
    directory: Path | str,
    *,
    views: int = 4,
    frames: int = 800,
    test_frames: int = 300,
    image_size: tuple[int, int] = (256, 256),
    fps: int = 30,
    seed: int = 0,
    distortion: bool = False,
    crf: int = 18,
    workers: int | None = None,
    progress: bool = True,
    force: bool = False,
) -> Path:
    """Film a simulated animal with a calibrated rig: H.264 videos, calibration, project file and the exact truth.

    Two recordings are made, `train` and `test`, of one animal in one room but with different motions. The same
    arguments give the same pictures and the same truth, whatever the number of workers.

    Args:
        directory: made anew; it appears only when complete.
        views: number of cameras, 4 to 8, on a ring around the arena.
        frames: length of the recording `train`, at least 2.
        test_frames: length of the recording `test`, at least 2.
        image_size: width and height in pixels, even and at least 32.
        fps: frames per second.
        seed: of everything random: cameras, motions, room, sensor noise.
        distortion: give each camera a lens with radial and tangential distortion.
        crf: quality of the H.264 encoding, 0 (lossless) to 51.
        workers: processes that render; default one per core, or none beside this one for a handful of pictures.
        progress: show a progress bar.
        force: replace an existing simulated rig.

    Returns:
        The path of `project.yaml`. Units are metres; each recording's `truth.npz` holds points3d (T, 21, 3) float32,
        names (21,), edges (20, 2), fps and units.

    Raises:
        InputError: an argument is out of range, or the directory holds files already or cannot be written.
    """
    directory = Path(directory).absolute()
    check_settings(views, frames, test_frames, image_size, fps, seed, crf, kind="simulated", least_views=4)
    if workers is not None and workers < 1:
        raise InputError(f"workers: expected at least 1 process, not {workers}")
    with new_rig(directory, "simulated", force) as target:
        camera_seed, train_seed, test_seed, room_seed, sensor_seed = np.random.SeedSequence(seed).spawn(5)
        cameras = place_cameras(RING, views, image_size, distortion, np.random.default_rng(camera_seed))
        animations = {
            "train": animate(frames, fps, np.random.default_rng(train_seed)),
            "test": animate(test_frames, fps, np.random.default_rng(test_seed)),
        }
        truths = {
            name: Truth(points3d=animation.joints, names=list(JOINTS), edges=EDGES, fps=float(fps))
            for name, animation in animations.items()
        }
        write_project(target, "simulated", cameras, truths, VOLUME)
        room, sensors = int(room_seed.generate_state(1)[0]), iter(sensor_seed.generate_state(2 * views).tolist())
        shots = [
            _Shot(target / name / f"{camera}.mp4", cameras.select([camera]), animation, fps, crf, room, next(sensors))
            for name, animation in animations.items()
            for camera in cameras.names
        ]
        _film_all(shots, workers, progress)
    return directory / "project.yaml"


def make_view(camera: Cameras) -> View:
    """Rays of the one camera in `camera`, through the undistorted position of each sample."""
    width, height = camera.image_size[0].tolist()
    x = (torch.arange(width * SUPERSAMPLE, dtype=torch.float64) + 0.5) / SUPERSAMPLE - 0.5
    y = (torch.arange(height * SUPERSAMPLE, dtype=torch.float64) + 0.5) / SUPERSAMPLE - 0.5
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (H s, W s, 2)
    straight = camera.undistort_points(pixels[None])[0] if camera.distortion.any() else pixels
    homogeneous = torch.cat([straight, torch.ones_like(straight[..., :1])], dim=-1)
    inverse = torch.linalg.inv(camera.intrinsics[0] @ camera.rotation[0])
    rays = torch.nn.functional.normalize(homogeneous @ inverse.T, dim=-1)
    focal = float(camera.intrinsics[0, [0, 1], [0, 1]].max())
    return View(camera.centers[0].float().numpy(), rays.float().permute(2, 0, 1).contiguous().numpy(), focal)


def make_film(camera: Cameras, animation: Animation, room_seed: int, sensor_seed: int) -> Film:
    """Everything that rendering the animation from the one camera in `camera` takes."""

    def project(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels, depth = camera.project(torch.from_numpy(points))
        return pixels[0].numpy(), depth[0].numpy()

    return Film(make_view(camera), animation.points, animation.frames, project, room_seed, sensor_seed)


def _film(shot: _Shot, report: Callable[[int], None]) -> None:
    """Render and encode one video; `report` hears of every few pictures."""
    film = make_film(shot.cameras, shot.animation, shot.room_seed, shot.sensor_seed)
    width, height = shot.cameras.image_size[0].tolist()
    with h264_video(shot.path, (width, height), shot.fps, shot.crf) as write:
        for i in range(len(film)):
            write(film.picture(i))
            if (i + 1) % _REPORT_EVERY == 0 or i + 1 == len(film):
                report(i % _REPORT_EVERY + 1)


def _film_apart(shot: _Shot, report: Callable[[int], None]) -> None:
    """As `_film`, in a process of its own."""
    torch.set_num_threads(1)  # there is one process per core already
    _film(shot, report)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _film_all(shots: list[_Shot], workers: int | None, progress: bool) -> None:
    """Make every video, several at a time; which process makes which has no influence on the result."""
    total = sum(len(shot.animation.points) for shot in shots)
    if workers is None:
        workers = 1 if total < _FEW_PICTURES else _usable_cores()
    workers = min(workers, len(shots))
    with tqdm(total=total, desc="rendering", unit="picture", disable=None if progress else True) as bar:
        if workers == 1:
            for shot in shots:
                _film(shot, lambda pictures: bar.update(pictures) and None)
            return
        lock = threading.Lock()

        def count(pictures: int) -> None:
            with lock:
                bar.update(pictures)

        for _ in call_each(_film_apart, shots, workers, report=count):
            pass
