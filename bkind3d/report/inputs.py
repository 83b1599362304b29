"""What a report is made of: the files of a run folder, and the frames that its keypoints were found in."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bkind3d.agreement import on_body
from bkind3d.cameras import Cameras
from bkind3d.errors import InputError
from bkind3d.health import Health, keypoint_health
from bkind3d.labels import Labels, load_labels
from bkind3d.poses import Poses
from bkind3d.run import Inputs, open_inputs, open_run

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
    """The files of a run folder; None or empty where the run has not got that far."""

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
        InputError: no run folder, or a file that is there and cannot be read.
    """
    config = run / "config.yaml"
    if not config.is_file():
        raise InputError(f"{run}: not a run folder (no config.yaml); make one with `bkind3d train`")
    skeleton = _json(run / "skeleton.json")
    poses = {path.stem: Poses.load(path) for path in sorted((run / "poses").glob("*.nc"))}
    labels = load_labels(run, skeleton["keypoints"] if skeleton else next((one.names for one in poses.values()), []))
    if skeleton:
        skeleton["keypoints"] = labels.names
    for one in poses.values():
        one.names = labels.names if len(labels.names) == len(one.names) else one.names
    return RunFiles(
        path=run,
        config=config.read_text(encoding="utf-8"),
        environment=_json(run / "env.json"),
        metrics=_metrics(run / "metrics.csv"),
        health=_health(run / "health.jsonl"),
        skeleton=skeleton,
        evaluation=_json(run / "evaluation.json"),
        actions=_json(run / "actions.json"),
        poses=poses,
        samples=sorted((run / "samples").glob("*.png")),
        labels=labels,
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


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); delete it or write it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of metrics.csv; empty when there is no row yet."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]} if rows else {}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: a row is not made of numbers ({error}); delete that row") from error


def _health(path: Path) -> list[tuple[int, Health]]:
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            records.append((int(record["step"]), Health.from_dict(record)))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: line {number} is not a health record ({error}); delete that line") from error
    return records
