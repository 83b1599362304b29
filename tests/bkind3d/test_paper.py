"""The paper's tables: every row trained once, kept, resumed, and shown beside the paper's own numbers."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bkind3d.checkpoints import checkpoints
from bkind3d.config import Config
from bkind3d.data import load_project, load_truth
from bkind3d.errors import InputError
from bkind3d.evaluation.probe import PAPER_ROWS
from bkind3d.experiments import paper as module
from bkind3d.experiments.paper import TABLES, change, film_once, identity, key, paper
from bkind3d.experiments.subjects import SUBJECTS, Film
from bkind3d.run import open_run

TINY = {
    "data.height": 32, "data.width": 32, "data.window": 24, "data.gap": 4,
    "model.pyramid_channels": 8, "model.channels": 4, "model.voxels": 8, "model.volume_channels": (4, 4, 8),
    "model.edge_strides": (8, 4), "model.edge_sigmas": (1.0, 1.5), "model.decoder_channels": (8, 8), "train.batch": 2,
}  # fmt: skip


METHODS = {
    "Keypoint3D": "keypoint3d",
    "triangulation + reprojection": "triangulation",
    "depth map": "depth",
    "BKinD-3D (volumetric)": "volumetric",
    "volumetric, never turned": "volumetric",
    "triangulation, the paper's objective": "triangulation",
    "volumetric, the paper's objective": "volumetric",
}


@pytest.fixture
def out(rig: Path, tmp_path: Path) -> Path:
    """A folder of tables whose animal has been filmed already."""
    shutil.copytree(rig.parent, tmp_path / "animal" / "data", ignore=shutil.ignore_patterns("cache"))
    return tmp_path


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Train in this process, and note each run that is trained or gone on with."""
    trained: list[str] = []

    def finish(jobs: list[module.Job], workers: int, progress: bool) -> None:
        for job in {job.run: job for job in jobs}.values():
            if not (job.run / "evaluation.json").is_file():
                trained.append(job.run.name)
                assert module.run_job(job)

    monkeypatch.setattr(module, "finish", finish)
    return trained


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_table_is_what_its_runs_say(out: Path, in_process: list[str]) -> None:
    written = paper(
        "2", "animal", budget=2, seeds=[0, 3], settings=TINY | {"model.turn_volume": True}, every=3, out=out,
        progress=False,
    )  # fmt: skip
    results = rows(written.with_suffix(".csv"))
    assert [(row["row"], row["seed"]) for row in results] == [(r.name, s) for r in TABLES["2"].rows for s in ("0", "3")]
    assert len(in_process) == 14
    for row in results:
        run = out / "animal" / row["run"]
        evaluation = json.loads((run / "evaluation.json").read_text())
        assert float(row["mpjpe"]) == evaluation["rows"][0]["mpjpe"]
        assert evaluation["every"] == 3
        assert float(row["untrained_mpjpe"]) == evaluation["rows"][1]["mpjpe"]
        config = open_run(run)
        assert (config.train.steps, str(config.train.seed)) == (2, row["seed"])
        assert config.method == METHODS[row["row"]]
        assert config.data.foreground == ("paper's objective" not in row["row"])
        assert float(row["one_to_one"]) == evaluation["parts"]["rows"][0]["one_to_one"]
    text = written.read_text()
    mine = [float(row["mpjpe"]) * 1000 for row in results if row["row"] == "BKinD-3D (volumetric)"]
    line = next(line for line in text.splitlines() if line.startswith("| BKinD-3D (volumetric)"))
    assert f"{sum(mine) / 2:.1f} ± {abs(mine[0] - mine[1]) / 2**0.5:.1f}" in line
    assert line.endswith("| 105 | 125 |")
    assert "not for comparison" in text


def test_rows_are_kept_shared_and_gone_on_with(out: Path, in_process: list[str]) -> None:
    def table(number: str, **changes: object) -> Path:
        return paper(number, "animal", budget=2, seeds=[0], settings=TINY | changes, out=out, progress=False)  # type: ignore[arg-type]

    some = paper("3", "animal", rows=["depth map"], budget=2, seeds=[0], settings=TINY, out=out, progress=False)
    assert [row["row"] for row in rows(some.with_suffix(".csv"))] == ["depth map"]
    assert len(in_process) == 1
    table("3")
    assert len(in_process) == 3
    first = table("3").read_text()
    assert len(in_process) == 3, "a finished row was trained again"

    volumetric = next(path for path in (out / "animal").glob("volumetric-*"))
    (volumetric / "evaluation.json").unlink()
    stamp = checkpoints(volumetric)[-1][1].stat().st_mtime_ns
    assert table("3").read_text() == first
    assert in_process[3:] == [volumetric.name]
    assert checkpoints(volumetric)[-1][1].stat().st_mtime_ns == stamp, (
        "a run that only lacked its evaluation was trained"
    )

    table("3", **{"loss.separation": 0.02})
    assert len(in_process) == 7, "other settings are other runs"


def test_rows_that_are_equal_are_one_run(out: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.SUBJECTS["animal"].__class__, "keypoints", 15, raising=False)
    settings = TINY | {"model.keypoints": 15}
    written = paper("4", "animal", budget=1, seeds=[0], settings=settings, out=out, progress=False)
    by_row = {row["row"]: row for row in rows(written.with_suffix(".csv"))}
    assert by_row["15 keypoints"]["run"] == by_row["edges, full objective"]["run"]
    assert len(in_process) == 5
    assert by_row["points"]["active_edges"] == "0"
    assert [by_row[f"{count} keypoints"]["keypoints"] for count in (8, 15, 30)] == ["8", "15", "30"]


