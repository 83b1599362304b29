"""Recordings whose cameras need more than an offset: chunks, images, an index, a calibration of their own."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_rig import counted_frames, ring, write_project, write_video
from torch import Tensor, nn

from bkind3d.cameras import save_toml
from bkind3d.check import check_project
from bkind3d.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from bkind3d.data import (
    FrameCache,
    Index,
    Project,
    Truth,
    build_cache,
    load_index,
    load_project,
    probe_recording,
    save_index,
    save_project,
    save_truth,
)
from bkind3d.errors import InputError
from bkind3d.predict import predict_recording
from bkind3d.run import Inputs
from bkind3d.train import Trainer

COUNT = 12


def write_chunks(folder: Path, camera: str, starts: list[int], end: int = COUNT) -> list[str]:
    """Frames 0 ... end - 1 of a camera in files that start at those numbers."""
    names = []
    for start, stop in zip(starts, [*starts[1:], end]):
        names.append(f"{camera}-{start}.mkv")
        write_video(folder / names[-1], counted_frames(end)[start:stop])
    return names


def write_images(folder: Path, numbers: list[int]) -> str:
    folder.mkdir()
    frames = counted_frames(max(numbers) + 1)
    for number in numbers:
        Image.fromarray(frames[number]).save(folder / f"img_{number:06d}.png")
    return f"{folder.name}/img_%06d.png"


def write_index(path: Path, columns: dict[str, list[int]], clock: list[int], fps: float = 30.0) -> str:
    save_index(path, Index(tuple(columns), np.stack(list(columns.values()), axis=1), np.array(clock), fps))
    return path.name


def numbers_read(project: Project, folder: Path) -> list[list[int]]:
    """Which frame of each camera the cache holds, by its brightness, (T, M)."""
    frames = cached(project, folder).recording("take").frames
    return (np.array(frames[:, :, 12, 16, 0], dtype=int) // 5).tolist()


def cached(project: Project, folder: Path) -> FrameCache:
    return build_cache(project, 24, 32, folder / "cache", crop="none", progress=False)


def changed(path: Path, **changes: object) -> Path:
    """The project file with the first recording's keys replaced."""
    content = yaml.safe_load(path.read_text())
    content["recordings"][0].update(changes)
    path.write_text(yaml.safe_dump(content))
    return path


