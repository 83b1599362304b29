import errno
import hashlib
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_rig import DISTORTION, counted_frames, ring, write_project, write_video

from bkind3d.cameras import Cameras
from bkind3d.data import Project, Volume, build_cache, load_project
from bkind3d.data import cache as cache_module
from bkind3d.data import video as video_module
from bkind3d.data.ledger import Ledger
from bkind3d.data.remap import Remap, image_boxes, network_cameras, volume_boxes
from bkind3d.errors import InputError

POINTS = torch.tensor([[0.0, 0.0, 0.0], [0.35, -0.2, 0.15], [-0.3, 0.3, -0.2], [0.2, 0.35, 0.1], [-0.4, -0.35, 0.2]])


def blobs(cameras: Cameras, index: int, sigma: float = 6.0) -> np.ndarray:
    """A raw picture (P, H, W) of each point: a Gaussian where OpenCV's lens model projects it."""
    width, height = cameras.image_size[index].tolist()
    rotation, _ = cv2.Rodrigues(cameras.rotation[index].numpy())
    pixels, _ = cv2.projectPoints(
        POINTS.double().numpy(),
        rotation,
        cameras.translation[index].numpy(),
        cameras.intrinsics[index].numpy(),
        cameras.distortion[index].numpy(),
    )
    rows, columns = np.mgrid[:height, :width]
    return np.stack([np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2)) for x, y in pixels[:, 0]])


def centroids(pictures: np.ndarray) -> np.ndarray:
    """(P, H, W) to (P, 2), x and y."""
    rows, columns = np.mgrid[: pictures.shape[1], : pictures.shape[2]]
    mass = pictures.sum((1, 2))
    return np.stack([(pictures * columns).sum((1, 2)) / mass, (pictures * rows).sum((1, 2)) / mass], -1)


def open_project(folder: Path, **options: object) -> Project:
    return load_project(write_project(folder, **options))  # type: ignore[arg-type]


def build(project: Project, folder: Path, **options: object):
    return build_cache(project, 24, 32, folder, progress=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("crop", ["volume", "none"])
@pytest.mark.parametrize("size", [(120, 160), (80, 80), (90, 45)])
def test_points_land_where_the_network_cameras_project_them(tmp_path: Path, crop: str, size: tuple[int, int]) -> None:
    """The whole path, from pictures drawn with OpenCV's distortion to the cached frames: sub-pixel."""
    cameras = ring(2, (640, 480), DISTORTION)
    path = write_project(tmp_path, cameras, frames=2, volume={"center": [0, 0, 0], "size": [1.2, 1.2, 0.7]})
    for index, name in enumerate(cameras.names):
        pictures = (255 * blobs(cameras, index)).round().astype(np.uint8)
        write_video(tmp_path / f"{name}.mkv", np.repeat(pictures[..., None], 3, axis=-1))
    cache = build_cache(load_project(path), *size, tmp_path / "cache", crop=crop, progress=False)
    frames = cache.recording("take").frames
    assert frames.shape == (len(POINTS), 2, *size, 3)
    network = cache.recording("take").cameras
    assert network.image_size.tolist() == [[size[1], size[0]]] * 2
    assert not network.distortion.any()
    expected, _ = network.project(POINTS)
    for index in range(2):
        found = centroids(frames[:, index, :, :, 0].astype(float))
        np.testing.assert_allclose(found, expected[index], atol=0.06)


def test_remap_agrees_with_opencv() -> None:
    """Undistorting and area-shrinking in two steps by OpenCV gives the same picture."""
    camera = ring(1, (640, 480), DISTORTION)
    smooth = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (480, 640, 3)).astype(np.float32), (0, 0), 8)
    smooth = cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    matrix, distortion = camera.intrinsics[0].numpy(), camera.distortion[0].numpy()
    expected = cv2.resize(cv2.undistort(smooth, matrix, distortion), (160, 120), interpolation=cv2.INTER_AREA)
    shrunk = Remap(camera, camera.pinhole().resize(160, 120))(smooth)
    difference = np.abs(shrunk.astype(int) - expected.astype(int))
    assert difference.mean() < 0.3
    assert difference[2:-2, 2:-2].max() <= 2


