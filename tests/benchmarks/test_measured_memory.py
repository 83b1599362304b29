"""What is foretold of a training step's memory is what it takes."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import compare
from bkind3d.sims.simulate import simulate_rig

SMALL: dict[str, Any] = {"data.height": 64, "data.width": 64, "data.window": 48, "train.batch": 2}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "rig"
    return simulate_rig(folder, views=4, frames=40, test_frames=2, image_size=(64, 64), workers=1, progress=False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "volumetric", "data.foreground": False, "data.window": 0},
        {"method": "volumetric", "train.checkpointing": "all", "model.voxels": 28},
    ],
)
def test_within_15_per_cent(project: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    row = compare("small", 4, SMALL | changes, project, tmp_path / "run")
    assert 0.85 < row["model_bytes"] / row["measured_bytes"] < 1.15