def refused(function, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_by_cache(path: Path) -> str:
    return refused(cached, load_project(path), path.parent)


@pytest.fixture
def project_file(tmp_path: Path) -> Path:
    """Two cameras, each one video of frames whose brightness is 5 times their number."""
    return write_project(tmp_path, ring(2), frames=COUNT)


def with_videos(path: Path, **videos: object) -> Path:
    known = yaml.safe_load(path.read_text())["recordings"][0]["videos"]
    return changed(path, videos={**known, **videos})


def test_chunks_are_read_as_one_video(project_file: Path) -> None:
    chunks = write_chunks(project_file.parent, "cam1", [0, 5, 9])
    project = load_project(with_videos(project_file, cam1=[chunks[2], chunks[0], chunks[1]]))
    assert numbers_read(project, project_file.parent) == [[t, t] for t in range(COUNT)]


def test_chunks_that_start_later_keep_their_numbers(project_file: Path) -> None:
    chunks = write_chunks(project_file.parent, "cam1", [3, 7])
    path = changed(with_videos(project_file, cam1=chunks), offsets={"cam0": 3})
    assert numbers_read(load_project(path), path.parent) == [[t, t] for t in range(3, COUNT)]


def test_the_missing_chunk_is_named(project_file: Path) -> None:
    chunks = write_chunks(project_file.parent, "cam1", [0, 5, 9])
    path = with_videos(project_file, cam1=[chunks[0], chunks[2]])
    message = refused_by_cache(path)
    assert "camera 'cam1': frame 8 is in no file" in message
    assert "cam1-0.mkv ends with frame 4, cam1-9.mkv follows; cam1-5.mkv is missing" in message

    def indexed(numbers: list[int]) -> str:
        index = write_index(path.parent / "index.npz", {"cam0": [0, 1], "cam1": numbers}, [0, 1])
        return refused_by_cache(changed(path, index=index))

    assert "frame 6 is in no file" in indexed([4, 6])
    assert "cam1-9.mkv ends with frame 11, no other file follows; cam1-12.mkv is missing" in indexed([9, 12])
    with_videos(path, cam1=[chunks[2]])
    assert "cam1-9.mkv, the first, starts at 9; a chunk before it is missing" in indexed([4, 9])


def test_chunks_that_do_not_fit_together(project_file: Path) -> None:
    folder = project_file.parent
    chunks = write_chunks(folder, "cam1", [0, 5, 9])
    write_video(folder / chunks[1], counted_frames(6))
    assert "cam1-5.mkv: reaches to frame 10, but cam1-9.mkv starts before" in refused_by_cache(
        with_videos(project_file, cam1=chunks)
    )
    write_video(folder / chunks[1], counted_frames(4, (48, 64)))
    assert "cam1-5.mkv: is 48×64, cam1-0.mkv is 64×48" in refused_by_cache(project_file)
    (folder / "end.mkv").write_bytes((folder / "cam1.mkv").read_bytes())
    message = refused_by_cache(with_videos(project_file, cam1=[chunks[0], "end.mkv"]))
    assert "end.mkv: a chunk's name must end with the number of its first frame" in message


def test_only_the_chunks_that_are_asked_for_are_opened(project_file: Path) -> None:
    chunks = write_chunks(project_file.parent, "cam1", [0, 5, 9])
    (project_file.parent / chunks[1]).write_text("not a video")
    index = write_index(project_file.parent / "index.npz", {"cam1": [4, 9, 10], "cam0": [2, 8, 3]}, [0, 5, 6])
    path = changed(with_videos(project_file, cam1=chunks), index=index)
    assert numbers_read(load_project(path), path.parent) == [[2, 4], [8, 9], [3, 10]]


def test_a_dropped_frame_is_its_neighbour_twice(project_file: Path) -> None:
    index = write_index(project_file.parent / "index.npz", {"cam0": [1, 1, 3], "cam1": [5, 4, 4]}, [0, 1, 2])
    project = load_project(changed(project_file, index=index))
    assert numbers_read(project, project_file.parent) == [[1, 5], [1, 4], [3, 4]]


def test_images_are_read_by_their_numbers(project_file: Path) -> None:
    folder = project_file.parent
    images = write_images(folder / "images", [1, 4, 7])
    index = write_index(folder / "index.npz", {"cam0": [0, 1, 2], "cam1": [7, 1, 4]}, [10, 20, 21], fps=50.0)
    project = load_project(changed(with_videos(project_file, cam1=images), index=index))
    assert numbers_read(project, folder) == [[0, 7], [1, 1], [2, 4]]
    entry = cached(project, folder).recording("take")
    assert (entry.fps, entry.clock.tolist()) == (50.0, [10, 20, 21])
    assert [entry.rows(every).tolist() for every in (1, 10, 11)] == [[0, 1, 2], [0, 1], [0, 2]]


def test_images_that_cannot_be_used(project_file: Path) -> None:
    folder = project_file.parent
    images = write_images(folder / "images", [1, 4])
    with_videos(project_file, cam1=images)
    assert "images" in (message := refused_by_cache(project_file))
    assert "need an 'index'" in message
    index = write_index(folder / "index.npz", {"cam0": [0, 1, 2], "cam1": [1, 4, 5]}, [0, 1, 2])
    changed(project_file, index=index)
    assert "img_000005.png: the image of frame 5 of camera 'cam1' is missing" in refused_by_cache(project_file)
    (folder / "images" / "img_000005.png").write_bytes(b"not an image")
    assert "img_000005.png: not a readable image" in refused_by_cache(project_file)
    Image.new("RGB", (48, 64)).save(folder / "images" / "img_000005.png")
    assert "img_000005.png: is 48×64, the first image is 64×48" in refused_by_cache(project_file)
    for number in (1, 4):
        Image.new("RGB", (48, 64)).save(folder / "images" / f"img_{number:06d}.png")
    assert "is 48×64, but its calibration is for 64×48" in refused_by_cache(project_file)
    with_videos(project_file, cam1="lost/img_%06d.png")
    assert "the folder" in (message := refused(load_project, project_file))
    assert "lost of the images img_%06d.png does not exist" in message


def test_bad_indices(project_file: Path) -> None:
    folder = project_file.parent
    index, cameras = folder / "index.npz", ("cam0", "cam1")
    arrays = {"frames": np.zeros((3, 2), int), "cameras": np.array(cameras), "clock": np.arange(3), "fps": 30.0}

    def wrong(**changes: object) -> str:
        np.savez(index, **{key: value for key, value in {**arrays, **changes}.items() if value is not None})
        return refused(load_index, index, cameras)

    assert "index.npz: its cameras are cam0, cam9; the recording has cam0, cam1" in wrong(
        cameras=np.array(["cam0", "cam9"])
    )
    assert "frames (3, 3) must be (moments, 2 cameras)" in wrong(frames=np.zeros((3, 3), int))
    assert "frames must hold whole numbers, not float64" in wrong(frames=np.zeros((3, 2)))
    assert "frames[1] of camera 'cam1' is -1; frames are counted from 0" in wrong(
        frames=np.array([[0, 0], [1, -1], [2, 2]])
    )
    assert "clock[2] is 4, after 4; the clock must increase" in wrong(clock=np.array([1, 4, 4]))
    assert "fps must be a number above 0, not 0.0" in wrong(fps=0.0)
    assert "expected frames, cameras, clock, fps" in wrong(clock=None)
    index.write_text("nothing")
    assert "not an npz file" in refused(load_index, index, cameras)
    write_index(index, {"cam0": [0, 12], "cam1": [0, 1]}, [0, 1])
    message = refused_by_cache(changed(project_file, index="index.npz"))
    assert "the index asks for frame 12, but" in message
    assert "cam0.mkv has 12 frames, 0 to 11" in message
    assert "the index names each moment's frames; remove 'frames'" in refused(
        load_project, changed(project_file, frames=3)
    )


def test_the_cache_depends_on_the_frames_and_not_on_the_clock(project_file: Path) -> None:
    folder = project_file.parent
    index = folder / "index.npz"
    changed(project_file, index=write_index(index, {"cam0": [0, 1], "cam1": [0, 1]}, [0, 1]))

    def entry():
        return cached(load_project(project_file), folder).recording("take")

    first = entry()
    write_index(index, {"cam0": [0, 1], "cam1": [0, 1]}, [0, 20], fps=50.0)
    assert (entry().path, entry().clock.tolist(), entry().fps) == (first.path, [0, 20], 50.0)
    write_index(index, {"cam0": [0, 1], "cam1": [1, 1]}, [0, 1])
    assert entry().path != first.path


# --- cameras of each recording ------------------------------------------------------------------------------------


@pytest.fixture
def two_rigs(tmp_path: Path) -> Project:
    """Recordings "take" (brightness 5 t) and "other" (200 - 5 t), filmed by cameras at other places."""
    path = write_project(tmp_path, ring(2), frames=COUNT)
    save_toml(ring(2, radius=4.0), tmp_path / "other.toml")
    content = yaml.safe_load(path.read_text())
    videos = {}
    for camera in ("cam0", "cam1"):
        videos[camera] = f"other-{camera}.mkv"
        write_video(tmp_path / videos[camera], 200 - counted_frames(COUNT)[:, 5:6].repeat(48, axis=1))
    content["recordings"].append({"name": "other", "split": "train", "calibration": "other.toml", "videos": videos})
    path.write_text(yaml.safe_dump(content))
    return load_project(path)


def test_every_recording_has_its_own_cameras(two_rigs: Project) -> None:
    take, other = two_rigs.recordings
    folder = two_rigs.path.parent
    assert list(two_rigs.rigs()) == [folder / "calibration.toml", folder / "other.toml"]
    assert two_rigs.cameras_of(take) is two_rigs.cameras
    torch.testing.assert_close(two_rigs.cameras_of(other).centers, ring(2, radius=4.0).centers)
    cache = build_cache(two_rigs, 24, 32, folder / "cache", progress=False)
    for recording, radius in ((take, 3.0), (other, 4.0)):
        entry = cache.recording(recording.name)
        torch.testing.assert_close(entry.cameras.centers, ring(2, radius=radius).centers)
        torch.testing.assert_close(entry.cameras.rotation, ring(2, radius=radius).rotation)
        torch.testing.assert_close(entry.projections, entry.cameras.projection_matrices().float())


def test_projects_with_all_of_that_are_written_and_read_back(two_rigs: Project, tmp_path: Path) -> None:
    folder = two_rigs.path.parent
    chunks = [folder / name for name in write_chunks(folder, "chunk", [0, 5])]
    images = folder / write_images(folder / "images", [0, 1])
    index = folder / write_index(folder / "index.npz", {"cam0": [0, 1], "cam1": [0, 1]}, [3, 4])
    take = dataclasses.replace(
        two_rigs.recordings[1], name="mixed", videos={"cam0": tuple(chunks), "cam1": images}, index=index
    )
    project = dataclasses.replace(two_rigs, recordings=[*two_rigs.recordings, take])
    (tmp_path / "elsewhere").mkdir()
    for path in (project.path, tmp_path / "elsewhere" / "copy.yaml"):
        save_project(project, path)
        again = load_project(path).recording("mixed")
        assert again.videos["cam0"] == tuple(chunks)
        assert (again.videos["cam1"], again.index, again.calibration) == (images, index, folder / "other.toml")
        torch.testing.assert_close(again.cameras.translation, take.cameras.translation)
        info = probe_recording(again, again.cameras)
        assert (info.frames, info.index.clock.tolist()) == (2, [3, 4])


def test_all_calibrations_must_name_the_same_cameras(two_rigs: Project) -> None:
    save_toml(ring(3), two_rigs.path.parent / "other.toml")
    message = refused(load_project, two_rigs.path)
    assert "other.toml has the cameras cam0, cam1, cam2; those of the project are cam0, cam1" in message


def test_check_looks_at_every_calibration(two_rigs: Project) -> None:
    report = check_project(two_rigs, gap=1, voxels=4)
    assert any(
        "2 calibrations; the cameras and voxels told of are those of calibration.toml" in x for x in report.lines()
    )
    assert report.warnings == []
    save_toml(ring(2, radius=90.0), two_rigs.path.parent / "other.toml")
    warnings = check_project(load_project(two_rigs.path), gap=1, voxels=4).warnings
    assert warnings[0].startswith("other.toml: camera 'cam0' is 95 volume sides away")
    far = dataclasses.replace(ring(2), translation=ring(2).translation + torch.tensor([0.0, 0.0, -900.0]))
    save_toml(far, two_rigs.path.parent / "other.toml")
    assert "lies behind all 2 cameras" in refused(check_project, load_project(two_rigs.path), gap=1)


def test_check_doubts_a_truth_that_no_camera_sees(project_file: Path) -> None:
    def warnings(points: np.ndarray) -> list[str]:
        truth = Truth(points, ["a", "b"], np.array([[0, 1]]), 30.0)
        save_truth(project_file.parent / "truth.npz", truth, "m")
        return check_project(load_project(changed(project_file, truth="truth.npz")), gap=1, voxels=4).warnings

    points = np.random.default_rng(0).uniform(-0.2, 0.2, (COUNT, 2, 3))
    points[0, 0] = np.nan
    assert warnings(points) == []
    assert warnings(np.full_like(points, np.nan)) == []
    (doubt,) = warnings(1000 * points)
    assert doubt.startswith("recording 'take': two cameras see 0% of its true joints")


def test_training_pairs_each_frame_with_the_cameras_that_filmed_it(two_rigs: Project) -> None:
    config = Config(
        project=two_rigs.path,
        data=DataConfig(height=24, width=32, gap=2, foreground=False),
        model=ModelConfig(
            keypoints=2, encoder="small", pyramid_channels=4, channels=2, voxels=4, volume_channels=(2, 2),
            volume_stem=3, volume_blocks=1, edge_strides=(8,), edge_sigmas=(1.0,), decoder_channels=(4,),
        ),
        loss=LossConfig(network="none", pixel_scales=1),
        train=TrainConfig(steps=5, batch=4),
    )  # fmt: skip
    trainer = Trainer(config, two_rigs.path.parent / "run", progress=False)
    entries = trainer.inputs.cache.recordings
    seen = set()
    for images, projections in trainer._batches():
        assert (images.shape[:3], projections.shape) == ((4, 2, 2), (4, 2, 3, 4))
        for image, projection in zip(images, projections):
            name = "other" if image[0, 0, 0, 12, 16] > 100 else "take"
            torch.testing.assert_close(projection, entries[name].projections)
            seen.add(name)
        trainer.step += 1
        if trainer.step == config.train.steps:
            break
    assert seen == {"take", "other"}


class Spy(nn.Module):
    """Stands in for a network: keypoints that hold the mean brightness of the image and the projection it came with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def detect(self, images: Tensor, projections: Tensor, grid: object) -> SimpleNamespace:
        brightness = images.mean((1, 2, 3, 4))[:, None, None].expand(-1, 1, 3)
        where = projections[:, 0, :, 3].expand(len(images), 1, 3)
        positions = torch.cat([brightness, where], dim=1)
        return SimpleNamespace(positions=positions, confidence=torch.ones(len(images), 2), detected=None)


def test_prediction_takes_the_cameras_and_the_clock_of_each_recording(two_rigs: Project) -> None:
    folder = two_rigs.path.parent
    index = write_index(folder / "index.npz", {"cam0": [0, 3, 6], "cam1": [0, 3, 6]}, [5, 8, 11], fps=50.0)
    content = yaml.safe_load(two_rigs.path.read_text())
    content["recordings"][1]["index"] = index
    two_rigs.path.write_text(yaml.safe_dump(content))
    cache = build_cache(load_project(two_rigs.path), 24, 32, folder / "cache", progress=False)
    inputs = Inputs(two_rigs, two_rigs.working_volume(), cache, torch.zeros(1))
    for name, frames, fps in (("take", [0, 3, 6, 9], 30.0), ("other", [5, 8, 11], 50.0)):
        poses = predict_recording(Spy(), inputs, name, every=3, progress=False)
        assert poses.frames.tolist() == frames
        assert poses.fps == pytest.approx(fps, rel=0.01)
        np.testing.assert_allclose(
            poses.positions[:, 1], cache.recording(name).projections[0, None, :, 3].repeat(len(frames), 1)
        )
        brightness = 255 * poses.positions[:, 0, 0]
        expected = 5 * np.array([0, 3, 6, 9]) if name == "take" else 200 - 5 * np.array([0, 3, 6])
        np.testing.assert_allclose(np.diff(brightness), np.diff(expected), atol=1)
