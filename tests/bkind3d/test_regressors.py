"""The linear map against closed forms; the MLP where a linear map cannot follow."""

import numpy as np
import pytest
import torch
from linear_scene import linear_scene

from bkind3d.errors import InputError
from bkind3d.evaluation.alignment import METRICS
from bkind3d.evaluation.probe import evaluate_probe
from bkind3d.evaluation.regressors import MLP_SETTINGS, RIDGES, ProbeOptions, _held_out, fit_regressor

# --- the linear map ---------------------------------------------------------------------------------------------------


def test_probe_recovers_a_linear_map_exactly():
    u, y = linear_scene()
    row = evaluate_probe(u[:80], y[:80], u[80:], y[80:])
    assert max(row[name] for name in METRICS) < 1e-9
    assert row["ridge"] == [0.0]


def test_constant_needs_the_bias():
    u, y = linear_scene(constant=10.0)
    without = evaluate_probe(u[:80], y[:80], u[80:], y[80:])
    with_bias = evaluate_probe(u[:80], y[:80], u[80:], y[80:], ProbeOptions(bias=True))
    assert without["mpjpe_absolute"] > 5
    assert with_bias["mpjpe_absolute"] < 1e-9


def test_keypoints_that_span_a_constant_need_no_bias():
    u, y = linear_scene(constant=10.0)
    u[:, 0] = [0.5, 0.0, 0.0]  # a keypoint that stands still, as many discovered ones do
    y = fit_regressor(u, y, ProbeOptions(bias=True)).predict(u)
    assert np.abs(fit_regressor(u, y).predict(u) - y).max() < 1e-9


def test_dependent_keypoints_give_the_solution_of_minimum_norm():
    u, y = linear_scene()
    doubled = np.concatenate([u, u], axis=1)
    probe = fit_regressor(doubled, y)
    features = doubled.reshape(len(u), -1)
    expected = np.linalg.lstsq(features, y.reshape(len(u), -1), rcond=None)[0]
    np.testing.assert_allclose(probe.weight, expected, atol=1e-10)
    np.testing.assert_allclose(probe.predict(doubled), y, atol=1e-9)


def test_fewer_frames_than_features():
    u, y = linear_scene(frames=5)
    probe = fit_regressor(u, y)
    np.testing.assert_allclose(probe.predict(u), y, atol=1e-9)
    assert np.isfinite(probe.weight).all()


@pytest.mark.parametrize("bias", [False, True])
def test_ridge_against_the_normal_equations(bias):
    u, y = linear_scene(constant=3.0)
    y = y + np.random.default_rng(1).normal(size=y.shape)
    probe = fit_regressor(u, y, ProbeOptions(ridge=0.3, bias=bias))
    x, t = u.reshape(len(u), -1), y.reshape(len(y), -1)
    x_mean, t_mean = (x.mean(0), t.mean(0)) if bias else (0, 0)
    gram = (x - x_mean).T @ (x - x_mean)
    penalty = 0.3 * np.trace(gram) / x.shape[1]
    expected = np.linalg.solve(gram + penalty * np.eye(x.shape[1]), (x - x_mean).T @ (t - t_mean))
    np.testing.assert_allclose(probe.weight, expected, atol=1e-9)
    np.testing.assert_allclose(probe.offset, t_mean - x_mean @ expected if bias else 0, atol=1e-9)


def test_ridge_has_no_units():
    u, y = linear_scene()
    small = fit_regressor(u, y, ProbeOptions(ridge=0.1)).predict(u)
    large = fit_regressor(1000 * u, 1000 * y, ProbeOptions(ridge=0.1)).predict(1000 * u)
    np.testing.assert_allclose(large, 1000 * small, rtol=1e-8)


def test_auto_ridge_is_small_on_clean_data_and_large_on_noise():
    u, y = linear_scene()
    assert fit_regressor(u, y, ProbeOptions(ridge="auto")).chosen["ridge"] == min(RIDGES)
    noise = np.random.default_rng(9).normal(size=y.shape)
    assert fit_regressor(u, noise, ProbeOptions(ridge="auto")).chosen["ridge"] >= 1


def test_auto_ridge_helps_where_frames_are_few():
    u, y = linear_scene(frames=140, keypoints=10)
    y = y + 3 * np.random.default_rng(1).normal(size=y.shape)
    plain = evaluate_probe(u[:40], y[:40], u[40:], y[40:])
    ridge = evaluate_probe(u[:40], y[:40], u[40:], y[40:], ProbeOptions(ridge="auto"))
    assert ridge["mpjpe_absolute"] < 0.8 * plain["mpjpe_absolute"]


def test_unannotated_joints_leave_the_fit_exact():
    u, y = linear_scene()
    holes = y.copy()
    holes[::3, 1] = np.nan
    holes[1::4, 4, 2] = np.nan
    probe = fit_regressor(u, holes)
    np.testing.assert_allclose(probe.predict(u), y, atol=1e-8)
    assert fit_regressor(u, holes, ProbeOptions(ridge="auto")).chosen["ridge"] == min(RIDGES)


