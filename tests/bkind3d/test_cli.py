"""The command line: every verb runs, and bad input ends in one line, exit code 2 and no traceback."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import TINY, refused

from bkind3d.cli import VERBS, main
from bkind3d.config import load_config


def test_the_whole_way(rig: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    main(["check", str(rig), *TINY, "--out", str(tmp_path / "check")])
    table = capsys.readouterr().out
    assert "cam0" in table
    assert re.search(r"^memory for training: about [\d.]+ GB; .*[\d.]+ GB with train.batch 1", table, re.MULTILINE)
    for kind in ("volume", "foreground"):
        assert len(list((tmp_path / "check").glob(f"{kind}_*.png"))) == 4
    main(["train", "--project", str(rig), "--out", run, *TINY])
    assert "bkind3d predict" in capsys.readouterr().out
    main(["predict", run])
    main(["evaluate", run, "--bias", "--ridge", "auto"])
    table = capsys.readouterr().out
    assert all(name in table for name in ("BKinD-3D", "untrained network", "mean pose", "ridge auto", "skeleton: "))
    assert "parts of the body over 8 frames" in table
    main(["evaluate", run, "--regressor", "mlp", "--hidden", "8", "--per_joint", "--force"])
    table = capsys.readouterr().out
    assert all(words in table for words in ("two-layer MLP fitted on 20", "hidden 8", "epochs chosen", "paw_hind_left"))
    assert (tmp_path / "run" / "evaluation.csv").read_text().count("\n") == 1 + 3 * 21
    main(["report", run])
    assert (tmp_path / "run" / "report.html").is_file()
    main(["train", "--resume", "--out", run, "--steps", "3"])
    assert load_config(tmp_path / "run" / "config.yaml").train.steps == 3
    for verb in ("predict", "evaluate", "report"):
        assert "--force" in refused([verb, run], capsys)
    main(["predict", run, "--force"])


def test_settings_from_a_file(rig: Path, tmp_path: Path) -> None:
    """A run's own config.yaml is a valid --config, and the command line overrides it."""
    main(["train", "--project", str(rig), "--out", str(tmp_path / "a"), *TINY])
    main(["train", "--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b"), "--train.steps=1"])
    first, second = (load_config(tmp_path / name / "config.yaml") for name in "ab")
    first.train.steps = 1
    assert first == second


@pytest.mark.parametrize("verb", [*VERBS, "cache", "check", "train"])
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "default" in text
    assert "usage" in text


def test_unknown_setting(rig: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--project", str(rig), "--out", str(tmp_path / "run"), "--model.voxles=3"])
    assert caught.value.code == 2
    assert "voxles" in capsys.readouterr().err


def edit(project: Path, change: dict) -> None:
    """Change keys of the project file's first recording, or of the file."""
    content = yaml.safe_load(project.read_text())
    for key, value in change.items():
        (content["recordings"][0] if key in content["recordings"][0] else content)[key] = value
    project.write_text(yaml.safe_dump(content))


def truncate_video(project: Path) -> None:
    video = project.parent / "train" / "cam1.mp4"
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])


def delete_video(project: Path) -> None:
    (project.parent / "train" / "cam2.mp4").unlink()


def shorter_video(project: Path) -> None:
    shutil.copy(project.parent / "test" / "cam1.mp4", project.parent / "train" / "cam1.mp4")


def camera_without_video(project: Path) -> None:
    content = yaml.safe_load(project.read_text())
    del content["recordings"][0]["videos"]["cam3"]
    project.write_text(yaml.safe_dump(content))


def video_without_camera(project: Path) -> None:
    content = yaml.safe_load(project.read_text())
    content["recordings"][0]["videos"]["cam9"] = "train/cam1.mp4"
    project.write_text(yaml.safe_dump(content))


def calibration(old: str, new: str):
    def change(project: Path) -> None:
        path = project.parent / "calibration.toml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def rotation(value: str):
    """Give the first camera another rotation."""

    def change(project: Path) -> None:
        path = project.parent / "calibration.toml"
        path.write_text(re.sub(r"rotation = \[.*?\]", f"rotation = {value}", path.read_text(), count=1))

    return change


