"""Recordings shared by several processes: each is taken once, and files are those of one process."""

import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_line import TINY, refused

from bkind3d.cli import main
from bkind3d.data import build_cache, load_project
from bkind3d.errors import InputError
from bkind3d.poses import Poses
from bkind3d.shards import share


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_hold_each_name_once(count: int) -> None:
    names = ["a", "b", "c", "d", "e"]
    shares = [share(names, f"{place}/{count}") for place in range(1, count + 1)]
    assert sorted(name for taken in shares for name in taken) == names
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert share(names, None) == names


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "1/0", "0/0", "-1/4", "a/b", "1/4/2", "1.0/2", ""])
def test_bad_shards(shard: str) -> None:
    with pytest.raises(InputError, match=r"shard: expected i/n with i from 1 to n, such as 1/4, got"):
        share(["a"], shard)


def test_predictions_of_shards_are_those_of_one_process(own_rig: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    main(["train", "--project", str(own_rig), "--out", str(run), *TINY, "--train.steps=1"])
    assert "shard: expected" in refused(["predict", str(run), "--shard", "3/2"], capsys)
    main(["predict", str(run)])
    whole = {path.name: Poses.load(path) for path in (run / "poses").iterdir()}
    shutil.rmtree(run / "poses")
    shutil.rmtree(own_rig.parent / "cache")
    written = []
    for place in (1, 2, 3):
        main(["predict", str(run), "--shard", f"{place}/3"])
        written.append({path.name for path in (run / "poses").iterdir()})
    assert written == [{"train.nc"}, {"train.nc", "test.nc"}, {"train.nc", "test.nc"}]
    for name, poses in whole.items():
        found = Poses.load(run / "poses" / name)
        np.testing.assert_array_equal(found.positions, poses.positions)
        np.testing.assert_array_equal(found.confidence, poses.confidence)


def test_the_command_builds_a_share_of_the_cache(own_rig: Path, tmp_path: Path, capsys) -> None:
    settings = ["--project", str(own_rig), "--cache", str(tmp_path), "--data.height=32", "--data.width=32"]
    bare = [*settings, "--data.foreground=false"]
    assert "shard: expected" in refused(["cache", *bare, "--shard", "0/2"], capsys)
    assert "data.height" in refused(["cache", *bare, "--data.height=3"], capsys)
    main(["cache", *bare, "--shard", "2/2"])
    assert capsys.readouterr().out == f"{tmp_path}: test\n"
    assert [path.name.split("-")[0] for path in tmp_path.glob("*.npy")] == ["test"]
    main(["cache", *bare, "--shard", "3/3"])
    assert "nothing to build" in capsys.readouterr().out
    main(["cache", *settings, "--shard", "1/2"])  # the masks of what is trained on need no test recording
    assert len(list(tmp_path.glob("train-*.masks-*.npy"))) == 1
    assert not list(tmp_path.glob("test-*.masks-*.npy"))


def build_share(project: Path, folder: Path, shard: str, start) -> None:
    opened = load_project(project)
    start.wait(120)
    names = share(opened.names(), shard)
    build_cache(opened, 32, 32, folder, foreground=True, recordings=names, progress=False)


def test_shares_are_built_side_by_side(own_rig: Path, tmp_path: Path) -> None:
    """Three processes begin at once with what they share: files are those of one process, and no lock is left."""
    content = yaml.safe_load(own_rig.read_text())
    train, test = content["recordings"]
    content["recordings"] = [train | {"name": "a"}, test | {"name": "b"}, test | {"name": "c", "split": "train"}]
    own_rig.write_text(yaml.safe_dump(content))
    expected = tmp_path / "expected"
    build_cache(load_project(own_rig), 32, 32, expected, foreground=True, progress=False)
    context = multiprocessing.get_context("spawn")  # torch's threads do not outlive a fork
    start = context.Barrier(3)
    workers = [
        context.Process(target=build_share, args=(own_rig, tmp_path / "shared", f"{place}/3", start))
        for place in (1, 2, 3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == names
    for path in expected.glob("*.npy"):
        assert (tmp_path / "shared" / path.name).read_bytes() == path.read_bytes()
