"""The project file: which videos, which calibration, which units, which volume."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bkind3d.cameras import UNITS, Cameras, load_calibration, read_calibration
from bkind3d.data.images import image_size, is_images
from bkind3d.data.video import video_size
from bkind3d.data.volume import Triple, Volume, propose_volume
from bkind3d.documents import dump_yaml, read_yaml
from bkind3d.errors import InputError, brief, reason, shown
from bkind3d.files import write_text

SPLITS = ("train", "test", "both")

_LONGEST_NAME = 100
_MOST_FRAMES = 1 << 40

_PROJECT_KEYS = ("name", "units", "calibration", "up", "volume", "recordings")
_VOLUME_KEYS = ("center", "size")
_RECORDING_KEYS = ("name", "split", "calibration", "videos", "index", "offsets", "frames", "truth", "masks")

# One camera's footage: a video file, chunks of one, or images, whose numbers a name such as img_%06d.jpg stands for.
Source = Path | tuple[Path, ...]


@dataclass(frozen=True)
class Recording:
    """One take of all cameras.

    Args:
        name: names its files (cache, poses): letters, digits, ``_``, ``-`` and ``.``.
        split: "train", "test", or "both" (trained on, and evaluated by blocked cross-validation).
        videos: camera name to footage, one for every camera of the calibration.
        offsets: camera name to the index, in that camera's video, of the recording's frame 0; 0 where not named.
        truth: npz file with the true joints, for evaluation only.
        frames: number of frames to use; None uses all, which asks that all videos end together.
        calibration: file or folder of this recording's own calibration; None takes the project's.
        cameras: loaded from it.
        index: npz file that says which frame of each camera shows which moment (:class:`bkind3d.data.index.Index`).
        masks: camera name to masks of the body (white on black), frame for frame as the videos; for every camera, or
            empty where masks are found from the background.
    """

    name: str
    split: str
    videos: Mapping[str, Source]
    offsets: dict[str, int] = field(default_factory=dict)
    truth: Path | None = None
    frames: int | None = None
    calibration: Path | None = None
    cameras: Cameras | None = None
    index: Path | None = None
    masks: Mapping[str, Source] = field(default_factory=dict)

    def offset(self, camera: str) -> int:
        """Index in that camera's video of the recording's frame 0."""
        return self.offsets.get(camera, 0)

    def files(self) -> list[Path]:
        """Every file that the recording is made of, each of its images too."""
        found: list[Path] = []
        for source in [*self.videos.values(), *self.masks.values()]:
            for path in source if isinstance(source, tuple) else (source,):
                found += sorted(path.parent.iterdir()) if is_images(path) else [path]
        found += [] if self.calibration is None else read_calibration(self.calibration).files
        return found + [path for path in (self.truth, self.index) if path is not None]


@dataclass(frozen=True)
class Project:
    """A rig and its recordings, as the project file describes them.

    Args:
        path: the project file.
        name: of the project.
        units: length unit of the calibration, the volume and the truth: "m", "cm", "mm" or "um".
        calibration: file or folder of it, of any known format, for every recording that has none of its own.
        cameras: loaded from it, in the natural order of their names, which are the same in all recordings.
        recordings: at least one.
        volume: the box to look into, in ``units``; None has it proposed (see :meth:`working_volume`).
        up: the world's vertical.
    """

    path: Path
    name: str
    units: str
    calibration: Path
    cameras: Cameras
    recordings: list[Recording]
    volume: Volume | None = None
    up: Triple = (0.0, 0.0, 1.0)

    def working_volume(self) -> Volume:
        """The volume of the project file, or the one proposed from the cameras' common view where it names none."""
        return self.volume or propose_volume(self.cameras, self.up)

    def files(self) -> list[Path]:
        """Every file that the project names, and all in its folders of images."""
        named = [*read_calibration(self.calibration).files]
        for recording in self.recordings:
            named += recording.files()
        return named

    def cameras_of(self, recording: Recording) -> Cameras:
        """The cameras that filmed a recording."""
        return self.cameras if recording.cameras is None else recording.cameras

    def rigs(self) -> dict[Path, Cameras]:
        """All different calibrations, by their files, in the order of the recordings."""
        return {row.calibration or self.calibration: self.cameras_of(row) for row in self.recordings}

    def names(self, *splits: str) -> list[str]:
        """Names of the recordings, in their order: of those in any of the splits, or of all where none is given."""
        return [recording.name for recording in self.recordings if not splits or recording.split in splits]

    def recording(self, name: str) -> Recording:
        """The recording of that name.

        Raises:
            InputError: there is none.
        """
        for recording in self.recordings:
            if recording.name == name:
                return recording
        raise InputError(f"{self.path}: there is no recording {name!r}; it has {brief(', '.join(self.names()))}")


