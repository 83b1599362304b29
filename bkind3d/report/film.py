"""A film of the videos themselves, at their full resolution, with the keypoints drawn over them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from bkind3d.cameras import Cameras
from bkind3d.data import Project, RecordingInfo, load_project, probe_recording
from bkind3d.data.ledger import Ledger
from bkind3d.errors import InputError
from bkind3d.exports.track import Views
from bkind3d.files import replacing
from bkind3d.pictures import SHADOW, WHITE
from bkind3d.poses import Poses
from bkind3d.report.clip import even, write_video
from bkind3d.report.inputs import SPLIT_ORDER, read_run
from bkind3d.run import open_run, refuse_results

NAME = "overlay.mp4"
WIDEST = 3840  # px, of a grid of several views
FASTEST = 60.0  # pictures per second
QUALITY = 20
FINENESS = 4  # Pillow draws without smoothing: draw larger, then reduce
FAINTEST = 0.12  # opacity of a keypoint without any confidence
SURE = 95  # percentile of the confidence of all keypoints that is drawn opaque
UNIT = 720  # px, height of a view in which lines and dots have the sizes below; they grow with it
LINE, DOT, RIM = 1.6, 4.0, 1.2  # px


def film(
    run: Path,
    *,
    recording: str | None = None,
    cameras: Sequence[str] | None = None,
    start: float = 0.0,
    seconds: float | None = None,
    speed: float = 1.0,
    size: int | None = None,
    out: Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Write H.264 of the original videos with keypoints and active edges over them; the more confident, the opaquer.

    Args:
        run: Run folder with poses.
        recording: Name of the recording; the first test recording when left out, else the first.
        cameras: One camera fills the picture, several are a grid; all of them when left out.
        start: Seconds from the first pose on.
        seconds: Length, of the recording; to its end when left out.
        speed: 0.25 shows it four times slower than it was.
        size: Width in pixels; the videos' own when left out, of a grid at most 3840.
        out: File ending in .mp4; RUN/overlay.mp4 when left out.
        force: Replace an earlier file.
        progress: Whether to show a progress bar.

    Returns:
        The file.

    Raises:
        InputError: Not a run folder, no poses of such a recording or no such camera, a number that makes no sense,
            another ending, a video cannot be read, the file is there and `force` is not set, or it cannot be written.
    """
    path = out or run / NAME
    if path.suffix != ".mp4":
        raise InputError(f"{path}: the name must end in .mp4")
    for name, value, least in (("seconds", seconds, 0), ("speed", speed, 0), ("size", size, 63)):
        if value is not None and not (math.isfinite(value) and value > least):
            raise InputError(f"{name}: expected more than {least}, got {value}")
    refuse_results(path, force=force)
    config, files = open_run(run), read_run(run)
    project = load_project(config.project)
    poses = _poses(files.poses, project, recording)
    picked = _cameras(project, cameras)
    rows = _rows(poses, start, seconds)
    rate, step = _rate(poses, speed)
    rows = rows[::step]
    edges, _ = files.active_edges()
    filmed = project.recording(poses.recording)
    info = probe_recording(filmed, project.cameras_of(filmed), Ledger.of_cache(Path(config.cache_directory)))
    opacity = opacities(poses.confidence)[rows]
    pictures = _pictures(info, project, poses, rows, picked, size, edges, files.labels.colours, opacity)
    bar = tqdm(pictures, total=len(rows), desc=f"render {poses.recording}", disable=None if progress else True)
    try:
        with replacing(path) as scratch:
            write_video(str(scratch), map(even, bar), rate, QUALITY)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def opacities(confidence: np.ndarray) -> np.ndarray:
    """Confidence (F, J) as opacity: 1 from the 95th percentile of all keypoints on, FAINTEST where there is none."""
    sure = max(float(np.nanpercentile(confidence, SURE)), 1e-12) if confidence.size else 1.0
    return FAINTEST + (1 - FAINTEST) * np.clip(np.nan_to_num(confidence) / sure, 0, 1)


