"""A moving picture of a run: views with their keypoints beside the turning skeleton, as GIF, APNG or MP4."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from bkind3d.errors import InputError
from bkind3d.files import write_bytes
from bkind3d.pictures import GAP, as_floats, overlay, relative
from bkind3d.report.clip import encode, even, project_keypoints
from bkind3d.report.crops import ASTRAY
from bkind3d.report.inputs import RunFiles, Scene, Shown, choose_recording, health_of, read_run, run_inputs
from bkind3d.report.shots import take_shots
from bkind3d.run import refuse_results

NAME = "render.gif"
TILES = 4  # views at most
TURN, ELEVATION = 30.0, 22.0  # degrees per second, degrees
LINES = 5  # of the floor's grid, across what is seen
SETTLING = 0.5  # s over which the middle of the 3D view follows the keypoints
DPI = 100
EDGE = np.array([0.24, 0.26, 0.29])
FLOOR, SHADE = "#d9dde2", "#c3c8cf"
MARGIN = 0.3  # round the keypoints in each view, of the side of their box
STILL = 14  # levels: what changes by less in a view is noise, and costs no bytes
SMALLEST = 48  # px, height of the whole picture, below which no file is small enough


@dataclass
class Clip:
    """What is shown: the moments of a recording, frame by frame of the moving picture.

    Attributes:
        fps: pictures per second.
        frames: (F, M, h, w, 3) uint8, at the size they are shown at.
        pixels: (F, M, J, 2) keypoints in them.
        points: (F, J, 3) keypoints, turned so that z is up, world units.
        steady: (J,) bool, keypoints that decide what the 3D view shows.
        edges: (E, 2) keypoint pairs.
        weights: (E,) of the edges.
        names: of the M views.
        colours: (J, 3) uint8 of the keypoints.
    """

    fps: float
    frames: np.ndarray
    pixels: np.ndarray
    points: np.ndarray
    steady: np.ndarray
    edges: np.ndarray
    weights: np.ndarray
    names: Sequence[str]
    colours: np.ndarray

    @property
    def height(self) -> int:
        """Height of the whole picture in pixels."""
        return _tiling(self.frames.shape[1])[1] * (self.frames.shape[2] + GAP) - GAP

    def shrunk(self, scale: float) -> Clip:
        """The same at a smaller size."""
        height, width = (max(1, round(side * scale)) for side in self.frames.shape[2:4])
        frames = np.stack([[_resized(view, width, height) for view in moment] for moment in self.frames])
        ratio = np.array([width, height]) / self.frames.shape[3:1:-1]
        return replace(self, frames=frames, pixels=(self.pixels + 0.5) * ratio - 0.5)


def render(
    run: Path,
    *,
    recording: str | None = None,
    start: float = 0.0,
    seconds: float = 4.0,
    fps: float = 15.0,
    size: int = 832,
    max_bytes: int = 1_500_000,
    out: Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Write a moving picture of a run: up to four views with keypoints and active edges, and the turning skeleton.

    In real time. What does not fit into `max_bytes` is given fewer colours, then drawn smaller.

    Args:
        run: Run folder with poses.
        recording: Name of the recording; the first test recording when left out, else the first.
        start: Seconds into the recording.
        seconds: Length; less where the recording ends before.
        fps: Pictures per second.
        size: Width in pixels.
        max_bytes: Largest file wanted.
        out: File ending in .gif, .png (animated PNG) or .mp4; RUN/render.gif when left out.
        force: Replace an earlier file.
        progress: Whether to show progress bars.

    Returns:
        The file.

    Raises:
        InputError: Not a run folder, no poses of such a recording, a number that makes no sense, another ending, the
            file is there and `force` is not set, or it cannot be written.
    """
    path = out or run / NAME
    if path.suffix not in ENCODERS:
        raise InputError(f"{path}: the name must end in {', '.join(ENCODERS)}")
    for name, value, least in (
        ("seconds", seconds, 0),
        ("fps", fps, 0),
        ("size", size, 63),
        ("max_bytes", max_bytes, 0),
    ):
        if not (math.isfinite(value) and value > least):
            raise InputError(f"{name}: expected more than {least}, got {value}")
    files = read_run(run)
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it first")
    refuse_results(path, force=force)
    if not files.poses:
        raise InputError(f"{run / 'poses'}: no poses; find them with `bkind3d predict {run}`")
    scene = run_inputs(run)
    shown = _recording(files, scene, recording)
    moments = pick_moments(shown.poses.time, start, seconds, fps)
    clip = make_clip(files, scene, shown, moments, fps, size, progress=progress)
    _write(path, fit(clip, path.suffix, max_bytes, progress=progress))
    return path


