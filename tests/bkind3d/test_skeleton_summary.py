"""Summary of a skeleton whose lengths and bones are known."""

import json

import numpy as np
import pytest

from bkind3d.errors import InputError
from bkind3d.evaluation.skeleton_summary import (
    assign_joints,
    bone_distances,
    describe_edges,
    format_skeleton,
    summarise_skeleton,
)

CHAIN = np.array([[0, 1], [1, 2], [2, 3], [3, 4]])  # five joints in a row


def chain(frames=400, seed=0):
    """(F, 5, 3): five joints, each moving on its own around a place in a row."""
    rng = np.random.default_rng(seed)
    return np.arange(5.0)[:, None] * [2, 0, 0] + rng.normal(0, 0.5, (frames, 5, 3))


def test_lengths_of_a_rigid_and_of_a_breathing_edge():
    """Keypoints 0 and 1 stay 3 apart while they turn; 2 is at 1 + sin from 0: mean 1, SD 1/√2."""
    phase = 2 * np.pi * np.arange(100) / 100
    turning = np.stack([np.cos(phase), np.sin(phase), 0 * phase], axis=1)
    breathing = (1 + np.sin(phase))[:, None] * [0, 0, 1]
    keypoints = np.array([5, 6, 7]) + np.stack([0 * turning, 3 * turning, breathing], axis=1)
    summary = summarise_skeleton(keypoints, np.array([[0, 1], [0, 2]]))
    rigid, breathing = summary["lengths"]
    assert (rigid["keypoints"], breathing["keypoints"]) == ([0, 1], [0, 2])
    assert rigid["mean"] == pytest.approx(3)
    assert rigid["cv"] == pytest.approx(0, abs=1e-12)
    assert (breathing["mean"], breathing["sd"], breathing["cv"]) == pytest.approx((1, 0.5**0.5, 0.5**0.5))
    assert summary["cv"] == pytest.approx(0.5**0.5 / 2)  # median of the two
    assert (summary["edges"], summary["pairs"], summary["frames"]) == (2, 3, 100)
    assert "agreement" not in summary
    assert format_skeleton(summary).splitlines() == [
        "skeleton: 2 of 3 edges active",
        "  over 100 frames their lengths vary by 35 % (SD / mean, median), those of all pairs of keypoints by 7 %",
    ]


def test_a_keypoint_is_given_to_the_joint_that_it_moves_with_wherever_it_lies():
    joints = chain()
    order = [3, 0, 4, 1, 2]
    keypoints = joints[:, order] + np.random.default_rng(1).normal(0, 3, (5, 3))  # offsets larger than the bones
    keypoints += np.random.default_rng(2).normal(0, 0.1, keypoints.shape)
    joint, distance = assign_joints(keypoints, joints)
    assert joint.tolist() == order
    np.testing.assert_allclose(distance, 0.16, atol=0.02)  # mean length of a normal vector of SD 0.1


def test_agreement_with_the_bones():
    """Edges of one, two and four bones, and one inside a joint, which is not counted."""
    joints = chain()
    keypoints = joints[:, [0, 1, 2, 4, 4]] + 0.3
    summary = summarise_skeleton(keypoints, np.array([[0, 1], [0, 2], [0, 3], [3, 4]]), joints, CHAIN)
    assert summary["joint"] == [0, 1, 2, 4, 4]
    assert [row["bones"] for row in summary["lengths"]] == [1, 2, 4, 0]
    assert summary["counted"] == 3
    # Pairs of joints: 01 12 one bone; 02, 24 twice, two; 14 twice, three; 04 twice, four; 44 left out.
    assert summary["agreement"] == [
        {"bones": 1, "share": pytest.approx(1 / 3), "all_pairs": pytest.approx(2 / 9), "interval": [0, 2 / 3]},
        {"bones": 2, "share": pytest.approx(2 / 3), "all_pairs": pytest.approx(5 / 9), "interval": [0, 1]},
    ]
    text = format_skeleton(summary)
    assert text.startswith("skeleton: 4 of 10 edges active")
    assert "of 3 between different true joints, 33 % (22 %) join neighbours and 67 % (56 %) joints at most two" in text
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_the_true_skeleton_agrees_wholly_and_all_pairs_by_chance():
    joints = chain()
    every = np.stack(np.triu_indices(5, 1), axis=1)
    assert summarise_skeleton(joints, CHAIN, joints, CHAIN)["agreement"][0]["share"] == 1
    for row in summarise_skeleton(joints, every, joints, CHAIN)["agreement"]:
        assert row["share"] == row["all_pairs"]


def test_no_edges():
    joints = chain()
    summary = summarise_skeleton(joints, np.zeros((0, 2)), joints, CHAIN)
    assert (summary["edges"], summary["cv"], summary["lengths"], summary["counted"]) == (0, None, [], 0)
    assert [row["share"] for row in summary["agreement"]] == [None, None]
    assert summary["agreement"][0]["all_pairs"] == pytest.approx(0.4)
    assert summary["agreement"][0]["interval"] is None
    assert format_skeleton(summary) == "skeleton: no edges"
    assert describe_edges(summary) == []
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_single_keypoint_and_coinciding_keypoints():
    joints = chain()
    assert summarise_skeleton(joints[:, :1], np.zeros((0, 2)), joints, CHAIN)["cv_all_pairs"] is None
    together = summarise_skeleton(joints[:, [1, 1]], np.array([[0, 1]]), joints, CHAIN)
    assert together["lengths"][0] == {"keypoints": [0, 1], "mean": 0, "sd": 0, "cv": None, "bones": 0}
    assert "vary by – (SD / mean, median)" in format_skeleton(together)


def test_unannotated_joints_take_no_part():
    joints = chain()
    keypoints = joints[:, [0, 2, 3]] + 1.0
    joints[::2, 2] = np.nan
    joints[:, 3] = np.nan
    joints[1::4, 4, 0] = np.nan  # one coordinate is enough
    joint, distance = assign_joints(keypoints, joints)
    assert joint[:2].tolist() == [0, 2]
    np.testing.assert_allclose(distance[:2], 0, atol=1e-12)
    assert joint[2] != 3  # nothing is known of it


def test_paths_over_bones():
    distances = bone_distances(np.array([[0, 1], [2, 1], [4, 3]]), 5)
    assert distances[0].tolist() == [0, 1, 2, np.inf, np.inf]
    np.testing.assert_array_equal(distances, distances.T)
    triangle = bone_distances(np.array([[0, 1], [1, 2], [2, 0], [0, 1]]), 3)  # nearly all pairs, and one twice
    assert triangle.tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    joints = chain()
    row = summarise_skeleton(joints, np.array([[0, 4]]), joints, np.array([[0, 1]]))["lengths"][0]
    assert row["bones"] is None  # no path of bones


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((4, 2, 2)), []), r"keypoints: expected finite positions"),
        ((np.full((4, 2, 3), np.nan), []), r"keypoints: expected finite positions"),
        ((np.zeros((4, 2, 3)), [[0, 2]]), "edges: expected pairs of numbers from 0 to 1"),
        ((np.zeros((4, 2, 3)), [[0, 1]], np.zeros((5, 3, 3)), [[0, 1]]), r"joints: expected shape \(4, K, 3\)"),
        (
            (np.zeros((4, 2, 3)), [[0, 1]], np.zeros((4, 3, 3)), [[0, 3]]),
            "bones: expected pairs of numbers",
        ),
        ((np.zeros((4, 2, 3)), [[0, 1]], np.full((4, 3, 3), np.nan), [[0, 1]]), "none is annotated in two frames"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        summarise_skeleton(*arguments)
