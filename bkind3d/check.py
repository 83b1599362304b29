"""A look at a project before training: files, frame counts, calibration, what the cameras see of the volume."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from bkind3d.cameras import Cameras
from bkind3d.check_foreground import ForegroundCheck, check_foreground
from bkind3d.check_motion import check_clocks, check_pictures, check_views, read_pictures
from bkind3d.check_rig import Finding, check_files, check_lenses, check_places, in_order, summary
from bkind3d.check_volume import draw_volume
from bkind3d.config import Config, validate
from bkind3d.data import (
    Project,
    Recording,
    RecordingInfo,
    Volume,
    gap_in_frames,
    load_truth,
    probe_recording,
    require_pairs,
    require_visible,
    visible_views,
)
from bkind3d.errors import InputError
from bkind3d.memory import Estimate, estimate
from bkind3d.run import follows_body
from bkind3d.tables import aligned

_SAME_PLACE = 1e-3  # of the distance to the volume: two cameras closer than this stand at one place
_SHALLOW_ANGLE = 5.0  # degrees between the lines of sight, below which depth is hardly resolved
_FAR = 50.0  # volume sides: a camera farther off than this hints at mixed units
_JOINTS_SEEN = 0.5  # share of true joints in two images, below which truth or calibration is likely wrong
_MOMENTS = 200  # of a recording that are looked at for that
_LOOKED, _LOOKED_IN_ALL, _LEAST_LOOKED = 300, 3000, 60  # first moments of each recording whose pictures are looked at


@dataclass(frozen=True)
class CameraCheck:
    """One camera: distance to the volume's centre and to the nearest other camera (units), share of voxels it sees."""

    name: str
    width: int
    height: int
    distance: float
    nearest: float
    share: float


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check_project` found.

    Args:
        project: what was checked.
        recordings: frames and frame rate of each recording.
        gaps: gap in frames of each recording that is trained on.
        cameras: one row per camera, of the first recording's calibration.
        volume: the working volume.
        voxels: shape (X, Y, Z) of the grid in it, or of the cube that follows the body.
        seen_by: share of voxels seen by exactly 0, 1, ... M of these cameras.
        pictures: the volume drawn into a frame of each camera, and the masks of the body if they were looked at.
        warnings: what is allowed but suspicious.
        foreground: one row per camera, of the first recording; empty where masks were not looked at.
        window: side of the windows that follow the body, pixels; 0 where the networks see whole frames.
        memory: what a training step takes; None where no settings of a run were given.
        findings: of the rig and its first moments, green, amber and red; the warnings are amber ones beside them.
    """

    project: Project
    recordings: dict[str, RecordingInfo]
    gaps: dict[str, int]
    cameras: list[CameraCheck]
    volume: Volume
    voxels: tuple[int, int, int]
    seen_by: list[float]
    pictures: list[Path]
    warnings: list[str]
    foreground: list[ForegroundCheck] = field(default_factory=list)
    window: int = 0
    memory: Estimate | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def fails(self) -> bool:
        """Whether something is red: training on this would be a waste."""
        return any(finding.level == "red" for finding in self.findings)

    @property
    def seen_by_two(self) -> float:
        """Share of voxels that two or more cameras see: those in which a point can be triangulated."""
        return sum(self.seen_by[2:])

    def print(self) -> None:
        """Print the report as a table."""
        print("\n".join(self.lines()))

    @property
    def all_findings(self) -> list[Finding]:
        """Findings and warnings, the worst last."""
        return in_order([*self.findings, *(Finding("amber", warning) for warning in self.warnings)])

    def recording_rows(self) -> list[list[str]]:
        """A table of the recordings, its head first."""
        rows = [["recording", "split", "frames", "fps", "gap"]]
        for recording in self.project.recordings:
            info, gap = self.recordings[recording.name], self.gaps.get(recording.name)
            effective = f"{gap} frames = {gap / info.fps:.3f} s" if gap else "-"
            rows.append([recording.name, recording.split, str(info.frames), f"{info.fps:.6g}", effective])
        return rows

    def camera_rows(self) -> list[list[str]]:
        """A table of the cameras, its head first."""
        units = self.project.units
        rows = [["camera", "image", "to volume", "to next camera", "voxels seen"]]
        for camera in self.cameras:
            distances = [f"{camera.distance:.4g} {units}", f"{camera.nearest:.4g} {units}"]
            rows.append([camera.name, f"{camera.width}×{camera.height}", *distances, f"{camera.share:.1%}"])
        return rows

    def foreground_rows(self) -> list[list[str]]:
        """A table of the masks, its head first; empty where none were looked at."""
        if not self.foreground:
            return []
        return [
            ["camera", "foreground", "empty", "overlap", "agrees"],
            *(
                [row.camera, f"{row.share:.1%}", f"{row.empty:.0%}", f"{row.steady:.0%}", f"{row.agreeing:.0%}"]
                for row in self.foreground
            ),
        ]

    def volume_lines(self) -> list[str]:
        """Where the volume is, what the cameras see of it, and what memory a step takes."""
        count, lines = len(self.cameras), []
        rigs = list(self.project.rigs())
        if len(rigs) > 1:
            lines.append(f"{len(rigs)} calibrations; the cameras and voxels told of are those of {rigs[0].name}")
        origin = "" if self.project.volume else ", proposed from the cameras' common view"
        shape = "×".join(map(str, self.voxels))
        follows = " around the body; those of the volume are" if self.window else ";"
        seen = f"0 cameras {self.seen_by[0]:.1%}, 1 {self.seen_by[1]:.1%}, 2 or more {self.seen_by_two:.1%}"
        lines += [
            f"volume: center {list(self.volume.center)}, size {list(self.volume.size)} {self.project.units}{origin}",
            f"voxels: {shape}{follows} seen by {seen}, all {count} {self.seen_by[-1]:.1%}",
        ]
        if self.memory is not None:
            lines.append(f"memory for training: about {self.memory.line()}")
        return lines

    def head(self) -> str:
        """What was checked, in one line."""
        project = self.project
        return (
            f"project {project.name}: {len(self.cameras)} cameras, {len(self.recordings)} recording(s), "
            f"units {project.units}"
        )

    def lines(self) -> list[str]:
        """The report, line by line."""
        return [
            self.head(),
            *aligned(self.recording_rows()),
            *aligned(self.camera_rows()),
            *self.volume_lines(),
            *(aligned(self.foreground_rows()) if self.foreground else []),
            *(f"picture: {path}" for path in self.pictures),
            *(finding.line() for finding in self.all_findings),
        ]


def check_project(
    project: Project,
    *,
    gap: str | int = "0.4 s",
    voxels: int = 64,
    out: Path | None = None,
    height: int = 256,
    width: int = 256,
    window: int = 0,
    foreground: bool = False,
) -> CheckReport:
    """Check a project; draw its working volume, and its true joints if it has any, into a frame of each camera.

    Args:
        project: the project.
        gap: distance of the two frames of a training pair, seconds ("0.4 s") or frames (12).
        voxels: samples along the volume's longest side.
        out: folder for the pictures, made when missing; None draws none.
        height: of the network's images, for the masks.
        width: of the network's images, likewise.
        window: side of the windows that follow the body, pixels, in place of whole images; the voxels are then those of
            a cube around it. 0 without.
        foreground: look at masks of the body too, on some moments of the first recording, which are decoded for it.

    Raises:
        InputError: a video is unusable, videos do not match each other, the calibration or the truth, the gap is not
            positive or too long, the volume is not seen by two cameras, or a picture cannot be written.
    """
    recordings = {row.name: probe_recording(row, project.cameras_of(row)) for row in project.recordings}
    gaps = {}
    for recording in project.recordings:
        index = recordings[recording.name].index
        if recording.split != "test":
            require_pairs(recording.name, index.clock, index.fps, gap)
            gaps[recording.name] = gap_in_frames(gap, index.fps)
        _check_truth(recording, project, recordings[recording.name])
    found = {"files": check_files(recordings)}
    found["lenses"] = [finding for rig in project.rigs().values() for finding in check_lenses(rig)]
    volume = _volume(project, found)
    found["places"] = [finding for rig in project.rigs().values() for finding in check_places(rig, volume)]
    _look(project, recordings, volume, found)
    first = next(iter(project.rigs().values()))
    views = visible_views(first, volume, voxels)
    cameras = _camera_rows(first, volume)
    shape = (voxels,) * 3 if window else volume.shape(voxels)
    pictures = [] if out is None else draw_volume(project, recordings, volume, Path(out))
    masks: list[ForegroundCheck] = []
    if foreground:
        recording = project.recordings[0]
        masks, drawn = check_foreground(project, recordings[recording.name], recording, height, width, out)
        pictures += drawn
    return CheckReport(
        project=project,
        recordings=recordings,
        gaps=gaps,
        cameras=cameras,
        volume=volume,
        voxels=shape,
        seen_by=[(views == count).double().mean().item() for count in range(len(cameras) + 1)],
        pictures=pictures,
        warnings=_warnings(project, volume, gaps) + [failure for row in masks for failure in row.failures()],
        foreground=masks,
        window=window,
        findings=summary(found),
    )


def _volume(project: Project, found: dict[str, list[Finding]]) -> Volume:
    """The working volume, which two cameras see; where there is none, the error says what is wrong with the rig."""
    try:
        volume = project.working_volume()
        for rig in project.rigs().values():
            require_visible(rig, volume)
        return volume
    except InputError as error:
        places = [finding for rig in project.rigs().values() for finding in check_places(rig)]
        red = [finding.text for finding in [*found["files"], *found["lenses"], *places] if finding.level == "red"]
        raise InputError("; ".join([str(error), *red])) from None


def _look(
    project: Project, recordings: dict[str, RecordingInfo], volume: Volume, found: dict[str, list[Finding]]
) -> None:
    """Look at the first moments of each recording."""
    moments = max(_LEAST_LOOKED, min(_LOOKED, _LOOKED_IN_ALL // len(recordings)))
    for recording in project.recordings:
        info = recordings[recording.name]
        pictures = read_pictures(info, moments)
        shown = check_pictures(pictures)
        rows: dict[str, list[Finding] | None] = {"pictures": shown}
        if (np.diff(info.index.clock[:moments]) == 1).all():
            rows["clocks"] = check_clocks(pictures)
        if not any(finding.level == "red" for finding in [*found["files"], *found["places"], *shown]):
            rows["views"] = check_views(pictures, project.cameras_of(recording), volume)
        where = "" if len(recordings) == 1 else f"recording {recording.name!r}: "
        for kind, findings in rows.items():
            if findings is not None:
                told = [replace(finding, text=where + finding.text) for finding in findings]
                found[kind] = found.get(kind, []) + told


def check_run(project: Project, config: Config, out: Path | None = None) -> CheckReport:
    """Check a project for a run with given settings, and how much memory a step of its training takes.

    Args:
        project: the project; what the settings say of one is not read.
        config: all settings. Of several gaps the last one is checked.
        out: as for `check_project`.

    Raises:
        InputError: as `check_project`, or settings that cannot work.
    """
    validate(config)
    data = config.data
    report = check_project(
        project,
        gap=data.gaps[-1],
        voxels=config.model.voxels,
        out=out,
        height=data.height,
        width=data.width,
        window=data.window if follows_body(config) else 0,
        foreground=data.foreground,
    )
    return replace(report, memory=estimate(config, len(report.cameras), report.voxels))


def _check_truth(recording: Recording, project: Project, info: RecordingInfo) -> None:
    if recording.truth is None:
        return
    frames = len(load_truth(recording, project).points3d)
    if frames != info.frames:
        raise InputError(
            f"{recording.truth}: holds {frames} frames, recording {recording.name!r} has {info.frames}; "
            "they must be the same moments"
        )


def _camera_rows(cameras: Cameras, volume: Volume) -> list[CameraCheck]:
    center = torch.tensor(volume.center, dtype=torch.float64)
    between = torch.cdist(cameras.centers, cameras.centers).fill_diagonal_(torch.inf)
    shares = cameras.in_view(volume.points(24)).double().mean((1, 2, 3))
    return [
        CameraCheck(
            name=name,
            width=int(cameras.image_size[index, 0]),
            height=int(cameras.image_size[index, 1]),
            distance=(cameras.centers[index] - center).norm().item(),
            nearest=between[index].min().item(),
            share=shares[index].item(),
        )
        for index, name in enumerate(cameras.names)
    ]


def _warnings(project: Project, volume: Volume, gaps: dict[str, int]) -> list[str]:
    rigs = project.rigs()
    found = []
    for path, cameras in rigs.items():
        where = f"{path.name}: " if len(rigs) > 1 else ""
        found += [where + text for text in _camera_warnings(cameras, volume)]
    for recording in project.recordings:
        if recording.truth is not None:
            share = _share_of_joints_seen(recording, project)
            if share < _JOINTS_SEEN:
                found.append(
                    f"recording {recording.name!r}: two cameras see {share:.0%} of its true joints: "
                    "do calibration and truth belong together?"
                )
    if not gaps:
        found.append("no recording has the split 'train' or 'both': there is nothing to train on")
    return found


def _camera_warnings(cameras: Cameras, volume: Volume) -> list[str]:
    found = []
    side = max(volume.size)
    for row in _camera_rows(cameras, volume):
        if row.nearest < _SAME_PLACE * row.distance:
            found.append(f"camera {row.name!r} stands where another one stands: together they give no depth")
        if row.distance > _FAR * side:
            ratio = row.distance / side
            found.append(f"camera {row.name!r} is {ratio:.0f} volume sides away: are the units of both the same?")
    if _widest_angle(cameras, volume) < _SHALLOW_ANGLE:
        found.append(f"all cameras look from within {_SHALLOW_ANGLE:g} degrees: depth is hardly resolved")
    return found


def _share_of_joints_seen(recording: Recording, project: Project) -> float:
    """Share of a recording's known true joints that lie in the images of two cameras or more."""
    points = load_truth(recording, project).points3d
    points = points[np.linspace(0, len(points) - 1, min(len(points), _MOMENTS)).astype(int)]
    known = torch.from_numpy(points[np.isfinite(points).all(-1)])
    if not len(known):
        return 1.0
    return (project.cameras_of(recording).in_view(known).sum(0) >= 2).double().mean().item()


def _widest_angle(cameras: Cameras, volume: Volume) -> float:
    """Greatest angle in degrees between the lines from the volume's centre to two cameras."""
    lines = torch.nn.functional.normalize(cameras.centers - torch.tensor(volume.center), dim=-1)
    return torch.rad2deg(torch.acos((lines @ lines.T).clamp(-1, 1)).max()).item()