def test_an_interrupted_row_goes_on_in_its_own_process(out: Path) -> None:
    """The rows of the table are trained by worker processes; one that has a checkpoint starts there."""

    def table(budget: int) -> list[dict[str, str]]:
        settings = TINY | {"train.save_every": 1}
        written = paper("3", "animal", budget=budget, seeds=[0], settings=settings, jobs=2, out=out, progress=False)
        return rows(written.with_suffix(".csv"))

    unbroken = {row["row"]: row["mpjpe"] for row in table(2)}
    for run in (out / "animal").glob("depth-*"):
        (run / "evaluation.json").unlink()
        shutil.rmtree(checkpoints(run)[-1][1].with_name("step_000002"), ignore_errors=True)
    assert {row["row"]: row["mpjpe"] for row in table(2)} == unbroken


def test_the_key_depends_on_what_decides_the_result(rig: Path, tmp_path: Path) -> None:
    config, data = Config(project=rig), identity(rig)
    same = Config(project=tmp_path / "elsewhere.yaml", cache=tmp_path)
    assert key(config, data, {}) == key(same, data, {})
    change(same, "model.voxels", 48)
    change(same, "model.edge_strides", [32, 16, 8, 4, 2])
    assert same.model.edge_strides == config.model.edge_strides
    assert key(config, data, {}) != key(same, data, {})
    assert key(config, data, {}) != key(config, data, {"every": 2})
    shutil.copytree(rig.parent, tmp_path / "rig", ignore=shutil.ignore_patterns("cache"))
    copy = tmp_path / "rig" / "project.yaml"
    assert identity(copy) == data
    video = next((tmp_path / "rig").rglob("*.mp4"))
    video.write_bytes(video.read_bytes() + b"\0")
    assert identity(copy) != data


def test_videos_are_made_once_and_as_asked(tmp_path: Path) -> None:
    film = Film(frames=6, test_frames=4, views=4, pixels=64)
    project = film_once(SUBJECTS["animal"], tmp_path, film, progress=False)
    made = [
        (len(load_truth(one, load_project(project)).points3d), len(one.videos))
        for one in load_project(project).recordings
    ]
    assert made == [(6, 4), (4, 4)]
    assert (np.asarray(load_project(project).cameras.image_size) == 64).all()
    stamp = project.stat().st_mtime_ns
    assert film_once(SUBJECTS["animal"], tmp_path, film, progress=False).stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match=r"were made with .*'frames': 6.*; choose another --out"):
        film_once(SUBJECTS["animal"], tmp_path, Film(frames=7, test_frames=4, views=4), progress=False)


def test_bad_input(out: Path) -> None:
    for settings in ({"model.voxel": 3}, {"modle.voxels": 3}, {"voxels": 3}):
        with pytest.raises(InputError, match="there is no setting"):
            paper("3", "animal", budget=1, settings=settings, out=out, progress=False)
    with pytest.raises(InputError, match=r"model\.voxels"):
        paper("3", "animal", budget=1, settings={"model.voxels": 1}, out=out, progress=False)
    for settings in ({"model.voxels": "many"}, {"model.voxels": True}, {"model.turn_volume": 1}, {"loss.target": 3.5}):
        with pytest.raises(InputError, match="is of the kind of"):
            paper("3", "animal", budget=1, settings=settings, out=out, progress=False)
    for film in ({"source": out}, {"frames": 50}, {"test_frames": 50}, {"views": 3}, {"pixels": 64}):
        with pytest.raises(InputError, match=r"the videos in .* were made with {'source': None}; choose another --out"):
            paper("3", "animal", budget=1, **film, out=out, progress=False)
    with pytest.raises(InputError, match="budget"):
        paper("3", "animal", budget=0, out=out, progress=False)
    with pytest.raises(InputError, match="every must be 1 or more"):
        paper("3", "animal", budget=1, every=0, out=out, progress=False)
    for chosen in ([], ["depth map", "depth"]):
        with pytest.raises(InputError, match=r"rows: table 3 has the rows .*'depth map'"):
            paper("3", "animal", budget=1, rows=chosen, out=out, progress=False)
    with pytest.raises(InputError, match="seeds"):
        paper("3", "animal", budget=1, seeds=[1, 1], out=out, progress=False)


def test_every_row_of_the_paper_is_in_a_table() -> None:
    shown = {(table.dataset, row.paper) for table in TABLES.values() for row in table.rows if row.paper}
    assert shown == {(row["dataset"], row["name"]) for row in PAPER_ROWS}


def test_an_unfinished_folder_without_checkpoint_is_made_anew(out: Path, in_process: list[str]) -> None:
    written = paper("3", "animal", budget=1, seeds=[0], settings=TINY, out=out, progress=False)
    before = written.read_text().splitlines()[6:]
    run = next((out / "animal").glob("triangulation-*"))
    (run / "evaluation.json").unlink()
    shutil.rmtree(checkpoints(run)[-1][1])
    again = paper("3", "animal", budget=1, seeds=[0], settings=TINY, out=out, progress=False)
    assert len(in_process) == 4
    assert [line.rsplit("|", 4)[0] for line in again.read_text().splitlines()[6:]] == [
        line.rsplit("|", 4)[0] for line in before
    ]
