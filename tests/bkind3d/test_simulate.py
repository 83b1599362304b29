"""The simulated rig: geometry of the pictures, truth of the truth, and files that read back."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from bkind3d.cameras import Cameras
from bkind3d.data import load_project, load_truth
from bkind3d.errors import InputError
from bkind3d.sims.simulate import rig, simulate_rig
from bkind3d.sims.simulate.body import CAPSULES, EDGES, INDEX, JOINTS, PAW_RADIUS
from bkind3d.sims.simulate.motion import Animation, animate
from bkind3d.sims.simulate.render import SUPERSAMPLE, Film, Fragments, intersect, trace

SMALL = {"frames": 7, "test_frames": 4, "image_size": (64, 48), "fps": 25, "progress": False, "workers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = simulate_rig(tmp_path_factory.mktemp("rig") / "new" / "rig", seed=5, **SMALL)
    assert path.name == "project.yaml"
    return path.parent


@pytest.fixture(scope="module")
def clips() -> dict[str, Animation]:
    """Motions as long as the demo's."""
    train, test = np.random.SeedSequence(11).spawn(2)
    return {
        "train": animate(800, 30, np.random.default_rng(train)),
        "test": animate(300, 30, np.random.default_rng(test)),
    }


def some(animation: Animation, step: int) -> Animation:
    return Animation(animation.points[::step], animation.frames[::step])


def cameras_for(distortion: bool, views: int = 4, size: tuple[int, int] = (112, 96)) -> Cameras:
    return rig.place_cameras(rig.RING, views, size, distortion, np.random.default_rng(2))


def film_of(camera: Cameras, animation: Animation) -> Film:
    return rig.make_film(camera, animation, room_seed=1, sensor_seed=2)


