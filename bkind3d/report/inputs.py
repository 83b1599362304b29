"""What a report is made of: the files of a run folder, and the frames that its keypoints were found in."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bkind3d.agreement import on_body
from bkind3d.cameras import Cameras
from bkind3d.documents import broken_file, parse_json, read_json, read_text
from bkind3d.errors import InputError, first_line, shown
from bkind3d.health import Health, keypoint_health
from bkind3d.labels import Labels, load_labels
from bkind3d.poses import Poses
from bkind3d.run import Inputs, open_inputs, open_run

Part = TypeVar("Part")

SPLIT_ORDER = ("test", "both", "train")  # unseen motion is shown where there is any


@dataclass
class Scene:
    """The recorded scene at the network's image size.

    Attributes:
        project: name of the project.
        units: unit of length.
        up: (3,) upward direction.
        center: (3,) centre of the volume.
        sides: (3,) sides of the volume.
        cameras: recording name -> pinhole cameras of its frames.
        frames: recording name -> (T, M, H, W, 3) uint8.
        clocks: recording name -> (T,) number of each frame on the recording's clock, increasing.
        splits: recording name -> "train", "test" or "both".
        inputs: the run's project and cache, where the videos behind the frames can be read again.
    """

    project: str
    units: str
    up: np.ndarray
    center: np.ndarray
    sides: np.ndarray
    cameras: dict[str, Cameras]
    frames: dict[str, np.ndarray]
    clocks: dict[str, np.ndarray]
    splits: dict[str, str]
    inputs: Inputs | None = None


@dataclass
class RunFiles:
    """The files of a run folder; None or empty where the run has not got that far, or where a file is corrupt.

    Of each corrupt file, `missing` says in one line what is the matter.
    """

    path: Path
    config: str
    environment: dict[str, Any] | None
    metrics: dict[str, np.ndarray]
    health: list[tuple[int, Health]]
    skeleton: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    actions: dict[str, Any] | None
    poses: dict[str, Poses]
    samples: list[Path]
    labels: Labels  # poses and skeleton have its names
    missing: list[str] = field(default_factory=list)

    def active_edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Keypoint pairs (E, 2) of the active edges and their weights (E,); none where there is no skeleton.

        The bones of a tree weigh the same: they are active whatever the weights that the reconstruction gives them.
        """
        rows = np.array(self.skeleton["edges"] if self.skeleton else [], dtype=np.float64).reshape(-1, 3)
        if self.skeleton and self.skeleton.get("tree"):
            rows[:, 2] = 1.0
        return rows[:, :2].astype(np.int64), rows[:, 2]


@dataclass
class Shown:
    """A recording with poses and the frames that they were found in."""

    poses: Poses
    split: str
    cameras: Cameras
    frames: np.ndarray  # (T, M, H, W, 3) uint8
    rows: np.ndarray  # (F,) of the frames, for each moment of the poses
    colours: np.ndarray  # (J, 3) uint8 of the keypoints


def run_inputs(run: Path) -> Scene:
    """Frames and network-size cameras of a run, from its project and its frame cache.

    Raises:
        InputError: the project, its videos or its cache cannot be used.
    """
    inputs = open_inputs(open_run(run), progress=False)
    return Scene(
        project=inputs.project.name,
        units=inputs.project.units,
        up=np.asarray(inputs.project.up, dtype=np.float64),
        center=np.asarray(inputs.volume.center, dtype=np.float64),
        sides=np.asarray(inputs.volume.size, dtype=np.float64),
        cameras={name: recording.cameras for name, recording in inputs.cache.recordings.items()},
        frames={name: recording.frames for name, recording in inputs.cache.recordings.items()},
        clocks={name: recording.clock for name, recording in inputs.cache.recordings.items()},
        splits={name: recording.split for name, recording in inputs.cache.recordings.items()},
        inputs=inputs,
    )


