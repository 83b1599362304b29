import json

import numpy as np
import pytest

from bkind3d.errors import InputError
from bkind3d.health import Health, keypoint_health

CENTER, SIDES = np.array([1.0, -2.0, 0.5]), np.array([2.0, 1.0, 1.0])


def wandering(frames=200, joints=4, seed=0):
    """Keypoints on circles of their own, well inside the volume and apart from each other."""
    angle = np.linspace(0, 4 * np.pi, frames)[:, None] + np.arange(joints)
    centers = np.stack([np.linspace(-0.6, 0.6, joints), np.zeros(joints), np.full(joints, 0.15)], axis=1)
    circle = 0.15 * np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=2)
    return CENTER + centers + circle, np.full((frames, joints), 0.2)


def health_of(positions, confidence):
    return keypoint_health(positions, confidence, CENTER, SIDES)


def test_healthy_keypoints_have_no_flag():
    health = health_of(*wandering())
    assert health.flags == [[], [], [], []]
    assert health.frames == 200
    # A circle of radius 0.15 in a volume whose longest side is 2.
    np.testing.assert_allclose(health.spread, 0.15 / 2, rtol=0.01)
    np.testing.assert_allclose(health.peak, 0.2)
    assert health.at_centre == health.at_border == [0, 0, 0, 0]
    assert "4/4 healthy" in health.summary()


def test_stuck_at_the_centre():
    positions, confidence = wandering()
    positions[:, 1] = CENTER + 1e-4
    health = health_of(positions, confidence)
    assert health.flags == [[], ["dead", "centre"], [], []]
    assert health.at_centre[1] == 1


def test_passing_through_the_centre_is_no_fault():
    positions, confidence = wandering()
    positions[::2, 1] = CENTER
    health = health_of(positions, confidence)
    assert health.at_centre[1] == pytest.approx(0.5)
    assert "centre" not in health.flags[1]


def test_still_elsewhere_is_dead_only():
    positions, confidence = wandering()
    positions[:, 2] = CENTER + np.array([0.3, 0.3, -0.2])
    assert health_of(positions, confidence).flags[2] == ["dead"]


@pytest.mark.parametrize(("axis", "sign"), [(0, 1), (0, -1), (1, 1), (1, -1), (2, 1)])
def test_border_of_each_axis_and_outside(axis, sign):
    positions, confidence = wandering()
    positions[:, 0, axis] = CENTER[axis] + sign * (SIDES[axis] / 2 - 0.01)
    positions[:, 3, axis] = CENTER[axis] + sign * SIDES[axis] * 3
    health = health_of(positions, confidence)
    assert "border" in health.flags[0]
    assert "border" in health.flags[3]
    assert health.at_border[1] == 0


@pytest.mark.parametrize(
    ("up", "axis", "sign"),
    [((0, 0, 1), 2, -1), ((0, 0, -2), 2, 1), ((0.1, -1, 0.2), 1, 1), ((1, 0, 0), 0, -1)],
)
def test_feet_on_the_floor_are_not_at_the_border(up, axis, sign):
    """At the bottom face they are not, farther than the margin below it and at the opposite face they are."""
    positions, confidence = wandering()
    floor, margin = CENTER[axis] + sign * SIDES[axis] / 2, 0.03 * SIDES.max()
    positions[:, 0, axis] = floor - sign * 0.01
    positions[:, 1, axis] = floor + sign * 0.9 * margin
    positions[:, 2, axis] = floor + sign * 1.1 * margin
    positions[:, 3, axis] = 2 * CENTER[axis] - floor
    flags = keypoint_health(positions, confidence, CENTER, SIDES, up).flags
    assert ["border" in each for each in flags] == [False, False, True, True]


def test_a_keypoint_far_less_sure_than_the_others():
    rng = np.random.default_rng(0)
    positions = CENTER + rng.uniform(-0.3, 0.3, (50, 4, 3)) * SIDES
    confidence = np.tile([0.2, 0.19, 0.025, 0.06], (50, 1))
    health = keypoint_health(positions, confidence, CENTER, SIDES)
    assert [("unsure" in flags) for flags in health.flags] == [False, False, True, False]
    fainter = keypoint_health(positions, confidence / 10, CENTER, SIDES)
    assert fainter.flags == health.flags


