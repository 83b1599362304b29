"""What the readers of published data sets share: choosing, thinning, and writing a project that names their files.

A reader turns a data set's folder into a project file beside calibrations, indices and truth in this package's formats;
videos and images stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bkind3d.cameras import Cameras, save_toml
from bkind3d.data.index import Index, save_index
from bkind3d.data.pairs import gap_in_frames, pair_rows
from bkind3d.data.project import Project, Recording, Source, save_project
from bkind3d.data.truth import Truth, save_truth
from bkind3d.data.volume import Triple, Volume, meeting_point
from bkind3d.errors import InputError


@dataclass(frozen=True)
class Take:
    """One recording of a data set: its footage, which frame shows what, the true joints, and the name of its rig."""

    name: str
    split: str
    rig: str
    videos: Mapping[str, Source]
    index: Index
    truth: Truth

    def thinned(self, every: int, gap: str | int) -> Take:
        """The moments whose numbers are multiples of ``every`` after the first, and those that pair with them.

        Args:
            every: distance on the clock; 1 keeps everything.
            gap: distance of the two frames of a training pair. Moments of a test recording need no partner.
        """
        if every == 1:
            return self
        clock = self.index.clock
        rows = np.flatnonzero((clock - clock[0]) % every == 0)
        if self.split != "test":
            pairs = pair_rows(clock, gap_in_frames(gap, self.index.fps))
            rows = np.union1d(rows, pairs[np.isin(pairs[:, 0], rows), 1])
        return self._at(rows)

    def first(self, moments: int | None) -> Take:
        """The first so many moments; None keeps all."""
        return self if moments is None else self._at(np.arange(min(moments, len(self.index.clock))))

    def _at(self, rows: np.ndarray) -> Take:
        index, truth = self.index, self.truth
        behaviour = None if truth.behaviour is None else truth.behaviour[rows]
        return replace(
            self,
            index=replace(index, frames=index.frames[rows], clock=index.clock[rows]),
            truth=replace(truth, points3d=truth.points3d[rows], behaviour=behaviour),
        )


def choose(what: str, asked: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """The asked ones of those known, in the order of the known; all where nothing was asked.

    Raises:
        InputError: one is not known.
    """
    known = list(known)
    for name in asked or ():
        if name not in known:
            raise InputError(f"{what}: {name!r} is not there; found {', '.join(known) or 'none'}")
    return [name for name in known if not asked or name in asked]


def write_takes(
    out: Path, name: str, takes: Sequence[Take], rigs: Mapping[str, Cameras], center: Triple | None, side: float
) -> Path:
    """Write ``project.yaml``, ``<rig>.toml``, and ``<take>/index.npz`` and ``truth.npz``.

    Args:
        out: folder, made when missing; it must not hold a project yet.
        name: of the project.
        takes: at least one.
        rigs: cameras by name.
        center: of the cubic volume; None takes the point where the optical axes meet, the mean over the rigs.
        side: of the volume.

    Returns:
        The path of ``project.yaml``.

    Raises:
        InputError: the folder holds a project or cannot be written, or the optical axes do not meet.
    """
    path = out / "project.yaml"
    if path.exists():
        raise InputError(f"{path}: this project exists; remove it or choose another folder")
    used = {take.rig: rigs[take.rig] for take in takes}
    if center is None:
        x, y, z = torch.stack([meeting_point(rig) for rig in used.values()]).mean(0).round().tolist()
        center = (x, y, z)
    first = next(iter(used.values()))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for rig, cameras in used.items():
            save_toml(cameras, out / f"{rig}.toml")
        recordings = [_write_take(out, take, used[take.rig]) for take in takes]
    except OSError as error:
        raise InputError(f"{error.filename or out}: cannot be written ({error.strerror})") from None
    project = Project(
        path=path,
        name=name,
        units=first.units,
        calibration=out / f"{takes[0].rig}.toml",
        cameras=first,
        recordings=recordings,
        volume=Volume(center, (side, side, side)),
    )
    save_project(project, path)
    return path


def _write_take(out: Path, take: Take, cameras: Cameras) -> Recording:
    folder = out / take.name
    folder.mkdir(exist_ok=True)
    save_index(folder / "index.npz", take.index)
    save_truth(folder / "truth.npz", take.truth, cameras.units)
    return Recording(
        name=take.name,
        split=take.split,
        videos=take.videos,
        truth=folder / "truth.npz",
        calibration=out / f"{take.rig}.toml",
        cameras=cameras,
        index=folder / "index.npz",
    )