def samples(pixels: np.ndarray) -> np.ndarray:
    """Pixels (..., 2) to the nearest supersampled (column, row)."""
    return np.round((pixels + 0.5) * SUPERSAMPLE - 0.5).astype(int)


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def pictures_hash(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.mp4"))
    return {str(f.relative_to(folder)): hashlib.sha256(decode(f).tobytes()).hexdigest() for f in files}


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distortion", [False, True])
def test_joints_lie_on_the_rendered_body(clips: dict[str, Animation], distortion: bool) -> None:
    cameras, animation = cameras_for(distortion), some(clips["test"], 60)
    pixels, _ = cameras.project(torch.from_numpy(animation.joints))
    on_body, on_own_part, elsewhere = [], [], []
    for index, name in enumerate(cameras.names):
        film = film_of(cameras.select([name]), animation)
        for i in range(len(film)):
            parts = film.parts(i)
            column, row = samples(pixels[index, i].numpy()).T
            seen = parts[row, column]
            on_body.append(seen >= 0)
            on_own_part.append((CAPSULES.ends[seen] == np.arange(len(JOINTS))[:, None]).any(axis=1) & (seen >= 0))
            elsewhere.append(parts[row, (column + 45) % parts.shape[1]] >= 0)
    assert np.mean(on_body) == 1.0  # a joint is inside the body, so its pixel shows the body
    assert 0.4 < np.mean(on_own_part) < 1.0  # often the very part; the others are hidden behind nearer parts
    assert np.mean(elsewhere) < 0.4


def test_pictures_show_the_lens_distortion(clips: dict[str, Animation]) -> None:
    """The silhouette of a small ball lies at its distorted pixel, and well away from its pinhole pixel."""
    cameras = cameras_for(True, size=(128, 128))
    radius, depth = 0.05, 2.5
    for name in cameras.names:
        camera = cameras.select([name])
        corner = torch.tensor([14.0, 15.0, 1.0], dtype=torch.float64)
        world = camera.rotation[0].T @ (torch.linalg.inv(camera.intrinsics[0]) @ corner * depth - camera.translation[0])
        distorted, straight = (camera.project(world[None], distort=flag)[0][0, 0].numpy() for flag in (True, False))
        view = rig.make_view(camera)
        ends = np.stack([world, world + 1e-3])[None].astype(np.float32)
        hits = trace(view, ends, np.stack([distorted] * 2)[None], np.full((1, 2), depth), np.full((1, 2), radius, "f4"))
        middle = (np.array([hits.column.mean(), hits.row.mean()]) + 0.5) / SUPERSAMPLE - 0.5
        area = np.pi * (radius * view.focal * SUPERSAMPLE / depth) ** 2
        assert 0.75 < len(hits.row) / area < 1.35
        assert np.linalg.norm(straight - corner[:2].numpy()) < 1e-6
        assert np.linalg.norm(middle - distorted) < 0.3
        assert np.linalg.norm(middle - straight) > 1.0


def test_boxes_miss_nothing(clips: dict[str, Animation]) -> None:
    """Testing every ray against every capsule gives the same picture of parts."""
    camera = cameras_for(True, size=(64, 64)).select(["cam1"])
    film = film_of(camera, some(clips["test"], 75))
    rays = film.view.rays.reshape(3, -1)
    count, capsules = rays.shape[1], len(CAPSULES.ends)
    everything = Fragments(np.full(capsules, count), np.tile(np.arange(count), capsules))
    for i in range(len(film)):
        distance, _ = intersect(film.view.center, np.tile(rays, capsules), everything, film.ends[i], CAPSULES.radii)
        distance = distance.reshape(capsules, count)
        nearest = np.where(np.isfinite(distance.min(axis=0)), distance.argmin(axis=0), -1)
        assert (nearest >= 0).sum() > 100
        np.testing.assert_array_equal(film.parts(i).ravel() >= 0, nearest >= 0)
        assert (film.parts(i).ravel() == nearest).mean() > 0.998  # capsules that share an end may tie


def test_intersection_equals_a_chain_of_spheres() -> None:
    """Oracle: the nearest hit over 4000 spheres along the axis, from outside and nearly along the axis too."""
    rng = np.random.default_rng(0)
    center = np.zeros(3, dtype=np.float32)
    for taper in (0.0, 0.05, -0.05, 0.09, -0.09):
        for tilt in (0.0, 0.02, 0.6, np.pi / 2, 2.5, np.pi):
            axis = np.array([np.sin(tilt), 0.0, np.cos(tilt)])
            ends = (np.array([0.02, -0.01, 1.2]) + np.array([[-0.06], [0.06]]) * axis)[None]
            radii = np.array([[0.1, 0.1 + taper]])
            rays = rng.normal([0, 0, 1.0], [0.07, 0.07, 0.0], (400, 3))
            rays /= np.linalg.norm(rays, axis=1, keepdims=True)
            share = np.linspace(0, 1, 4000)
            balls = ends[0, 0] + share[:, None] * (ends[0, 1] - ends[0, 0])
            along = rays @ balls.T
            room = along**2 - (balls**2).sum(axis=1) + (radii[0, 0] + share * taper) ** 2
            expected = np.where(room >= 0, along - np.sqrt(np.maximum(room, 0)), np.inf).min(axis=1)
            part = Fragments(np.array([400]), np.arange(400))
            distance, where = intersect(
                center, rays.T.astype(np.float32), part, ends.astype(np.float32), radii.astype(np.float32)
            )
            grazing = np.abs(room.max(axis=1)) < 1e-5
            both = np.isfinite(expected) & ~grazing
            assert both.sum() > 100
            np.testing.assert_array_equal(np.isfinite(distance)[~grazing], np.isfinite(expected)[~grazing])
            np.testing.assert_allclose(distance[both], expected[both], atol=2e-4)
            assert ((where[both] >= 0) & (where[both] <= 1)).all()


def test_empty_room_is_still_and_the_animal_moves(clips: dict[str, Animation]) -> None:
    film = film_of(cameras_for(False).select(["cam0"]), some(clips["test"], 30))
    first, later = film.picture(0).astype(float), film.picture(7).astype(float)
    change = np.abs(first - later).max(axis=-1)
    empty = film.room.max(axis=-1)
    assert np.median(change) < 6  # sensor noise alone
    assert (change > 40).mean() > 0.01
    assert np.abs(first - film.room).max(axis=-1)[:8].max() < 12  # the top rows show the walls
    assert 40 < empty.mean() < 220
    assert empty.std() > 5  # textured


# --- motion -----------------------------------------------------------------------------------------------------------


def test_bones_keep_their_length(clips: dict[str, Animation]) -> None:
    assert len(JOINTS) == 21
    assert EDGES.shape == (20, 2)
    assert set(EDGES.ravel().tolist()) == set(range(21))
    for animation in clips.values():
        joints = animation.joints
        assert joints.dtype == np.float32
        lengths = np.linalg.norm(joints[:, EDGES[:, 0]] - joints[:, EDGES[:, 1]], axis=-1)
        assert np.ptp(lengths, axis=0).max() < 1e-6
        assert lengths.min() > 0.03
    both = [np.linalg.norm(np.diff(clip.joints[0, EDGES], axis=1), axis=-1) for clip in clips.values()]
    np.testing.assert_allclose(*both, atol=1e-6)


def test_motion_stays_in_the_volume_on_its_feet(clips: dict[str, Animation]) -> None:
    paws = [INDEX[name] for name in JOINTS if name.startswith("paw")]
    for animation in clips.values():
        joints = animation.joints
        assert np.abs(joints[..., :2]).max() < 0.62
        assert joints[..., 2].max() < 0.6
        assert joints[..., 2].min() > PAW_RADIUS - 1e-3
        assert np.median(joints[:, paws, 2]) < 1.5 * PAW_RADIUS
        speed = np.linalg.norm(np.diff(joints, axis=0), axis=-1) * 30
        assert (speed[:, paws] < 0.01).mean() > 0.3  # planted, not sliding
        assert speed.max() < 3.0
        assert speed[:, INDEX["spine"]].max() > 0.15


def test_training_and_test_motion_differ_but_are_alike(clips: dict[str, Animation]) -> None:
    train, test = (clips[name].joints.astype(float) for name in ("train", "test"))
    apart = np.linalg.norm(train[None, :, INDEX["nose"]] - test[:, None, INDEX["nose"]], axis=-1)
    poses = np.abs(train[apart.argmin(axis=1)] - test).max(axis=(1, 2))
    assert poses.min() > 1e-3  # no frame occurs twice
    for joints in (train, test):
        x, y = (joints[:, INDEX["chest"], :2] - joints[:, INDEX["pelvis"], :2]).T
        share = np.histogram(np.arctan2(y, x), 8, (-np.pi, np.pi))[0] / len(joints)
        assert share.min() > 0.015  # every heading
        assert joints[:, INDEX["nose"], 2].max() > 0.28
    mean = train.mean(axis=0)
    centred = (test - test.mean(axis=1, keepdims=True)) - (mean - mean.mean(axis=0))
    assert 0.11 < np.linalg.norm(centred, axis=-1).mean() < 0.2
    spread = [np.std(joints - joints.mean(axis=1, keepdims=True), axis=0).mean() for joints in (train, test)]
    assert spread[1] == pytest.approx(spread[0], rel=0.2)


@pytest.mark.parametrize("fps", [1, 7, 120])
def test_motion_at_any_frame_rate(fps: int) -> None:
    joints = animate(4 * fps + 2, fps, np.random.default_rng(0)).joints
    assert joints.shape == (4 * fps + 2, 21, 3)
    assert np.isfinite(joints).all()
    assert np.abs(joints[..., :2]).max() < 0.65
    moved = np.linalg.norm(joints[4 * fps] - joints[0], axis=-1).mean()
    assert 0.02 < moved < 1.0


# --- cameras ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [4, 6, 8])
@pytest.mark.parametrize("distortion", [False, True])
def test_cameras_see_the_volume(views: int, distortion: bool) -> None:
    cameras = cameras_for(distortion, views)
    seen = cameras.in_view(rig.VOLUME.points(16)).sum(dim=0)
    assert (seen >= 2).double().mean() > 0.85
    assert (seen >= 1).double().mean() > 0.95
    assert len({round(z, 3) for z in cameras.centers[:, 2].tolist()}) == views
    focal = cameras.intrinsics[:, [0, 1], [0, 1]]
    assert (focal[:, 0] != focal[:, 1]).all()
    assert len({round(f, 2) for f in focal[:, 0].tolist()}) == views
    middle = (cameras.image_size.double() - 1) / 2
    offset = (cameras.intrinsics[:, :2, 2] - middle).abs() / cameras.image_size
    assert (offset.amax(dim=1) > 0).all()
    assert offset.max() < 0.05
    assert (cameras.distortion.abs().sum() > 0) == distortion


def test_animal_fills_a_fair_part_of_the_picture(clips: dict[str, Animation]) -> None:
    cameras = cameras_for(False)
    pixels, _ = cameras.project(torch.from_numpy(clips["test"].joints))
    length = (pixels.amax(dim=2) - pixels.amin(dim=2)).amax(dim=-1) / cameras.image_size.amax()
    assert 0.2 < length.mean() < 0.4
    inside = cameras.in_view(torch.from_numpy(clips["test"].joints)).double().mean()
    assert inside > 0.99


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_read_back(folder: Path) -> None:
    project = load_project(folder / "project.yaml")
    assert [(r.name, r.split) for r in project.recordings] == [("train", "train"), ("test", "test")]
    assert (project.units, project.volume) == ("m", rig.VOLUME)
    assert len(project.cameras) == 4
    for recording, frames in zip(project.recordings, (7, 4)):
        truth = load_truth(recording, project)
        assert truth.points3d.shape == (frames, 21, 3)
        assert (truth.fps, tuple(truth.names)) == (25.0, JOINTS)
        np.testing.assert_array_equal(truth.edges, EDGES)
        with np.load(recording.truth) as arrays:
            assert arrays["points3d"].dtype == np.float32
            assert str(arrays["units"]) == "m"
        for path in recording.videos.values():
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
                assert (stream.width, stream.height, stream.average_rate) == (64, 48, 25)
                times = [frame.time for frame in container.decode(stream)]
            np.testing.assert_allclose(times, np.arange(frames) / 25, atol=1e-6)


def test_videos_show_what_truth_and_calibration_say(folder: Path) -> None:
    """Where the projected truth says that joints are, the decoded frame differs from the median frame of the view."""
    project = load_project(folder / "project.yaml")
    for recording in project.recordings:
        truth = load_truth(recording, project)
        pixels, _ = project.cameras.project(torch.from_numpy(truth.points3d))
        for index, name in enumerate(project.cameras.names):
            frames = decode(recording.videos[name]).astype(float)
            camera = project.cameras.select([name])
            view = rig.make_view(camera)
            assert view.size == frames.shape[1:3]
            x, y = pixels[index].mean(dim=1).round().long().T
            body = np.stack(
                [frames[i, y[i] - 1 : y[i] + 2, x[i] - 1 : x[i] + 2].mean(axis=(0, 1)) for i in range(len(x))]
            )
            floor = np.median(frames.reshape(-1, 3), axis=0)
            assert (np.linalg.norm(body - floor, axis=1) > 25).mean() > 0.7


def test_encoding_is_faithful(clips: dict[str, Animation], tmp_path: Path) -> None:
    camera, animation = cameras_for(True).select(["cam2"]), some(clips["test"], 60)
    rig._film(rig._Shot(tmp_path / "clip.mp4", camera, animation, 30, 18, 1, 2), lambda pictures: None)
    film = film_of(camera, animation)
    rendered = np.stack([film.picture(i) for i in range(len(film))]).astype(float)
    error = decode(tmp_path / "clip.mp4") - rendered
    assert 10 * np.log10(255**2 / (error**2).mean()) > 30


def test_same_seed_same_files_whatever_the_workers(folder: Path, tmp_path: Path) -> None:
    again = simulate_rig(tmp_path / "again", seed=5, **{**SMALL, "workers": 2}).parent
    names = sorted(f.relative_to(folder) for f in folder.rglob("*.*"))
    assert names == sorted(f.relative_to(again) for f in again.rglob("*.*"))
    assert len(names) == 2 + 2 * (4 + 1)
    for name in names:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_another_seed_is_another_rig(folder: Path, tmp_path: Path) -> None:
    other = simulate_rig(tmp_path / "other", seed=6, **SMALL).parent
    assert not set(pictures_hash(other).values()) & set(pictures_hash(folder).values())
    assert (other / "calibration.toml").read_text() != (folder / "calibration.toml").read_text()
    one, two = (np.load(path / "train" / "truth.npz")["points3d"] for path in (folder, other))
    assert np.abs(one - two).max() > 0.05


def test_noise_differs_between_frames_and_cameras(clips: dict[str, Animation]) -> None:
    still = Animation(clips["test"].points[[0, 0]], clips["test"].frames[[0, 0]])
    camera = cameras_for(False).select(["cam0"])
    one, two = rig.make_film(camera, still, 1, 2), rig.make_film(camera, still, 1, 3)
    noises = [film.picture(i).astype(float) - film.room for film in (one, two) for i in (0, 1)]
    np.testing.assert_array_equal(one.picture(1), one.picture(1))
    wall = [noise[:8].ravel() for noise in noises]
    assert all(1.0 < noise.std() < 4.0 for noise in wall)
    correlation = np.corrcoef(wall) - np.eye(4)
    assert np.abs(correlation).max() < 0.15


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("views", 3),
        ("views", 9),
        ("frames", 1),
        ("test_frames", 0),
        ("image_size", (65, 48)),
        ("image_size", (64, 16)),
        ("fps", 0),
        ("seed", -1),
        ("crf", 52),
        ("workers", 0),
    ],
)
def test_bad_arguments(tmp_path: Path, argument: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^{argument}: ") as caught:
        simulate_rig(tmp_path / "rig", **{**SMALL, argument: value})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "rig").exists()