def draw_keypoints(
    picture: Image.Image, pixels: np.ndarray, edges: np.ndarray, colours: np.ndarray, opacity: np.ndarray
) -> None:
    """Draw keypoints and edges over a view, smoothly.

    Args:
        picture: the view, drawn into.
        pixels: (J, 2) keypoints, centres at integers; those that are not finite are left out, with their edges.
        edges: (E, 2) pairs; each end in the colour of its keypoint.
        colours: (J, 3) uint8.
        opacity: (J,), 0 to 1; of an edge that of its fainter end.
    """
    unit = max(0.6, picture.height / UNIT)
    shown = np.isfinite(pixels).all(axis=1)
    if not shown.any():
        return
    margin = (DOT + RIM + 1) * unit
    low = np.maximum(np.floor(pixels[shown].min(axis=0) - margin), 0).astype(int)
    high = np.minimum(np.ceil(pixels[shown].max(axis=0) + margin) + 1, picture.size).astype(int)
    if (low >= high).any():
        return
    layer = Image.new("RGBA", tuple((FINENESS * (high - low)).tolist()))
    draw, at = ImageDraw.Draw(layer), (pixels - low + 0.5) * FINENESS - 0.5
    thickness = unit * FINENESS
    for i, j in edges:
        if shown[i] and shown[j]:
            alpha, middle = round(255 * min(opacity[i], opacity[j])), (at[i] + at[j]) / 2
            draw.line([*at[i], *at[j]], fill=(*SHADOW, alpha // 2), width=round((LINE + RIM) * thickness))
            for end in (i, j):
                draw.line([*at[end], *middle], fill=(*colours[end].tolist(), alpha), width=round(LINE * thickness))
    for j in np.flatnonzero(shown)[np.argsort(opacity[shown], kind="stable")]:
        alpha = round(255 * opacity[j])
        for radius, fill in ((DOT, (*SHADOW, alpha)), (DOT - RIM, (*colours[j].tolist(), alpha))):
            box = [*(at[j] - radius * thickness), *(at[j] + radius * thickness)]
            draw.ellipse(box, fill=fill)
    smooth = layer.reduce(FINENESS)
    picture.paste(smooth.convert("RGB"), tuple(low.tolist()), smooth.getchannel("A"))


# --- what is shown -------------------------------------------------------------------------------------------------


def _poses(found: dict[str, Poses], project: Project, name: str | None) -> Poses:
    known = {
        recording: poses for recording, poses in found.items() if recording in project.names() and len(poses.frames)
    }
    if not known:
        raise InputError("poses: the run has none of a recording of the project; find them with `bkind3d predict`")
    if name is None:
        name = min(known, key=lambda one: (SPLIT_ORDER.index(project.recording(one).split), one))
    if name not in known:
        raise InputError(f"recording: {name!r} has no poses; there are those of {', '.join(known)}")
    return known[name]


def _cameras(project: Project, names: Sequence[str] | None) -> list[str]:
    unknown = [name for name in names or [] if name not in project.cameras.names]
    if unknown:
        raise InputError(f"cameras: there is no camera {unknown[0]!r}; there are {', '.join(project.cameras.names)}")
    return list(names or project.cameras.names)


def _rows(poses: Poses, start: float, seconds: float | None) -> np.ndarray:
    """Rows of the poses between the seconds."""
    time = poses.time - poses.time[0]
    end = math.inf if seconds is None else start + seconds - 1e-9
    rows = np.flatnonzero((time >= start - 1e-9) & (time < end))
    if not len(rows):
        raise InputError(f"start: there are no poses from {start:g} s on; the recording has {time[-1]:.2f} s of them")
    return rows


def _rate(poses: Poses, speed: float) -> tuple[float, int]:
    """Pictures per second, and every how many-th moment is one."""
    spacing = float(np.median(np.diff(poses.frames))) if len(poses.frames) > 1 else 1.0
    rate = poses.fps / spacing * speed
    step = max(1, math.ceil(rate / FASTEST - 1e-6))
    return rate / step, step


def _pictures(
    info: RecordingInfo,
    project: Project,
    poses: Poses,
    rows: np.ndarray,
    names: list[str],
    size: int | None,
    edges: np.ndarray,
    colours: np.ndarray,
    opacity: np.ndarray,
) -> Iterator[np.ndarray]:
    """The pictures of the film, (h, w, 3) uint8, as the videos are decoded."""
    cameras = project.cameras_of(project.recording(poses.recording))
    frames = info.index.frames[np.searchsorted(info.index.clock, poses.frames[rows])]
    views = Views(cameras, frames, [])
    places = [cameras.names.index(name) for name in names]
    pixels = {m: views.reprojected(m, poses.positions[rows])[0] for m in places}
    columns, scale = _layout(cameras, places, size)
    streams = [_moments(info, m, frames[:, m]) for m in places]
    for f, shots in enumerate(zip(*streams, strict=True)):
        tiles = []
        for m, shot in zip(places, shots, strict=True):
            view = Image.fromarray(shot)
            if scale != 1:
                view = view.resize([max(1, round(scale * side)) for side in view.size], Image.Resampling.LANCZOS)
            ratio = np.array(view.size) / shot.shape[1::-1]
            draw_keypoints(view, (pixels[m][f] + 0.5) * ratio - 0.5, edges, colours, opacity[f])
            _label(view, f"{cameras.names[m]}  {poses.time[rows[f]]:.2f} s")
            tiles.append(view)
        yield _grid(tiles, columns)


def _moments(info: RecordingInfo, m: int, numbers: np.ndarray) -> Iterator[np.ndarray]:
    """The frames of those numbers (F,), not decreasing; one that is asked for twice is shown twice."""
    stream = info.footage[info.index.cameras[m]].read(np.unique(numbers))
    number, frame = next(stream)
    for wanted in numbers:
        while number < wanted:
            number, frame = next(stream)
        yield frame


def _layout(cameras: Cameras, places: list[int], size: int | None) -> tuple[int, float]:
    """Columns of the grid, and how much views are enlarged."""
    columns = math.ceil(math.sqrt(len(places)))
    width = columns * int(cameras.image_size[places, 0].max())
    if size is None and len(places) > 1:
        size = min(width, WIDEST)
    return columns, 1.0 if size is None else size / width


def _grid(tiles: list[Image.Image], columns: int) -> np.ndarray:
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    sheet = Image.new("RGB", (min(columns, len(tiles)) * width, -(-len(tiles) // columns) * height))
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % columns * width, place // columns * height))
    return np.asarray(sheet)


def _label(view: Image.Image, text: str) -> None:
    font = ImageFont.load_default(size=max(11, view.height // 36))
    draw = ImageDraw.Draw(view)
    draw.text((6, 4), text, fill=WHITE, font=font, stroke_width=max(1, view.height // 400), stroke_fill=SHADOW)
