import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bkind3d import probe as evaluation
from bkind3d.errors import InputError
from bkind3d.probe import METRICS, ProbeOptions, compare, compare_blocked, fit_probe, joint_errors


def skeletons(frames=30, joints=5, seed=0):
    return np.random.default_rng(seed).normal(size=(frames, joints, 3))


def linear_scene(frames=120, keypoints=4, joints=5, seed=0, constant=0.0):
    """Keypoints at random and joints that are an exact linear map of them (plus a constant)."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(frames, keypoints, 3))
    matrix = rng.normal(size=(3 * keypoints, 3 * joints))
    return u, (u.reshape(frames, -1) @ matrix).reshape(frames, joints, 3) + constant


# --- alignments ---------------------------------------------------------------------------------------------------


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
    row = evaluation.score(skeletons(seed=1), truth, ProbeOptions())
    assert (row["frames"], row["frames_skipped"]) == (29, 1)
    with pytest.raises(InputError, match="no frame has 3 annotated joints"):
        evaluation.score(skeletons(frames=1), truth[3:4], ProbeOptions())


def test_score_is_mean_and_median_over_frames():
    truth = skeletons(frames=4)
    shifts = np.array([0.0, 0.0, 1.0, 7.0])
    row = evaluation.score(truth + np.array([1.0, 0, 0]) * shifts[:, None, None], truth, ProbeOptions())
    assert row["mpjpe_absolute"] == pytest.approx(2)
    assert row["median"]["mpjpe_absolute"] == pytest.approx(0.5)
    np.testing.assert_allclose(row["per_joint"]["mpjpe_absolute"], 2)


# --- the probe ----------------------------------------------------------------------------------------------------


def test_probe_recovers_a_linear_map_exactly():
    u, y = linear_scene()
    row = evaluation.evaluate_probe(u[:80], y[:80], u[80:], y[80:])
    assert max(row[name] for name in METRICS) < 1e-9
    assert row["ridge"] == [0.0]


def test_constant_needs_the_bias():
    u, y = linear_scene(constant=10.0)
    without = evaluation.evaluate_probe(u[:80], y[:80], u[80:], y[80:])
    with_bias = evaluation.evaluate_probe(u[:80], y[:80], u[80:], y[80:], ProbeOptions(bias=True))
    assert without["mpjpe_absolute"] > 5
    assert with_bias["mpjpe_absolute"] < 1e-9


def test_keypoints_that_span_a_constant_need_no_bias():
    u, y = linear_scene(constant=10.0)
    u[:, 0] = [0.5, 0.0, 0.0]  # a keypoint that stands still, as many discovered ones do
    y = fit_probe(u, y, ProbeOptions(bias=True)).predict(u)
    assert np.abs(fit_probe(u, y).predict(u) - y).max() < 1e-9


def test_dependent_keypoints_give_the_solution_of_minimum_norm():
    u, y = linear_scene()
    doubled = np.concatenate([u, u], axis=1)
    probe = fit_probe(doubled, y)
    features = doubled.reshape(len(u), -1)
    expected = np.linalg.lstsq(features, y.reshape(len(u), -1), rcond=None)[0]
    np.testing.assert_allclose(probe.weight, expected, atol=1e-10)
    np.testing.assert_allclose(probe.predict(doubled), y, atol=1e-9)


def test_fewer_frames_than_features():
    u, y = linear_scene(frames=5)
    probe = fit_probe(u, y)
    np.testing.assert_allclose(probe.predict(u), y, atol=1e-9)
    assert np.isfinite(probe.weight).all()


@pytest.mark.parametrize("bias", [False, True])
def test_ridge_against_the_normal_equations(bias):
    u, y = linear_scene(constant=3.0)
    y = y + np.random.default_rng(1).normal(size=y.shape)
    probe = fit_probe(u, y, ProbeOptions(ridge=0.3, bias=bias))
    x, t = u.reshape(len(u), -1), y.reshape(len(y), -1)
    x_mean, t_mean = (x.mean(0), t.mean(0)) if bias else (0, 0)
    gram = (x - x_mean).T @ (x - x_mean)
    penalty = 0.3 * np.trace(gram) / x.shape[1]
    expected = np.linalg.solve(gram + penalty * np.eye(x.shape[1]), (x - x_mean).T @ (t - t_mean))
    np.testing.assert_allclose(probe.weight, expected, atol=1e-9)
    np.testing.assert_allclose(probe.offset, t_mean - x_mean @ expected if bias else 0, atol=1e-9)


def test_ridge_has_no_units():
    u, y = linear_scene()
    small = fit_probe(u, y, ProbeOptions(ridge=0.1)).predict(u)
    large = fit_probe(1000 * u, 1000 * y, ProbeOptions(ridge=0.1)).predict(1000 * u)
    np.testing.assert_allclose(large, 1000 * small, rtol=1e-8)


def test_auto_ridge_is_small_on_clean_data_and_large_on_noise():
    u, y = linear_scene()
    assert fit_probe(u, y, ProbeOptions(ridge="auto")).ridge == min(evaluation.RIDGES)
    noise = np.random.default_rng(9).normal(size=y.shape)
    assert fit_probe(u, noise, ProbeOptions(ridge="auto")).ridge >= 1


def test_auto_ridge_helps_where_frames_are_few():
    u, y = linear_scene(frames=140, keypoints=10)
    y = y + 3 * np.random.default_rng(1).normal(size=y.shape)
    plain = evaluation.evaluate_probe(u[:40], y[:40], u[40:], y[40:])
    ridge = evaluation.evaluate_probe(u[:40], y[:40], u[40:], y[40:], ProbeOptions(ridge="auto"))
    assert ridge["mpjpe_absolute"] < 0.8 * plain["mpjpe_absolute"]


def test_unannotated_joints_leave_the_fit_exact():
    u, y = linear_scene()
    holes = y.copy()
    holes[::3, 1] = np.nan
    holes[1::4, 4, 2] = np.nan
    probe = fit_probe(u, holes)
    np.testing.assert_allclose(probe.predict(u), y, atol=1e-8)
    assert fit_probe(u, holes, ProbeOptions(ridge="auto")).ridge == min(evaluation.RIDGES)


# --- blocks -------------------------------------------------------------------------------------------------------


def test_block_numbers():
    assert evaluation.block_numbers(100, 10).tolist() == [i // 10 for i in range(100)]
    uneven = np.bincount(evaluation.block_numbers(23, 5))
    assert uneven.sum() == 23
    assert uneven.max() - uneven.min() <= 1


@pytest.mark.parametrize("ridge", [0.1, "auto"])
def test_a_block_is_predicted_without_its_own_joints(ridge):
    u, y = linear_scene(frames=40)
    y = y + np.random.default_rng(1).normal(size=y.shape)
    options = ProbeOptions(ridge=ridge)
    before, chosen = evaluation.predict_blocked(u, y, 4, options)
    changed = y.copy()
    changed[10:20] = 1e3 * np.random.default_rng(2).normal(size=(10, 5, 3))
    after, chosen_after = evaluation.predict_blocked(u, changed, 4, options)
    np.testing.assert_array_equal(after[10:20], before[10:20])
    assert chosen_after[1] == chosen[1]
    assert np.abs(after[20:] - before[20:]).max() > 1


def test_memorised_time_does_not_help_across_blocks():
    """Features that only say which block a frame is in, joints that are constant in a block: leaking data."""
    rng = np.random.default_rng(0)
    number = np.repeat(np.arange(9), 8)
    u = np.eye(9)[number].reshape(72, 3, 3)
    y = rng.normal(size=(9, 5, 3))[number]
    shuffled = rng.permutation(72)
    assert evaluation.evaluate_blocked(u[shuffled], y[shuffled], 9)["mpjpe_absolute"] < 1e-9  # this protocol leaks
    honest = compare_blocked({"memory": u}, y, 9, units="m")["rows"]
    assert honest[0]["mpjpe_absolute"] > 0.8 * honest[1]["mpjpe_absolute"] > 0.5


def test_ridge_is_chosen_on_the_other_blocks_not_on_neighbouring_frames():
    """Inside the training frames the folds are the same blocks: memory of a block must not look useful there."""
    rng = np.random.default_rng(0)
    number = np.repeat(np.arange(9), 8)
    u = np.eye(9)[number].reshape(72, 3, 3)
    y = 5 + rng.normal(size=(9, 5, 3))[number]
    _, ridges = evaluation.predict_blocked(u, -y * (-1.0) ** number[:, None, None], 9, ProbeOptions(ridge="auto"))
    assert min(ridges) == max(ridges)
    clean_u, clean_y = linear_scene(frames=72)
    _, ridges = evaluation.predict_blocked(clean_u, clean_y, 9, ProbeOptions(ridge="auto"))
    assert ridges == [min(evaluation.RIDGES)] * 9


# --- the table ----------------------------------------------------------------------------------------------------


def test_compare_adds_the_mean_pose_and_says_what_was_done():
    u, y = linear_scene()
    y[3, 1] = np.nan
    options = ProbeOptions(bias=True, scale=True, ridge=0.01)
    document = compare(
        {"BKinD-3D": (u[:80], u[80:]), "untrained network": (u[:80, :2], u[80:, :2])},
        y[:80],
        y[80:],
        options,
        units="m",
        joint_names=list("abcde"),
    )
    assert [row["name"] for row in document["rows"]] == ["BKinD-3D", "untrained network", "mean pose"]
    assert document["options"] == {"bias": True, "scale": True, "ridge": 0.01}
    assert document["units"] == "m"
    assert document["masked"] == {"joints": 1, "of": 600}
    assert "80 training frames" in document["protocol"]
    trained, untrained, mean = document["rows"]
    assert trained["mpjpe"] < untrained["mpjpe"] <= mean["mpjpe"]
    expected = np.linalg.norm(np.nanmean(y[:80], axis=0) - y[80:], axis=2).mean()
    assert mean["mpjpe_absolute"] == pytest.approx(expected)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    table = evaluation.format_table(document)
    assert table.splitlines()[1] == "bias yes, scale yes, ridge 0.01"
    assert len(table.splitlines()) == 2 + 1 + 3
    assert "MPJPE, mean shift removed (m)" in table


def test_mean_pose_does_not_see_its_block():
    y = np.repeat(np.arange(4.0), 5)[:, None, None] * np.ones((20, 3, 3))
    row = compare_blocked({}, y, 4, units="m")["rows"][0]
    # Leaving one of 0, 1, 2, 3 out, the mean of the others is off by 2, 2/3, 2/3, 2 in each coordinate.
    assert row["mpjpe_absolute"] == pytest.approx(np.sqrt(3) * 4 / 3)
    assert row["mpjpe"] == pytest.approx(0, abs=1e-12)


def test_paper_rows():
    rows = {(row["dataset"], row["name"]): (row["pmpjpe"], row["mpjpe"]) for row in evaluation.PAPER_ROWS}
    assert rows[("Human3.6M", "BKinD-3D, 15 keypoints")] == (105, 125)
    assert rows[("Rat7M", "BKinD-3D")] == (24, 76)
    assert len(rows) == len(evaluation.PAPER_ROWS)
    assert all(row["units"] == "mm" for row in evaluation.PAPER_ROWS)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [-1, float("nan"), "best", None])
def test_bad_ridge(ridge):
    with pytest.raises(InputError, match="ridge"):
        ProbeOptions(ridge=ridge)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda u, y: (u[:, :, :2], y), r"training keypoints: expected shape"),
        (lambda u, y: (u, y[:, :2]), r"training joints: expected \(F, K, 3\) with K of at least 3"),
        (lambda u, y: (u[:-1], y), "training frames: 119 of the keypoints, 120 of the joints"),
        (lambda u, y: (np.where(u > 2, np.nan, u), y), "not finite"),
        (lambda u, y: (u, np.where(np.arange(5)[:, None] == 3, np.nan, y)), "joint 3 is never annotated"),
        (lambda u, y: (u[:0], y[:0]), "training joints"),
    ],
)
def test_bad_arrays(spoil, message):
    with pytest.raises(InputError, match=message):
        fit_probe(*spoil(*linear_scene()))


def test_prediction_that_is_not_finite():
    truth = skeletons()
    with pytest.raises(InputError, match="prediction: expected finite"):
        joint_errors(np.where(truth > 2, np.nan, truth), truth)


def test_training_and_test_must_agree():
    u, y = linear_scene()
    with pytest.raises(InputError, match="keypoints: training has 4 of them and test has 3"):
        evaluation.evaluate_probe(u, y, u[:, :3], y)
    with pytest.raises(InputError, match="joints: training has 5"):
        evaluation.evaluate_probe(u, y, u, y[:, :4])


@pytest.mark.parametrize("blocks", [1, 121])
def test_bad_blocks(blocks):
    u, y = linear_scene()
    with pytest.raises(InputError, match="blocks: expected between 2"):
        evaluation.evaluate_blocked(u, y, blocks)


def test_reserved_name_and_joint_names():
    u, y = linear_scene()
    with pytest.raises(InputError, match="reserved"):
        compare_blocked({"mean pose": u}, y, units="m")
    with pytest.raises(InputError, match="joint_names"):
        compare_blocked({"x": u}, y, units="m", joint_names=["a"])
