"""What is wrong with a rig before a frame is looked at: files given twice, lenses and places that cannot be.

Each finding is green, amber (look at it) or red (training on this is a waste), with why and how to mend it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bkind3d.cameras import Cameras
from bkind3d.data.matching import RecordingInfo
from bkind3d.data.volume import Volume, meeting_point
from bkind3d.errors import InputError

Level = Literal["grey", "green", "amber", "red"]
LEVELS: tuple[Level, ...] = ("grey", "green", "amber", "red")

_OFF_CENTRE = 0.2  # of the image, that a principal point lies beside its middle at most
_NARROW, _WIDE = 3.0, 140.0  # degrees of the field of view, of lenses without the fisheye model
_UNEQUAL = 1.25  # fx over fy
_OTHER_UNITS = 8.0  # times as far from where the others look as they are, or as near
_SEEN = 0.02  # of the volume that a camera must see
_APART = 0.02  # of the distance to what is looked at, between two cameras
_BLOCK = 1 << 22  # bytes hashed at a time


@dataclass(frozen=True)
class Finding:
    """One item of the check: what was found, why and how to mend it; grey where it could not be looked at."""

    level: Level
    text: str

    def line(self) -> str:
        """For the terminal."""
        return f"{self.level + ':':<7}{self.text}"


# What is said where a kind of finding has none.
FINE = {
    "files": "every camera has a video of its own",
    "lenses": "principal points and fields of view fit the images",
    "places": "every camera stands outside of what the others look at, and looks at it",
    "pictures": "every camera shows something, and changes",
    "clocks": "movements come at the same time in all cameras",
    "views": "no other order of the videos, and none turned by 180°, fits better",
}
# And where nothing of the kind could be looked at.
NOT_LOOKED_AT = {
    "clocks": "not compared: that takes 4 s without gaps in which cameras see the same movements",
    "views": "not compared: something must move in every camera, and what is red be mended",
}


def summary(found: dict[str, list[Finding]]) -> list[Finding]:
    """All findings, the red ones last: a green one of each kind that has none, a grey one of each that is missing."""
    rows = [finding for findings in found.values() for finding in findings]
    for kind, text in FINE.items():
        if kind not in found:
            rows.append(Finding("grey", f"{kind}: {NOT_LOOKED_AT[kind]}"))
        elif not found[kind]:
            rows.append(Finding("green", f"{kind}: {text}"))
    return in_order(rows)


def in_order(findings: list[Finding]) -> list[Finding]:
    """The worst last, where the eye is."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


# --- files ----------------------------------------------------------------------------------------------------------


def check_files(recordings: dict[str, RecordingInfo]) -> list[Finding]:
    """One file that is given for two cameras of a recording, under one name or two."""
    found = []
    for name, info in recordings.items():
        first = {camera: footage.parts[0][1] for camera, footage in info.footage.items()}
        for one, other in combinations(first, 2):
            if _same_content(first[one], first[other]):
                found.append(
                    Finding(
                        "red",
                        f"recording {name!r}: cameras {one!r} and {other!r} have the same video ({first[one].name}, "
                        f"{first[other].name}): give each its own",
                    )
                )
    return found


def _same_content(one: Path, other: Path) -> bool:
    if one.samefile(other):
        return True
    return one.stat().st_size == other.stat().st_size and _digest(one) == _digest(other)