def test_off_the_body_and_swaps():
    """Both are flagged below their thresholds only, and only where they were measured."""
    positions, confidence = wandering()
    on_body = np.ones((200, 4))
    on_body[:101, 1], on_body[:, 2] = 0.61, 0.8
    identity = np.array([0.5, 1, 0.49, 0.9])
    health = keypoint_health(positions, confidence, CENTER, SIDES, on_body=on_body, identity=identity)
    assert health.on_body == pytest.approx([1, 0.803, 0.8, 1], abs=1e-4)
    assert health.flags == [[], [], ["swaps"], []]
    on_body[:, 3] = 0.79
    health = keypoint_health(positions, confidence, CENTER, SIDES, on_body=on_body, identity=identity)
    assert health.flags == [[], [], ["swaps"], ["off"]]
    assert "2/4 healthy (1 off, 1 swaps)" in health.summary()
    assert health.looked_for == ["dead", "twin", "centre", "border", "unsure", "off", "swaps"]
    assert Health.from_dict(json.loads(json.dumps(health.to_dict()))) == health
    unknown = health_of(positions, confidence)
    assert (unknown.on_body, unknown.identity) == (None, None)
    assert unknown.looked_for == ["dead", "twin", "centre", "border", "unsure"]


def test_records_of_earlier_versions_lack_what_was_not_measured():
    health = health_of(*wandering())
    record = health.to_dict()
    del record["on_body"], record["identity"]
    assert Health.from_dict(record) == health


def test_twins_name_each_other():
    positions, confidence = wandering()
    positions[:, 3] = positions[:, 1] + [0.01, 0, 0]
    health = health_of(positions, confidence)
    assert (health.twin[1], health.twin[3]) == (3, 1)
    assert health.twin_distance[1] == pytest.approx(0.005)
    assert [("twin" in flags) for flags in health.flags] == [False, True, False, True]


def test_nearest_twin_against_a_loop():
    rng = np.random.default_rng(3)
    positions = CENTER + rng.uniform(-0.4, 0.4, (50, 6, 3))
    health = health_of(positions, np.ones((50, 6)))
    for j in range(6):
        median = [np.median(np.linalg.norm(positions[:, j] - positions[:, k], axis=1)) for k in range(6)]
        median[j] = np.inf
        assert health.twin[j] == int(np.argmin(median))
        assert health.twin_distance[j] == pytest.approx(min(median) / 2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_positions_that_are_not_finite_are_dead_and_nobodys_twin(bad):
    positions, confidence = wandering()
    positions[5, 0], positions[9, 1] = bad, bad
    confidence[5, 0] = np.nan
    health = health_of(positions, confidence)
    assert health.flags == [["dead", "unsure"], ["dead"], [], []]
    assert health.peak[0] == 0


def test_one_keypoint_one_frame():
    health = keypoint_health(np.array([[[1.2, -2, 0.5]]]), np.ones((1, 1)), CENTER, SIDES)
    assert health.twin == [-1]
    assert health.flags == [["dead"]]
    assert json.loads(json.dumps(health.to_dict()))["twin_distance"] == [None]


def test_dictionary_round_trip_ignores_the_step():
    positions, confidence = wandering()
    health = health_of(positions, confidence)
    line = json.dumps(health.to_dict() | {"step": 300})
    assert Health.from_dict(json.loads(line)) == health
    one = keypoint_health(np.zeros((2, 1, 3)), np.ones((2, 1)), CENTER, SIDES)
    assert Health.from_dict(one.to_dict()) == one


def test_dictionary_without_a_key():
    with pytest.raises(InputError, match="'spread' is missing"):
        Health.from_dict({"frames": 1})


def test_summary_is_one_line_and_counts():
    positions, confidence = wandering()
    positions[:, :2] = CENTER
    summary = health_of(positions, confidence).summary()
    assert "2/4 healthy (2 dead, 2 twin, 2 centre)" in summary
    assert "\n" not in summary


@pytest.mark.parametrize(
    ("positions", "confidence", "sides", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 2)), SIDES, "positions"),
        (np.zeros((0, 2, 3)), np.zeros((0, 2)), SIDES, "positions"),
        (np.zeros((3, 2, 3)), np.zeros((3, 3)), SIDES, "confidence"),
        (np.zeros((3, 2, 3)), np.zeros((3, 2)), np.array([1.0, 0.0, 1.0]), "volume"),
        (np.zeros((3, 2, 3)), np.zeros((3, 2)), np.ones(2), "volume"),
    ],
)
def test_bad_input(positions, confidence, sides, message):
    with pytest.raises(InputError, match=message):
        keypoint_health(positions, confidence, CENTER, sides)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"up": (0, 0, 0)}, "up: expected a direction"),
        ({"up": (0, 1)}, "up: expected a direction"),
        ({"on_body": np.ones(4)}, r"on_body: expected shares from 0 to 1 of shape \(200, 4\)"),
        ({"on_body": np.full((200, 4), np.nan)}, "on_body: expected shares"),
        ({"identity": np.full(4, 1.1)}, r"identity: expected shares from 0 to 1 of shape \(4,\)"),
    ],
)
def test_bad_input_of_what_may_be_known(more, message):
    with pytest.raises(InputError, match=message):
        keypoint_health(*wandering(), CENTER, SIDES, **more)
