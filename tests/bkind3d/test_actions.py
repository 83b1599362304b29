"""Behaviour of a run's recordings: which frames, which splits, and the verb from the videos to actions.json."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_line import TINY, refused
from small_rig import ring

from bkind3d.cli import main
from bkind3d.data import CachedRecording, Recording, Truth, load_project, load_truth, save_truth
from bkind3d.errors import InputError
from bkind3d.evaluation import actions
from bkind3d.evaluation.evaluate import Annotated, fit_and_test

FAST = ["--window=0.14", "--seeds=2", "--steps=3"]  # five frames of the small rig


def annotated(points: np.ndarray, split: str = "train", fps: float = 30.0, **behaviour: object) -> Annotated:
    names = [f"joint{k}" for k in range(points.shape[1])]
    truth = Truth(points, names, np.zeros((0, 2), int), fps, **behaviour)  # type: ignore[arg-type]
    shape = (len(points), 1, 8, 8, 3)
    cached = CachedRecording(split, split, fps, Path("none.npy"), shape, ring(1), np.arange(len(points)))
    return Annotated(Recording(split, split, {}), cached, truth)


def with_behaviour(rig: Path, folder: Path, splits: dict[str, str]) -> Path:
    """A copy of the project whose truth names behaviours; frames come from the same cache."""
    shutil.copytree(rig.parent, folder, ignore=shutil.ignore_patterns("cache"))
    content = yaml.safe_load((folder / "project.yaml").read_text())
    for recording in content["recordings"]:
        recording["split"] = splits[recording["name"]]
    (folder / "project.yaml").write_text(yaml.safe_dump(content))
    project = load_project(folder / "project.yaml")
    for recording in project.recordings:
        truth = load_truth(recording, project)
        behaviour = np.arange(len(truth.points3d)) // 2 % 2
        behaviour[3] = -1
        save_truth(recording.truth, replace(truth, behaviour=behaviour, behaviours=["walk", "rear"]), "m")
    return folder / "project.yaml"


def train(project: Path, rig: Path, run: Path) -> str:
    main(["train", "--project", str(project), "--cache", str(rig.parent / "cache"), "--out", str(run), *TINY])
    return str(run)


def test_from_videos_to_a_table(rig: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(with_behaviour(rig, tmp_path / "rig", {"train": "train", "test": "test"}), rig, tmp_path / "run")
    capsys.readouterr()
    main(["actions", run, *FAST])
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "run" / "actions.json").read_text())
    assert [row["name"] for row in document["rows"]] == ["BKinD-3D", "true joints", "untrained network", "majority"]
    assert all(row["name"] in printed for row in document["rows"])
    # 20 frames to train on: two left out at each end, one unknown. 8 to test on: likewise.
    assert "over 5 frames (0.14 s), trained on 15 windows of the training recordings, tested on 3" in printed
    assert document["windows"] == {"tested": [2, 1], "unknown": 2, "cut": 8}
    assert document["options"]["window"] == 5
    assert document["options"]["class_weights"] == "balanced"
    assert (document["step"], document["behaviours"]) == (2, ["walk", "rear"])
    assert "--force" in refused(["actions", run], capsys)
    main(["report", run])
    assert "tested on 3 of the test recordings" in (tmp_path / "run" / "report.html").read_text()


def test_recordings_of_both_splits_are_cut_into_blocks(rig: Path, tmp_path: Path, capsys) -> None:
    run = train(with_behaviour(rig, tmp_path / "rig", {"train": "both", "test": "both"}), rig, tmp_path / "run")
    main(["actions", run, *FAST, "--blocks=3", "--class_weights=none"])
    document = json.loads((tmp_path / "run" / "actions.json").read_text())
    assert "cross-validated over 3 blocks" in document["protocol"]
    assert sum(document["windows"]["tested"]) == 18  # every window is tested once
    assert "window" in refused(["actions", run, "--window=0.01", "--force"], capsys)


def test_without_behaviour(rig: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(rig, rig, tmp_path / "run")
    assert "no behaviour to classify" in refused(["actions", run], capsys)
    assert not (tmp_path / "run" / "actions.json").exists()


def test_behaviours_are_matched_by_name() -> None:
    points = np.zeros((4, 3, 3))
    one = annotated(points, behaviour=np.array([0, 1, -1, 1]), behaviours=["walk", "rear"])
    other = annotated(points, behaviour=np.array([1, 0, 0, -1]), behaviours=["groom", "walk"])
    names, labels = actions.behaviour_of([one, other], every=1)
    assert names == ["walk", "rear", "groom"]
    assert [label.tolist() for label in labels] == [[0, 1, -1, 1], [0, 2, 2, -1]]
    assert actions.behaviour_of([one], every=2)[1][0].tolist() == [0, -1]


def test_gaps_in_true_tracks_are_filled_in_time() -> None:
    points = np.arange(6.0)[:, None, None] * np.ones((6, 3, 3))
    holes = points.copy()
    holes[2:4, 0] = np.nan
    holes[0, 1, 2] = np.nan  # one coordinate is enough
    filled = actions.true_tracks([annotated(holes)], every=1)
    np.testing.assert_allclose(filled[:, 0], points[:, 0])
    np.testing.assert_allclose(filled[0, 1], 1)  # held from the first frame that is known
    holes[:, 2] = np.nan
    assert actions.true_tracks([annotated(points), annotated(holes)], every=1).shape == (12, 2, 3)
    with pytest.raises(InputError, match="no joint is annotated in every recording"):
        actions.true_tracks([annotated(np.full((6, 3, 3), np.nan))], every=1)


def test_window_in_frames() -> None:
    slow, fast = (annotated(np.zeros((4, 3, 3)), fps=fps) for fps in (30.0, 50.0))
    assert actions.window_in_frames(1.0, [slow, slow], 1) == 31
    assert actions.window_in_frames(1.0, [fast], 5) == 11
    with pytest.raises(InputError, match="two lengths of time at 30 and 50 frames per second"):
        actions.window_in_frames(1.0, [slow, fast], 1)
    with pytest.raises(InputError, match="every: expected 1 or more"):
        actions.true_tracks([slow], 0)


def test_splits() -> None:
    train, test, both = (annotated(np.zeros((4, 3, 3)), split) for split in ("train", "test", "both"))
    assert fit_and_test([train, both, test]) == ([train], [test])
    assert fit_and_test([both, train]) == ([both], [])
    assert fit_and_test([train]) == ([], [])
