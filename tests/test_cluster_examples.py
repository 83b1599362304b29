"""The examples for clusters: shells accept them, and the commands that they come down to are ours."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from bkind3d.cli import build_parser

FOLDER = Path(__file__).parents[1] / "examples/cluster"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
# What a cluster has, each as a script: the command that a script comes down to is written into a file.
STUBS = {
    "srun": 'exec "$@"',
    "scontrol": "echo first; echo second",
    "torchrun": 'while [ "$1" != -m ]; do echo "$1" >>"$LAUNCH"; shift; done; shift; exec "$@"',
    "bkind3d": 'printf "%s\\n" "$@" >>"$COMMAND"',
}
SLURM = {
    "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7",
}  # fmt: skip


def command_of(script: list[str], folder: Path, **environment: str) -> list[str]:
    """The arguments of the one call of `bkind3d` in a script that runs in a folder."""
    for name, text in STUBS.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    found = folder / "command"
    found.unlink(missing_ok=True)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    files = {"COMMAND": str(found), "LAUNCH": str(folder / "launch")}
    subprocess.run(script, cwd=folder, env=os.environ | {"PATH": path} | files | environment, check=True, timeout=60)
    return found.read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shells_accept_a_script(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
    assert all(line.startswith("#SBATCH --") for line in script.read_text().splitlines() if "SBATCH" in line)


@pytest.mark.parametrize("name", ["predict", "cache"])
def test_an_array_takes_its_share(name: str, tmp_path: Path) -> None:
    arguments = command_of(["bash", str(FOLDER / f"{name}.sbatch")], tmp_path, **SLURM)
    parsed = build_parser().parse_args(arguments)
    assert (parsed.verb, parsed[name].shard) == (name, "2/4")


def test_training_starts_and_goes_on(tmp_path: Path) -> None:
    script = ["bash", str(FOLDER / "train.sbatch")]
    first = build_parser().parse_args(command_of(script, tmp_path, **SLURM)).train
    assert (str(first.out), first.resume, first.train.batch) == ("runs/mine", False, 2)
    assert (tmp_path / "launch").read_text().split()[:4] == ["--nnodes", "2", "--nproc_per_node", "4"]
    assert "first:29500" in (tmp_path / "launch").read_text()
    (tmp_path / "runs/mine/checkpoints/step_000200.partial").mkdir(parents=True)
    assert not build_parser().parse_args(command_of(script, tmp_path, **SLURM)).train.resume
    (tmp_path / "runs/mine/checkpoints/step_000200").mkdir()
    assert build_parser().parse_args(command_of(script, tmp_path, **SLURM)).train.resume


def test_the_pods_of_an_indexed_job_share_the_recordings(tmp_path: Path) -> None:
    """Checked by hand against the fields of batch/v1 that are used: a cluster is needed for its schema."""
    job = yaml.safe_load((FOLDER / "predict-job.yaml").read_text())
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert set(job["spec"]) == {"completionMode", "completions", "parallelism", "backoffLimit", "template"}
    pod = job["spec"]["template"]["spec"]
    assert set(pod) == {"restartPolicy", "containers", "volumes"}
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    shards = []
    for index in range(job["spec"]["completions"]):
        script = [*container["command"], *container["args"]]
        arguments = command_of(script, tmp_path, JOB_COMPLETION_INDEX=str(index))
        shards.append(build_parser().parse_args(arguments).predict.shard)
    assert shards == ["1/4", "2/4", "3/4", "4/4"]
