import dataclasses
import html
import io
import json
import os
import re
import time
from pathlib import Path

import av
import chromium
import numpy as np
import pytest
import torch
from PIL import Image
from run_folder import (
    CENTER,
    FRAMES,
    HEIGHT,
    JOINTS,
    SIDES,
    VIEWS,
    WIDTH,
    caterpillar,
    make_scene,
    write_filmed_run,
    write_run,
)

from bkind3d import pictures
from bkind3d.cameras import Cameras
from bkind3d.errors import InputError
from bkind3d.poses import Poses
from bkind3d.report import build_report, clip, crops, page, shots
from bkind3d.report.inputs import choose_recording, read_run, run_inputs

SECTIONS = [
    "crops", "quality", "parts", "results", "actions", "motion", "clip", "scene", "losses", "samples", "edges",
    "health", "configuration", "versions",
]  # fmt: skip


@pytest.fixture(scope="module")
def scene():
    return make_scene()


@pytest.fixture
def with_frames(monkeypatch, scene):
    monkeypatch.setattr(page, "run_inputs", lambda run: scene)


@pytest.fixture(scope="module")
def full_report(tmp_path_factory, scene):
    run = write_run(tmp_path_factory.mktemp("runs") / "demo", scene)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "run_inputs", lambda run: scene)
        return build_report(run)


# --- pictures -----------------------------------------------------------------------------------------------------


def test_palette_is_fixed_and_distinct():
    colours = pictures.palette(30).astype(int)
    np.testing.assert_array_equal(colours[:12], pictures.palette(12))
    distance = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 1000 * np.eye(30, dtype=int)
    assert distance.min() > 50
    assert pictures.palette(0).shape == (0, 3)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_overlay_puts_a_keypoint_on_its_pixel(scale):
    images = np.full((2, 40, 60, 3), 128, np.uint8)
    keypoints = np.full((2, 3, 2), np.nan)
    keypoints[1, 2] = (45, 12)
    picture = pictures.overlay(images, keypoints, np.zeros((0, 2)), scale=scale)
    assert picture.shape == (40 * scale, 2 * 60 * scale + pictures.GAP, 3)
    assert picture.dtype == np.uint8
    assert (picture[:, : 60 * scale] == 128).all()  # nothing to draw in the first view
    rows, columns = np.nonzero((picture[:, 60 * scale + pictures.GAP :] != 128).any(axis=2))
    assert rows.mean() == pytest.approx((12 + 0.5) * scale - 0.5, abs=0.3)
    assert columns.mean() == pytest.approx((45 + 0.5) * scale - 0.5, abs=0.3)
    at = round((12.5) * scale - 0.5), 60 * scale + pictures.GAP + round(45.5 * scale - 0.5)
    np.testing.assert_array_equal(picture[at], pictures.palette(3)[2])


def test_overlay_draws_an_edge_between_its_keypoints_only():
    images = np.full((1, 50, 50, 3), 100, np.uint8)
    keypoints = np.array([[[5, 25], [45, 25], [25, 5]]], float)
    with_edge = pictures.overlay(images, keypoints, np.array([[0, 1]]))
    without = pictures.overlay(images, keypoints, np.zeros((0, 2)))
    changed = np.argwhere((with_edge != without).any(axis=2))
    assert with_edge[50:52, 50].max() == 255
    assert np.abs(changed[:, 0] - 50.5).max() < 5
    keypoints[0, 1] = np.nan
    lone = pictures.overlay(images, keypoints, np.array([[0, 1]]))
    assert (lone[50:52, 50] == 100).all()


