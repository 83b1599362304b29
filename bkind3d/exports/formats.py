"""The registry of exports: a new one is a file beside this one, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bkind3d.exports import anipose, c3d, dannce, dlc, movement, nwb, plain, sleap
from bkind3d.exports.track import Files, Track


@dataclass(frozen=True)
class Export:
    """A format.

    Args:
        name: of the option `--to`, and of its folder in the run's `exports`.
        files: what it writes of one recording.
        needs: what else it asks for: "cameras" of the project, the "start" of the recording.
        modules: that it imports beside those of training, which the extra `export` installs.
    """

    name: str
    files: Callable[[Track], Files]
    needs: str = ""
    modules: tuple[str, ...] = ()


FORMATS = {
    one.name: one
    for one in (
        Export("csv", plain.files),
        Export("anipose", anipose.files),
        Export("sleap-anipose", sleap.points_files),
        Export("dannce", dannce.files),
        Export("movement", movement.files),
        Export("movement-0.15", movement.files_before),
        Export("nwb", nwb.files, needs="start", modules=("pynwb", "ndx_pose")),
        Export("c3d", c3d.files, modules=("ezc3d",)),
        Export("dlc", dlc.files, needs="cameras"),
        Export("sleap", sleap.analysis_files, needs="cameras"),
    )
}
