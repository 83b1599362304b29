import json
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from small_rig import counted_frames, ring, write_video

from bkind3d.cameras import Cameras
from bkind3d.data import load_project, load_truth, probe_recording, visible_views
from bkind3d.errors import InputError
from bkind3d.experiments import human
from bkind3d.experiments.human import human_project

NAMES = ("cam01", "cam02", "cam03", "cam04")
CLIP = Path(os.environ.get(human.SOURCE_VARIABLE) or Path(__file__).parents[3] / "shared" / "data" / "human")


def rig() -> Cameras:
    """Four small cameras around the working volume, in mm."""
    cameras = ring(4, (64, 48), radius=4000.0, units="mm")
    return Cameras(
        NAMES,
        cameras.intrinsics,
        cameras.distortion,
        cameras.rotation,
        cameras.translation - cameras.rotation @ torch.tensor(human.VOLUME.center, dtype=torch.float64),
        cameras.image_size,
        "mm",
    )


def joints(frames: int) -> np.ndarray:
    """Joints (T, 21, 3) inside the volume."""
    generator = np.random.default_rng(0)
    return np.array(human.VOLUME.center) + generator.uniform(-500, 500, (frames, 21, 3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder laid out as the prepared clip is."""
    cameras, source = rig(), tmp_path / "clip"
    rows = [
        {
            "name": name,
            "size_wh": cameras.image_size[index].tolist(),
            "K": cameras.intrinsics[index].tolist(),
            "dist": [-0.01, 0, 0, 0, 0],
            "R": cameras.rotation[index].tolist(),
            "t": cameras.translation[index].tolist(),
        }
        for index, name in enumerate(NAMES)
    ]
    for name in NAMES:
        write_video(source / f"{name}.mp4", counted_frames(5), fps=60)
    (source / "calibration.json").write_text(json.dumps({"units": "mm", "cameras": rows}))
    names = np.array(list(human._JOINTS))
    np.savez(source / "labels.npz", points3d=joints(5), names=names, edges=np.array([[0, 1]]), fps=60)
    return source


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel laid out as pose2sim's: Qualisys calibration, videos, OpenPose detections of a man and a bystander."""
    cameras, path = rig(), tmp_path / "pose2sim-0.6.1-py3-none-any.whl"
    pixels, _ = cameras.project(torch.tensor(joints(5)))
    entries = []
    for index, name in enumerate(NAMES):
        matrix = np.diag([1.0, -1.0, -1.0]) @ cameras.rotation[index].numpy()
        turned = " ".join(f'r{r + 1}{c + 1}="{matrix[r, c]!r}"' for r in range(3) for c in range(3))
        x, y, z = cameras.centers[index].tolist()
        k = (64 * cameras.intrinsics[index]).tolist()
        entries.append(
            f'<camera serial="{name}"><transform {turned} x="{x}" y="{y}" z="{z}"/>'
            f'<intrinsic focalLengthU="{k[0][0]}" focalLengthV="{k[1][1]}" centerPointU="{k[0][2]}" '
            f'centerPointV="{k[1][2]}" skew="0" radialDistortion1="0" radialDistortion2="0" radialDistortion3="0" '
            'tangentalDistortion1="0" tangentalDistortion2="0"/></camera>'
        )
    with zipfile.ZipFile(path, "w") as archive:
        xml = "".join(entries).replace("np.float64(", "").replace(')"', '"')
        archive.writestr(human._CALIBRATION, f"<calibration><cameras>{xml}</cameras></calibration>")
        for index, name in enumerate(NAMES):
            video = write_video(tmp_path / "wheel" / f"{name}.mp4", counted_frames(5), fps=60)
            archive.write(video, f"{human._TRIAL}/videos/{name}.mp4")
            for t in range(5):
                pose = np.zeros((25, 3))
                pose[list(human._JOINTS.values()), :2] = pixels[index, t]
                pose[list(human._JOINTS.values()), 2] = 0.8
                if t == 2 and index > 0:
                    pose[human._JOINTS["Nose"]] = 0  # seen by one camera alone
                if t == 3 and index == 1:
                    pose[human._JOINTS["Neck"]] = (5, 5, 1e-9)  # nearly no confidence in a wrong place
                people = [{"pose_keypoints_2d": pose.ravel().tolist()}, {"pose_keypoints_2d": [9.0] * 75}]
                entry = f"{human._TRIAL}/pose/{name}_json/{name}.{t:04d}.json"
                archive.writestr(entry, json.dumps({"people": people}))
    return path


def test_prepared_folder(folder: Path, tmp_path: Path) -> None:
    path = human_project(tmp_path / "project", folder)
    project = load_project(path)
    assert (project.units, project.volume) == ("mm", human.VOLUME)
    assert [(recording.name, recording.split) for recording in project.recordings] == [("balancing", "both")]
    torch.testing.assert_close(project.cameras.translation, rig().translation)
    assert project.cameras.distortion[:, 0].tolist() == [-0.01] * 4
    recording = project.recordings[0]
    assert all(video.parent == tmp_path / "project" for video in recording.videos.values()), "videos are copied"
    truth = load_truth(recording, project)
    np.testing.assert_allclose(truth.points3d, joints(5))
    assert (truth.names[0], truth.fps) == ("RHip", 60)
    assert probe_recording(recording, project.cameras).frames == 5
    with pytest.raises(InputError, match=r"project.yaml: this project exists; remove it or choose another folder"):
        human_project(tmp_path / "project", folder)


def test_environment_names_the_folder(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(human.SOURCE_VARIABLE, str(folder))
    assert human_project(tmp_path / "project").exists()


def test_wheel_gives_the_same_project(wheel: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(human.SOURCE_VARIABLE, "")
    monkeypatch.setattr(human, "_download", lambda scratch: wheel)
    project = load_project(human_project(tmp_path / "project"))
    expected = rig()
    for field in ("intrinsics", "rotation", "translation", "image_size"):
        torch.testing.assert_close(getattr(project.cameras, field), getattr(expected, field))
    truth = load_truth(project.recordings[0], project)
    assert np.isnan(truth.points3d[2, truth.names.index("Nose")]).all()
    known = np.delete(np.arange(5), 2)
    np.testing.assert_allclose(truth.points3d[known], joints(5)[known], atol=0.05)
    assert len(truth.edges) == 20


def test_missing_file(folder: Path, tmp_path: Path) -> None:
    (folder / "cam03.mp4").unlink()
    with pytest.raises(InputError, match=r"cam03.mp4: the folder of the human clip lacks this file"):
        human_project(tmp_path / "project", folder)


def test_failed_download(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(human.SOURCE_VARIABLE, raising=False)
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="WARNING: retrying\nERROR: no connection\n")
    monkeypatch.setattr(human.subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(InputError, match=r"cannot be downloaded \(ERROR: no connection\); name a .*BKIND3D_HUMAN"):
        human_project(tmp_path / "project")


def test_unwritable_folder(folder: Path) -> None:
    with pytest.raises(InputError, match=r"cannot prepare the project \(Not a directory\)"):
        human_project(folder / "cam01.mp4" / "project", folder)


@pytest.mark.skipif(not CLIP.is_dir(), reason=f"the human clip is not at {CLIP}")
def test_real_clip(tmp_path: Path) -> None:
    project = load_project(human_project(tmp_path / "project", CLIP))
    info = probe_recording(project.recordings[0], project.cameras)
    assert (info.frames, info.fps) == (100, pytest.approx(60))
    truth = load_truth(project.recordings[0], project)
    assert truth.points3d.shape == (100, 21, 3)
    low = np.array(human.VOLUME.center) - np.array(human.VOLUME.size) / 2
    high = np.array(human.VOLUME.center) + np.array(human.VOLUME.size) / 2
    assert ((truth.points3d > low) & (truth.points3d < high)).all(-1).mean() > 0.99, "the man stays in the volume"
    assert (visible_views(project.cameras, human.VOLUME, 16) >= 2).double().mean() > 0.99
    detected = np.load(CLIP / "labels.npz")["points2d"]
    projected, _ = project.cameras.project(torch.tensor(truth.points3d))
    error = np.linalg.norm(projected.numpy() - detected, axis=-1)
    assert np.nanmedian(error) < 8, "px of 1920, as the clip's notes say"