def test_existing_folder_needs_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig, "_film", lambda shot, report: shot.path.write_bytes(b"film"))
    target = tmp_path / "rig"
    target.mkdir()
    simulate_rig(target, **SMALL)  # an empty folder is as good as none
    (target / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="force"):
        simulate_rig(target, **SMALL)
    assert (target / "mine.txt").read_text() == "keep"
    simulate_rig(target, force=True, **SMALL)
    assert sorted(path.name for path in target.iterdir()) == ["calibration.toml", "project.yaml", "test", "train"]
    assert list(tmp_path.iterdir()) == [target]


def test_force_spares_other_folders(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"project\.yaml"):
        simulate_rig(tmp_path, force=True, **SMALL)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    monkeypatch.setattr(rig, "_film", lambda shot, report: shot.path.write_bytes(b"old"))
    target = simulate_rig(tmp_path / "rig", **SMALL).parent

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(rig, "_film", fail)
    expected = InputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is InputError else None):
        simulate_rig(target, force=True, **SMALL)
    assert (target / "train" / "cam0.mp4").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "rig").write_text("")
    with pytest.raises(InputError, match="is a file"):
        simulate_rig(tmp_path / "rig", **SMALL)
    with pytest.raises(InputError, match="cannot be written"):
        simulate_rig(tmp_path / "rig" / "below", **SMALL)


def test_progress_counts_every_picture_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    simulate_rig(tmp_path / "rig", **{**SMALL, "frames": 3, "test_frames": 2, "progress": True})
    assert "20/20" in capsys.readouterr().err
