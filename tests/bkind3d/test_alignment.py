"""The three errors, against closed forms and SciPy's rotations."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bkind3d.errors import InputError
from bkind3d.evaluation.alignment import joint_errors, score


def skeletons(frames=30, joints=5, seed=0):
    return np.random.default_rng(seed).normal(size=(frames, joints, 3))


def test_rotation_and_shift_cost_nothing_after_rigid_alignment():
    truth = skeletons()
    rotations = Rotation.random(len(truth), rng=np.random.default_rng(1)).as_matrix()
    moved = np.einsum("fij,fkj->fki", rotations, truth) + np.random.default_rng(2).normal(size=(len(truth), 1, 3))
    errors = joint_errors(moved, truth)
    np.testing.assert_allclose(errors["pmpjpe"], 0, atol=1e-9)
    assert errors["mpjpe"].mean() > 0.5


def test_reflection_is_not_undone():
    truth = skeletons()
    errors = joint_errors(truth * [-1, 1, 1], truth)
    assert errors["pmpjpe"].mean(axis=1).min() > 0.05


def test_scale_is_undone_only_on_request():
    truth = skeletons()
    assert joint_errors(2 * truth, truth)["pmpjpe"].mean() > 0.5
    np.testing.assert_allclose(joint_errors(2 * truth, truth, scale=True)["pmpjpe"], 0, atol=1e-9)


def test_scale_alignment_against_brute_force():
    rng = np.random.default_rng(5)
    truth, prediction = rng.normal(size=(1, 6, 3)), rng.normal(size=(1, 6, 3))
    aligned_error = np.square(joint_errors(prediction, truth, scale=True)["pmpjpe"]).sum()
    x, y = prediction[0] - prediction[0].mean(0), truth[0] - truth[0].mean(0)
    rotation, _ = Rotation.align_vectors(y, x)
    turned = rotation.apply(x)
    best = min(np.square(s * turned - y).sum() for s in np.linspace(0.01, 3, 3000))
    assert aligned_error == pytest.approx(best, rel=1e-4)


def test_rigid_alignment_equals_scipys():
    rng = np.random.default_rng(6)
    truth, prediction = rng.normal(size=(20, 7, 3)), rng.normal(size=(20, 7, 3))
    errors = joint_errors(prediction, truth)["pmpjpe"]
    for f in range(20):
        x, y = prediction[f] - prediction[f].mean(0), truth[f] - truth[f].mean(0)
        rotation, _ = Rotation.align_vectors(y, x)
        np.testing.assert_allclose(errors[f], np.linalg.norm(rotation.apply(x) - y, axis=1), atol=1e-9)


def test_a_mean_shift_alone():
    truth = skeletons()
    errors = joint_errors(truth + np.array([3.0, 0.0, 4.0]), truth)
    np.testing.assert_allclose(errors["mpjpe_absolute"], 5)
    np.testing.assert_allclose(errors["mpjpe"], 0, atol=1e-9)
    np.testing.assert_allclose(errors["pmpjpe"], 0, atol=1e-9)


def test_unannotated_joints_take_no_part():
    truth = skeletons()
    rotations = Rotation.random(len(truth), rng=np.random.default_rng(1)).as_matrix()
    moved = np.einsum("fij,fkj->fki", rotations, truth) + 1.0
    truth[:, 2] = np.nan
    truth[4, 3, 1] = np.nan  # one coordinate is enough
    moved[:, 2] = 1e6
    errors = joint_errors(moved, truth)["pmpjpe"]
    assert np.isnan(errors[:, 2]).all()
    assert np.isnan(errors[4, 3])
    np.testing.assert_allclose(errors[:, [0, 1, 4]], 0, atol=1e-9)


def test_frames_with_too_few_joints_are_skipped_and_counted():
    truth = skeletons()
    truth[3, 2:] = np.nan
    row = score(skeletons(seed=1), truth)
    assert (row["frames"], row["frames_skipped"]) == (29, 1)
    with pytest.raises(InputError, match="no frame has 3 annotated joints"):
        score(skeletons(frames=1), truth[3:4])


def test_score_is_mean_and_median_over_frames():
    truth = skeletons(frames=4)
    shifts = np.array([0.0, 0.0, 1.0, 7.0])
    row = score(truth + np.array([1.0, 0, 0]) * shifts[:, None, None], truth)
    assert row["mpjpe_absolute"] == pytest.approx(2)
    assert row["median"]["mpjpe_absolute"] == pytest.approx(0.5)
    np.testing.assert_allclose(row["per_joint"]["mpjpe_absolute"], 2)


def test_prediction_that_is_not_finite():
    truth = skeletons()
    with pytest.raises(InputError, match="prediction: expected finite"):
        joint_errors(np.where(truth > 2, np.nan, truth), truth)
