import dataclasses

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_rig import DISTORTION, ring

from bkind3d.cameras import Cameras, load_toml, natural_key, save_toml
from bkind3d.errors import InputError

POINTS = torch.tensor(np.random.default_rng(0).uniform(-0.6, 0.6, (5, 8, 3)))


def opencv_pixels(cameras: Cameras, index: int, points: torch.Tensor, distort: bool = True) -> np.ndarray:
    rotation, _ = cv2.Rodrigues(cameras.rotation[index].numpy())
    distortion = cameras.distortion[index].numpy() if distort else np.zeros(5)
    flat = points.reshape(-1, 3).numpy()
    matrix = cameras.intrinsics[index].numpy()
    pixels, _ = cv2.projectPoints(flat, rotation, cameras.translation[index].numpy(), matrix, distortion)
    return pixels.reshape(*points.shape[:-1], 2)


def broken(**changes: torch.Tensor) -> Cameras:
    """The ring with camera cam1's entries replaced."""
    cameras = ring(distortion=DISTORTION)
    replaced = {}
    for field, value in changes.items():
        tensor = getattr(cameras, field).clone()
        tensor[1] = torch.as_tensor(value, dtype=tensor.dtype)
        replaced[field] = tensor
    return dataclasses.replace(cameras, **replaced)


@pytest.mark.parametrize("distort", [True, False])
def test_project_equals_opencv(distort: bool) -> None:
    cameras = ring(4, (640, 480), DISTORTION)
    pixels, depth = cameras.project(POINTS, distort=distort)
    assert pixels.shape == (4, 5, 8, 2)
    assert depth.shape == (4, 5, 8)
    for index in range(4):
        np.testing.assert_allclose(pixels[index], opencv_pixels(cameras, index, POINTS, distort), atol=1e-9)
        camera_z = (POINTS @ cameras.rotation[index].T + cameras.translation[index])[..., 2]
        torch.testing.assert_close(depth[index], camera_z)


def test_undistort_equals_opencv() -> None:
    cameras = ring(2, (640, 480), DISTORTION)
    raw = torch.tensor(np.random.default_rng(1).uniform([0, 0], [639, 479], (2, 50, 2)))
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_MAX_ITER, 200, 1e-12)
    for index in range(2):
        matrix, distortion = cameras.intrinsics[index].numpy(), cameras.distortion[index].numpy()
        expected = cv2.undistortPoints(
            raw[index].numpy()[:, None], matrix, distortion, R=None, P=matrix, criteria=criteria
        )
        np.testing.assert_allclose(cameras.undistort_points(raw)[index], expected[:, 0], atol=1e-5)


def test_skew_is_applied_to_the_distorted_ray() -> None:
    cameras = ring(1, (640, 480), DISTORTION, skew=30.0)
    pixels, _ = cameras.project(POINTS)
    straight = dataclasses.replace(cameras, intrinsics=torch.eye(3)[None])
    rays = opencv_pixels(straight, 0, POINTS)
    expected = rays @ cameras.intrinsics[0, :2, :2].numpy().T + cameras.intrinsics[0, :2, 2].numpy()
    np.testing.assert_allclose(pixels[0], expected, atol=1e-9)
    torch.testing.assert_close(cameras.distort_points(cameras.undistort_points(pixels)), pixels, atol=1e-3, rtol=0)


def test_projection_matrices_are_the_pinhole() -> None:
    cameras = ring(3, (640, 480), DISTORTION, skew=5.0)
    homogeneous = torch.cat([POINTS, torch.ones_like(POINTS[..., :1])], -1)
    projected = torch.einsum("mij,...j->m...i", cameras.projection_matrices(), homogeneous)
    pixels, _ = cameras.pinhole().project(POINTS)
    torch.testing.assert_close(projected[..., :2] / projected[..., 2:], pixels)


