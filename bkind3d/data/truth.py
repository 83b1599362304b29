"""The true joints of a recording, which evaluation alone looks at: an npz file beside its videos."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bkind3d.data.arrays import read_npz
from bkind3d.data.project import Project, Recording
from bkind3d.documents import broken_file
from bkind3d.errors import InputError


@dataclass(frozen=True, eq=False)
class Truth:
    """True joints of a recording, for evaluation only: points3d (T, K, 3) in the project's units, NaN where unknown.

    `note` says in one sentence how far they can be trusted, where that needs saying. Where the behaviour is known,
    `behaviour` (T,) holds for each frame a place in the list `behaviours`, -1 where it is not.
    """

    points3d: np.ndarray
    names: list[str]
    edges: np.ndarray  # (E, 2) int
    fps: float
    note: str = ""
    behaviour: np.ndarray | None = None
    behaviours: list[str] = field(default_factory=list)


def save_truth(path: Path | str, truth: Truth, units: str) -> None:
    """Write the true joints of a recording: npz with points3d, names, edges, fps, units, note, behaviour."""
    known: dict[str, Any] = {}
    if truth.behaviour is not None:
        known = {"behaviour": truth.behaviour, "behaviours": np.array(truth.behaviours)}
    np.savez_compressed(
        path,
        points3d=truth.points3d,
        names=np.array(truth.names),
        edges=truth.edges,
        fps=truth.fps,
        units=units,
        note=truth.note,
        **known,
    )


def load_truth(recording: Recording, project: Project) -> Truth:
    """Read the true joints of a recording.

    Raises:
        InputError: the recording names no truth, the file cannot be read, an array is missing or misshapen, or its
            units are not the project's.
    """
    if recording.truth is None:
        raise InputError(f"{project.path}: recording {recording.name!r} has no 'truth' to evaluate against")
    path = recording.truth
    with broken_file(f"{path}: not the true joints of a recording"):
        return _truth(path, read_npz(path, ("points3d", "names", "edges", "fps", "units")), project)


def _truth(path: Path, arrays: dict[str, np.ndarray], project: Project) -> Truth:
    note = str(arrays["note"]) if "note" in arrays else ""
    behaviour = arrays["behaviour"].astype(np.int64) if "behaviour" in arrays else None
    behaviours = [str(name) for name in arrays["behaviours"]] if behaviour is not None else []
    points, names = arrays["points3d"], [str(name) for name in arrays["names"]]
    if points.ndim != 3 or points.shape[1:] != (len(names), 3):
        raise InputError(f"{path}: points3d {points.shape} must be (frames, {len(names)} names, 3)")
    units = str(arrays["units"])
    if units != project.units:
        raise InputError(f"{path}: its units are {units!r}, the project's are {project.units!r}; convert one of them")
    if behaviour is not None and (
        behaviour.shape != points.shape[:1] or not ((behaviour >= -1) & (behaviour < len(behaviours))).all()
    ):
        raise InputError(f"{path}: behaviour must be a place in 'behaviours', or -1, for each of {len(points)} frames")
    edges = arrays["edges"].astype(np.int64).reshape(-1, 2)
    if points.dtype.kind not in "iuf" or ((edges < 0) | (edges >= len(names))).any():
        raise InputError(f"{path}: points3d must be numbers, edges places in 'names'")
    return Truth(
        points3d=points.astype(np.float64),
        names=names,
        edges=edges,
        fps=float(arrays["fps"]),
        note=note,
        behaviour=behaviour,
        behaviours=behaviours,
    )
