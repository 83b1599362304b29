"""From the command line: a published data set in, and everything downstream as for any project."""

import json
from pathlib import Path

import numpy as np
import pytest
from layouts import H36M_CAMERAS, TRAIN_FRAMES, write_h36m_layout, write_rat7m_layout

from bkind3d.cli import build_parser, main
from bkind3d.config import Config, validate
from bkind3d.data import load_project
from bkind3d.poses import Poses

CONFIGS = Path(__file__).parents[2] / "configs"
# Small enough for a test; everything else comes from the preset.
SMALL = [
    "--data.height=32", "--data.width=40", "--model.keypoints=4", "--model.encoder=small", "--model.pyramid_channels=8",
    "--model.channels=4", "--model.voxels=8", "--model.volume_channels=[4,4]", "--model.volume_stem=3",
    "--model.volume_blocks=1", "--model.edge_strides=[8,4]", "--model.edge_sigmas=[1.0,1.5]",
    "--model.decoder_channels=[8,8]", "--loss.network=none", "--loss.pixel_scales=1", "--train.steps=2",
    "--train.batch=2",
]  # fmt: skip


@pytest.mark.parametrize(("name", "gap"), [("h36m", "0.4 s"), ("rat7m", "0.66 s")])
def test_presets_have_the_settings_of_the_paper(name: str, gap: str, tmp_path: Path) -> None:
    config = ["--config", str(CONFIGS / f"{name}.yaml"), "--project", str(tmp_path / "p.yaml")]
    settings = build_parser().parse_args(["train", *config, "--out", str(tmp_path / "run")]).train
    assert (settings.data.height, settings.data.width, settings.data.crop, settings.data.gap) == (256, 256, "none", gap)
    model = settings.model
    assert (model.keypoints, model.encoder, model.channels, model.map_stride, model.voxels) == (
        15,
        "resnet50",
        32,
        4,
        64,
    )


@pytest.mark.parametrize("file", sorted(CONFIGS.iterdir()), ids=lambda file: file.name)
def test_every_preset_can_be_trained(file: Path, tmp_path: Path) -> None:
    parser = build_parser()
    namespace = parser.parse_args(["train", "--config", str(file), "--out", str(tmp_path / "run")])
    settings = parser.instantiate(namespace).train
    validate(Config(**{name: settings[name] for name in Config.__dataclass_fields__}))


def test_the_papers_objective_joins_any_other_preset(tmp_path: Path) -> None:
    files = ["--config", str(CONFIGS / "rat7m.yaml"), "--config", str(CONFIGS / "paper.yaml")]
    settings = build_parser().parse_args(["train", *files, "--out", str(tmp_path / "run")]).train
    assert (settings.data.gap, settings.data.crop, settings.model.encoder) == ("0.66 s", "none", "resnet50")
    assert (settings.data.foreground, settings.method, settings.model.turn_volume) == (False, "volumetric", False)
    assert settings.model.bottleneck == "edges"
    loss = settings.loss
    assert (loss.length, loss.separation, loss.separation_sigma, loss.target) == (0.1, 0.01, 0.05, "ssim")


def test_rat7m_from_its_files_to_an_evaluation(tmp_path: Path, capsys) -> None:
    """Cameras of each session, chunks, and an index: import, check, train, predict, evaluate."""
    write_rat7m_layout(tmp_path / "data", moments=30, chunk=12)
    project, run = tmp_path / "out" / "project.yaml", tmp_path / "run"
    main(["import", "rat7m", str(tmp_path / "data"), "--every", "2", "--out", str(tmp_path / "out")])
    assert f"{project}; next: bkind3d check {project}" in capsys.readouterr().out
    main(["check", str(project), "--config", str(CONFIGS / "rat7m.yaml"), *SMALL, "--data.foreground=false"])
    printed = capsys.readouterr().out
    assert "20 frames = 0.667 s" in printed
    assert "2 calibrations" in printed
    assert "warning" not in printed
    preset = ["--config", str(CONFIGS / "rat7m.yaml"), "--project", str(project), "--out", str(run)]
    main(["train", *preset, *SMALL])
    main(["predict", str(run)])
    times = Poses.load(run / "poses" / "s5-d1.nc").time
    np.testing.assert_allclose(times, np.arange(0, 30, 2) / 30)
    main(["evaluate", str(run), "--every", "4"])
    result = json.loads((run / "evaluation.json").read_text())
    assert "8 training frames" in result["protocol"]
    assert "8 test frames" in result["protocol"]
    assert result["units"] == "mm"


def test_h36m_from_the_command_line(tmp_path: Path, capsys) -> None:
    write_h36m_layout(tmp_path / "data")
    out = tmp_path / "out"
    main(["import", "h36m", str(tmp_path / "data"), "--subjects", "[S1]", "--center", "[0,0,900]", "--side", "2500",
          "--out", str(out)])  # fmt: skip
    project = load_project(out / "project.yaml")
    assert project.cameras.names == H36M_CAMERAS
    assert [row.name for row in project.recordings] == ["S1-Walking-1"]
    assert project.volume.size == (2500.0, 2500.0, 2500.0)
    main(["check", str(out / "project.yaml"), *SMALL])
    assert f"{len(TRAIN_FRAMES)}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["import", "h36m", str(tmp_path / "data"), "--out", str(out)])
    assert ended.value.code == 2
    assert "this project exists; remove it or choose another folder" in capsys.readouterr().err
