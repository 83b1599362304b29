"""One small simulated recording for every test that needs real videos."""

import shutil
from pathlib import Path

import pytest

from bkind3d.sims.simulate import simulate_rig


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Project file of four cameras: 20 training and 8 test frames of 48 × 48 pixels."""
    folder = tmp_path_factory.mktemp("rig") / "rig"
    return simulate_rig(folder, views=4, frames=20, test_frames=8, image_size=(48, 48), workers=1, progress=False)


@pytest.fixture
def own_rig(rig: Path, tmp_path: Path) -> Path:
    """A copy of the project that a test may break."""
    shutil.copytree(rig.parent, tmp_path / "rig", ignore=shutil.ignore_patterns("cache"))
    return tmp_path / "rig" / "project.yaml"