def load_project(path: Path | str) -> Project:
    """Read a project file; paths in it are relative to it.

    Raises:
        InputError: a key is unknown or missing, a value is of the wrong kind, a file does not exist, or the cameras of
            a recording and those of the calibration are not the same.
    """
    path = Path(path)
    content = read_yaml(path)
    _check_keys(f"{path}", content, _PROJECT_KEYS, ("name", "units", "calibration", "recordings"))
    units = content["units"]
    if units not in UNITS:
        raise InputError(f"{path}: units: {shown(units)} is not a unit of length; expected one of {', '.join(UNITS)}")
    rows = content["recordings"]
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: recordings: expected a list of at least one recording")
    calibration = _existing(path, "calibration", content["calibration"])
    videos = [row["videos"] for row in rows if isinstance(row, dict) and isinstance(row.get("videos"), dict)]
    footage = {str(camera): value for mapping in reversed(videos) for camera, value in mapping.items()}
    cameras = load_calibration(calibration, units, _sizes(path, footage))
    for camera in cameras.names:
        _require_file_name(f"{calibration}", f"camera {camera!r}", camera)
    recordings = _with_cameras(path, [_recording(path, index, row, cameras) for index, row in enumerate(rows)], cameras)
    names = [recording.name for recording in recordings]
    twice, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise InputError(f"{path}: two recordings are named {twice!r}; give every recording its own name")
    return Project(
        path=path,
        name=_text(f"{path}: name", content["name"]),
        units=units,
        calibration=calibration,
        cameras=cameras,
        recordings=recordings,
        volume=_volume(path, content.get("volume")),
        up=_up(path, content.get("up", [0, 0, 1])),
    )