def read_run(run: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        InputError: no run folder.
    """
    config = run / "config.yaml"
    if not config.is_file():
        raise InputError(f"{run}: not a run folder (no config.yaml); make one with `bkind3d train`")
    missing: list[str] = []

    def part(name: str, read: Callable[[Path], Part], without: Part) -> Part:
        try:
            with broken_file(f"{run / name}: not what a run writes"):
                return read(run / name) if (run / name).is_file() else without
        except InputError as error:
            missing.append(str(error))
            return without

    names = sorted(f"poses/{path.name}" for path in (run / "poses").glob("*.nc"))
    poses = {Path(name).stem: one for name in names if (one := part(name, Poses.load, None)) is not None}
    skeleton = part("skeleton.json", _skeleton, None)
    for name, one in poses.items():
        if skeleton and len(one.names) != len(skeleton["keypoints"]):
            missing.append(f"{run / 'skeleton.json'}: is not of the keypoints of poses/{name}.nc")
            skeleton = None
    labels = load_labels(run, skeleton["keypoints"] if skeleton else next((one.names for one in poses.values()), []))
    if skeleton:
        skeleton["keypoints"] = labels.names
    for one in poses.values():
        one.names = labels.names if len(labels.names) == len(one.names) else one.names
    return RunFiles(
        path=run,
        config=read_text(config, 1 << 20),
        environment=part("env.json", read_json, None),
        metrics=part("metrics.csv", _metrics, {}),
        health=part("health.jsonl", _health, []),
        skeleton=skeleton,
        evaluation=part("evaluation.json", read_json, None),
        actions=part("actions.json", read_json, None),
        poses=poses,
        samples=sorted((run / "samples").glob("*.png")),
        labels=labels,
        missing=missing,
    )


def choose_recording(files: RunFiles, scene: Scene | None) -> Shown | None:
    """The first recording with poses and frames, test before both before train."""
    if scene is None:
        return None
    known = [name for name in files.poses if name in scene.frames]
    known.sort(key=lambda name: (SPLIT_ORDER.index(scene.splits[name]), name))
    for name in known:
        poses, clock = files.poses[name], scene.clocks[name]
        if len(poses.frames) and np.isin(poses.frames, clock).all():
            rows = np.searchsorted(clock, poses.frames)
            return Shown(poses, scene.splits[name], scene.cameras[name], scene.frames[name], rows, files.labels.colours)
    return None


def health_of(shown: Shown, scene: Scene) -> Health:
    """Health of the keypoints over all poses of a recording; on the body or not, where the run knew the foreground."""
    poses, seen = shown.poses, None
    if scene.inputs is not None and scene.inputs.body_size is not None:
        recording = scene.inputs.cache.recording(poses.recording)
        seen = on_body(poses.positions, recording.projections.numpy(), recording.masks[shown.rows])
    return keypoint_health(poses.positions, poses.confidence, scene.center, scene.sides, scene.up, on_body=seen)


def _skeleton(path: Path) -> dict[str, Any]:
    """skeleton.json, whose edges join keypoints that it names."""
    content = read_json(path)
    names = content["keypoints"]
    for row in (*content["edges"], *content["all_weights"]):
        start, end, weight = row
        if not (0 <= int(start) < len(names) and 0 <= int(end) < len(names) and math.isfinite(weight)):
            raise InputError(f"{path}: an edge {shown(row)} is not of its {len(names)} keypoints")
    float(content["threshold"])
    return content | {"keypoints": [str(name) for name in names]}


def _metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of metrics.csv; empty when there is no row yet."""
    rows = list(csv.DictReader(io.StringIO(read_text(path))))
    try:
        columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]} if rows else {}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: a row is not made of numbers ({error}); delete that row") from error
    absent = [name for name in ("step", "seconds") if rows and not np.isfinite(columns.get(name, np.nan)).all()]
    if absent:
        raise InputError(f"{path}: has no numbers of {absent[0]!r}")
    return columns


def _health(path: Path) -> list[tuple[int, Health]]:
    records: list[tuple[int, Health]] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            record = parse_json(line, "the line")
            health = Health.from_dict(record)
            joints = len((records[0][1] if records else health).flags)
            health.require(joints)
            records.append((int(record["step"]), health))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(
                f"{path}: line {number} is not a health record ({first_line(error)}); delete that line"
            ) from error
    return records