def volume_behind(project: Path) -> None:
    edit(project, {"volume": {"center": [0.0, 0.0, 500.0], "size": [1.0, 1.0, 1.0]}})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (delete_video, ["cam2.mp4"]),
        (truncate_video, ["cam1.mp4"]),
        (shorter_video, ["cam1", "20", "8"]),
        (camera_without_video, ["cam3"]),
        (video_without_camera, ["cam9"]),
        (calibration("0.0, 0.0, 1.0", "0.0, 0.1, 1.0"), ["calibration.toml", "0 0 1"]),
        (rotation("[nan, 0.0, 0.0]"), ["calibration.toml", "cam0", "finite"]),
        (rotation("[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0]]"), ["calibration.toml", "cam0", "mirrored"]),
        (volume_behind, ["volume"]),
        (lambda project: edit(project, {"units": "furlong"}), ["units", "furlong"]),
        (lambda project: edit(project, {"voulme": {}}), ["voulme", "volume"]),
        (lambda project: project.write_text("{"), ["project.yaml"]),
        (lambda project: project.unlink(), ["project.yaml"]),
    ],
)
def test_bad_project(damage, words: list[str], own_rig: Path, tmp_path: Path, capsys) -> None:
    damage(own_rig)
    for arguments in (
        ["check", str(own_rig), *TINY],
        ["train", "--project", str(own_rig), "--out", str(tmp_path / "run"), *TINY],
    ):
        line = refused(arguments, capsys)
        assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_bad_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("predict", "evaluate", "report"):
        assert "nowhere" in refused([verb, str(tmp_path / "nowhere")], capsys)


def test_zero_gap(rig: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "gap" in refused(["check", str(rig), "--data.gap", "0"], capsys)
    arguments = ["train", "--project", str(rig), "--out", str(tmp_path / "run"), *TINY, "--data.gap=0 s"]
    assert "gap" in refused(arguments, capsys)


def test_demo_refuses_an_existing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    assert "--force" in refused(["demo", "--out", str(tmp_path / "run")], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_demo_never_replaces_data_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mouse-data").mkdir()
    (tmp_path / "mouse-data" / "project.yaml").write_text("name: mine")
    assert "not made by a demo" in refused(["demo", "--out", str(tmp_path / "mouse"), "--force"], capsys)
    assert (tmp_path / "mouse-data" / "project.yaml").read_text() == "name: mine"


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("--data.height=36", "data.height"),
        ("--model.edge_sigmas=[1]", "model.edge_sigmas"),
        ("--model.logit_gain=0", "model.logit_gain"),
        ("--model.volume_channels=[4]", "model.volume_channels"),
        ("--loss.ssim_window=4", "loss.ssim_window"),
        ("--train.batch=0", "train.batch"),
        ("--train.save_every=0", "train.save_every"),
        ("--train.seed=-1", "train.seed"),
        ("--data.gap=[]", "data.gap"),
        ("--train.precision=fp16", "train.precision"),
        ("--train.precision=bf16", "train.precision"),
        ("--model.backend=cuda", "cuda"),
        ("--steps=5", "--resume"),
        ("--resume", "--steps"),
    ],
)
def test_impossible_settings(setting: str, name: str, rig: Path, tmp_path: Path, capsys) -> None:
    arguments = ["train", "--project", str(rig), "--out", str(tmp_path / "run"), *TINY, setting]
    assert name in refused(arguments, capsys)


def test_no_traceback_from_the_installed_command(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("bkind3d")
    done = subprocess.run([command, "check", tmp_path / "absent.yaml"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "absent.yaml" in done.stderr


def test_the_base_installation_says_what_the_command_needs() -> None:
    code = (
        "import sys; sys.modules['jsonargparse'] = None; import runpy; runpy.run_module('bkind3d', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "bkind3d: error: the command needs jsonargparse, which is not installed: pip install 'bkind3d[train]'\n"
    )


def test_the_command_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "bkind3d", "--help"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert all(f" {verb} " in done.stdout for verb in VERBS)