def pick_moments(time: np.ndarray, start: float, seconds: float, fps: float) -> np.ndarray:
    """Rows (F,) of the times (T,) nearest to each picture's, from `start` seconds after the first time on.

    Raises:
        InputError: nothing is there.
    """
    time = time - time[0]
    if not 0 <= start <= time[-1]:
        raise InputError(f"start: {start:g} s is not within the recording, which has poses of {time[-1]:.2f} s")
    wanted = start + np.arange(max(1, round(seconds * fps))) / fps
    wanted = wanted[wanted <= time[-1] + 1e-6]
    after = np.searchsorted(time, wanted).clip(1, max(1, len(time) - 1))
    nearest = after - (wanted - time[after - 1] < time[after.clip(max=len(time) - 1)] - wanted)
    return nearest.clip(0, len(time) - 1)


def make_clip(
    files: RunFiles, scene: Scene, shown: Shown, moments: np.ndarray, fps: float, size: int, *, progress: bool = False
) -> Clip:
    """Frames of the size that they are shown at, and the keypoints in them and in space.

    Args:
        files: of the run.
        scene: with the volume, and with the videos where they can be read.
        shown: the recording.
        moments: (F,) rows of its poses.
        fps: pictures per second.
        size: width of the whole picture, in pixels.
        progress: show a progress bar while videos are read.
    """
    poses, steady = shown.poses, _steady(shown, scene)
    positions, names = poses.positions[moments].astype(np.float64), shown.cameras.names
    picked = np.linspace(0, len(names) - 1, min(TILES, len(names))).round().astype(int)
    picture = shown.cameras.image_size[0].tolist()
    width, height = tile_size(size, len(picked), *picture)
    boxes = view_boxes(project_keypoints(shown.cameras, positions[:, steady]), *picture)
    cameras = shown.cameras.crop(torch.from_numpy(boxes)).select([names[m] for m in picked]).resize(width, height)
    rows, back = np.unique(shown.rows[moments], return_inverse=True)
    frames = take_shots(scene, poses.recording, rows, cameras, progress=progress)
    edges, weights = files.active_edges()
    return Clip(
        fps=fps,
        frames=hold(frames[back], STILL),
        pixels=project_keypoints(cameras, positions),
        points=positions @ upright(scene.up).T,
        steady=steady,
        edges=edges,
        weights=weights,
        names=cameras.names,
        colours=shown.colours,
    )


def view_boxes(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """For each view the part of its picture that the keypoints move in, with a margin and the picture's aspect.

    Args:
        pixels: (F, M, J, 2) keypoints, NaN behind a camera.
        width: of the pictures.
        height: of the pictures.

    Returns:
        (M, 4) int x, y, width, height inside the pictures; the whole picture where no keypoint is in it.
    """
    size = np.array([width, height])
    boxes = np.tile([0, 0, width, height], (pixels.shape[1], 1))
    for m, track in enumerate(np.moveaxis(pixels, 1, 0)):
        seen = track[((track >= 0) & (track < size)).all(axis=-1)]  # (K, 2)
        if len(seen):
            low, high = seen.min(axis=0), seen.max(axis=0)
            share = min(1.0, max(0.25, float(((high - low) * (1 + 2 * MARGIN) / size).max())))
            sides = np.rint(share * size)
            start = np.clip(np.rint((low + high - sides) / 2), 0, size - sides)
            boxes[m] = *start, *sides
    return boxes


def hold(frames: np.ndarray, tolerance: int) -> np.ndarray:
    """(F, ..., 3) uint8 with each pixel as it last was until one of its channels has changed by more than that."""
    held = frames.copy()
    for before, after in itertools.pairwise(held):
        still = np.abs(after.astype(np.int16) - before).max(axis=-1, keepdims=True) <= tolerance
        np.copyto(after, before, where=still)
    return held


def tile_size(size: int, views: int, width: int, height: int) -> tuple[int, int]:
    """Width and height of each view, beside a square as high as all of them, in a picture so wide."""
    columns, rows = _tiling(views)
    tile = (size - columns * GAP - (rows - 1) * GAP) / (columns * width / height + rows)
    return max(1, int(tile * width / height)), max(1, int(tile))


def upright(up: np.ndarray) -> np.ndarray:
    """Rotation (3, 3) that turns a direction (3,) to z."""
    z = up / np.linalg.norm(up)
    x = np.eye(3)[np.abs(z).argmin()]
    x = x - (x @ z) * z
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z])