# --- the MLP ----------------------------------------------------------------------------------------------------------


def folded_scene(frames=500, seed=0):
    """Joints that no linear map finds: a joint's height is the distance of a keypoint from the axis."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(frames, 3, 3))
    y = rng.normal(size=(9, 12)).T @ u.reshape(frames, 9, 1)
    y = y.reshape(frames, 4, 3)
    y[..., 2] += 4 * np.abs(u[:, :1, 0])
    return u, y


MLP = ProbeOptions(regressor="mlp")


def test_mlp_follows_what_a_linear_map_cannot():
    u, y = folded_scene()
    linear = evaluate_probe(u[:400], y[:400], u[400:], y[400:], ProbeOptions(bias=True))
    mlp = evaluate_probe(u[:400], y[:400], u[400:], y[400:], MLP)
    assert mlp["mpjpe_absolute"] < 0.25 * linear["mpjpe_absolute"]
    assert 10 < mlp["epochs"][0] <= MLP_SETTINGS["most_epochs"]
    assert "ridge" not in mlp


def test_mlp_is_the_same_for_a_seed_and_leaves_the_generator_alone(monkeypatch):
    monkeypatch.setitem(MLP_SETTINGS, "most_epochs", 30)
    u, y = folded_scene(120)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = fit_regressor(u, y, MLP).predict(u)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    np.testing.assert_array_equal(fit_regressor(u, y, MLP).predict(u), first)
    other = fit_regressor(u, y, ProbeOptions(regressor="mlp", seed=1)).predict(u)
    assert np.abs(other - first).max() > 1e-3


def test_mlp_has_no_units(monkeypatch):
    monkeypatch.setitem(MLP_SETTINGS, "most_epochs", 60)
    u, y = folded_scene(200)
    metres = fit_regressor(u, y, MLP).predict(u)
    millimetres = fit_regressor(1000 * u + 300, 1000 * y - 70, MLP).predict(1000 * u + 300)
    assert np.abs((millimetres + 70) / 1000 - metres).mean() < 0.02 * np.abs(y).mean()


def test_mlp_on_noise_stops_near_the_mean_pose():
    """Early stopping: with nothing to learn, the test error stays near the mean pose's."""
    rng = np.random.default_rng(0)
    u, y = rng.normal(size=(300, 8, 3)), 5 + rng.normal(size=(300, 4, 3))
    row = evaluate_probe(u[:200], y[:200], u[200:], y[200:], MLP)
    constant = np.linalg.norm(y[:200].mean(0) - y[200:], axis=2).mean()
    assert row["mpjpe_absolute"] < 1.15 * constant
    assert row["epochs"][0] < 20


def test_mlp_with_unannotated_joints():
    """Joints that are NaN change nothing but their own weight: whatever hides behind them is not seen."""
    u, y = folded_scene()
    holes = y.copy()
    holes[::3, 1] = np.nan
    holes[1::4, 3, 2] = np.nan
    row = evaluate_probe(u[:400], holes[:400], u[400:], y[400:], MLP)
    linear = evaluate_probe(u[:400], y[:400], u[400:], y[400:], ProbeOptions(bias=True))
    assert row["mpjpe_absolute"] < 0.35 * linear["mpjpe_absolute"]


def test_mlp_survives_keypoints_that_stand_still():
    u, y = folded_scene(200)
    u[:, 2] = [0.3, 0.0, 0.0]
    prediction = fit_regressor(u, y, MLP).predict(u + 1e-9)
    assert np.isfinite(prediction).all()
    u[:] = 1.0  # all of them
    assert np.abs(fit_regressor(u, y, MLP).predict(u) - y.mean(axis=0)).mean() < 0.2


def test_mlp_holds_out_whole_blocks():
    """Which frames it stops on: the third block, and every fifth after it, never one whose joints are all unknown."""
    blocks = np.repeat(np.arange(9), 4)
    annotated = np.ones((36, 3), dtype=bool)
    assert np.unique(blocks[_held_out(blocks, annotated)]).tolist() == [2, 7]
    annotated[8:12] = False
    assert np.unique(blocks[_held_out(blocks, annotated)]).tolist() == [3, 8]
    with pytest.raises(InputError, match="fewer than 2 blocks"):
        _held_out(blocks, annotated & (blocks == 4)[:, None])


# --- bad input --------------------------------------------------------------------------------------------------------


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
        fit_regressor(*spoil(*linear_scene()))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"regressor": "forest"}, "regressor: expected one of linear, mlp"),
        ({"regressor": "mlp", "bias": True}, "bias: means nothing to the regressor 'mlp'"),
        ({"regressor": "mlp", "ridge": 0.1}, "ridge: means nothing"),
        ({"hidden": 64}, "hidden: means nothing to the regressor 'linear'"),
        ({"regressor": "mlp", "hidden": 0}, "hidden: expected at least 1"),
    ],
)
def test_bad_options(options, name):
    with pytest.raises(InputError, match=name):
        ProbeOptions(**options)
