"""The settings in ``configs/`` load, hold together, and are what they say."""

import dataclasses
from pathlib import Path

import pytest

from bkind3d.cli import settings_of, train_parser
from bkind3d.config import Config, validate
from bkind3d.experiments.subjects import SUBJECTS
from bkind3d.memory import training_memory

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name: str) -> Config:
    parser = train_parser()
    arguments = ["--config", str(CONFIGS / name), "--project", "rig/project.yaml", "--out", "runs/rig"]
    return settings_of(parser.instantiate(parser.parse_args(arguments)))


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_settings_load_and_are_valid(name: str) -> None:
    config = load(name)
    validate(config)
    assert config != dataclasses.replace(Config(), project=config.project)


def test_cpu_is_the_demo() -> None:
    assert load("cpu.yaml") == SUBJECTS["animal"].config(Path("rig/project.yaml"), seed=0)


def test_a_step_of_six_cameras_fits_into_24_gb() -> None:
    assert training_memory(load("gpu-24gb.yaml"), 6, (64, 64, 64)) < 22e9