def save_project(project: Project, path: Path | str) -> None:
    """Write a project file; files below its folder are named relative to it. The calibration is not written.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)

    def relative(file: Path) -> str:
        absolute, folder = Path(file).resolve(), path.resolve().parent
        return str(absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute)

    def sources(footage: Mapping[str, Source]) -> dict[str, Any]:
        return {
            camera: [relative(chunk) for chunk in source] if isinstance(source, tuple) else relative(source)
            for camera, source in footage.items()
        }

    content: dict[str, Any] = {
        "name": project.name,
        "units": project.units,
        "calibration": relative(project.calibration),
        "up": list(project.up),
    }
    if project.volume is not None:
        content["volume"] = {"center": list(project.volume.center), "size": list(project.volume.size)}
    content["recordings"] = []
    for recording in project.recordings:
        row: dict[str, Any] = {"name": recording.name, "split": recording.split}
        if recording.calibration is not None:
            row["calibration"] = relative(recording.calibration)
        row["videos"] = sources(recording.videos)
        if recording.index is not None:
            row["index"] = relative(recording.index)
        if recording.offsets:
            row["offsets"] = dict(recording.offsets)
        if recording.frames is not None:
            row["frames"] = recording.frames
        if recording.truth is not None:
            row["truth"] = relative(recording.truth)
        if recording.masks:
            row["masks"] = sources(recording.masks)
        content["recordings"].append(row)
    try:
        write_text(path, dump_yaml(content))
    except OSError as error:
        raise InputError(f"{path}: the project file cannot be written ({error.strerror})") from None


def _check_keys(where: str, content: Any, known: tuple[str, ...], required: Iterable[str] = ()) -> None:
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected the keys {', '.join(known)}, not {shown(content)}")
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key)[:_LONGEST_NAME], known, n=1, cutoff=0.5)
            mend = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
            raise InputError(f"{where}: unknown key {shown(key)}; {mend}")
    for key in required:
        if content.get(key) is None:
            raise InputError(f"{where}: the key {key!r} is required")


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value).strip():
        raise InputError(f"{where}: expected text, not {shown(value)}")
    return str(value)


def _existing(project: Path, where: str, value: Any) -> Path:
    """A file, or a folder."""
    path = _path(project, where, value)
    if not path.exists():
        raise InputError(f"{project}: {where}: the file {path} does not exist; paths are relative to the project file")
    return path


def _existing_file(project: Path, where: str, value: Any) -> Path:
    file = _existing(project, where, value)
    if not file.is_file():
        raise InputError(f"{project}: {where}: {file} is no file")
    return file


def _sizes(project: Path, footage: Mapping[str, Any]) -> Callable[[str], tuple[int, int]]:
    """Image sizes by camera, of footage as the project file names it: for calibrations that have none."""

    def size(camera: str) -> tuple[int, int]:
        if camera not in footage:
            raise InputError(
                f"{project}: camera {camera!r} of the calibration has no video; add it under 'videos', or remove the "
                "camera from the calibration"
            )
        source = footage[camera]
        if not isinstance(source, Path | tuple):
            source = _source(project, f"video of camera {camera!r}", source)
        first = source[0] if isinstance(source, tuple) else source
        return image_size(first) if is_images(first) else video_size(first)

    return size


def _path(project: Path, where: str, value: Any) -> Path:
    text = _text(f"{project}: {where}", value)
    try:
        path = project.parent / Path(text).expanduser()
        path.exists()
    except (RuntimeError, OSError, ValueError) as error:  # ~nobody, a name too long, a zero byte
        raise InputError(f"{project}: {where}: {shown(text)} is not a path ({reason(error)})") from None
    return path


def _volume(path: Path, content: Any) -> Volume | None:
    if content is None:
        return None
    _check_keys(f"{path}: volume", content, _VOLUME_KEYS, _VOLUME_KEYS)
    try:
        return Volume(content["center"], content["size"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _up(path: Path, value: Any) -> Triple:
    try:
        x, y, z = (float(number) for number in value if not isinstance(number, bool))
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{path}: up must be three numbers such as [0, 0, 1], not {shown(value)}") from None
    if not 0 < math.hypot(x, y, z) < math.inf:
        raise InputError(f"{path}: up must be a direction such as [0, 0, 1], not {shown(value)}")
    return x, y, z


def _recording(path: Path, index: int, row: Any, cameras: Cameras) -> Recording:
    where = f"{path}: recordings[{index}]"
    _check_keys(where, row, _RECORDING_KEYS, ("name", "split", "videos"))
    name = _text(f"{where}: name", row["name"])
    _require_file_name(where, f"name {shown(name)}", name)
    where = f"{path}: recording {name!r}"
    if row["split"] not in SPLITS:
        raise InputError(f"{where}: split {shown(row['split'])} must be one of {', '.join(SPLITS)}")
    videos = _camera_mapping(f"{where}: videos", row["videos"])
    _match_cameras(where, videos, cameras)
    frames = row.get("frames")
    if frames is not None and not _is_whole(frames, least=1):
        raise InputError(f"{where}: frames must be a whole number of at least 1, not {shown(frames)}")
    for key in ("offsets", "frames"):
        if row.get("index") is not None and row.get(key):
            raise InputError(f"{where}: the index names each moment's frames; remove {key!r}")

    masks = _camera_mapping(f"{where}: masks", row.get("masks") or {})
    if masks:
        _match_cameras(where, masks, cameras, "masks")

    def optional(key: str) -> Path | None:
        value = row.get(key)
        return None if value is None else _existing_file(path, f"recording {name!r}: {key}", value)

    def footage(what: str, values: dict[str, Any]) -> dict[str, Source]:
        return {
            camera: _source(path, f"recording {name!r}: {what} of camera {camera!r}", values[camera])
            for camera in cameras.names
            if values
        }

    return Recording(
        name=name,
        split=row["split"],
        videos=footage("video", videos),
        offsets=_offsets(where, row.get("offsets", {}), cameras),
        truth=optional("truth"),
        frames=frames,
        calibration=None
        if row.get("calibration") is None
        else _existing(path, f"recording {name!r}: calibration", row["calibration"]),
        index=optional("index"),
        masks=footage("masks", masks),
    )


def _source(project: Path, where: str, value: Any) -> Source:
    if isinstance(value, list) and value:
        return tuple(_existing_file(project, where, chunk) for chunk in value)
    path = _path(project, where, value)
    if not is_images(path):
        return _existing_file(project, where, value)
    if not path.parent.is_dir():
        raise InputError(f"{project}: {where}: the folder {path.parent} of the images {path.name} does not exist")
    return path


def _with_cameras(path: Path, recordings: list[Recording], cameras: Cameras) -> list[Recording]:
    """The recordings with their own cameras loaded, each calibration once."""
    rigs = {
        row.calibration: load_calibration(row.calibration, cameras.units, _sizes(path, row.videos))
        for row in recordings
        if row.calibration
    }
    for calibration, rig in rigs.items():
        if rig.names != cameras.names:
            raise InputError(
                f"{path}: {calibration} has the cameras {', '.join(rig.names)}; those of the project are "
                f"{', '.join(cameras.names)}, and must be the same in every recording"
            )
    return [replace(row, cameras=rigs[row.calibration]) if row.calibration else row for row in recordings]


def _require_file_name(where: str, what: str, name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name, flags=re.ASCII) or len(name) > _LONGEST_NAME:
        raise InputError(f"{where}: {what} names files: use at most {_LONGEST_NAME} letters, digits, '_', '-' and '.'")


def _camera_mapping(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected 'camera: value' pairs, not {shown(value)}")
    return {str(camera): item for camera, item in value.items()}


def _match_cameras(where: str, footage: dict[str, Any], cameras: Cameras, key: str = "videos") -> None:
    known, what = ", ".join(cameras.names), {"videos": "a video", "masks": "masks"}[key]
    for camera in footage:
        if camera not in cameras.names:
            raise InputError(
                f"{where}: camera {shown(camera)} has {what} but is not in the calibration ({known}); "
                f"match the names, or remove the {what.removeprefix('a ')}"
            )
    missing = next((camera for camera in cameras.names if camera not in footage), None)
    if missing is None:
        return
    if key == "masks":
        raise InputError(f"{where}: masks: camera {missing!r} has none; give masks of every camera, or of none")
    raise InputError(
        f"{where}: camera {missing!r} of the calibration has no video; "
        "add it under 'videos', or remove the camera from the calibration"
    )


def _offsets(where: str, value: Any, cameras: Cameras) -> dict[str, int]:
    offsets = _camera_mapping(f"{where}: offsets", value)
    for camera, offset in offsets.items():
        if camera not in cameras.names:
            known = ", ".join(cameras.names)
            raise InputError(f"{where}: offsets: camera {shown(camera)} is not in the calibration ({known})")
        if not _is_whole(offset, least=0):
            raise InputError(
                f"{where}: the offset of camera {camera!r} must be a whole number of frames, 0 or more, not "
                f"{shown(offset)}; a camera that started late is matched by raising the others"
            )
    return offsets


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST_FRAMES
