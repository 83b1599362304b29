"""The poses of a run, written in the files of another tool."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bkind3d.data import Project, load_project
from bkind3d.data.matching import frame_numbers
from bkind3d.documents import read_json
from bkind3d.errors import InputError
from bkind3d.exports.formats import FORMATS, Export
from bkind3d.exports.track import Files, Track, Views
from bkind3d.files import write_json
from bkind3d.labels import load_labels
from bkind3d.poses import Poses
from bkind3d.run import open_run, refuse_results


def export(
    run: Path,
    to: str,
    *,
    recordings: list[str] | None = None,
    start: str | None = None,
    out: Path | None = None,
    force: bool = False,
) -> list[Path]:
    """Write the poses of a run in the files of another tool, under the names of the run's ``keypoints.yaml``.

    Args:
        run: run folder with poses.
        to: name of :data:`~bkind3d.exports.FORMATS`.
        recordings: names of recordings with poses; all of them when left out.
        start: when the recording began, ISO 8601 with its time zone, for formats that ask for it.
        out: folder for the files; ``exports/<to>`` of the run when left out.
        force: replace files that are there.

    Returns:
        The files written; ``<recording>.json`` among them tells units, frame rate and keypoints, which not every format
        has a place for.

    Raises:
        InputError: no such run, format or recording, no poses, the project of the run cannot be read where the format
            needs its cameras, a library is missing, a file is there and ``force`` is not set, or one cannot be written.
    """
    config = open_run(run)
    chosen = _format(to)
    names = _recordings(run, recordings)
    began = _start(chosen, start, names)
    project = load_project(config.project) if chosen.needs == "cameras" else None
    edges = _edges(run)
    folder = out or run / "exports" / chosen.name
    written: Files = {}
    for name in names:
        track = _track(run, name, edges, project, began)
        written |= chosen.files(track) | {f"{name}.json": partial(write_json, content=_about(track))}
    paths = [folder / name for name in written]
    refuse_results(*paths, force=force)
    for path, write in zip(paths, written.values(), strict=True):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    return paths


def _format(to: str) -> Export:
    if to not in FORMATS:
        raise InputError(f"to: {to!r} is no format; expected one of {', '.join(FORMATS)}")
    missing = [module for module in FORMATS[to].modules if find_spec(module) is None]
    if missing:
        raise InputError(f'{to}: {", ".join(missing)} is not installed; install it with pip install "bkind3d[export]"')
    return FORMATS[to]


def _recordings(run: Path, names: list[str] | None) -> list[str]:
    """Names of the recordings to write, each of which has poses."""
    known = sorted(path.stem for path in (run / "poses").glob("*.nc"))
    if not known:
        raise InputError(f"{run / 'poses'}: no poses; find them with `bkind3d predict {run}`")
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise InputError(f"recordings: {unknown[0]!r} has no poses in {run / 'poses'}; it has {', '.join(known)}")
    return names or known


def _start(chosen: Export, start: str | None, names: list[str]) -> datetime | None:
    """The start that a format needs, of one recording."""
    if chosen.needs != "start":
        if start is not None:
            raise InputError(f"start: {chosen.name} has no place for it; leave it out")
        return None
    example = "such as 2026-03-01T14:30:00+01:00"
    if start is None:
        raise InputError(f"start: {chosen.name} asks when a recording began; give its date, time and zone, {example}")
    if len(names) > 1:
        raise InputError(f"recordings: one start is of one recording; name it, of {', '.join(names)}")
    try:
        began = datetime.fromisoformat(start)
    except ValueError:
        raise InputError(f"start: expected a date and time, {example}, got {start!r}") from None
    if began.tzinfo is None:
        raise InputError(f"start: expected a time zone, {example}, got {start!r}")
    return began


def _track(run: Path, name: str, edges: np.ndarray, project: Project | None, start: datetime | None) -> Track:
    poses = Poses.load(run / "poses" / f"{name}.nc")
    if not len(poses.frames):
        raise InputError(f"recording {name!r}: its poses have no frames; run `bkind3d predict --force` again")
    poses = dataclasses.replace(poses, names=load_labels(run, poses.names).names)
    return Track(poses, edges, None if project is None else _views(project, poses), start)


def _about(track: Track) -> dict[str, Any]:
    poses = track.poses
    return {
        "source_software": f"bkind3d {version('bkind3d')}",
        "units": poses.units,
        "fps": poses.fps,
        "frames": [int(poses.frames[0]), int(poses.frames[-1])],
        "keypoints": poses.names,
    }


def _views(project: Project, poses: Poses) -> Views:
    recording = project.recording(poses.recording)
    cameras = project.cameras_of(recording)
    sources = [recording.videos[camera] for camera in cameras.names]
    videos = [str(source[0] if isinstance(source, tuple) else source) for source in sources]
    return Views(cameras, frame_numbers(recording, cameras, poses.frames), videos)


def _edges(run: Path) -> np.ndarray:
    """Active edges (E, 2) of the run's skeleton."""
    path = run / "skeleton.json"
    if not path.is_file():
        return np.zeros((0, 2), dtype=np.int64)
    try:
        rows = read_json(path)["edges"]
        return np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{path}: not a skeleton ({error}); run `bkind3d train --resume` to write it again") from error