def test_edges_are_thinner_and_fainter_the_less_they_weigh():
    images = np.full((1, 60, 60, 3), 100, np.uint8)
    keypoints = np.array([[[5, 10], [55, 10], [5, 40], [55, 40]]], float)
    edges = np.array([[2, 3], [0, 1]])
    picture = pictures.overlay(images, keypoints, edges, weights=np.array([2.0, 0.2])).astype(int)
    heavy, light = (np.abs(picture[top : top + 20, 60, 0] - 100) for top in (72, 12))
    assert heavy.max() > 2 * light.max() > 20
    assert (heavy > 10).sum() > (light > 10).sum()
    alone = pictures.overlay(images, keypoints, edges[:1], weights=np.array([0.2]))
    np.testing.assert_array_equal(alone, pictures.overlay(images, keypoints, edges[:1]))  # relative to the largest
    with pytest.raises(InputError, match=r"weights: expected \(2,\), got \(3,\)"):
        pictures.overlay(images, keypoints, edges, weights=np.ones(3))


def test_overlay_survives_keypoints_far_away():
    images = np.zeros((1, 20, 20, 3), np.uint8)
    keypoints = np.array([[[1e9, -1e12], [5, 5]]])
    assert pictures.overlay(images, keypoints, np.array([[0, 1]])).shape == (40, 40, 3)


def test_low_confidence_makes_smaller_dots():
    images = np.zeros((1, 60, 60, 3), np.uint8)
    keypoints = np.array([[[15, 30], [45, 30]]], float)
    picture = pictures.overlay(images, keypoints, np.zeros((0, 2)), scale=4, confidence=np.array([0.4, 0.02]))
    coloured = picture.any(axis=2)
    assert coloured[:, :120].sum() > 2 * coloured[:, 120:].sum() > 0


def test_overlay_in_columns():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((5, 10, 12, 3), 40, np.uint8)
    picture = pictures.overlay(images, np.zeros((5, 0, 2)), np.zeros((0, 2)), scale=1, columns=3)
    assert picture.shape == (24, 44, 3)
    assert picture[15, 20].tolist() == [160, 160, 160]  # the fifth view: second row, second column
    assert picture[20, 40].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("images", "keypoints", "edges", "message"),
    [
        (np.zeros((1, 8, 8, 3)), np.zeros((1, 2, 2)), [], "images"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((1, 2, 2)), [], "images"),
        (np.zeros((1, 8, 8, 3), np.uint8), np.zeros((2, 2, 2)), [], "keypoints"),
        (np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 2, 2)), [[0, 2]], "edges"),
        (np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 2, 2)), [[-1, 0]], "edges"),
    ],
)
def test_overlay_bad_input(images, keypoints, edges, message):
    with pytest.raises(InputError, match=f"^{message}: expected"):
        pictures.overlay(images, keypoints, np.array(edges))


def test_sample_sheet_shows_target_and_reconstruction_on_one_range(tmp_path):
    images = np.full((2, 64, 64, 3), 30, np.uint8)
    target = np.zeros((2, 64, 64))
    target[:, 32:] = 2.0
    for maps in (target, np.repeat(target[:, None], 3, axis=1)):
        path = tmp_path / "sheet.png"
        pictures.sample_sheet(path, images, np.full((2, 4, 2), 20.0), np.zeros((0, 2)), maps, 0.5 * maps)
        sheet = np.asarray(Image.open(path))
        assert sheet.shape == (4 * (256 + 22), 2 * 256 + 4, 3)
        bands = [sheet[22 + k * 278 : 278 + k * 278] for k in range(4)]
        assert bands[0][100, 300].tolist() == [30, 30, 30]
        assert (bands[1] != bands[0]).any()
        assert [bands[2][10, 10, 0], bands[2][200, 10, 0]] == [0, 255]
        assert [bands[3][10, 10, 0], bands[3][200, 10, 0]] == [0, 127]
    assert os.listdir(tmp_path) == ["sheet.png"]


def test_sample_sheet_bad_input(tmp_path):
    images, keypoints, edges = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 2, 2)), np.zeros((0, 2))
    with pytest.raises(InputError, match="target and reconstruction"):
        pictures.sample_sheet(tmp_path / "a.png", images, keypoints, edges, np.zeros((2, 8, 8)), np.zeros((2, 8, 9)))
    maps = np.zeros((2, 8, 8))
    with pytest.raises(InputError, match="cannot write the picture"):
        pictures.sample_sheet(tmp_path / "none" / "a.png", images, keypoints, edges, maps, maps)