def test_centers_and_axes() -> None:
    cameras = ring(4, radius=3.0)
    torch.testing.assert_close(cameras.centers[:, :2].norm(dim=-1), torch.full((4,), 3.0, dtype=torch.float64))
    towards_origin = torch.nn.functional.normalize(-cameras.centers, dim=-1)
    torch.testing.assert_close(cameras.axes, towards_origin)


@settings(deadline=None, max_examples=25)
@given(width=st.integers(1, 900), height=st.integers(1, 900))
def test_resize_rule(width: int, height: int) -> None:
    cameras = ring(2, (640, 480), DISTORTION)
    before, _ = cameras.project(POINTS)
    resized = cameras.resize(width, height)
    after, _ = resized.project(POINTS)
    scale = torch.tensor([width / 640, height / 480], dtype=torch.float64)
    torch.testing.assert_close(after, (before + 0.5) * scale - 0.5)
    assert resized.image_size.tolist() == [[width, height]] * 2


def test_resize_agrees_with_a_resized_picture() -> None:
    """A blob drawn at full size and shrunk by area averaging lies where the resized camera says."""
    cameras = ring(1, (640, 480))
    point = torch.tensor([0.21, -0.13, 0.08], dtype=torch.float64)
    x, y = cameras.project(point)[0][0].tolist()
    rows, columns = np.mgrid[:480, :640]
    picture = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 12.0**2))
    small = cv2.resize(picture, (160, 60), interpolation=cv2.INTER_AREA)
    rows, columns = np.mgrid[:60, :160]
    centroid = [(small * columns).sum() / small.sum(), (small * rows).sum() / small.sum()]
    np.testing.assert_allclose(cameras.resize(160, 60).project(point)[0][0], centroid, atol=1e-3)


def test_crop_rule() -> None:
    cameras = ring(2, (640, 480), DISTORTION)
    before, _ = cameras.project(POINTS)
    boxes = [[10, 20, 100, 50], [-5, 300, 700, 400]]
    cropped = cameras.crop(boxes)
    after, _ = cropped.project(POINTS)
    torch.testing.assert_close(after, before - torch.tensor([[10.0, 20.0], [-5.0, 300.0]])[:, None, None])
    assert cropped.image_size.tolist() == [[100, 50], [700, 400]]
    with pytest.raises(InputError, match="integers x, y, width, height"):
        cameras.crop([0.5, 0, 10, 10])


def test_select() -> None:
    cameras = ring(3)
    picked = cameras.select(["cam2", "cam0"])
    assert picked.names == ("cam2", "cam0")
    torch.testing.assert_close(picked.translation, cameras.translation[[2, 0]])
    with pytest.raises(InputError, match="camera 'cam7' is not in the calibration, which has cam0, cam1, cam2"):
        cameras.select(["cam7"])


def test_in_view() -> None:
    cameras = ring(2, (640, 480))
    assert cameras.in_view(torch.zeros(3)).tolist() == [True, True]
    behind = 2 * cameras.centers[0]
    assert cameras.in_view(behind)[0].item() is False
    beside = cameras.centers[0] + cameras.axes[0] + 5 * cameras.rotation[0, 0]
    assert cameras.in_view(beside)[0].item() is False
    # the edge of the image is the outer edge of its outermost pixel
    for x, seen in ((-0.49, True), (-0.51, False), (639.49, True), (639.51, False)):
        ray = torch.linalg.inv(cameras.intrinsics[0]) @ torch.tensor([x, 100.0, 1.0], dtype=torch.float64)
        point = cameras.centers[0] + cameras.rotation[0].T @ ray
        assert cameras.in_view(point)[0].item() is seen


def test_points_folded_back_by_the_lens_model_are_not_in_view() -> None:
    cameras = ring(1, (640, 480), (-0.4, 0.0, 0.0, 0.0, 0.0))
    radii = torch.linspace(0, 3, 200, dtype=torch.float64)
    rays = torch.stack([radii, torch.zeros_like(radii), torch.ones_like(radii)], -1)
    points = cameras.centers[0] + rays @ cameras.rotation[0]
    pixels, _ = cameras.project(points)
    inside = (pixels[0, :, 0] <= 639.5) & (pixels[0, :, 0] >= -0.5)
    assert inside[radii > 1.2].any(), "the polynomial must fold some far ray back, or this tests nothing"
    growth_ends = (1 / (3 * 0.4)) ** 0.5
    seen = cameras.in_view(points)[0]
    assert not seen[radii >= growth_ends].any()
    assert seen[(radii < growth_ends) & inside].all()


