"""The short form of `benchmarks.faults`: some mutants of every kind of file that is read, none of which goes wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import faults
from bkind3d.errors import InputError


class Report:
    """What a trial sends: the counts, and what went wrong."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    faults.make(folder)
    return folder


@pytest.mark.parametrize("name", faults.KINDS)
def test_no_mutant_goes_wrong(files: Path, name: str) -> None:
    path, report = files / faults.KINDS[name].path, Report()
    good = path.read_bytes()
    try:
        faults.try_kind(name, files, seconds=2.0, most=12, seed=1, report=report)
    finally:
        path.write_bytes(good)
    *wrong, counts = report.sent
    assert wrong == []
    assert counts["tried"] >= 5
    assert counts["taken"] + counts["refused"] == counts["tried"]


def test_what_is_wrong_is_counted(tmp_path: Path) -> None:
    """An error that is not of the input, more than one line, and what takes too long."""

    def fails(path: Path) -> None:
        raise {b"a": KeyError("a"), b"b": InputError("two\nlines"), b"c": InputError("one line")}[path.read_bytes()]

    outcomes = []
    for content in "abc":
        (tmp_path / "file").write_text(content)
        outcomes.append(faults.trial(faults.Kind("file", fails), tmp_path / "file")[0])
    assert outcomes == ["wrong", "wrong", "refused"]


def test_mutants_are_others() -> None:
    data, random = b"name: rig\nunits: m\n" * 5, np.random.default_rng(0)
    assert len({faults.mutant(data, random, text=True) for _ in range(100)} - {data}) > 80
