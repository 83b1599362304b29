"""`bkind3d init`: a project file from a folder of videos and a calibration.

A video is a camera's where the camera's name stands in the name of the file, or of a folder that it lies in. What is
left of its path without that name says which videos were taken together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from bkind3d.cameras import UNITS, Calibration, Cameras, read_calibration
from bkind3d.data import load_project, propose_volume
from bkind3d.data.video import video_size
from bkind3d.errors import InputError
from bkind3d.files import write_text

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".m4v", ".mpg", ".mpeg", ".webm", ".wmv", ".mts")
_TESTED = 0.2  # share of the recordings that are proposed for testing
_LISTED = 6  # names that a message lists

_TEMPLATE = """\
# Look at it before training:  bkind3d check {file} --out check
# Every key is explained in docs/rig.md; paths are relative to this file.
name: {name}
units: {units}            # of the calibration's translations, the volume, true joints and all results: m, cm, mm or um
calibration: {calibration}   # {format}
up: [0, 0, 1]        # the world's vertical; turn it where the red line in check's pictures does not point up
{volume}
recordings:          # videos that were taken together, one of each camera
{recordings}"""

_RECORDING = """\
  - name: {name}
    split: {split}      # train, test (only evaluated), or both
    videos:
{videos}
    offsets: {offsets}   # frame of each video that shows the recording's first moment
    # frames: 9000     # how many to use, where the cameras stopped at different times
"""


def init_project(
    folder: Path,
    *,
    calibration: Path | None = None,
    units: str | None = None,
    name: str | None = None,
    out: Path | None = None,
) -> None:
    """Write a project file from a folder of videos and a calibration, with comments that explain each key.

    Args:
        folder: Folder with the videos, below which they are looked for; a camera's name stands in its videos' names, or
            in those of their folders.
        calibration: Calibration of any known format, file or folder; looked for in the folder, and in those in it that
            have calib in their names, when left out.
        units: Length unit of the calibration (m, cm, mm or um), where its format does not say.
        name: Name of the project; the folder's when left out.
        out: Project file to write; FOLDER/project.yaml when left out. It is never overwritten.

    Raises:
        InputError: The file exists, no calibration or no video of some camera is found, or units are missing.
    """
    path = out or folder / "project.yaml"
    if path.exists():
        raise InputError(f"{path}: exists, and is never overwritten; move it away, or give another --out")
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder")
    if units is not None and units not in UNITS:
        raise InputError(f"--units: {units!r} is not a unit of length; expected one of {', '.join(UNITS)}")
    found = read_calibration(calibration) if calibration is not None else _look_for_calibration(folder)
    recordings, left_out = group_videos(folder, [lens.name for lens in found.lenses])
    first = next(iter(recordings.values()))
    cameras = found.cameras(units, lambda camera: video_size(first[camera]))
    write_text(path, _content(path, folder, name, found, cameras, recordings))
    try:
        load_project(path)
    except InputError:
        path.unlink()
        raise
    for video in left_out:
        print(f"left out: {video}")
    print(
        f"{path}: {len(cameras)} cameras, {len(recordings)} recording(s); read it, then: "
        f"bkind3d check {path} --out {path.parent / 'check'}"
    )


def _look_for_calibration(folder: Path) -> Calibration:
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and "calib" in path.name.lower()]
    for place in (folder, *inside):
        try:
            return read_calibration(place)
        except InputError as error:
            if "holds no calibration" not in str(error):
                raise
    raise InputError(f"{folder}: neither it nor a folder 'calib...' in it holds a calibration; give --calibration PATH")


def group_videos(folder: Path, cameras: Sequence[str]) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """The recordings below a folder, by name: one video of each camera; and what was left out, with the reason.

    Raises:
        InputError: there is no recording of all cameras.
    """
    groups: dict[str, dict[str, Path]] = {}
    left_out, videos = [], _videos_below(folder)
    for video in videos:
        parts = video.relative_to(folder).with_suffix("").parts
        camera, rest = _split_path(parts, cameras)
        if camera is None:
            left_out.append(f"{video}, which no camera's name stands in")
        elif camera in groups.setdefault(rest, {}):
            left_out.append(f"{video}: {groups[rest][camera]} is of the same camera and recording")
        else:
            groups[rest][camera] = video
    whole = {rest: group for rest, group in groups.items() if len(group) == len(cameras)}
    for rest, group in groups.items():
        if rest not in whole:
            missing = next(camera for camera in cameras if camera not in group)
            left_out += [f"{video}: of camera {missing!r} there is no such video" for video in group.values()]
    if not whole:
        shown = ", ".join(str(video.relative_to(folder)) for video in videos[:_LISTED]) or "none"
        more = ", ..." if len(videos) > _LISTED else ""
        raise InputError(
            f"{folder}: no recording has a video of each camera ({', '.join(cameras)}); found {shown}{more}: the name "
            "of a camera in the calibration must stand in the name of its video, or of the video's folder"
        )
    return {_name(rest, place): whole[rest] for place, rest in enumerate(sorted(whole, key=_counted))}, left_out


def _videos_below(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.suffix.lower() in VIDEOS and path.is_file())
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _split_path(parts: Sequence[str], cameras: Sequence[str]) -> tuple[str | None, str]:
    """The camera that a path names, its file before its folders, and the path without it."""
    for part in reversed(parts):
        named = [camera for camera in cameras if _pattern(camera).search(part)]
        if named:
            camera = max(named, key=len)
            rest = [_pattern(camera).sub(" ", other) for other in parts]
            return camera, "-".join(word for other in rest for word in re.findall(r"[\w.]+", other, re.ASCII))
    return None, ""


def _pattern(camera: str) -> re.Pattern[str]:
    """A camera's name as a word of its own: cam_1 and cam01 are the same, cam1 does not stand in cam10."""
    groups = re.findall(r"[^\W\d_]+|\d+", camera) or [camera]
    words = [f"0*{int(group)}" if group.isdecimal() else re.escape(group) for group in groups]
    return re.compile(rf"(?<![^\W_]){'[ _.-]*'.join(words)}(?![^\W_])", re.IGNORECASE)