def test_undistort_has_no_answer_beyond_the_lens_model() -> None:
    cameras = ring(1, (640, 480), (-0.4, 0.0, 0.0, 0.0, 0.0))
    assert cameras.undistort_points(torch.tensor([[[2000.0, 240.0]]])).isnan().all()
    assert cameras.distort_points(torch.tensor([[[3000.0, 240.0]]])).isnan().all()


def test_point_in_the_plane_of_the_camera_stays_finite() -> None:
    cameras = ring(1)
    pixels, depth = cameras.project(cameras.centers[0] + cameras.rotation[0, 0])
    assert torch.isfinite(pixels).all()
    assert abs(depth.item()) < 1e-9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intrinsics": [[60.0, 0, 32], [0, 60, 24], [32, 24, 1]]}, "last row of K is 32 24 1, expected 0 0 1"),
        ({"intrinsics": [[60.0, 0, 32], [3, 60, 24], [0, 0, 1]]}, "K must be upper triangular"),
        ({"intrinsics": [[-60.0, 0, 32], [0, 60, 24], [0, 0, 1]]}, "positive focal lengths"),
        ({"intrinsics": torch.full((3, 3), torch.nan)}, "intrinsics holds a value that is not a finite number"),
        ({"translation": [0.0, torch.nan, 1.0]}, "translation holds a value that is not a finite number"),
        ({"rotation": [[1.0, 0, 0], [0, torch.inf, 0], [0, 0, 1]]}, "rotation holds a value"),
        ({"rotation": torch.diag(torch.tensor([1.0, 1.0, -1.0]))}, r"mirrored \(determinant -1\)"),
        ({"rotation": 1.001 * torch.eye(3)}, "not orthonormal"),
        ({"distortion": [0.1, 0, 0, 0, torch.nan]}, "distortion holds a value"),
        ({"image_size": [0, 48]}, "must be positive"),
    ],
)
def test_impossible_cameras_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"camera 'cam1': .*{message}"):
        broken(**changes)


