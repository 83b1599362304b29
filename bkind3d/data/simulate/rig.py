"""A simulated laboratory: cameras around an arena, an animal in it, and the files that a real rig would leave."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import av
import numpy as np
import torch
from tqdm import tqdm

from bkind3d.cameras import Cameras, save_toml
from bkind3d.data.project import Project, Recording, Truth, save_project, save_truth
from bkind3d.data.simulate.body import EDGES, JOINTS
from bkind3d.data.simulate.motion import Animation, animate
from bkind3d.data.simulate.render import SUPERSAMPLE, Film, View
from bkind3d.data.volume import Volume
from bkind3d.errors import InputError

VOLUME = Volume(center=(0.0, 0.0, 0.3), size=(1.2, 1.2, 0.6))  # metres
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
    _check(views, frames, test_frames, image_size, fps, seed, crf, workers)
    _check_target(directory, force)
    camera_seed, train_seed, test_seed, room_seed, sensor_seed = np.random.SeedSequence(seed).spawn(5)
    cameras = place_cameras(views, image_size, distortion, np.random.default_rng(camera_seed))
    animations = {
        "train": animate(frames, fps, np.random.default_rng(train_seed)),
        "test": animate(test_frames, fps, np.random.default_rng(test_seed)),
    }
    room, sensors = int(room_seed.generate_state(1)[0]), iter(sensor_seed.generate_state(2 * views).tolist())
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
            target = Path(scratch) / "rig"
            _write_project(target, cameras, animations, fps)
            shots = [
                _Shot(
                    target / name / f"{camera}.mp4", cameras.select([camera]), animation, fps, crf, room, next(sensors)
                )
                for name, animation in animations.items()
                for camera in cameras.names
            ]
            _film_all(shots, workers, progress)
            _put_in_place(target, directory, Path(scratch) / "replaced")
    except OSError as error:
        raise InputError(f"{directory}: the simulated rig cannot be written ({error.strerror or error})") from error
    return directory / "project.yaml"


def place_cameras(views: int, image_size: tuple[int, int], distortion: bool, rng: np.random.Generator) -> Cameras:
    """Cameras on a ring around and above the arena, looking in, no two alike in height, distance or lens."""
    turn = 2 * np.pi * (np.arange(views) + rng.uniform(-0.12, 0.12, views)) / views + rng.uniform(0, 2 * np.pi)
    height = np.where(np.arange(views) % 2 == 0, 0.65, 1.25) + rng.uniform(-0.12, 0.12, views)
    radius = rng.uniform(1.7, 2.1, views)
    centers = np.stack([radius * np.cos(turn), radius * np.sin(turn), height], axis=1)
    targets = np.array([0.0, 0.0, 0.14]) + rng.uniform(-0.03, 0.03, (views, 3))
    rotation = np.stack([_look_at(*pair, rng.uniform(-0.05, 0.05)) for pair in zip(centers, targets)])
    translation = -np.einsum("mij,mj->mi", rotation, centers)
    lens = np.zeros((views, 5))
    if distortion:
        lens[:, 0] = rng.uniform(-0.36, -0.26, views)
        lens[:, 1] = rng.uniform(0.08, 0.16, views)
        lens[:, 2:4] = rng.uniform(-0.002, 0.002, (views, 2))
    return Cameras(
        names=tuple(f"cam{i}" for i in range(views)),
        intrinsics=torch.from_numpy(_intrinsics(rotation, translation, image_size, rng)),
        distortion=torch.from_numpy(lens),
        rotation=torch.from_numpy(rotation),
        translation=torch.from_numpy(translation),
        image_size=torch.tensor([image_size] * views),
        units="m",
    )


def _look_at(center: np.ndarray, target: np.ndarray, roll: float) -> np.ndarray:
    """World-to-camera rotation with OpenCV axes (x right, y down, z forward)."""
    forward = (target - center) / np.linalg.norm(target - center)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    return np.stack([c * right + s * down, c * down - s * right, forward])


def _intrinsics(
    rotation: np.ndarray, translation: np.ndarray, image_size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """K (M, 3, 3) whose focal length just frames the space where the animal moves."""
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    rim = np.stack([0.62 * np.cos(turn), 0.62 * np.sin(turn), np.zeros(24)], axis=1)
    rim = np.concatenate([rim, rim * 0.85 + [0.0, 0.0, 0.40]])
    seen = np.einsum("mij,pj->mpi", rotation, rim) + translation[:, None]
    width, height = image_size
    extent = np.abs(seen[..., :2] / seen[..., 2:]).max(axis=1)  # (M, 2)
    focal = (np.array([width, height]) / 2 / extent).min(axis=1) * rng.uniform(0.96, 1.04, len(rotation))
    matrix = np.tile(np.eye(3), (len(rotation), 1, 1))
    matrix[:, 0, 0] = focal
    matrix[:, 1, 1] = focal * rng.uniform(0.994, 1.006, len(rotation))  # pixels are never quite square
    matrix[:, 0, 2] = (width - 1) / 2 + width * rng.uniform(-0.02, 0.02, len(rotation))
    matrix[:, 1, 2] = (height - 1) / 2 + height * rng.uniform(-0.02, 0.02, len(rotation))
    return matrix


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
    with av.open(str(shot.path), "w") as container:
        # The encoder's decisions must depend on the pictures alone, not on the machine, nor on what memory happens to
        # hold: with AVX-512, x264's macroblock tree reads past rows whose width is no multiple of 128 pixels.
        options = {"crf": str(shot.crf), "preset": "veryfast", "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=Fraction(shot.fps), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for i in range(len(film)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(film.picture(i), format="rgb24")))
            if (i + 1) % _REPORT_EVERY == 0 or i + 1 == len(film):
                report(i % _REPORT_EVERY + 1)
        container.mux(stream.encode())


_counter: Synchronized[int]


def _start_worker(counter: Synchronized[int]) -> None:
    global _counter
    _counter = counter
    torch.set_num_threads(1)  # there is one process per core already


def _film_and_count(shot: _Shot) -> None:
    def count(pictures: int) -> None:
        with _counter.get_lock():
            _counter.value += pictures

    _film(shot, count)


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
        # Spawned, not forked: the caller's process may run torch's threads.
        context = multiprocessing.get_context("spawn")
        counter = context.Value("q", 0)
        with ProcessPoolExecutor(workers, context, _start_worker, (counter,)) as pool:
            pending = {pool.submit(_film_and_count, shot) for shot in shots}
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.2, return_when="FIRST_EXCEPTION")
                    bar.update(counter.value - bar.n)
                    for future in done:
                        future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _write_project(target: Path, cameras: Cameras, animations: dict[str, Animation], fps: int) -> None:
    """All files of the rig but its videos."""
    recordings = []
    for name, animation in animations.items():
        videos = {camera: target / name / f"{camera}.mp4" for camera in cameras.names}
        recordings.append(Recording(name=name, split=name, videos=videos, truth=target / name / "truth.npz"))
        (target / name).mkdir(parents=True)
        truth = Truth(points3d=animation.joints, names=list(JOINTS), edges=EDGES, fps=float(fps))
        save_truth(target / name / "truth.npz", truth, cameras.units)
    save_toml(cameras, target / "calibration.toml")
    project = Project(
        path=target / "project.yaml",
        name="simulated",
        units=cameras.units,
        calibration=target / "calibration.toml",
        cameras=cameras,
        recordings=recordings,
        volume=VOLUME,
    )
    save_project(project, project.path)


def _put_in_place(target: Path, directory: Path, replaced: Path) -> None:
    if directory.exists():
        directory.rename(replaced)
    target.rename(directory)


def _check(
    views: int,
    frames: int,
    test_frames: int,
    image_size: tuple[int, int],
    fps: int,
    seed: int,
    crf: int,
    workers: int | None,
) -> None:
    if not 4 <= views <= 8:
        raise InputError(f"views: the simulated rig has 4 to 8 cameras, not {views}")
    for name, value in (("frames", frames), ("test_frames", test_frames)):
        if value < 2:
            raise InputError(f"{name}: a recording needs at least 2 frames, not {value}")
    if len(image_size) != 2 or any(side < 32 or side % 2 for side in image_size):
        raise InputError(f"image_size: width and height must be even and at least 32, not {tuple(image_size)}")
    if fps < 1:
        raise InputError(f"fps: expected a whole number of frames per second, at least 1, not {fps}")
    if seed < 0:
        raise InputError(f"seed: expected a whole number from 0, not {seed}")
    if not 0 <= crf <= 51:
        raise InputError(f"crf: expected 0 (lossless) to 51, not {crf}")
    if workers is not None and workers < 1:
        raise InputError(f"workers: expected at least 1 process, not {workers}")


def _check_target(directory: Path, force: bool) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InputError(f"{directory}: is a file; name a folder for the simulated rig")
    if not any(directory.iterdir()):
        return
    if not force:
        raise InputError(f"{directory}: holds files already; name another folder, or use --force to replace it")
    if not (directory / "project.yaml").is_file():
        raise InputError(f"{directory}: holds no project.yaml, so it is no rig that --force may replace")
