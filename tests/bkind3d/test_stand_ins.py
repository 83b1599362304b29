"""Numbers without labels, of a stick whose silhouette is known."""

import json

import numpy as np
import pytest

from bkind3d.agreement import on_body
from bkind3d.errors import InputError
from bkind3d.evaluation.stand_ins import label_free, silhouette_overlap

HEIGHT, WIDTH, FOCAL = 40, 60, 50.0
STICK = np.array([[0, 1]])


def cameras():
    """(2, 3, 4): one looks along +z from z = -5, the other along -z from z = 5."""
    lens = np.array([[FOCAL, 0, 29.5], [0, FOCAL, 19.5], [0, 0, 1.0]])
    front = np.hstack([np.eye(3), [[0], [0], [5]]])
    back = np.hstack([np.diag([-1.0, 1, -1]), [[0], [0], [5]]])
    return np.stack([lens @ front, lens @ back])


def stick(frames=5):
    """(F, 3, 3): two ends 2 apart that slide along x, and a third keypoint beyond the stick."""
    x = np.linspace(-0.5, 0.5, frames)[:, None]
    return np.stack([x + np.array([-1, 1, 1.8]), np.zeros((frames, 3)), np.zeros((frames, 3))], axis=2)


def silhouettes(points, radius):
    """(F, 2, H, W): pixels nearer than `radius` to the projected stick, by the formula of this scene alone."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    masks = np.zeros((len(points), 2, HEIGHT, WIDTH), dtype=np.uint8)
    for view, sign in enumerate((1, -1)):
        ends = np.sort(sign * points[:, :2, 0] * FOCAL / 5 + 29.5, axis=1)
        beyond = np.maximum(np.maximum(ends[:, :1, None] - x, x - ends[:, 1:, None]), 0)
        masks[:, view][beyond**2 + (y - 19.5) ** 2 < radius**2] = 200
    return masks


def test_the_stick_itself():
    points = stick()
    masks = silhouettes(points, 4.0)
    result = label_free(points, cameras(), masks, STICK)
    assert (result["frames"], result["views"]) == (5, 2)
    assert result["on_body_per_keypoint"] == [1, 1, 0]
    assert result["on_body"] == pytest.approx(2 / 3)
    assert result["rigidity"] == pytest.approx(1)
    assert result["radius"] == 4
    assert result["overlap"] == pytest.approx(1, abs=1e-6)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_overlap_of_a_wrong_skeleton_is_less():
    points = stick()
    masks = silhouettes(points, 4.0)
    half = points.copy()
    half[:, 1] = half[:, :2].mean(axis=1)
    overlap, radius = silhouette_overlap(half, cameras(), masks, STICK)
    assert 0.5 < overlap < 0.8
    aside, _ = silhouette_overlap(points + np.array([0, 2.0, 0]), cameras(), masks, STICK)
    assert aside == 0
    # A disk of radius r inside a silhouette of A pixels has Dice 2 πr² / (πr² + A), to the accuracy of pixels.
    point = points[:, [0, 0]] + [1.0, 0, 0]
    overlap, radius = silhouette_overlap(point, cameras(), masks, STICK, radii=[2.0, 3.5])
    disk, area = np.pi * 3.5**2, (masks[0, 0] > 0).sum()
    assert radius == 3.5
    assert overlap == pytest.approx(2 * disk / (disk + area), rel=0.1)


def test_rigidity_of_a_breathing_edge():
    """Lengths 2 + sin: SD / mean is 1 / (2 √2)."""
    points = np.zeros((100, 2, 3))
    points[:, 1, 0] = 2 + np.sin(2 * np.pi * np.arange(100) / 100)
    masks = np.zeros((100, 2, HEIGHT, WIDTH), dtype=np.uint8)
    assert label_free(points, cameras(), masks, STICK)["rigidity"] == pytest.approx(1 - 1 / 8**0.5)


def test_nearest_pixel_is_the_one_whose_centre_is_nearest():
    """Keypoints at depth 5 whose pixels are (30.4, 20) and (30.6, 20): only column 30 is foreground."""
    x = (np.array([30.4, 30.6]) - 29.5) * 5 / FOCAL
    points = np.stack([x, np.full(2, 0.05), np.zeros(2)], axis=1)[None]
    masks = np.zeros((1, 1, HEIGHT, WIDTH), dtype=np.uint8)
    masks[0, 0, 20, 30] = 128
    assert on_body(points, cameras()[:1], masks).tolist() == [[1, 0]]
    masks[0, 0, 20, 30] = 127
    assert on_body(points, cameras()[:1], masks).tolist() == [[0, 0]]


def test_views_that_cannot_see_a_keypoint_do_not_count():
    """At z = 6 the second camera has keypoint 0 behind it; keypoint 1 is outside both pictures."""
    points = np.array([[[0.0, 0, 6], [50, 0, 0], [0, 0, 0]]])
    masks = np.full((1, 2, HEIGHT, WIDTH), 255, dtype=np.uint8)
    assert on_body(points, cameras(), masks).tolist() == [[1, 0, 1]]
    masks[0, 1] = 0
    assert on_body(points, cameras(), masks).tolist() == [[1, 0, 0.5]]


def test_an_edge_behind_a_camera_is_not_drawn_there():
    points = np.array([[[-1.0, 0, 6], [1, 0, 6]]])  # behind the second camera, whose mirror image is a stick too
    masks = np.zeros((1, 2, HEIGHT, WIDTH), dtype=np.uint8)
    masks[0, 1, 18:22] = 255
    assert silhouette_overlap(points, cameras(), masks, STICK)[0] == 0


def test_pictures_without_foreground_do_not_count():
    points = stick()
    masks = silhouettes(points, 3.0)
    masks[0, 0] = masks[3] = 0
    overlap, radius = silhouette_overlap(points, cameras(), masks, STICK)
    assert (overlap, radius) == (pytest.approx(1), 3)
    assert silhouette_overlap(points, cameras(), 0 * masks, STICK) == (None, None)


def test_no_edges():
    points = stick()
    result = label_free(points, cameras(), silhouettes(points, 3.0), np.zeros((0, 2), dtype=int))
    assert (result["rigidity"], result["overlap"], result["radius"]) == (None, None, None)


def test_many_frames_are_drawn_in_batches():
    points = stick(150)
    masks = silhouettes(points, 3.0)
    whole = silhouette_overlap(points[:, ::-1][:, [0, 2]], cameras(), masks, STICK)
    parts = [
        silhouette_overlap(points[rows, ::-1][:, [0, 2]], cameras(), masks[rows], STICK, radii=[whole[1]])[0]
        for rows in (slice(0, 75), slice(75, 150))
    ]
    assert 0 < whole[0] < 1
    assert whole[0] == pytest.approx(np.mean(parts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": np.full((5, 3, 3), np.nan)}, "positions"),
        ({"projections": np.zeros((2, 4, 4))}, "projections"),
        ({"masks": np.zeros((5, 3, HEIGHT, WIDTH), dtype=np.uint8)}, "masks"),
        ({"masks": np.zeros((5, 2, HEIGHT, WIDTH))}, "masks: expected uint8"),
        ({"radii": [1.0, 0.0]}, "radii"),
        ({"radii": []}, "radii"),
        ({"edges": np.array([[0, 3]])}, "edges"),
    ],
)
def test_bad_input(change, message):
    points = stick()
    good = {"positions": points, "projections": cameras(), "masks": silhouettes(points, 3.0), "edges": STICK}
    with pytest.raises(InputError, match=message):
        label_free(**(good | change))
