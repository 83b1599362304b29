"""Protocols and tables of the probe."""

import csv
import io
import json

import numpy as np
import pytest
from linear_scene import linear_scene

from bkind3d.errors import InputError
from bkind3d.evaluation import probe as evaluation
from bkind3d.evaluation.blocks import block_numbers
from bkind3d.evaluation.probe import compare, compare_blocked
from bkind3d.evaluation.regressors import MLP_SETTINGS, RIDGES, ProbeOptions


def test_block_numbers():
    assert block_numbers(100, 10).tolist() == [i // 10 for i in range(100)]
    uneven = np.bincount(block_numbers(23, 5))
    assert uneven.sum() == 23
    assert uneven.max() - uneven.min() <= 1


@pytest.mark.parametrize(
    "options",
    [ProbeOptions(ridge=0.1), ProbeOptions(ridge="auto"), ProbeOptions(regressor="mlp")],
    ids=lambda o: f"{o.regressor} {o.ridge}",
)
def test_a_block_is_predicted_without_its_own_joints(options):
    u, y = linear_scene(frames=40)
    y = y + np.random.default_rng(1).normal(size=y.shape)
    before, chosen = evaluation.predict_blocked(u, y, 4, options)
    changed = y.copy()
    changed[10:20] = 1e3 * np.random.default_rng(2).normal(size=(10, 5, 3))
    after, chosen_after = evaluation.predict_blocked(u, changed, 4, options)
    np.testing.assert_array_equal(after[10:20], before[10:20])
    assert [values[1] for values in chosen_after.values()] == [values[1] for values in chosen.values()]
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
    _, chosen = evaluation.predict_blocked(u, -y * (-1.0) ** number[:, None, None], 9, ProbeOptions(ridge="auto"))
    assert min(chosen["ridge"]) == max(chosen["ridge"])
    clean_u, clean_y = linear_scene(frames=72)
    _, chosen = evaluation.predict_blocked(clean_u, clean_y, 9, ProbeOptions(ridge="auto"))
    assert chosen["ridge"] == [min(RIDGES)] * 9


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
    assert document["options"] == {"regressor": "linear", "bias": True, "scale": True, "ridge": 0.01}
    assert document["units"] == "m"
    assert document["masked"] == {"joints": 1, "of": 600}
    assert "80 training frames" in document["protocol"]
    trained, untrained, mean = document["rows"]
    assert trained["mpjpe"] < untrained["mpjpe"] <= mean["mpjpe"]
    expected = np.linalg.norm(np.nanmean(y[:80], axis=0) - y[80:], axis=2).mean()
    assert mean["mpjpe_absolute"] == pytest.approx(expected)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    table = evaluation.format_table(document)
    assert table.splitlines()[1] == "regressor linear, bias yes, scale yes, ridge 0.01"
    assert len(table.splitlines()) == 2 + 1 + 3
    assert "MPJPE, mean shift removed (m)" in table


def test_the_regressor_is_named_in_every_output(monkeypatch):
    monkeypatch.setitem(MLP_SETTINGS, "most_epochs", 30)
    u, y = linear_scene(frames=60)
    options = ProbeOptions(regressor="mlp", hidden=16, seed=3)
    for document in (
        compare({"BKinD-3D": (u[:40], u[40:])}, y[:40], y[40:], options, units="m"),
        compare_blocked({"BKinD-3D": u}, y, 3, options, units="m"),
    ):
        assert document["protocol"].startswith("two-layer MLP")
        assert document["options"] == {"regressor": "mlp", "scale": False, "hidden": 16, "seed": 3} | MLP_SETTINGS
        trained, mean = document["rows"]
        assert mean["name"] == "mean pose"
        line = evaluation.format_table(document).splitlines()[1]
        assert line.startswith("regressor mlp, scale no, hidden 16, seed 3, learning_rate 0.003")
        assert line.endswith(f"epochs chosen: BKinD-3D {', '.join(f'{x}' for x in sorted(set(trained['epochs'])))}")
        assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_a_chosen_ridge_is_named():
    u, y = linear_scene()
    document = compare_blocked({"a": u, "b": u[:, :2]}, y, 4, ProbeOptions(ridge="auto"), units="m")
    line = evaluation.format_table(document).splitlines()[1]
    assert line.startswith("regressor linear, bias no, scale no, ridge auto; ridge chosen: a 1e-07; b ")


def test_errors_of_each_joint_as_text_and_csv():
    u, y = linear_scene(joints=4)
    y[80:, 2] = np.nan  # never annotated in the test frames
    document = compare({"BKinD-3D": (u[:80], u[80:])}, y[:80], y[80:], units="mm", joint_names=list("abcd"))
    lines = evaluation.format_joints(document).splitlines()
    assert lines[0].split() == ["MPJPE,", "mean", "shift", "removed", "(mm)", "BKinD-3D", "mean", "pose"]
    assert [line.split()[0] for line in lines[1:]] == list("abcd")
    assert lines[3].split()[1:] == ["–", "–"]
    rows = list(csv.DictReader(io.StringIO(evaluation.joints_csv(document))))
    assert [(row["predictor"], row["joint"]) for row in rows] == [
        (p, j) for p in ("BKinD-3D", "mean pose") for j in "abcd"
    ]
    assert rows[2]["mpjpe"] == rows[2]["pmpjpe"] == ""
    assert float(rows[5]["pmpjpe"]) == document["rows"][1]["per_joint"]["pmpjpe"][1]
    assert {row["units"] for row in rows} == {"mm"}


def test_two_blocks_still_have_something_to_hold_out():
    """Each half is predicted from the other, which is cut into runs to choose the ridge."""
    u, y = linear_scene(frames=60)
    assert evaluation.predict_blocked(u, y, 2, ProbeOptions(ridge="auto"))[1]["ridge"] == [min(RIDGES)] * 2


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