def _digest(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.digest()


# --- lenses ---------------------------------------------------------------------------------------------------------


def check_lenses(cameras: Cameras) -> list[Finding]:
    """Intrinsics that do not belong to the image size beside them."""
    return list(_lens_findings(cameras))


def _lens_findings(cameras: Cameras) -> Iterator[Finding]:
    mend = "do 'size' and 'matrix' belong to one calibration? A resized video needs both resized"
    for index, name in enumerate(cameras.names):
        matrix, size = cameras.intrinsics[index], cameras.image_size[index].double()
        beside = ((matrix[:2, 2] + 0.5) / size - 0.5).abs().max().item()  # 0.5 is the image's border
        x, y = matrix[:2, 2].tolist()
        width, height = cameras.image_size[index].tolist()
        if beside > _OFF_CENTRE:
            where = "outside" if beside > 0.5 else "far from the middle of"
            level: Level = "red" if beside > 0.5 else "amber"
            text = f"camera {name!r}: principal point ({x:.4g}, {y:.4g}) {where} its image {width}×{height}: {mend}"
            yield Finding(level, text)
        fx, fy = matrix[0, 0].item(), matrix[1, 1].item()
        if not 1 / _UNEQUAL < fx / fy < _UNEQUAL:
            text = (
                f"camera {name!r}: focal lengths {fx:.4g} and {fy:.4g} differ, as if its pixels were not square: {mend}"
            )
            yield Finding("amber", text)
        view = 2 * torch.rad2deg(torch.atan(size / 2 / torch.tensor([fx, fy]))).max().item()
        if not cameras.fisheye[index] and not _NARROW < view < _WIDE:
            text = (
                f"camera {name!r}: field of view {view:.3g}° (focal length {fx:.4g} px, image {width}×{height}): {mend}"
            )
            yield Finding("red", text)


# --- places ---------------------------------------------------------------------------------------------------------


def check_places(cameras: Cameras, volume: Volume | None = None) -> list[Finding]:
    """Cameras that stand or look where none of this rig can, judged by where the others look.

    Args:
        cameras: the rig.
        volume: the box to look into; None where nothing could be proposed.
    """
    if volume is None and _meet(inverted(cameras, range(len(cameras)))) and not _meet(cameras):
        return [Finding("red", f"the extrinsics of all cameras look inverted: {_INVERTED}")]
    found = [_place(cameras, index, volume) for index in range(len(cameras))]
    return [finding for finding in found if finding is not None]


def _meet(cameras: Cameras) -> bool:
    """Whether all cameras see the point where their optical axes meet, and stand at places of their own."""
    try:
        point = meeting_point(cameras)
    except InputError:
        return False
    nearest = torch.pdist(cameras.centers).min().item() if len(cameras) > 1 else 0.0
    apart = nearest > _APART * (cameras.centers - point).norm(dim=-1).max().item()
    return apart and bool(cameras.in_view(point).all())


_INVERTED = "x_cam = R X + t takes world to camera; a file of poses (camera to world) has R transposed and C for t"


def _place(cameras: Cameras, index: int, volume: Volume | None) -> Finding | None:
    name = cameras.names[index]
    target = _target(cameras, index, volume)
    if target is None:
        return None
    points = volume.points(8).reshape(-1, 3) if volume else target[None]
    seen = cameras.in_view(points).double().mean(-1)
    distance = (cameras.centers - target).norm(dim=-1)
    usual = torch.cat([distance[:index], distance[index + 1 :]]).median().item()
    ratio = distance[index].item() / usual
    if seen[index] < _SEEN and inverted(cameras, [index]).in_view(points)[index].double().mean() > _SEEN:
        text = f"camera {name!r} does not see what the others look at, but would if its extrinsics were not inverted: "
        return Finding("red", text + _INVERTED)
    if not 1 / _OTHER_UNITS < ratio < _OTHER_UNITS:
        far = f"{ratio:.3g} times as far" if ratio > 1 else f"only {ratio:.2g} times as far"
        text = (
            f"camera {name!r} stands {far} from what the others look at as they do: is its translation in their units?"
        )
        return Finding("red", text)
    if seen[index] < _SEEN:
        text = f"camera {name!r} does not see what the others look at: was it moved, or is its name another camera's?"
        return Finding("red", text)
    return None


def _target(cameras: Cameras, index: int, volume: Volume | None) -> Tensor | None:
    """The middle of the volume, or where the other cameras look; None where that cannot be told."""
    if volume is not None:
        return torch.tensor(volume.center, dtype=torch.float64)
    others = [name for place, name in enumerate(cameras.names) if place != index]
    try:
        return meeting_point(cameras.select(others))
    except InputError:
        return None


def inverted(cameras: Cameras, places: Iterable[int]) -> Cameras:
    """The rig with the extrinsics of some cameras taken as camera to world."""
    rotation, translation = cameras.rotation.clone(), cameras.translation.clone()
    for place in places:
        rotation[place] = cameras.rotation[place].T
        translation[place] = -cameras.rotation[place].T @ cameras.translation[place]
    return replace(cameras, rotation=rotation, translation=translation)
