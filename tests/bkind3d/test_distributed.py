"""Training in several processes: the same curve, resumption by another number, ends by signals."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import TINY, refused
from ranks import ENVIRONMENT, run_worlds
from safetensors.torch import load_file

from bkind3d.checkpoints import checkpoints
from bkind3d.cli import main
from bkind3d.config import load_config
from bkind3d.predict import predict
from bkind3d.run import load_model
from bkind3d.train import Interrupt, Trainer, is_about_another_process

# Of 32 pairs (both directions of 16) a step takes 12: the last 8 of an epoch fill no step and are left out.
PAIRS = 12
# Every other term of the objective is a mean over pairs; these compare the pairs of one process with each other.
SEPARABLE = ["--loss.identity=0", "--loss.rigidity=0", "--loss.equivariance=0"]


def training(rig: Path, out: Path, processes: int, *changes: str) -> list[str]:
    """A training with regularisers, averages, tree, turned volumes, and the same pairs in each step."""
    return [
        "train", "--project", str(rig), "--out", str(out), *TINY, "--data.reverse=true", "--model.turn_volume=true",
        "--model.silhouette_strides=[4,2]", "--loss.length=0.1", "--loss.regularise_after=0.5", *SEPARABLE,
        f"--train.batch={PAIRS // processes}", "--train.steps=5", "--train.log_every=1", "--train.sample_every=100",
        *changes,
    ]  # fmt: skip


def curves(run: Path) -> dict[str, np.ndarray]:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    left_out = ("seconds", "identity", "rigidity", "equivariance")
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0] if name not in left_out}


def assert_same_training(first: Path, second: Path) -> None:
    """Within a few roundings of float32: sums over pairs are taken in another order."""
    expected, got = curves(first), curves(second)
    assert len(expected["loss"]) == 5
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values, rtol=2e-4, atol=1e-6, err_msg=name)
    one, other = (load_model(run, load_config(run / "config.yaml"))[0].state_dict() for run in (first, second))
    for name in ("skeleton.average", "skeleton.observed", "skeleton.tree", "skeleton.known"):
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-6)
    scales = [load_file(checkpoints(run)[-1][1] / "objective.safetensors")["reconstruction.scales"]
              for run in (first, second)]  # fmt: skip
    torch.testing.assert_close(*scales, rtol=1e-4, atol=1e-6)


def test_any_number_of_processes_trains_the_same(rig: Path, tmp_path: Path) -> None:
    """One, two and four processes; and two that hand on to one in the middle of an epoch, and one to two."""
    runs = {name: tmp_path / name for name in ("1", "2", "4", "2 to 1", "1 to 2")}

    def crash(name: str) -> list[str]:
        """The run of so many processes as if it had died after step 3; returns the command that goes on."""
        shutil.copytree(runs[name[0]], runs[name])
        shutil.rmtree(checkpoints(runs[name])[-1][1])
        return ["train", "--resume", "--out", str(runs[name])]

    main(training(rig, runs["1"], 1, "--train.save_every=3"))
    run_worlds(
        (2, training(rig, runs["2"], 2, "--train.save_every=3")), (4, training(rig, runs["4"], 4)), (2, crash("1 to 2"))
    )
    main(crash("2 to 1"))
    for name in ("2", "4", "2 to 1", "1 to 2"):
        assert_same_training(runs["1"], runs[name])
    assert load_config(runs["2 to 1"] / "config.yaml").train.batch == PAIRS
    assert load_config(runs["1 to 2"] / "config.yaml").train.batch == PAIRS // 2


def test_processes_that_cannot_share_a_step(rig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run = tmp_path / "run"
    main(training(rig, run, 1))
    state = checkpoints(run)[-1][1] / "trainer.json"
    assert json.loads(state.read_text())["pairs"] == PAIRS
    with monkeypatch.context() as patched:
        patched.setattr("accelerate.Accelerator.num_processes", property(lambda accelerator: 5))
        assert "12 pairs, which 5 processes cannot share evenly" in refused(
            ["train", "--resume", "--out", str(run)], capsys
        )
    state.write_text("{")
    assert "corrupt or foreign checkpoint" in refused(["train", "--resume", "--out", str(run)], capsys)


def await_checkpoint(run: Path, launched: subprocess.Popen[str], after: int = 0) -> None:
    for _ in range(6000):
        if any(step > after for step, _ in checkpoints(run)):
            return
        assert launched.poll() is None, launched.communicate()[1]
        time.sleep(0.05)
    raise TimeoutError(run)


def workers_of(launched: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
def test_a_killed_and_a_terminated_job_go_on(rig: Path, tmp_path: Path) -> None:
    """Under torchrun, two processes: one dies; the job goes on, is asked to leave, and one process reads the run."""
    run = tmp_path / "run"
    long = training(rig, run, 2, "--train.steps=100000", "--train.save_every=2", "--method=triangulation")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "bkind3d.cli"]

    def start(arguments: list[str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([*launch, *arguments], env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)

    killed = start(long)
    await_checkpoint(run, killed)
    os.kill(workers_of(killed)[1], signal.SIGKILL)
    error = killed.communicate(timeout=120)[1]
    assert killed.returncode != 0
    lines = [line for line in error.splitlines() if line.startswith("bkind3d: error: ")]
    assert len(lines) == 1, error
    assert "another process of the training has ended" in lines[0]
    assert "bkind3d/train.py" not in error  # no traceback of ours

    step = checkpoints(run)[-1][0]
    terminated = start(["train", "--resume", "--out", str(run)])
    await_checkpoint(run, terminated, after=step)
    terminated.send_signal(signal.SIGTERM)
    error = terminated.communicate(timeout=120)[1]
    assert terminated.returncode != 0
    assert error.count("bkind3d: terminated and saved; go on with: bkind3d train --resume") == 1, error
    assert "bkind3d/train.py" not in error
    with (run / "metrics.csv").open() as file:
        assert checkpoints(run)[-1][0] == int(list(csv.DictReader(file))[-1]["step"])
    assert not list((run / "checkpoints").glob(f"step_{checkpoints(run)[-1][0]:06d}.part*"))
    assert predict(run, recordings=["test"], progress=False)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_gives_its_status(
    rig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    run, after_step = tmp_path / "run", Trainer._after_step

    def press(trainer: Trainer, *arguments: object) -> None:
        after_step(trainer, *arguments)  # type: ignore[arg-type]
        if trainer.step == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_after_step", press)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        main(training(rig, run, 1))
    assert caught.value.code == status
    assert [step for step, _ in checkpoints(run)] == [3]
    assert signal.getsignal(number) is before
    assert len(curves(run)["step"]) == 3


def test_only_a_second_ctrl_c_stops_at_once() -> None:
    interrupt = Interrupt()
    for _ in range(2):
        interrupt(signal.SIGTERM, None)
    assert interrupt.signal == signal.SIGTERM
    interrupt(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGINT, None)


def test_errors_of_a_lost_process() -> None:
    assert is_about_another_process(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert is_about_another_process(torch.distributed.DistBackendError("NCCL communicator was aborted"))
    assert not is_about_another_process(RuntimeError("shapes do not match"))