# --- the clip -----------------------------------------------------------------------------------------------------


def test_projected_keypoints_lie_on_the_dark_blobs(scene):
    """The frames were drawn by the same projection; a mistake in axes or order would still leave the blobs."""
    pixels = clip.project_keypoints(scene.cameras["test"], caterpillar())
    assert pixels.shape == (FRAMES, VIEWS, JOINTS, 2)
    f, m, j = 7, 2, 4
    x = scene.cameras["test"].rotation[m] @ torch.tensor(caterpillar()[f, j]) + scene.cameras["test"].translation[m]
    expected = (scene.cameras["test"].intrinsics[m] @ (x / x[2]))[:2].numpy()
    np.testing.assert_allclose(pixels[f, m, j], expected, atol=1e-9)


def test_keypoints_behind_a_camera_are_not_drawn(scene):
    behind = scene.cameras["test"].centers[0].numpy() * 2 - CENTER  # beyond camera 0, seen from the volume
    pixels = clip.project_keypoints(scene.cameras["test"], np.stack([[behind, CENTER, np.full(3, np.nan)]]))
    assert np.isnan(pixels[0, 0, 0]).all()
    assert np.isfinite(pixels[0, :, 1]).all()
    assert np.isnan(pixels[0, :, 2]).all()


@pytest.mark.parametrize(
    ("count", "spacing", "fps", "rows", "rate"),
    [
        (100, 1, 30.0, 100, 30.0),
        (400, 1, 30.0, 240, 30.0),  # eight seconds
        (100, 1, 60.0, 50, 30.0),  # every second frame
        (100, 1, 50.0, 50, 25.0),
        (100, 4, 100.0, 100, 25.0),  # every fourth frame was predicted
        (1, 1, 240.0, 1, 30.0),
    ],
)
def test_clip_runs_in_real_time(count, spacing, fps, rows, rate):
    picked, shown = clip.clip_rows(np.arange(count) * spacing, fps)
    assert (len(picked), shown) == (rows, rate)


def test_encoded_clip_decodes_to_the_same_pictures():
    sent = [np.full((46, 62, 3), (200, 40 + 30 * k, 60), np.uint8) for k in range(5)]
    with av.open(io.BytesIO(clip.encode(sent, 25.0))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 25)
        received = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(received) == 5
    for before, after in zip(sent, received):
        assert np.abs(before.astype(int) - after).mean() < 6


def test_drawn_moments_have_even_sides(scene):
    images = np.zeros((3, 33, 35, 3), np.uint8)
    picture = clip.draw(images, np.zeros((3, 2, 2)), np.zeros((0, 2)), ["a", "b", "c"])
    assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0


# --- crops --------------------------------------------------------------------------------------------------------


def near_and_far():
    """Two views of the origin from 1 m and from 3 m, along different axes, with different focal lengths."""
    turn = np.array([[0.0, 1, 0], [0, 0, -1], [-1, 0, 0]])
    matrix = np.array([[90.0, 0, 70.3], [0, 110.0, 52.1], [0, 0, 1]])
    return Cameras(
        names=("near", "far"),
        intrinsics=torch.tensor(np.stack([matrix, matrix * [[2.5], [2.5], [1]]])),
        distortion=torch.zeros(2, 5),
        rotation=torch.tensor(np.stack([np.eye(3), turn])),
        translation=torch.tensor([[0.0, 0, 1], [0, 0, 3]]),
        image_size=torch.tensor([[160, 120], [400, 300]]),
        units="m",
    )