def fit(clip: Clip, suffix: str, max_bytes: int, *, progress: bool = False) -> bytes:
    """A file of at most so many bytes: with fewer colours where that is enough, else drawn smaller.

    Args:
        clip: what to show.
        suffix: of ENCODERS.
        max_bytes: largest file wanted; a picture of SMALLEST pixels may take more.
        progress: show a progress bar while pictures are drawn.
    """
    encoder, palettes = ENCODERS[suffix]
    while True:
        bar = tqdm(draw(clip), total=len(clip.frames), desc="drawing", disable=None if progress else True)
        pictures = list(bar)
        for colours in palettes:
            content = encoder(pictures, clip.fps, clip.colours, colours)
            if len(content) <= max_bytes or clip.height <= SMALLEST:
                return content
        clip = clip.shrunk(float(np.clip(0.98 * math.sqrt(max_bytes / len(content)), 0.5, 0.95)))


def draw(clip: Clip) -> Iterator[np.ndarray]:
    """The pictures, (h, w, 3) uint8 each: views to the left, the skeleton to the right."""
    columns, _ = _tiling(clip.frames.shape[1])
    stage, gap = Stage(clip, clip.height), np.full((clip.height, GAP, 3), 255, np.uint8)
    for f, (images, pixels) in enumerate(zip(clip.frames, clip.pixels)):
        views = overlay(
            images, pixels, clip.edges, scale=1, weights=clip.weights, names=clip.names, columns=columns,
            colours=clip.colours,
        )  # fmt: skip
        yield np.concatenate([views, gap, stage.draw(f)], axis=1)


class Stage:
    """The 3D view: equal axes, a floor that stands still, a camera that turns and follows the keypoints.

    Args:
        clip: what is shown.
        side: of the view in pixels.
    """

    def __init__(self, clip: Clip, side: int) -> None:
        self.clip = clip
        used = clip.points[:, clip.steady]
        self.middle = _smooth(used.mean(axis=1), round(SETTLING * clip.fps))  # (F, 3)
        self.floor = float(np.percentile(used[..., 2], 1))
        self.reach = max(1e-9, 1.1 * float(np.percentile(np.linalg.norm(used - self.middle[:, None], axis=2), 97)))
        self.figure = Figure(figsize=(side / DPI, side / DPI), dpi=DPI)
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1), projection="3d", computed_zorder=False)
        self.unit = max(0.7, side / 416)  # of lines and dots

    def draw(self, f: int) -> np.ndarray:
        """Picture f, (side, side, 3) uint8."""
        axes, points = self.axes, self.clip.points[f]
        axes.clear()
        axes.set_axis_off()
        axes.view_init(elev=ELEVATION, azim=TURN * f / self.clip.fps - 60)
        for k, name in enumerate("xyz"):
            getattr(axes, f"set_{name}lim")(self.middle[f, k] - self.reach, self.middle[f, k] + self.reach)
        axes.set_box_aspect((1, 1, 1), zoom=1.6)
        self._draw_floor(f)
        axes.scatter(*points[:, :2].T, self.floor, s=14 * self.unit**2, c=SHADE, depthshade=False, zorder=1)
        for (i, j), share in zip(self.clip.edges, relative(self.clip.weights)):
            colour = 1 - (0.4 + 0.6 * share) * (1 - EDGE)  # mixed with white, not transparent: fewer colours
            axes.plot(*points[[i, j]].T, color=colour, linewidth=self.unit * (0.8 + 1.6 * share), zorder=2 + share)
        dots = {"depthshade": False, "zorder": 4, "edgecolors": "black", "linewidths": 0.9 * self.unit}
        axes.scatter(*points.T, s=52 * self.unit**2, c=as_floats(self.clip.colours), **dots)
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()

    def _draw_floor(self, f: int) -> None:
        """Lines that stand still in the world, as far as they are seen."""
        spacing = 2 * self.reach / LINES
        low, high = self.middle[f] - self.reach, self.middle[f] + self.reach
        for k in (0, 1):
            first = math.ceil(low[k] / spacing)
            for value in np.arange(first, math.floor(high[k] / spacing) + 1) * spacing:
                ends = np.array([[value, value], [low[1 - k], high[1 - k]]])
                x, y = ends if k == 0 else ends[::-1]
                self.axes.plot(x, y, [self.floor] * 2, color=FLOOR, linewidth=0.8 * self.unit, zorder=0)


# --- files --------------------------------------------------------------------------------------------------------


