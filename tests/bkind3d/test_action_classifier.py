"""The classifier on synthetic behaviours that a person could tell apart, and on labels that say nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bkind3d.errors import InputError
from bkind3d.evaluation import action_classifier
from bkind3d.evaluation.action_classifier import (
    ActionOptions,
    action_scores,
    blocked_folds,
    compare_actions,
    find_windows,
    format_actions,
    split_fold,
)

BEHAVIOURS = ["rest", "oscillate", "drift"]
BOUT = 40  # frames
OPTIONS = ActionOptions(window=11, seeds=2, steps=150)


def recording(bouts=24, seed=0):
    """(T, 4, 3) tracks in bouts of rest, oscillation or drift from wherever the animal is, and the behaviour (T,)."""
    rng = np.random.default_rng(seed)
    body = rng.normal(size=(4, 3))
    place, tracks, labels = rng.normal(0, 5, 3), [], []
    for _ in range(bouts):
        behaviour = rng.integers(3)
        moved = np.zeros((BOUT, 4, 3))
        if behaviour == 1:
            swing = np.sin(2 * np.pi * np.arange(BOUT) / 6 + rng.uniform(0, 6))
            moved[:, :2] = 0.8 * swing[:, None, None] * rng.normal(size=3)
        if behaviour == 2:
            angle = rng.uniform(0, 2 * np.pi)
            moved += 0.15 * np.arange(1, BOUT + 1)[:, None, None] * [np.cos(angle), np.sin(angle), 0]
        tracks.append(body + place + moved)
        place = place + (moved[-1].mean(axis=0) if behaviour == 2 else 0)
        labels.append(np.full(BOUT, behaviour))
    noise = rng.normal(0, 0.02, (bouts * BOUT, 4, 3))
    return np.concatenate(tracks) + noise, np.concatenate(labels)


def windows_of(labels, window):
    return find_windows(labels, [np.arange(len(one)) for one in labels], window)


def scene():
    (train, train_labels), (test, test_labels) = recording(seed=0), recording(16, seed=1)
    windows = windows_of([train_labels, test_labels], OPTIONS.window)
    return np.concatenate([train, test]), windows, split_fold(windows, [1])


def test_behaviours_are_told_apart_and_the_majority_is_not_enough():
    tracks, windows, folds = scene()
    noise = np.random.default_rng(5).normal(size=(len(tracks), 2, 3))
    document = compare_actions({"moving": tracks, "noise": noise}, windows, folds, BEHAVIOURS, OPTIONS)
    moving, blind, majority = document["rows"]
    assert moving["top1"] > 0.9
    assert moving["balanced"] > 0.9
    assert min(moving["recall"]) > 0.75
    assert moving["topk"] > 0.97
    assert moving["sd"]["top1"] < 0.05
    assert blind["balanced"] < 0.5
    assert majority["balanced"] == pytest.approx(1 / 3)
    tested = np.bincount(windows.label[folds[0].test])
    usual = np.bincount(windows.label[folds[0].train]).argmax()
    assert majority["top1"] == pytest.approx(tested[usual] / tested.sum())
    assert "sd" not in majority
    assert document["windows"]["tested"] == tested.tolist()
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_shuffled_labels_give_chance():
    tracks, windows, folds = scene()
    windows.label[:] = np.random.default_rng(0).permutation(windows.label)
    row = compare_actions({"moving": tracks}, windows, folds, BEHAVIOURS, replace(OPTIONS, seeds=1))["rows"][0]
    assert abs(row["balanced"] - 1 / 3) < 0.06


def test_blocks_in_time_and_no_shared_frame():
    tracks, labels = recording(20)
    windows = windows_of([labels], OPTIONS.window)
    folds = blocked_folds(windows, 3, OPTIONS.window)
    assert np.concatenate([fold.test for fold in folds]).tolist() == list(range(len(windows.time)))
    for fold in folds:
        distance = np.abs(windows.time[fold.train][:, None] - windows.time[fold.test])
        assert distance.min() == OPTIONS.window
    assert len(folds[0].train) == len(windows.time) - len(folds[0].test) - (OPTIONS.window - 1)
    row = compare_actions({"moving": tracks}, windows, folds, BEHAVIOURS, replace(OPTIONS, seeds=1))["rows"][0]
    assert row["top1"] > 0.9
    assert "sd" not in row


def test_windows_stay_inside_their_recording_and_around_known_behaviour():
    labels = [np.array([0, 1, 1, -1, 1, 0, 0, 1]), np.array([1, 0]), np.array([0, 0, 1, 1, 1, -1])]
    windows = windows_of(labels, 5)
    assert windows.centre.tolist() == [2, 4, 5, 12, 13]  # frames 2, 4, 5 of the first, 2 and 3 of the third
    assert windows.label.tolist() == [1, 1, 0, 1, 1]
    assert windows.recording.tolist() == [0, 0, 0, 2, 2]
    assert np.diff(windows.time)[2] >= 5  # windows of two recordings never overlap
    assert (windows.unknown, windows.cut) == (2, 16 - 2 - 5)
    with pytest.raises(InputError, match="window: no recording holds 9 frames"):
        windows_of(labels, 9)


def test_no_window_reaches_over_a_frame_that_is_missing():
    numbers = np.array([0, 2, 4, 6, 8, 12, 14, 16, 18, 20, 22])  # every second frame, 10 lacks
    windows = find_windows([np.zeros(11, int)], [numbers], 5, every=2)
    assert windows.centre.tolist() == [2, 7, 8]
    assert windows.cut == 8


def test_the_same_for_the_same_seeds_whatever_the_units():
    tracks, windows, folds = scene()
    options = replace(OPTIONS, steps=30)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = compare_actions({"a": tracks}, windows, folds, BEHAVIOURS, options)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert compare_actions({"a": tracks}, windows, folds, BEHAVIOURS, options) == first
    moved = compare_actions({"a": 1024 * tracks}, windows, folds, BEHAVIOURS, options)
    assert moved["rows"][0]["top1"] == pytest.approx(first["rows"][0]["top1"], abs=0.02)


def test_turns_are_rotations_about_the_vertical():
    up = np.array([1.0, 2.0, -2.0]) / 3
    turns = action_classifier._random_turns(5, 7 * up).numpy()
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.tile(np.eye(3), (5, 1, 1)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(turns), 1, atol=1e-6)
    np.testing.assert_allclose(turns @ up, np.tile(up, (5, 1)), atol=1e-6)
    assert np.abs(turns[0] - turns[1]).max() > 0.1


def test_scores():
    scores = np.array([[3, 2, 1], [1, 3, 2], [1, 3, 2], [2, 3, 1]])
    assert action_scores(scores, np.array([0, 1, 0, 0]), 2) == {
        "top1": 0.5,
        "topk": 0.75,
        "balanced": pytest.approx((1 / 3 + 1) / 2),
        "recall": [pytest.approx(1 / 3), 1.0, None],
    }


def test_class_weights_raise_the_rare_behaviour():
    """Two behaviours that overlap, one nine times as frequent: unweighted, the rare one is hardly ever named."""
    rng = np.random.default_rng(0)
    labels = (np.arange(2000) // 20 % 10 == 0).astype(int)
    tracks = rng.normal(size=(2000, 2, 3)) * (1 + 0.5 * labels)[:, None, None]
    windows = windows_of([labels[:1000], labels[1000:]], 5)
    folds = split_fold(windows, [1])
    recall = {
        weights: compare_actions(
            {"a": tracks}, windows, folds, ["usual", "rare"], ActionOptions(5, 1, 1, weights, 100)
        )["rows"][0]["recall"]
        for weights in ("balanced", "none")
    }
    assert recall["balanced"][1] > recall["none"][1] + 0.15
    assert recall["balanced"][0] < recall["none"][0]
    weights = action_classifier._class_weights(torch.tensor([0, 0, 0, 2]), 3)
    assert weights.tolist() == pytest.approx([2 / 3, 0, 2])


def test_table():
    document = {
        "options": {"top": 2},
        "behaviours": ["rest", "walk"],
        "rows": [
            {"name": "keypoints", "top1": 0.9, "topk": 1.0, "balanced": 0.85, "recall": [0.95, None],
             "sd": {"top1": 0.012, "topk": 0, "balanced": 0.02}},
            {"name": "majority", "top1": 0.6, "topk": 1.0, "balanced": 0.5, "recall": [1, 0]},
        ],
    }  # fmt: skip
    head, first, second = (line.split() for line in format_actions(document).splitlines())
    assert head == ["top-1", "top-2", "balanced", "rest", "walk"]
    assert " ".join(first) == "keypoints 90 % ± 1.2 100 % ± 0.0 85 % ± 2.0 95 % –"
    assert " ".join(second) == "majority 60 % 100 % 50 % 100 % 0 %"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, "window: expected an odd number of at least 5"),
        ({"window": 3}, "window: expected an odd"),
        ({"top": 0}, "top: expected at least 1"),
        ({"seeds": 0}, "seeds: expected at least 1"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"class_weights": "all"}, "class_weights: expected"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        ActionOptions(**options)


def test_bad_input():
    windows = windows_of([np.arange(40) % 2, np.arange(40) % 2], 5)
    folds, tracks = split_fold(windows, [1]), {"a": np.zeros((80, 2, 3))}

    def refused(message, tracks=tracks, windows=windows, folds=folds, top=2):
        with pytest.raises(InputError, match=message):
            compare_actions(tracks, windows, folds, ["a", "b"], ActionOptions(window=5, top=top))

    refused("tracks of a: expected", tracks={"a": np.zeros((70, 2, 3))})
    refused("tracks of a: some positions are not finite", tracks={"a": np.full((80, 2, 3), np.nan)})
    refused("at least two must occur", windows=windows_of([np.zeros(40, int)], 5))
    refused("none to train", folds=split_fold(windows, []))
    refused("top: expected at most", top=3)
    with pytest.raises(InputError, match="blocks: expected between 2"):
        blocked_folds(windows, 1, 5)