def _counted(rest: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdecimal() else (0, word) for word in re.findall(r"\d+|\D+", rest)]


def _name(rest: str, place: int) -> str:
    name = re.sub(r"[^\w.-]+", "-", rest, flags=re.ASCII).strip("-_.")
    return name or f"take{place + 1}"


def _content(
    path: Path, folder: Path, name: str | None, found: Calibration, cameras: Cameras,
    recordings: dict[str, dict[str, Path]],
) -> str:  # fmt: skip
    tested = 0 if len(recordings) == 1 else max(1, round(_TESTED * len(recordings)))
    splits = ["train"] * (len(recordings) - tested) + ["test"] * tested if tested else ["both"]
    rows = [
        _RECORDING.format(
            name=_scalar(recording),
            split=split,
            videos="\n".join(
                f"      {_scalar(camera)}: {_scalar(_relative(path, video))}" for camera, video in videos.items()
            ),
            offsets="{" + ", ".join(f"{_scalar(camera)}: 0" for camera in cameras.names) + "}",
        )
        for (recording, videos), split in zip(recordings.items(), splits)
    ]
    return _TEMPLATE.format(
        file=path.name,
        name=_scalar(name or folder.resolve().name),
        units=cameras.units,
        calibration=_scalar(_relative(path, found.files[0])),
        format=found.format,
        volume=_volume_lines(cameras),
        recordings="".join(rows),
    )


def _volume_lines(cameras: Cameras) -> str:
    """The volume as a comment, so that it is proposed anew as long as nobody has looked."""
    try:
        volume = propose_volume(cameras)
    except InputError:
        return (
            "volume:              # the box that the animal stays in; the cameras do not say where: give both lines\n"
            "  center: [0, 0, 0]\n  size: [1, 1, 1]"
        )
    return (
        "# volume:            # the box that the animal stays in; left out, the common view of the cameras is taken:\n"
        f"#   center: {list(volume.center)}\n#   size: {list(volume.size)}"
    )


def _relative(path: Path, file: Path) -> str:
    file, folder = file.absolute(), path.absolute().parent
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file)


def _scalar(text: str) -> str:
    """Text as YAML reads it back."""
    return text if re.fullmatch(r"[\w./ -]+", text) and yaml.safe_load(f"[{text}]") == [text] else json.dumps(text)
