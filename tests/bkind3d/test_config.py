"""Settings by hand: every one is read by its type, or refused in one line that names it."""

from dataclasses import fields
from pathlib import Path

import pytest
from command_line import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from bkind3d.cli import check_settings_files
from bkind3d.config import Config, load_config, read_settings, save_config, to_dict, validate
from bkind3d.documents import dump_yaml
from bkind3d.errors import InputError


def changed(name: str, value: object) -> dict:
    content = to_dict(Config())
    section, _, key = name.rpartition(".")
    (content[section] if section else content)[key] = value
    return content


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    for config in (Config(), Config(project=Path("a: b"), cache=Path("1e3"), method="depth")):
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("train.lr", "2e-3", 0.002),
        ("train.lr", "'2e-3'", 0.002),
        ("train.lr", "1", 1.0),
        ("train.precision", "no", "no"),
        ("data.gap", "[3, 0.4 s]", [3, "0.4 s"]),
        ("model.voxels", "'64'", 64),
        ("model.edge_sigmas", "[1, 2, 3, 4, 5]", (1.0, 2.0, 3.0, 4.0, 5.0)),
    ],
)
def test_values_as_people_write_them(tmp_path: Path, name: str, text: str, expected: object) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(changed(name, "HERE")).replace("HERE", text))
    section, _, key = name.partition(".")
    found = getattr(getattr(load_config(path), section), key)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.encoder", "smal", "model.encoder: expected one of resnet50, resnet18, small, not 'smal'"),
        ("train.lrr", 1, "train.lrr: no such setting; did you mean train.lr?"),
        ("train.batch", 2.5, "train.batch: expected a whole number, not 2.5"),
        ("train.batch", True, "train.batch: expected a whole number, not True"),
        ("train.lr", None, "train.lr: expected a number, not None"),
        ("train.lr", "nan", "train.lr: expected a number, not 'nan'"),
        ("train.lr", float("inf"), "train.lr: expected a number, not inf"),
        ("train.lr", 1e300, "train.lr: expected a number, not 1e+300"),
        ("data.reverse", "yes", "data.reverse: expected true or false, not 'yes'"),
        ("data.gap", [[1]], "data.gap: expected a text or a whole number or a list"),
        ("model", 5, "model: expected names and values, not 5"),
        ("model.edge_sigmas", "a", "model.edge_sigmas: expected a list, each a number, not 'a'"),
        ("model.voxels", 10**9, "model.voxels: expected 1024 at most, got 1000000000"),
        ("project", [1], "project: expected a path, not [1]"),
        ("cache", "", "cache: expected a path or null, not ''"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, name: str, value: object, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(changed(name, value)))
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    if "at most" not in message:  # a limit is looked at when the command line has been read
        with pytest.raises(InputError) as caught:
            check_settings_files(["train", f"--config={path}", "--out", "run"])
        assert message in str(caught.value)


def test_the_command_line_names_it_too(tmp_path: Path, capsys) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(changed("train.lrr", 1)))
    assert f"{path}: train.lrr: no such" in refused(["train", "--config", str(path), "--out", "run"], capsys)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NAMES = [f"{section}.{key}" for section in ("data", "model", "loss", "train") for key in to_dict(Config())[section]]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([*NAMES, *(field.name for field in fields(Config))]), PLAIN | st.lists(PLAIN, max_size=3))
def test_any_value_is_taken_or_named(name: str, value: object) -> None:
    message = name
    try:
        validate(read_settings(Config, changed(name, value)))
    except InputError as error:
        message = str(error)
    assert name.split(".")[0] in message
    assert "\n" not in message
