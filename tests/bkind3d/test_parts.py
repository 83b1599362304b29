"""Keypoints whose place on a body is known by construction."""

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bkind3d.errors import InputError
from bkind3d.evaluation.parts import (
    OUTLINE_POINTS,
    RANDOM_POINTS,
    body_of,
    compare_parts,
    describe_part_edges,
    format_parts,
    measure_parts,
    mirror_pairs,
    outline_points,
    random_points,
)
from bkind3d.evaluation.skeleton_summary import bone_agreement, bone_distances

CHAIN = np.array([[0, 1], [1, 2], [2, 3], [3, 4]])
NO_BONES = np.zeros((0, 2), dtype=int)


def square():
    """(6, 4, 3): a unit square that wanders; joints at its corners, in order; its box has the diagonal √2."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=float)
    return corners + np.random.default_rng(0).normal(0, 5, (6, 1, 3))


def walker(frames=120):
    """(F, 5, 3): a chain of five joints that walks in a circle, headed along its path."""
    angle = np.linspace(0, 4 * np.pi, frames)[:, None] - 0.15 * np.arange(5)
    return np.stack([3 * np.cos(angle), 3 * np.sin(angle), 0.1 * np.arange(5) + 0 * angle], axis=2)


def test_keypoints_on_all_joints_are_perfect():
    joints = walker()
    order = [3, 0, 4, 1, 2]
    row = measure_parts(joints[:, order], body_of(joints, CHAIN))
    for name in ("nearest_bone", "best_joint", "one_to_one"):
        assert row[name] == pytest.approx(0, abs=1e-12)
    assert row["same"] == row["same_unsided"] == row["covered"] == 1
    assert (row["keypoints"], row["assigned"]) == (5, 5)
    for name in ("best_joint", "own_joint", "usual_joint"):
        assert row["per_keypoint"][name] == order


def test_two_shifted_keypoints_of_a_square():
    """Both lie beside joint 0: 0.6 along the bone to joint 1 and 0.5 above it, and 0.3 below joint 0."""
    joints = square()
    bones = np.array([[0, 1], [1, 2], [2, 3]])
    keypoints = joints[:, [0, 0]] + [[0.6, 0, 0.5], [0, 0, -0.3]]
    row = measure_parts(keypoints, body_of(joints, bones))
    size = np.sqrt(2)
    first = np.hypot(0.4, 0.5)  # to joint 1, the nearest
    each = row["per_keypoint"]
    assert each["nearest_bone"] == pytest.approx([0.5 / size, 0.3 / size])
    assert each["best_joint_distance"] == pytest.approx([first / size, 0.3 / size])
    assert each["best_joint"] == each["own_joint"] == each["usual_joint"] == [1, 0]
    assert row["nearest_bone"] == pytest.approx(0.4 / size)
    assert row["best_joint"] == row["one_to_one"] == pytest.approx((first + 0.3) / 2 / size)
    assert row["covered"] == 0  # 0.3 / √2 is more than 0.15
    closer = measure_parts(joints[:, [0, 0]] + [[0, 0, 0.2], [0, 0, -0.3]], body_of(joints, bones))
    assert closer["covered"] == 0.25  # 0.2 / √2 is less


def test_beyond_the_end_of_a_bone_its_end_is_nearest():
    joints = square()
    row = measure_parts(joints[:, [0, 1]] + [[-0.3, 0, 0.4], [1.2, 0, -0.5]], body_of(joints, np.array([[0, 1]])))
    assert row["per_keypoint"]["nearest_bone"] == pytest.approx(np.array([0.5, 1.3]) / np.sqrt(2))


def test_one_to_one_gives_two_keypoints_at_one_joint_two_joints():
    joints = square()
    row = measure_parts(joints[:, [0, 0]], body_of(joints, NO_BONES))
    assert row["per_keypoint"]["best_joint"] == [0, 0]
    assert sorted(row["per_keypoint"]["own_joint_distance"]) == pytest.approx([0, 1 / np.sqrt(2)])
    assert row["best_joint"] == pytest.approx(0, abs=1e-12)
    assert row["one_to_one"] == pytest.approx(0.5 / np.sqrt(2))


def test_one_to_one_is_the_best_assignment_not_the_greedy_one():
    """Greedy gives joint 1 to the nearest keypoint 0 and leaves 1.1 to keypoint 1: 1.2 in sum, instead of 1.0."""
    joints = np.array([[[0.0, 0, 0], [1, 0, 0]]])
    keypoints = np.array([[[0.9, 0, 0], [1.1, 0, 0]]])
    row = measure_parts(keypoints, body_of(joints, NO_BONES))
    assert row["per_keypoint"]["own_joint"] == [0, 1]
    assert row["one_to_one"] == pytest.approx(0.5)


def test_more_keypoints_than_joints():
    joints = square()[:, :2]
    offset = np.array([0.1, 0.0, 0.7])[:, None] * [0, 0, 1]
    row = measure_parts(joints[:, [0, 1, 1]] + offset, body_of(joints, NO_BONES))
    assert row["assigned"] == 2
    assert row["per_keypoint"]["own_joint"] == [0, 1, None]
    assert row["per_keypoint"]["own_joint_distance"] == [pytest.approx(0.1), pytest.approx(0, abs=1e-12), None]
    assert row["one_to_one"] == pytest.approx(0.05)  # of the two that have one
    assert row["best_joint"] == pytest.approx((0.1 + 0 + 0.7) / 3)
    unknown = np.concatenate([joints, np.full_like(joints, np.nan)], axis=1)  # two joints that nobody annotated
    same = measure_parts(joints[:, [0, 1, 1]] + offset, body_of(unknown, NO_BONES))
    assert same == row


def test_share_of_frames_with_the_usual_joint_and_the_median_over_keypoints():
    """Of six frames keypoint 0 is at joint 0 in four and at joint 1 in two, 1 never leaves, 2 is at all in turn."""
    joints = square()
    follows = np.array([[0, 2, 0], [0, 2, 1], [1, 2, 2], [0, 2, 3], [1, 2, 0], [0, 2, 1]])
    keypoints = np.take_along_axis(joints, follows[..., None], axis=1)
    row = measure_parts(keypoints, body_of(joints, NO_BONES))
    assert row["per_keypoint"]["same"] == pytest.approx([4 / 6, 1, 2 / 6])
    assert row["per_keypoint"]["usual_joint"][:2] == [0, 2]
    assert row["same"] == pytest.approx(4 / 6)
    unsided = measure_parts(keypoints, body_of(joints, NO_BONES, np.array([[0, 1]])))
    assert unsided["same"] == row["same"]
    assert unsided["per_keypoint"]["same_unsided"] == pytest.approx([1, 1, 4 / 6])
    assert unsided["same_unsided"] == 1


def test_missing_joints_take_no_part():
    """Joint 0 is missing in half of the frames, where joint 1 is the nearest left; joint 3 is never annotated."""
    joints = square()
    keypoints = joints[:, :1].copy()
    joints[::2, 0, 1] = np.nan  # one coordinate is enough
    joints[:, 3] = np.nan
    body = body_of(joints, np.array([[0, 1], [1, 2], [2, 3]]))
    assert body.size == pytest.approx((np.sqrt(2) + 1) / 2)  # corners 0 to 2 in half of the frames, else 1 and 2
    row = measure_parts(keypoints, body)
    each = row["per_keypoint"]
    assert (each["best_joint"], each["own_joint"]) == ([0], [0])
    assert row["best_joint"] == pytest.approx(0, abs=1e-12)
    assert row["nearest_bone"] == pytest.approx(0.5 / body.size)  # 0 where bone 01 is there, else 1 to bone 12
    assert each["same"] == [0.5]
    assert row["covered"] == pytest.approx(1 / 3)  # joint 3 cannot be covered and is not asked for


def test_size_of_the_body_is_that_of_frames_with_two_joints():
    joints = square()
    joints[1:5, 1:] = np.nan
    assert body_of(joints, NO_BONES).size == pytest.approx(np.sqrt(2))


def test_frames_without_joints_or_keypoint_are_left_out():
    joints = walker()
    keypoints = joints[:, [1, 2]] + 50.0
    keypoints[3:] = joints[3:, [1, 2]]
    joints[:3] = np.nan
    keypoints[5:9, 1] = np.nan
    row = measure_parts(keypoints, body_of(joints, CHAIN))
    assert row["nearest_bone"] == pytest.approx(0, abs=1e-12)
    assert row["same"] == 1


def test_isolated_joints_are_points_and_no_bones_mean_the_nearest_joint():
    joints = square()
    middle = joints[:, :2].mean(axis=1, keepdims=True)
    for bones, keypoints, expected in (
        (np.array([[0, 1]]), joints[:, 2:3], 0.0),
        (np.array([[0, 1]]), middle, 0.0),
        (NO_BONES, middle, 0.5 / np.sqrt(2)),
    ):
        row = measure_parts(keypoints, body_of(joints, bones))
        assert row["nearest_bone"] == pytest.approx(expected, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(2, 6), st.integers(0, 8), st.booleans(), st.integers(0, 1000))
def test_whatever_the_shape(frames, keypoints, joints, bones, complete, seed):
    """Ranges, the order of the distances, and no dependence on place, orientation by axes, scale or order."""
    rng = np.random.default_rng(seed)
    truth, found = rng.normal(size=(frames, joints, 3)), rng.normal(size=(frames, keypoints, 3))
    if not complete:
        truth[rng.uniform(size=truth.shape[:2]) < 0.2] = np.nan
        truth[0] = rng.normal(size=(joints, 3))
    pairs = rng.integers(0, joints, (bones, 2))
    row = measure_parts(found, body_of(truth, pairs))
    assert row["assigned"] == min(keypoints, joints)
    if complete:  # else the means are over different frames
        assert row["nearest_bone"] <= row["best_joint"] + 1e-12
    if keypoints <= joints:
        assert row["best_joint"] <= row["one_to_one"] + 1e-12
    assert 1 / joints <= row["same"] <= row["same_unsided"] <= 1
    assert 0 <= row["covered"] <= 1
    assert all(len(values) == keypoints for values in row["per_keypoint"].values())
    json.dumps(row, allow_nan=False)
    order = rng.permutation(keypoints)
    moved = measure_parts(7 * found[:, order][..., [1, 2, 0]] + 3, body_of(7 * truth[..., [1, 2, 0]] + 3, pairs))
    for name in ("nearest_bone", "best_joint", "one_to_one", "same", "covered"):
        assert moved[name] == pytest.approx(row[name])
    assert moved["per_keypoint"]["nearest_bone"] == pytest.approx(np.array(row["per_keypoint"]["nearest_bone"])[order])


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["knee_left", "nose", "knee_right"], [[0, 2]]),
        (["RHip", "LHip", "LBigToe", "RBigToe"], [[1, 0], [2, 3]]),
        (["SpineF", "SpineM", "SpineL", "HipL", "HipR", "HeadB", "HeadL"], [[3, 4]]),
        (["paw_L", "paw_R", "l_ear", "r_ear", "Left Eye", "Right Eye", "front_left_toe", "front_right_toe"],
         [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (["tail", "left_hand"], []),
    ],
)  # fmt: skip
def test_left_and_right_are_known_by_name(names, pairs):
    assert mirror_pairs(names).tolist() == pairs


def test_outline_points_are_the_farthest_joints():
    joints = np.array([[[0, 0, 5], [1, -2, 0], [-3, 4, 1]], [[0, 0, 5], [9, 9, 9], [np.nan, 4, -99]]])
    outline = outline_points(body_of(joints, NO_BONES))
    assert outline[0].tolist() == joints[0, [1, 2, 2, 1, 0, 1]].tolist()
    assert outline[1].tolist() == joints[1, [1, 0, 1, 0, 1, 0]].tolist()


def test_random_points_stay_where_they_are_on_their_bone():
    joints = walker()
    joints[4, 2] = np.nan
    body = body_of(joints, CHAIN)
    points = random_points(body, 200, np.random.default_rng(0))
    length = np.linalg.norm(joints[:, CHAIN[:, 1]] - joints[:, CHAIN[:, 0]], axis=2)
    start, end = (np.linalg.norm(points[:, :, None] - joints[:, CHAIN[:, side]][:, None], axis=3) for side in (0, 1))
    on_bone = np.isclose(start + end, length[:, None])[[0, 50, 119]].all(axis=0)  # (200, 4)
    assert (on_bone.sum(axis=1) == 1).all(), "each lies on one bone in all frames"
    bone = on_bone.argmax(axis=1)
    share = (start / length[:, None])[0, np.arange(200), bone]
    assert np.bincount(bone, minlength=4).min() > 30  # of 50 expected
    assert np.histogram(share, 4, (0, 1))[0].min() > 30
    np.testing.assert_allclose(start[7, np.arange(200), bone] / length[7, bone], share)
    assert np.isnan(points[4]).any(axis=1).tolist() == [b in (1, 2) for b in bone]


def test_table_of_a_walker():
    """The outline follows the walker and is near its bones, but no part of it; points fixed to bones are parts."""
    joints = walker()
    names = ["head", "neck", "hip_left", "hip_right", "tail"]
    found = joints[:, [0, 2, 3]] + 0.01
    edges = np.array([[0, 1], [1, 2]])
    document = compare_parts({"found": found, "not": found + 9}, joints, CHAIN, names, units="m", edges=edges)
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == ["found", "not", RANDOM_POINTS, OUTLINE_POINTS]
    assert [rows[name]["keypoints"] for name in rows] == [3, 3, 3, 6]
    assert rows["found"]["same"] == rows["found"]["same_unsided"] == 1
    assert rows["not"]["nearest_bone"] > 1
    assert rows[RANDOM_POINTS]["nearest_bone"] == pytest.approx(0, abs=1e-9)
    assert rows[RANDOM_POINTS]["same"] > 0.9
    assert rows[OUTLINE_POINTS]["nearest_bone"] == pytest.approx(0, abs=1e-9)
    assert rows[OUTLINE_POINTS]["same"] < 0.65
    assert (document["frames"], document["units"], document["mirror"]) == (120, "m", [[2, 3]])
    assert document["edges"]["edges"] == document["edges"]["counted"] == 2
    assert document["edges"]["agreement"][0] == {
        "bones": 1, "share": 0.5, "all_pairs": pytest.approx(1 / 3), "interval": [0, 0.5],
    }  # fmt: skip
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    again = compare_parts({"found": found}, joints, CHAIN, names, units="m", edges=edges)
    assert again["rows"][1] == rows[RANDOM_POINTS]
    lines = format_parts(document).splitlines()
    assert lines[0].startswith("parts of the body over 120 frames; distances in body sizes of ")
    assert " ".join(lines[1].split()) == "nearest bone best joint one to one same joint left = right joints covered"
    assert lines[2].startswith("found ")
    assert lines[2].endswith("60 %")
    assert lines[6] == (
        "of 2 active edges between keypoints of different nearest joints, 50 % (chance 33 %, 95 % of draws 0 % to "
        "50 %) join neighbours and 100 % (chance 67 %, 95 % of draws 50 % to 100 %) joints at most two bones apart"
    )


def test_truth_without_bones_and_no_edges():
    joints = walker()
    names = [f"joint {k}" for k in range(5)]
    document = compare_parts({"found": joints}, joints, NO_BONES, names, units="m", edges=np.zeros((0, 2)))
    assert (document["edges"], document["bones"]) == (None, 0)
    assert document["rows"][1]["best_joint"] == pytest.approx(0, abs=1e-12)  # random points are joints
    assert "the truth has no bones, so the nearest bone is the nearest joint" in format_parts(document)
    without = compare_parts({"found": joints}, joints, CHAIN, names, units="m", edges=np.zeros((0, 2)))
    assert without["edges"]["agreement"][0] == {
        "bones": 1, "share": None, "all_pairs": pytest.approx(0.4), "interval": None,
    }  # fmt: skip
    assert describe_part_edges(without["edges"]) == []


@pytest.mark.parametrize("drawn", [1, 3, 5])
def test_interval_of_chance_against_every_possible_draw(drawn):
    """Of the ten pairs of five keypoints four are neighbours: each set of `drawn` edges is looked at."""
    joint, apart = np.arange(5), bone_distances(CHAIN, 5)
    every = list(combinations(range(5), 2))
    draws = list(combinations(every, drawn))
    near = np.array([sum(abs(i - j) == 1 for i, j in draw) for draw in draws]) / drawn
    row = bone_agreement(np.array(draws[0]), joint, apart)["agreement"][0]
    low, high = row["interval"]
    assert row["all_pairs"] == pytest.approx(near.mean())
    assert low <= row["all_pairs"] <= high
    assert (near < low - 1e-9).mean() <= 0.025
    assert (near > high + 1e-9).mean() <= 0.025
    assert (near < low + 1e-9).mean() > 0.025, "no narrower interval holds as much"
    assert (near > high - 1e-9).mean() > 0.025


@pytest.mark.parametrize(
    ("keypoints", "joints", "bones", "message"),
    [
        (np.zeros((3, 2, 3)), np.zeros((3, 2)), NO_BONES, r"joints: expected shape \(F, K, 3\)"),
        (np.zeros((3, 2, 3)), np.zeros((3, 2, 3)), NO_BONES, "the body has no size"),
        (np.zeros((3, 2, 3)), np.full((3, 2, 3), np.nan), NO_BONES, "the body has no size"),
        (np.zeros((3, 2, 3)), walker(3), [[0, 5]], "bones: expected pairs of numbers from 0 to 4"),
        (np.zeros((2, 2, 3)), walker(3), CHAIN, r"keypoints: expected shape \(3, J, 3\)"),
        (np.full((3, 2, 3), np.nan), walker(3), CHAIN, "in no frame together with"),
    ],
)
def test_bad_input(keypoints, joints, bones, message):
    with pytest.raises(InputError, match=message):
        measure_parts(keypoints, body_of(joints, bones))


def test_edge_between_keypoints_that_do_not_exist():
    joints = walker()
    with pytest.raises(InputError, match="edges: expected pairs of numbers from 0 to 1"):
        compare_parts({"found": joints[:, :2]}, joints, CHAIN, list("abcde"), units="m", edges=np.array([[0, 2]]))


def test_covered_needs_to_be_nearer_than_the_threshold():
    joints = square()
    for factor, expected in ((0.99, 1.0), (1.01, 0.0)):
        shift = factor * 0.15 * np.sqrt(2) * np.array([0, 0, 1])
        assert measure_parts(joints + shift, body_of(joints, NO_BONES))["covered"] == expected