def bright(cameras, m, points):
    """(H, W, 3): black with a bright blob where view m shows each world point."""
    width, height = cameras.image_size[m].tolist()
    y, x = np.mgrid[:height, :width]
    picture = np.zeros((height, width))
    for u, v in cameras.project(torch.tensor(np.array(points)), distort=False)[0][m].numpy():
        picture += 255 * np.exp(-((x - u) ** 2 + (y - v) ** 2) / 5)
    return np.repeat(picture.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def middle_of(picture):
    """(x, y) of the brightness of a picture."""
    level = np.asarray(picture)[..., 0].astype(float)
    y, x = np.mgrid[: level.shape[0], : level.shape[1]]
    return np.array([(level * x).sum(), (level * y).sum()]) / level.sum()


@pytest.mark.parametrize("m", [0, 1])
def test_a_crop_has_its_keypoint_in_the_middle(m):
    cameras, point = near_and_far(), np.array([0.107, -0.053, 0.08])
    cell = crops.crop(bright(cameras, m, [point]), cameras, m, point, 0.4)
    assert cell.size == (crops.CELL, crops.CELL)
    np.testing.assert_allclose(middle_of(cell), crops.CELL // 2, atol=0.15)
    brightest = np.unravel_index(np.asarray(cell)[..., 0].argmax(), cell.size)
    assert brightest == (crops.CELL // 2, crops.CELL // 2)
    crops.ring(cell, np.array([200, 30, 40]))
    assert np.asarray(cell)[crops.CELL // 2, crops.CELL // 2, 2] > 200  # the ring leaves the middle free
    assert (np.asarray(cell) == [200, 30, 40]).all(axis=2).sum() > 20


def test_all_crops_have_the_same_physical_size():
    """0.1 m is a quarter of a crop of 0.4 m, whatever the view, its distance and the depth of the keypoint."""
    cameras = near_and_far()
    for m, across in ((0, np.array([0.1, 0, 0])), (1, np.array([0, 0.1, 0]))):
        for point in (np.array([0.02, 0.01, 0.1]), np.array([0.1, -0.05, -0.2])):
            cell = crops.crop(bright(cameras, m, [point + across]), cameras, m, point, 0.4)
            distance = np.linalg.norm(middle_of(cell) - crops.CELL // 2)
            assert distance == pytest.approx(crops.CELL / 4, abs=0.4)


def test_a_crop_beyond_the_frame_is_black_there():
    cameras = near_and_far()
    point = torch.linalg.solve(cameras.intrinsics[0], torch.tensor([2.0, 60.0, 1.0], dtype=torch.float64)) * 1.3
    cell = np.asarray(crops.crop(np.full((120, 160, 3), 90, np.uint8), cameras, 0, point.numpy() - [0, 0, 1], 0.4))
    assert (cell[:, : crops.CELL // 4] == 0).all()
    assert (cell[:, crops.CELL // 2 :] == 90).all()


def test_only_views_that_show_the_keypoint_are_cropped(scene):
    cameras = scene.cameras["test"]
    assert crops.views_of(cameras, CENTER, 0) == [0, 1, 2]
    assert crops.views_of(cameras, CENTER, 3) == [3, 0, 1]
    assert crops.views_of(cameras, np.full(3, np.nan), 0) == []
    beyond = CENTER + 1.05 * (cameras.centers[0].numpy() - CENTER)  # behind camera 0, in front of the others
    assert 0 not in crops.views_of(cameras, beyond, 0)
    assert crops.views_of(cameras, CENTER + np.array([0, 0, 40]), 0) == []


def test_moments_are_spread_over_the_recording():
    assert crops.spread_moments(80).tolist() == [10, 30, 50, 70]
    assert crops.spread_moments(3).tolist() == [0, 1, 2]


def test_keypoints_astray_do_not_make_the_animal_larger():
    positions = np.zeros((5, 4, 3))
    positions[:, 1], positions[:, 2] = (0.3, 0.0, 0.0), (0.0, 0.4, 0.0)
    positions[:, 3] = 9.0
    assert crops.body_extent(positions, np.array([True, True, True, False])) == pytest.approx(0.5)
    assert crops.body_extent(positions, np.zeros(4, bool)) > 15
    assert crops.body_extent(np.full((5, 4, 3), np.nan), np.ones(4, bool)) == 0


def test_the_grid_has_a_row_for_each_keypoint(tmp_path, scene):
    files = read_run(write_run(tmp_path / "run", scene, ["poses"]))
    shown = choose_recording(files, scene)
    shown.poses.positions[:, 7] = np.nan  # never found
    grid = crops.crop_grid(shown, scene)
    sheet = np.asarray(Image.open(io.BytesIO(grid.jpeg))).astype(int)
    assert len(grid.jpeg) <= crops.LARGEST
    assert (grid.times, grid.views) == (pytest.approx(np.array([5, 16, 28, 39]) / 30), 3)
    rows = [sheet[crops.HEADER + j * (crops.CELL + crops.GAP) :][: crops.CELL] for j in range(JOINTS)]
    assert sheet.shape[0] == crops.HEADER + JOINTS * (crops.CELL + crops.GAP) - crops.GAP
    for j, colour in enumerate(pictures.palette(JOINTS).astype(int)):
        at = crops.CELL // 2
        assert np.abs(rows[j][at, 10] - colour).max() < 40  # its colour beside its name
        first = rows[j][:, crops.LABEL : crops.LABEL + crops.CELL]
        rings = (np.abs(first - colour).sum(axis=2) < 60).sum()
        assert rings == 0 if j == 7 else rings > 20, j
    assert np.abs(rows[7][:, crops.LABEL + 5 : crops.LABEL + 60] - crops.BLANK).max() < 12
    dark = rows[2][crops.CELL // 2, crops.LABEL + crops.CELL // 2]
    assert dark.max() < 90  # the blob that keypoint 2 sits on


def test_a_picture_that_is_too_large_is_coded_coarser():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8))
    good = crops.small_jpeg(noise, 10**6)
    assert len(crops.small_jpeg(noise, len(good) - 1)) < len(good)
    assert len(crops.small_jpeg(noise, 1)) == len(crops.small_jpeg(noise, 2))  # there is a worst quality


def test_shots_come_from_the_videos_where_those_are_sharper(tmp_path, scene, monkeypatch):
    """The network sees 32 pixels where the video has 72: at 64 pixels, its blobs are darker than the cache's."""
    run = write_filmed_run(tmp_path, scene, size=32)
    found = run_inputs(run)
    rows, cameras = np.array([3, 3, 17]), found.cameras["walk"].resize(64, 64).select(["cam2", "cam0"])
    sharp = shots.take_shots(found, "walk", rows, cameras)
    assert sharp.shape == (3, 2, 64, 64, 3)
    np.testing.assert_array_equal(sharp[0], sharp[1])
    monkeypatch.setattr(shots, "DECODED_PIXELS", 20 * 2 * HEIGHT * WIDTH - 1)  # less than up to frame 17, in two views
    assert (shots.take_shots(found, "walk", np.array([3, 3, 5]), cameras)[:2] == sharp[:2]).all()
    monkeypatch.setattr(shots, "DECODED_PIXELS", 18 * 2 * HEIGHT * WIDTH - 1)
    blurred = shots.take_shots(found, "walk", rows, cameras)

    pixels = clip.project_keypoints(cameras, caterpillar()[rows]).round().astype(int)  # (3, 2, J, 2)
    f, m = np.ogrid[:3, :2]
    at = (f[..., None], m[..., None], pixels[..., 1], pixels[..., 0])
    assert sharp[at].mean() < blurred[at].mean() - 3
    assert sharp[at].max() < 110
    assert np.abs(sharp.astype(int) - blurred).mean() < 20  # the same view of the same moments


# --- the page -----------------------------------------------------------------------------------------------------


OUTSIDE = re.compile(
    r"""(?:src|srcset|href|action|poster|data)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?(?:https?:)?//|@import"""
)


def test_report_is_small_and_offline(full_report):
    text = full_report.read_text(encoding="utf-8")
    plain = html.unescape(text)  # the 3D view is escaped into an attribute
    assert full_report.name == "report.html"
    assert full_report.stat().st_size < 15e6
    assert "__VISER_EMBED_DATA__" in plain
    assert OUTSIDE.findall(text) == OUTSIDE.findall(plain) == []
    assert "default-src 'none'" in text
    for bad in ('<img src="https://x.org/a.png">', "<a href=//x.org>", "background: url(http://x.org)", "@import 'a'"):
        assert OUTSIDE.search(bad)


def test_report_names_numbers_and_units(full_report):
    text = full_report.read_text(encoding="utf-8")
    document = json.loads((full_report.parent / "evaluation.json").read_text())
    for row in document["rows"]:
        assert f"{row['name']}</td>" in text
        assert f"{row['mpjpe']:.4f}" in text
    for expected in ("MPJPE, absolute (m)", "1.2 × 1.2 × 0.6 m", "ridge auto; ridge chosen: BKinD-3D 1e-0", "Human3.6M",
                     "105 mm", "7 of 45", "Over 45 frames their lengths vary by", "5 min 40 s",
                     "dead, centre", "90 % ± 1.2", "95 %", "groom (17)", "kp09, 0.004", "step 300",
                     "2.13.0", "0.041", "83 %", "0.734 m", "Of 7 active edges", "71 % join neighbours",
                     "31 % (11 % to 52 %)",
                     "at 4 moments of recording test (split: test), each in up to 3 views"):  # fmt: skip
        assert expected in text, expected
    assert text.count('class="missing"') == 0


def test_text_of_the_run_is_escaped(full_report):
    text = full_report.read_text(encoding="utf-8")
    assert "<script>alert(1)</script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_unseen_motion_is_shown_where_there_is_any(full_report, scene, tmp_path):
    assert "Recording test (split: test)" in full_report.read_text(encoding="utf-8")
    run = write_run(tmp_path / "run", scene, ["poses"])
    assert choose_recording(read_run(run), scene).poses.recording == "test"
    (run / "poses" / "test.nc").unlink()
    assert choose_recording(read_run(run), scene).poses.recording == "train"


def test_names_the_clock_and_what_the_views_say(tmp_path, scene, with_frames):
    """Of a recording at 60 frames per second whose keypoints have names, and one of them hardly any confidence."""
    run = write_run(tmp_path / "run", scene, ["poses", "skeleton"])
    (run / "keypoints.yaml").write_text('kp00: {name: nose, color: "#010203"}\n')
    poses = Poses.load(run / "poses" / "test.nc")
    confidence, error = np.full((FRAMES, JOINTS), 0.2), np.full((FRAMES, JOINTS), 3.26)
    confidence[:, 2] = 0.025
    dataclasses.replace(poses, fps=60.0, confidence=confidence, reprojection_error=error).save(
        run / "poses" / "test.nc"
    )  # fmt: skip
    text = build_report(run).read_text(encoding="utf-8")
    quality, motion, shown = (
        re.search(f'<section id="{name}">.*?</section>', text, re.DOTALL)[0] for name in ("quality", "motion", "clip")
    )
    rows = re.findall(r"<tr><td>.*?</tr>", quality)
    assert len(rows) == JOINTS
    assert all(part in rows[0] for part in ("#010203", "nose", "0.200", "3.3 px", "none"))
    assert all(part in rows[2] for part in ("kp02", "0.025", "100 %", "unsure"))
    assert "0.7 s at 60 frames per second" in motion
    assert len(re.findall("<img", motion)) == 4
    assert "filmed at 60 frames per second" in shown
    assert "30 pictures per second" in shown
    assert "#010203" in shown


def test_missing_parts_are_said_plainly(tmp_path, scene, with_frames):
    run = write_run(tmp_path / "run", scene, [])
    text = build_report(run).read_text(encoding="utf-8")
    assert (
        text.count('class="missing"') == len(SECTIONS) - 3
    )  # configuration is always there, behaviour and movement if known
    assert "Behaviour" not in text
    assert "what the views say themselves" in text
    assert "4, 96 × 72 px each" in text


def test_without_frames_the_page_says_why_and_shows_the_rest(tmp_path, scene, monkeypatch):
    def gone(run):
        raise InputError("demo/cam0.mp4: no such video")

    monkeypatch.setattr(page, "run_inputs", gone)
    run = write_run(tmp_path / "run", scene, ["health", "skeleton", "poses"])
    text = build_report(run).read_text(encoding="utf-8")
    assert "The frames cannot be shown: demo/cam0.mp4: no such video" in text
    # That, crops, quality, clip and 3D view; and parts, results, losses, samples and versions, which it has not got.
    assert text.count('class="missing"') == 10
    assert "training step 2000" in text  # keypoint health from the training


def test_existing_report_is_kept_unless_forced(tmp_path, scene, with_frames):
    run = write_run(tmp_path / "run", scene, [])
    (run / "report.html").write_text("precious")
    with pytest.raises(InputError, match=r"report\.html: exists; give --force"):
        build_report(run)
    assert (run / "report.html").read_text() == "precious"
    assert "BKinD-3D" in build_report(run, force=True).read_text(encoding="utf-8")


def test_failed_write_keeps_the_old_report(tmp_path, scene, with_frames, monkeypatch):
    run = write_run(tmp_path / "run", scene, [])
    (run / "report.html").write_text("precious")

    def full_disk(self, text, encoding):
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(InputError, match="cannot be written"):
        build_report(run, force=True)
    assert (run / "report.html").read_text() == "precious"
    assert sorted(os.listdir(run)) == ["config.yaml", "report.html"]


def test_not_a_run_folder(tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("env.json", "{", r"env\.json: not valid JSON"),
        ("skeleton.json", "[]", r"skeleton\.json: expected keys and values, not \[\]"),
        ("skeleton.json", '{"keypoints": ["a"], "edges": [[0, 1, 1.0]]}', r"skeleton\.json: .*'all_weights'"),
        ("evaluation.json", '{"rows": []}', r"evaluation\.json: key 'protocol' is missing"),
        (
            "evaluation.json",
            '{"protocol": "", "options": {}, "units": "", "joints": [], "rows": [], "masked": {}, "paper": [], '
            '"paper_source": "", "note": ""}',
            r"evaluation\.json: key 'regressor' is missing; run `bkind3d evaluate`",
        ),
        (
            "evaluation.json",
            '{"parts": {"size": 1.0, "units": "m", "rows": []}}',
            r"evaluation\.json: key 'edges' is missing; run `bkind3d evaluate --force` again",
        ),
        ("actions.json", '{"rows": []}', r"actions\.json: key 'protocol' is missing; run `bkind3d actions`"),
        ("metrics.csv", "step,loss\n1,abc\n", r"metrics\.csv: a row is not made of numbers"),
        ("metrics.csv", "step,loss\n1\n", r"metrics\.csv: a row is not made of numbers"),
        ("health.jsonl", '{"step": 1}\n', r"health\.jsonl: line 1 is not a health record"),
        ("samples/step_000001.png", "x", r"step_000001\.png: not what a run writes"),
        ("poses/train.nc", "x", r"train\.nc: not a readable netCDF"),
    ],
)
def test_corrupt_files_are_left_out_and_named(tmp_path, scene, with_frames, name, content, message):
    run = write_run(tmp_path / "run", scene, [])
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(content)
    text = html.unescape(build_report(run).read_text(encoding="utf-8"))
    assert re.search(f"Left out: [^\n]*{message}", text)


def test_an_evaluation_without_parts_says_so(tmp_path, scene, with_frames):
    run = write_run(tmp_path / "run", scene, ["evaluation"])
    document = json.loads((run / "evaluation.json").read_text())
    document["parts"]["edges"] = None  # a truth without bones
    (run / "evaluation.json").write_text(json.dumps(document))
    text = build_report(run).read_text(encoding="utf-8")
    assert "83 %" in text
    assert "join neighbours" not in text
    del document["parts"]
    (run / "evaluation.json").write_text(json.dumps(document))
    assert "has not measured it" in build_report(run, force=True).read_text(encoding="utf-8")


def test_poses_that_reach_beyond_the_frames_are_not_shown(tmp_path, scene, with_frames):
    run = write_run(tmp_path / "run", scene, [])
    (run / "poses").mkdir()
    Poses(np.zeros((2, 3, 3)), np.zeros((2, 3)), 30, "m", "test", frames=[0, FRAMES]).save(run / "poses" / "test.nc")
    assert "<video" not in build_report(run).read_text(encoding="utf-8")


def test_poses_are_shown_on_the_frames_of_their_numbers(tmp_path, scene):
    """On a clock that leaves numbers out, a pose's number is not the row of its frame."""
    run = write_run(tmp_path / "run", scene, [])
    (run / "poses").mkdir()
    clock = 10 + 3 * np.arange(FRAMES)
    Poses(np.zeros((2, 3, 3)), np.zeros((2, 3)), 30, "m", "test", frames=[16, 22]).save(run / "poses" / "test.nc")
    sparse = dataclasses.replace(scene, clocks={"train": clock, "test": clock})
    assert choose_recording(read_run(run), sparse).rows.tolist() == [2, 4]
    assert choose_recording(read_run(run), dataclasses.replace(scene, clocks={"test": clock + 1})) is None


def test_frames_and_cameras_come_from_the_runs_project(tmp_path, scene):
    """Real videos and a real calibration: keypoints projected by the run's cameras fall on the dark blobs."""
    run = write_filmed_run(tmp_path, scene)

    found = run_inputs(run)

    assert (found.project, found.units, found.splits) == ("filmed", "m", {"walk": "both"})
    np.testing.assert_allclose([*found.center, *found.sides], [*CENTER, *SIDES])
    assert found.frames["walk"].shape == (20, VIEWS, 64, 64, 3)
    pixels = clip.project_keypoints(found.cameras["walk"], caterpillar()[:20]).round().astype(int)  # (F, M, J, 2)
    f, m = np.ogrid[:20, :VIEWS]
    at_keypoints = found.frames["walk"][f[..., None], m[..., None], pixels[..., 1], pixels[..., 0]]
    assert at_keypoints.max() < 75
    assert np.median(found.frames["walk"]) > 140


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(full_report, tmp_path_factory):
    if chromium.executable() is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("chromium is not on PATH: install it")
    with chromium.Browser(tmp_path_factory.mktemp("chromium"), 900, 700) as browser:
        browser.open(full_report)
        yield browser


def test_browser_shows_every_section(browser):
    assert browser.evaluate("document.title") == "demo – BKinD-3D report"
    assert browser.evaluate("[...document.querySelectorAll('main > section')].map(s => s.id)") == SECTIONS
    pictures_loaded = "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
    assert browser.evaluate("document.images.length") > 10
    assert browser.evaluate(pictures_loaded)


def test_browser_plays_the_clip(browser):
    browser.evaluate("document.querySelector('video').scrollIntoView()")  # nothing plays outside the window
    browser.wait_for("document.querySelector('video').currentTime > 0.2")
    assert browser.evaluate("document.querySelector('video').videoWidth") == 2 * 5 * WIDTH + pictures.GAP
    assert browser.evaluate("document.querySelector('video').duration") == pytest.approx(FRAMES / 30, abs=0.05)


def test_browser_renders_the_three_dimensional_view(browser):
    browser.evaluate("document.querySelector('iframe').scrollIntoView()")

    def dots():
        """How many keypoints are seen, by their colours."""
        picture = browser.screenshot("iframe").astype(int)
        near = [np.abs(picture - colour).sum(axis=2) < 30 for colour in pictures.palette(JOINTS).astype(int)]
        return sum(int(seen.sum()) > 15 for seen in near)

    deadline = time.monotonic() + chromium.PATIENCE
    while dots() < 6:
        assert time.monotonic() < deadline, "the 3D view stayed blank"
        time.sleep(0.5)


def test_browser_fits_a_phone(browser):
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    browser.call("Emulation.clearDeviceMetricsOverride")


def test_browser_saw_no_fault_and_asked_for_nothing(browser, full_report):
    """Last: it covers everything that the tests above did with the page."""
    browser.evaluate("new Promise(done => setTimeout(done, 500))")
    assert browser.faults() == []
    assert browser.requests() == [full_report.resolve().as_uri()]