def test_other_refusals() -> None:
    cameras = ring(2)
    with pytest.raises(InputError, match="'inch' is not a unit of length; expected one of m, cm, mm, um"):
        dataclasses.replace(cameras, units="inch")
    with pytest.raises(InputError, match="camera 'a' is defined twice"):
        dataclasses.replace(cameras, names=("a", "a"))
    with pytest.raises(InputError, match=r"translation must have shape \(2, 3\)"):
        dataclasses.replace(cameras, translation=torch.zeros(2, 4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cameras.units = "mm"  # type: ignore[misc]


def test_natural_order() -> None:
    assert sorted(["cam_10", "cam_2", "Cam_1", "cam_1"], key=natural_key) == ["Cam_1", "cam_1", "cam_2", "cam_10"]


def test_toml_round_trip(tmp_path) -> None:
    cameras = ring(12, (640, 480), DISTORTION, skew=0.3, units="mm")
    cameras = dataclasses.replace(cameras, names=tuple(f'view "{index}" é' for index in range(12)))
    save_toml(cameras, tmp_path / "calibration.toml")
    read = load_toml(tmp_path / "calibration.toml", "mm")
    assert read.names == cameras.names
    assert read.units == "mm"
    for field in ("intrinsics", "distortion", "rotation", "translation", "image_size"):
        torch.testing.assert_close(getattr(read, field), getattr(cameras, field), atol=1e-14, rtol=1e-14)


TABLE = """
[{key}]
name = "{name}"
size = [ 1088.0, 1920.0]
matrix = [ [ 1681.25, 0.0, 532.5], [ 0.0, 1681.0, 948.0], [ 0.0, 0.0, 1.0]]
distortions = [ -0.1, 0.02, 0.001, 0.002]
rotation = [ 0.1, 0.2, -0.3]
translation = [ {x}, 0.5, 2.5]
fisheye = false
"""


def toml(tmp_path, *edits: tuple[str, str], names: tuple[str, ...] = ("cam_1",), extra: str = ""):
    text = "".join(TABLE.format(key=f"cam_{i}", name=name, x=float(i)) for i, name in enumerate(names)) + extra
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "calibration.toml"
    path.write_text(text)
    return path


def test_anipose_file(tmp_path) -> None:
    path = toml(tmp_path, names=("cam_10", "cam_2"), extra="\n[metadata]\nadjusted = false\nerror = 0.0\n")
    cameras = load_toml(path, "m")
    assert cameras.names == ("cam_2", "cam_10")
    assert cameras.translation[:, 0].tolist() == [1.0, 0.0], "tables are matched by their name, not by their key"
    assert cameras.distortion[0].tolist() == [-0.1, 0.02, 0.001, 0.002, 0.0]
    assert cameras.image_size[0].tolist() == [1088, 1920]
    expected, _ = cv2.Rodrigues(np.array([0.1, 0.2, -0.3]))
    np.testing.assert_allclose(cameras.rotation[0], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("[ 0.0, 0.0, 1.0]]", "[ 0.0, 0.1, 1.0]]"), "camera 'cam_1': the last row of K is 0 0.1 1, expected 0 0 1"),
        (("fisheye = false", "fisheye = true"), r"\[cam_0\] is a fisheye camera, whose lens model is not supported"),
        (("rotation = [ 0.1, 0.2, -0.3]", "rotation = [ nan, 0.2, -0.3]"), "rotation holds a value that is not a"),
        (("rotation = [ 0.1, 0.2, -0.3]", "rotation = [[1,0,0],[0,1,0],[0,0,-1]]"), "mirrored"),
        (("rotation = [ 0.1, 0.2, -0.3]", "rotation = [1, 2]"), "'rotation' must be 3 or 3×3 numbers, not 2"),
        (("translation = [ 0.0, 0.5, 2.5]", "translation = [ inf, 0.5, 2.5]"), "'cam_1': translation holds a value"),
        (("translation", "position"), r"\[cam_0\] lacks 'translation'"),
        (("size = [ 1088.0, 1920.0]", "size = [ 1088.5, 1920.0]"), "'size' must be two whole numbers"),
        (("[ -0.1, 0.02, 0.001, 0.002]", "[ -0.1, 0.02, 0.001, 0.002, 0, 0, 0, 0]"), "'distortions' must be 4 or 5"),
        (("[ -0.1, 0.02, 0.001, 0.002]", '"none"'), "'distortions' must be 4 or 5 numbers"),
        (("fisheye = false", "fisheye ="), "not a TOML file"),
    ],
)
def test_bad_calibration_files_are_refused(tmp_path, edit: tuple[str, str], message: str) -> None:
    path = toml(tmp_path, edit)
    with pytest.raises(InputError, match=message) as caught:
        load_toml(path, "m")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_calibration_refusals(tmp_path) -> None:
    with pytest.raises(InputError, match=r"missing.toml: cannot be read \(No such file"):
        load_toml(tmp_path / "missing.toml", "m")
    with pytest.raises(InputError, match="no camera tables"):
        load_toml(toml(tmp_path, names=(), extra="[metadata]\nadjusted = true\n"), "m")
    with pytest.raises(InputError, match="says units 'mm', but 'm' was asked for"):
        load_toml(toml(tmp_path, extra='[metadata]\nunits = "mm"\n'), "m")
    with pytest.raises(InputError, match="camera 'a' is defined twice"):
        load_toml(toml(tmp_path, names=("a", "a")), "m")
    with pytest.raises(InputError, match="the calibration cannot be written"):
        save_toml(ring(), tmp_path / "no folder" / "calibration.toml")
