import dataclasses
from pathlib import Path

import numpy as np
import pytest
from small_rig import counted_frames, ring, write_project, write_video

from bkind3d.data import VideoInfo, load_project, probe_recording, probe_video, read_frames
from bkind3d.errors import InputError


def refused(function, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, 48, 64, 3), dtype=np.uint8)


def decode_all(info: VideoInfo) -> np.ndarray:
    return np.stack(list(read_frames(info)))


@pytest.mark.parametrize(("suffix", "fps"), [(".mp4", 30), (".mp4", 60), (".mkv", 24), (".avi", 25)])
def test_probe_counts_frames_by_their_time_stamps(tmp_path: Path, suffix: str, fps: int) -> None:
    info = probe_video(write_video(tmp_path / f"video{suffix}", counted_frames(13), fps))
    assert (info.frames, info.width, info.height) == (13, 64, 48)
    assert info.fps == pytest.approx(fps, rel=0.005)


def test_frames_come_in_display_order_and_unchanged(tmp_path: Path) -> None:
    frames = noise(9)
    np.testing.assert_array_equal(decode_all(probe_video(write_video(tmp_path / "a.mkv", frames))), frames)


def test_frames_of_a_compressed_video_with_b_frames(tmp_path: Path) -> None:
    decoded = decode_all(probe_video(write_video(tmp_path / "a.mp4", counted_frames(40))))
    means = decoded[:, 8:].mean((1, 2, 3))
    np.testing.assert_allclose(means, 5 * np.arange(40), atol=2.5)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    assert "lost.mp4: not a readable video (No such file" in refused(probe_video, tmp_path / "lost.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("this is not a video" * 100)
    assert "text.mp4: not a readable video (Invalid data" in refused(probe_video, text)


def test_truncated_mp4(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", noise(20))
    content = whole.read_bytes()
    half = tmp_path / "half.mp4"
    half.write_bytes(content[: len(content) // 2])
    message = refused(probe_video, half)
    assert "half.mp4: the file ends within frame" in message
    assert "it is truncated: copy it again or re-encode it" in message
    headless = tmp_path / "headless.mp4"
    headless.write_bytes(content[:200])
    assert "headless.mp4: holds no video stream; if it should, it is truncated" in refused(probe_video, headless)


def test_truncated_mkv(tmp_path: Path) -> None:
    """Matroska ends silently: only the declared duration tells."""
    content = write_video(tmp_path / "whole.mkv", noise(20)).read_bytes()
    half = tmp_path / "half.mkv"
    half.write_bytes(content[: len(content) // 2])
    message = refused(probe_video, half)
    assert "before the duration it declares; it is truncated" in message
    assert "half.mkv: ends after frame" in message


def test_damaged_frames_name_the_frame_reached(tmp_path: Path) -> None:
    path = write_video(tmp_path / "damaged.mp4", noise(20))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    path.write_bytes(content)
    message = refused(decode_all, probe_video(path))
    assert "damaged.mp4: decoding failed after" in message
    assert "of 20 frames" in message


def test_fewer_frames_than_time_stamps(tmp_path: Path) -> None:
    info = probe_video(write_video(tmp_path / "a.mkv", counted_frames(5)))
    message = refused(decode_all, dataclasses.replace(info, frames=6))
    assert "5 frames could be decoded, but it has time stamps of 6" in message


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    info = probe_video(write_video(tmp_path / "a.mkv", counted_frames(2)))
    assert "frame 0 is 64×48, the first is 32×48" in refused(decode_all, dataclasses.replace(info, width=32))


def test_dropped_frame(tmp_path: Path) -> None:
    stamps = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    path = write_video(tmp_path / "dropped.mkv", counted_frames(12), stamps=stamps)
    message = refused(probe_video, path)
    assert "dropped.mkv: frame 5 comes 0.067 s after the one before, the mean is 0.036" in message
    assert "the frame rate varies or frames were dropped" in message


def test_single_frame_is_no_video(tmp_path: Path) -> None:
    assert "holds 1 frame(s)" in refused(probe_video, write_video(tmp_path / "one.mkv", counted_frames(1)))


def test_recording(tmp_path: Path) -> None:
    project = load_project(write_project(tmp_path, frames=7))
    info = probe_recording(project.recordings[0], project.cameras)
    assert info.frames == 7
    assert info.fps == pytest.approx(30, rel=0.01)
    assert {camera: video.frames for camera, video in info.footage.items()} == {"cam0": 7, "cam1": 7, "cam2": 7}


def test_unequal_frame_counts(tmp_path: Path) -> None:
    project = load_project(write_project(tmp_path, counts={"cam1": 9}))
    message = refused(probe_recording, project.recordings[0], project.cameras)
    assert "recording 'take': the cameras differ in their number of frames" in message
    assert "cam0 12, cam1 9, cam2 12" in message
    assert "set 'frames: 9'" in message


def test_offsets_and_frames_make_counts_equal(tmp_path: Path) -> None:
    offset = write_project(tmp_path / "offset", counts={"cam1": 15}, recording={"offsets": {"cam1": 3}})
    project = load_project(offset)
    assert probe_recording(project.recordings[0], project.cameras).frames == 12
    cut = load_project(write_project(tmp_path / "cut", counts={"cam1": 9}, recording={"frames": 9}))
    assert probe_recording(cut.recordings[0], cut.cameras).frames == 9
    beyond = load_project(write_project(tmp_path / "beyond", counts={"cam1": 9}, recording={"frames": 10}))
    message = refused(probe_recording, beyond.recordings[0], beyond.cameras)
    assert "frames: 10 were asked for, but after the offsets there are cam0 12, cam1 9, cam2 12" in message


def test_offset_beyond_the_video(tmp_path: Path) -> None:
    project = load_project(write_project(tmp_path, recording={"offsets": {"cam2": 12}}))
    message = refused(probe_recording, project.recordings[0], project.cameras)
    assert "the offset 12 of camera 'cam2' is beyond the 12 frames of" in message


def test_image_size_must_be_that_of_the_calibration(tmp_path: Path) -> None:
    project = load_project(write_project(tmp_path))
    write_video(tmp_path / "cam1.mkv", counted_frames(12, (48, 64)))
    message = refused(probe_recording, project.recordings[0], project.cameras)
    assert "camera 'cam1':" in message
    assert "cam1.mkv is 48×64, but its calibration is for 64×48" in message


def test_frame_rates_must_agree(tmp_path: Path) -> None:
    project = load_project(write_project(tmp_path, ring(3)))
    write_video(tmp_path / "cam2.mkv", counted_frames(12), fps=25)
    message = refused(probe_recording, project.recordings[0], project.cameras)
    assert "camera 'cam2' runs at 25 frames per second, 'cam0' at" in message