def test_fine_texture_does_not_alias() -> None:
    camera = ring(1, (640, 480))
    stripes = np.zeros((480, 640, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    shrunk = Remap(camera, camera.resize(80, 60))(stripes)
    np.testing.assert_allclose(shrunk, 127.5, atol=1)


def test_same_size_without_distortion_changes_nothing() -> None:
    camera = ring(1, (64, 48))
    picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(Remap(camera, camera)(picture), picture)
    doubled = Remap(camera, camera.resize(128, 96))(picture)
    np.testing.assert_array_equal(doubled[1::2, 1::2][:-1, :-1].shape, (47, 63, 3))
    expected = cv2.resize(picture, (128, 96), interpolation=cv2.INTER_LINEAR)
    assert np.abs(doubled.astype(int) - expected).max() <= 1


def test_black_outside_the_image_and_whole_inside() -> None:
    camera = ring(1, (64, 48))
    white = np.full((48, 64, 3), 255, dtype=np.uint8)
    frame = Remap(camera, camera.crop([-8, -4, 80, 56]))(white)
    inside = np.zeros((56, 80), dtype=bool)
    inside[4:52, 8:72] = True
    assert (frame[inside] == 255).all()
    assert (frame[~inside] == 0).all()


def test_black_beyond_the_lens_model() -> None:
    """Far outside, the polynomial of a barrel lens comes back into the image; nothing may be drawn from there."""
    camera = ring(1, (64, 48), (-0.4, 0.0, 0.0, 0.0, 0.0))
    white = np.full((48, 64, 3), 255, dtype=np.uint8)
    frame = Remap(camera, camera.pinhole().crop([-100, -100, 264, 248]))(white)
    rows, columns = np.nonzero(frame[..., 0])
    growth_ends = (1 / (3 * 0.4)) ** 0.5 * 64 * 1.05  # px from the principal point, at the longer focal length
    distance = np.hypot(
        columns - 100 - camera.intrinsics[0, 0, 2].item(), rows - 100 - camera.intrinsics[0, 1, 2].item()
    )
    assert 0.7 * growth_ends < distance.max() < growth_ends + 1


def test_volume_boxes_hold_the_volume_and_keep_the_aspect() -> None:
    cameras = ring(4, (640, 480), DISTORTION)
    volume = Volume((0.05, 0, 0), (0.8, 0.7, 0.5))
    for size in ((100, 100), (60, 150)):
        boxes = volume_boxes(cameras, volume, *size)
        network = network_cameras(cameras, boxes, *size)
        corners, _ = network.project(volume.corners())
        assert (corners > -0.6).all()
        assert (corners < torch.tensor([size[1], size[0]]) - 0.4).all()
        for x, y, width, height in boxes:
            assert width / height == pytest.approx(size[1] / size[0], rel=0.02)
            assert x >= 0
            assert y >= -100
        tight = (corners.amax(1) - corners.amin(1)) / torch.tensor([size[1], size[0]])
        assert (tight.amax(-1) > 0.95).all(), "one side of the box touches the volume"


def test_boxes_end_where_the_image_ends() -> None:
    cameras = ring(3, (640, 480))
    assert volume_boxes(cameras, Volume((0, 0, 0), (50, 50, 50)), 48, 64) == [(0, 0, 640, 480)] * 3
    assert image_boxes(cameras, 48, 64) == [(0, 0, 640, 480)] * 3
    assert image_boxes(cameras, 64, 64) == [(0, -80, 640, 640)] * 3


def test_frames_and_offsets(tmp_path: Path) -> None:
    """Frame t of camera m is frame t + offset of its video."""
    project = open_project(tmp_path, counts={"cam1": 15}, recording={"offsets": {"cam1": 3}, "split": "both"})
    cache = build(project, tmp_path / "cache", crop="none")
    recording = cache.recording("take")
    assert (len(recording), recording.split, recording.name) == (12, "both", "take")
    assert recording.fps == pytest.approx(30, rel=0.01)
    assert isinstance(recording.frames, np.memmap)
    assert recording.frames.dtype == np.uint8
    numbers = np.array(recording.frames[:, :, 12, 16, 0], dtype=int) / 5
    np.testing.assert_array_equal(numbers[:, 0], np.arange(12))
    np.testing.assert_array_equal(numbers[:, 1], np.arange(12) + 3)
    assert project.names("train", "both") == ["take"]
    assert project.names("test") == []
    assert project.names() == list(cache.recordings)
    with pytest.raises(InputError, match="there is no recording 'x' in the cache; it has take"):
        cache.recording("x")


def test_shorter_frames_leave_the_rest_out(tmp_path: Path) -> None:
    project = open_project(tmp_path, counts={"cam1": 9}, recording={"frames": 5})
    frames = build(project, tmp_path / "cache", crop="none").recording("take").frames
    assert frames.shape[0] == 5
    np.testing.assert_array_equal(frames[:, 1, 12, 16, 0], 5 * np.arange(5))


def test_reused_when_nothing_changed_and_rebuilt_when_something_did(tmp_path: Path, monkeypatch) -> None:
    built = []
    original = cache_module._build
    monkeypatch.setattr(cache_module, "_build", lambda *arguments: (built.append(1), original(*arguments)))
    folder = tmp_path / "cache"

    def keys() -> str:
        return build(load_project(tmp_path / "project.yaml"), folder).key

    write_project(tmp_path)
    first = keys()
    assert (keys(), len(built)) == (first, 1), "the second call reuses the first's frames"
    write_project(tmp_path, recording={"split": "test"})
    assert (keys(), len(built)) == (first, 1), "the split is not in the frames"
    write_project(tmp_path, volume={"center": [0, 0, 0.1], "size": [1, 1, 0.5]})
    moved = keys()
    assert moved != first
    write_project(tmp_path, cameras=ring(distortion=DISTORTION))
    assert keys() not in (first, moved)
    write_project(tmp_path, frames=13, recording={"frames": 12, "offsets": {"cam0": 1}})
    assert len({first, moved, keys()}) == 3
    write_project(tmp_path)
    write_video(tmp_path / "cam0.mkv", counted_frames(12, seed=99))
    assert len({first, moved, keys()}) == 3
    assert len(built) == 5


def test_unchanged_videos_are_not_read_again(tmp_path: Path, monkeypatch) -> None:
    """Neither probed nor hashed; one that changes is, however alike, and a lost ledger costs time alone."""
    path, folder = write_project(tmp_path), tmp_path / "cache"
    first = build(load_project(path), folder).key
    probed = []
    original = video_module.probe_video
    monkeypatch.setattr(
        video_module, "probe_video", lambda path, **o: (probed.append(path.name), original(path, **o))[1]
    )
    assert build(load_project(path), folder).key == first
    assert probed == []
    video = tmp_path / "cam1.mkv"
    content, before = video.read_bytes(), video.stat()
    altered = bytearray(content)
    altered[len(content) // 2] ^= 1  # of the same size, and dated back
    video.write_bytes(altered)
    os.utime(video, ns=(before.st_atime_ns, before.st_mtime_ns))
    digest = cache_module._hash_files([video], Ledger(folder / ".ledger"), False)[video]
    assert digest == hashlib.blake2b(altered, digest_size=16).hexdigest()
    video.write_bytes(content)
    assert build(load_project(path), folder).key == first
    assert probed == ["cam1.mkv"]
    for text in ("", "[]", "{"):
        (folder / ".ledger").write_text(text)
        assert build(load_project(path), folder).key == first
    assert len(probed) == 1 + 3 * 3


def test_a_lost_or_short_file_is_built_again(tmp_path: Path) -> None:
    project = open_project(tmp_path)
    recording = build(project, tmp_path / "cache").recording("take")
    expected = np.array(recording.frames)
    with recording.path.open("r+b") as file:
        file.truncate(1000)
    np.testing.assert_array_equal(build(project, tmp_path / "cache").recording("take").frames, expected)
    recording.path.unlink()
    np.testing.assert_array_equal(build(project, tmp_path / "cache").recording("take").frames, expected)


def test_full_disk_while_writing(tmp_path: Path, monkeypatch) -> None:
    """The disk fills up halfway: one line, no rubbish left, earlier recordings kept, and a later call succeeds."""
    project = open_project(tmp_path)
    folder = tmp_path / "cache"
    before = build_cache(project, 12, 16, folder, progress=False).recording("take").path
    original, left = os.pwrite, [20]

    def pwrite(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(InputError, match=r"cache: the disk is full: the frames of recording 'take' need .* GB; free"):
        build(project, folder)
    monkeypatch.undo()
    kept = [".ledger", ".lock", before.with_suffix(".json").name, before.name]
    assert sorted(path.name for path in folder.iterdir()) == kept
    assert build(project, folder).recording("take").frames.any()


def test_too_little_space_is_seen_before_writing(tmp_path: Path, monkeypatch) -> None:
    project = open_project(tmp_path)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="the disk is full"):
        build(project, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npy*"))


def test_unwritable_folder(tmp_path: Path) -> None:
    project = open_project(tmp_path)
    with pytest.raises(InputError, match=r"project.yaml/cache: the cache folder cannot be written \(Not a directory\)"):
        build(project, tmp_path / "project.yaml" / "cache")


def test_damaged_video_stops_the_build(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (12, 48, 64, 3), dtype=np.uint8)
    project = open_project(tmp_path)
    content = bytearray(write_video(tmp_path / "damaged.mp4", noise).read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3000] = bytes(3000)
    project.recordings[0].videos["cam1"].write_bytes(content)
    with pytest.raises(InputError, match=r"cam1.mkv: decoding failed after \d+ of 12 frames"):
        build(project, tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".ledger", ".lock"]


def slow_build(path: Path, folder: Path, started) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background inherits it ignored
    original = os.pwrite

    def pwrite(*arguments):
        started.set()
        time.sleep(0.05)
        return original(*arguments)

    os.pwrite = pwrite
    build(load_project(path), folder)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_build_is_built_again(tmp_path: Path, signal_number: int) -> None:
    path, folder = write_project(tmp_path), tmp_path / "cache"
    expected = np.array(build(load_project(path), tmp_path / "other").recording("take").frames)
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=slow_build, args=(path, folder, started))
    process.start()
    assert started.wait(120)
    os.kill(process.pid, signal_number)
    process.join(120)
    assert process.exitcode != 0
    assert not list(folder.glob("*.json"))
    assert len(list(folder.glob("*.part"))) == (signal_number == signal.SIGKILL), "Ctrl-C cleans up after itself"
    (folder / "another.npy.part").write_text("left by a killed process")
    recording = build(load_project(path), folder).recording("take")
    np.testing.assert_array_equal(recording.frames, expected)
    assert not list(folder.glob("*.part"))


def test_two_processes_build_once(tmp_path: Path) -> None:
    path, folder = write_project(tmp_path), tmp_path / "cache"
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=slow_build, args=(path, folder, started))
    process.start()
    assert started.wait(120)
    recording = build(load_project(path), folder).recording("take")
    written = recording.path.stat().st_mtime_ns
    process.join(120)
    assert process.exitcode == 0
    assert recording.path.stat().st_mtime_ns == written
    assert recording.frames[11, 0, 12, 16, 0] == 55


def test_options_are_checked(tmp_path: Path) -> None:
    project = open_project(tmp_path)
    with pytest.raises(InputError, match="crop: 'tight' must be one of volume, none"):
        build(project, tmp_path, crop="tight")
    with pytest.raises(InputError, match="image size: 0×24 must be at least 1×1"):
        build_cache(project, 24, 0, tmp_path)


def test_a_volume_that_is_not_seen_is_refused(tmp_path: Path) -> None:
    project = open_project(tmp_path, volume={"center": [900, 0, 0], "size": [1, 1, 1]})
    with pytest.raises(InputError, match=r"0.0% of its voxels are seen by two or more cameras"):
        build(project, tmp_path / "cache")


def test_pickle_carries_no_frames(tmp_path: Path) -> None:
    recording = build(open_project(tmp_path), tmp_path / "cache").recording("take")
    frames = np.array(recording.frames)
    data = pickle.dumps(recording)
    assert len(data) < 10_000 < frames.nbytes
    np.testing.assert_array_equal(pickle.loads(data).frames, frames)
