"""Calls in processes of their own, from callers of every kind."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from errands import double, end, fail, square

from bkind3d.data import load_project, load_truth
from bkind3d.errors import InputError
from bkind3d.processes import call_each
from bkind3d.sims.simulate import simulate_rig

FAILURES = [InputError("frames: too few"), OSError(28, "No space left on device"), KeyboardInterrupt()]


@pytest.mark.parametrize("fresh", [False, True])
def test_results_and_reports_of_other_processes(fresh: bool) -> None:
    heard: list[int] = []
    found = list(call_each(square, [1, 2, 3], 1, report=heard.append, fresh=fresh))
    assert sorted(result for result, _ in found) == [1, 4, 9]
    assert sorted(heard) == [1, 2, 3]
    processes = {process for _, process in found}
    assert os.getpid() not in processes
    assert len(processes) == (3 if fresh else 1)


def test_nothing_to_do() -> None:
    assert list(call_each(square, [], 2)) == []


def test_tensors_go_there_and_back() -> None:
    (found,) = call_each(double, [torch.arange(3.0)], 1)
    assert torch.equal(found, torch.tensor([0.0, 2.0, 4.0]))


@pytest.mark.parametrize("error", FAILURES)
def test_errors_are_raised_here(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        list(call_each(fail, [error], 1))
    assert str(caught.value) == str(error)


def test_a_process_that_ends_by_itself() -> None:
    with pytest.raises(RuntimeError, match="process of end ended by itself, with exit code 3"):
        list(call_each(end, [3], 1))


@pytest.mark.parametrize("caller", ["standard input", "unguarded script"])
def test_rigs_are_simulated_from_anywhere(tmp_path: Path, caller: str) -> None:
    """No caller's main module is run again, and the files are those of one process."""
    small = {"views": 4, "frames": 3, "test_frames": 2, "image_size": (32, 32), "progress": False}
    code = (
        "from bkind3d.sims.simulate import simulate_rig\n"
        f"print(simulate_rig({str(tmp_path / 'rig')!r}, workers=2, **{small}))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    arguments = ["-"] if caller == "standard input" else [str(script)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *arguments], input=code, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    project = load_project(Path(done.stdout.strip()))
    alone = load_project(simulate_rig(tmp_path / "alone", workers=1, **small))
    for here, there in zip(project.recordings, alone.recordings, strict=True):
        np.testing.assert_array_equal(load_truth(here, project).points3d, load_truth(there, alone).points3d)
        assert [Path(str(path)).read_bytes() for path in here.videos.values()] == [
            Path(str(path)).read_bytes() for path in there.videos.values()
        ]