def gif(pictures: Sequence[np.ndarray], fps: float, kept: np.ndarray, colours: int) -> bytes:
    """Animated GIF of (h, w, 3) uint8 pictures, of so many colours, `kept` (K, 3) uint8 among them."""
    ends = np.rint(np.arange(len(pictures) + 1) * 100 / fps)  # GIF counts in hundredths of a second
    durations = (np.diff(ends) * 10).astype(int).tolist()
    return _animation(pictures, kept, colours, format="GIF", duration=durations, disposal=1, optimize=True)


def apng(pictures: Sequence[np.ndarray], fps: float, kept: np.ndarray, colours: int) -> bytes:
    """Animated PNG of (h, w, 3) uint8 pictures, of so many colours, `kept` (K, 3) uint8 among them."""
    return _animation(pictures, kept, colours, format="PNG", duration=1000 / fps)


def mp4(pictures: Sequence[np.ndarray], fps: float, kept: np.ndarray, colours: int) -> bytes:
    """H.264 of (h, w, 3) uint8 pictures, in all colours."""
    return encode(map(even, pictures), fps)


# What writes a file of that ending, and the numbers of colours to try.
ENCODERS = {".gif": (gif, (128, 96, 64)), ".png": (apng, (128, 96, 64)), ".mp4": (mp4, (2**24,))}


def _animation(pictures: Sequence[np.ndarray], kept: np.ndarray, colours: int, **options: Any) -> bytes:
    table = _colour_table(pictures, colours, kept)
    images = [Image.fromarray(one).quantize(palette=table, dither=Image.Dither.NONE) for one in pictures]
    memory = io.BytesIO()
    images[0].save(memory, save_all=True, append_images=images[1:], loop=0, **options)
    return memory.getvalue()


def _colour_table(pictures: Sequence[np.ndarray], colours: int, kept: np.ndarray) -> Image.Image:
    """A picture with a palette of so many colours: white, those kept (at most half of it), and the pictures' own."""
    kept = np.concatenate([np.full((1, 3), 255, np.uint8), kept])[: colours // 2]
    some = [pictures[k] for k in np.unique(np.linspace(0, len(pictures) - 1, 6).astype(int))]
    found = Image.fromarray(np.concatenate(some)).quantize(colours - len(kept), method=Image.Quantize.MEDIANCUT)
    own = np.array(found.getpalette(), dtype=np.int64).reshape(-1, 3)[: colours - len(kept)]
    # Pillow takes any of several colours that are nearly the same; those kept are to be taken.
    own = own[np.abs(own[:, None] - kept.astype(np.int64)).max(axis=2).min(axis=1) > 8]
    table = Image.new("P", (1, 1))
    table.putpalette([*kept.ravel().tolist(), *own.ravel().tolist()])
    return table


def _resized(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def _write(path: Path, content: bytes) -> None:
    try:
        write_bytes(path, content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


# --- small things -------------------------------------------------------------------------------------------------


def _recording(files: RunFiles, scene: Scene, name: str | None) -> Shown:
    """The recording of that name, or the first."""
    if name is not None and name not in files.poses:
        raise InputError(f"recording: {name!r} has no poses in {files.path / 'poses'}; it has {', '.join(files.poses)}")
    chosen = files.poses if name is None else {name: files.poses[name]}
    shown = choose_recording(replace(files, poses=chosen), scene)
    if shown is None:
        raise InputError(f"{files.path / 'poses'}: not of the project's frames; run `bkind3d predict --force` again")
    return shown


def _steady(shown: Shown, scene: Scene) -> np.ndarray:
    """Keypoints (J,) bool that are in every moment, and follow something if any does."""
    poses = shown.poses
    finite = np.isfinite(poses.positions).all(axis=(0, 2))
    if not finite.any():
        raise InputError(f"recording {poses.recording!r}: no keypoint has a position in all of its poses")
    steady = finite & [not ASTRAY & set(flags) for flags in health_of(shown, scene).flags]
    return steady if steady.any() else finite


def _tiling(views: int) -> tuple[int, int]:
    """Columns and rows of so many views."""
    shown = min(TILES, views)
    columns = 1 if shown <= 2 else 2
    return columns, math.ceil(shown / columns)


def _smooth(track: np.ndarray, width: int) -> np.ndarray:
    """(F, 3) -> running mean over 2 · width + 1 rows, the ends repeated."""
    padded = np.pad(track, [(width, width), (0, 0)], mode="edge")
    sums = np.cumsum(np.concatenate([np.zeros((1, 3)), padded]), axis=0)
    return (sums[2 * width + 1 :] - sums[: len(track)]) / (2 * width + 1)
