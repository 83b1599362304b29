"""The paper's tables on a subject of one's own choice: every method and ablation on the same data, with one budget.

Each row of a table is a training run of its own, evaluated like any other and kept in a folder named after a hash of
everything that decides its result: settings, seed and data. A row that two tables share is trained once, a table that
was interrupted goes on where it stopped, and a longer table trains only what is new.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from tqdm import tqdm

from bkind3d.checkpoints import checkpoints
from bkind3d.config import Config, to_dict, validate
from bkind3d.data import load_project
from bkind3d.errors import InputError
from bkind3d.evaluation.evaluate import UNTRAINED, evaluate
from bkind3d.evaluation.parts import DISTANCES, SHARES
from bkind3d.evaluation.probe import MEAN_POSE, PAPER_ROWS, PAPER_SOURCE
from bkind3d.experiments.subjects import SUBJECTS, Film, Subject
from bkind3d.files import write_json, write_text
from bkind3d.models.body import BODY_TERMS
from bkind3d.models.methods import METHODS
from bkind3d.processes import call_each
from bkind3d.run import open_run
from bkind3d.tables import csv_text
from bkind3d.train import resume, train

PARTS = DISTANCES | SHARES
OTHER_DATA = "from other subjects, cameras and joints: for the order of the rows, not for comparison of the numbers"


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        name: As the table shows it.
        settings: What makes it differ from the subject's settings, "section.name" -> value.
        paper: The row's name among the paper's own numbers (`bkind3d.evaluation.probe.PAPER_ROWS`); empty where it
            has none.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    paper: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the paper, or one beside them: its title, the paper's data set, and its rows."""

    title: str
    dataset: str
    rows: tuple[Row, ...]


# The paper's bare objective (configs/paper.yaml), with the weights that the small networks had under it.
PAPER_OBJECTIVE = {
    "data.foreground": False, "data.window": 0,
    "loss.length": 0.02, "loss.separation_sigma": 0.05, "model.edge_threshold": 1.5,
    "model.voxels": 24, "model.logit_gain": 15.0,
}  # fmt: skip
_VOLUMETRIC = {"method": "volumetric"}
_PAPER_METHODS = ("keypoint3d", "triangulation", "depth", "volumetric")  # of Table 2


def _method(name: str, **settings: Any) -> Row:
    """A method by its title in the registry, which is also its name among the paper's numbers where it has one."""
    title = METHODS[name].title
    return Row(title, {"method": name, **settings}, title)


TABLES = {
    "2": Table(
        "Table 2: methods of discovery, on Human3.6M in the paper",
        "Human3.6M",
        (
            _method("keypoint3d", **{"model.bottleneck": "points"}),  # as published
            _method("triangulation"),
            _method("depth"),
            Row("BKinD-3D (volumetric)", _VOLUMETRIC, "BKinD-3D, 15 keypoints"),
            *(_method(name) for name in METHODS if name not in _PAPER_METHODS),
            Row("volumetric, never turned", _VOLUMETRIC | {"model.turn_volume": False}),
            Row("triangulation, the paper's objective", {"method": "triangulation"} | PAPER_OBJECTIVE),
            Row("volumetric, the paper's objective", _VOLUMETRIC | PAPER_OBJECTIVE),
        ),
    ),
    "3": Table(
        "Table 3: methods of discovery, on Rat7M in the paper",
        "Rat7M",
        (_method("triangulation"), _method("depth"), Row("BKinD-3D (volumetric)", _VOLUMETRIC, "BKinD-3D")),
    ),
    "4": Table(
        "Table 4: keypoints, bottleneck and length loss, on Human3.6M in the paper",
        "Human3.6M",
        (
            Row("8 keypoints", {"model.keypoints": 8}, "BKinD-3D, 8 keypoints"),
            Row("15 keypoints", {"model.keypoints": 15}, "BKinD-3D, 15 keypoints"),
            Row("30 keypoints", {"model.keypoints": 30}, "BKinD-3D, 30 keypoints"),
            Row("points", {"model.bottleneck": "points"}, "BKinD-3D, points without edges"),
            Row("edges, without rigidity", {"loss.rigidity": 0.0}, "BKinD-3D, edges without length loss"),
            Row("edges, full objective", {}, "BKinD-3D, 15 keypoints"),
        ),
    ),
    "objective": Table(
        "The objective: what each term gives (not in the paper)",
        "",
        (
            Row("all terms"),
            *(Row(f"without {name}", {f"loss.{name}": 0.0}) for name in BODY_TERMS),
            Row("without separation", {"loss.separation": 0.0}),
            Row("the paper's objective", PAPER_OBJECTIVE),
        ),
    ),
    "resolution": Table(
        "Resolution: voxels along the longest side, and pixels, under the paper's objective (not in the paper)",
        "",
        tuple(
            Row(
                f"{voxels} voxels, {size} px",
                _VOLUMETRIC | PAPER_OBJECTIVE | {"model.voxels": voxels, "data.height": size, "data.width": size},
            )
            for voxels, size in ((8, 32), (16, 48), (24, 64), (24, 96), (32, 96), (32, 128), (48, 128))
        ),
    ),
    "pitch": Table(
        "Pitch: voxels along the arena, along a box that follows the body, and of a cascade (not in the paper)",
        "",
        (
            *(Row(f"arena, {n} voxels", _VOLUMETRIC | {"data.box": 0.0, "model.voxels": n}) for n in (26, 38, 51)),
            *(
                Row(
                    f"cascade, 26 then {n} voxels",
                    _VOLUMETRIC
                    | {"data.box": 0.0, "model.voxels": 26, "model.cascade": 0.23, "model.cascade_voxels": n},
                )
                for n in (12, 18, 24)
            ),
            *(Row(f"box, {n} voxels", _VOLUMETRIC | {"model.voxels": n}) for n in (7, 12, 18, 24, 36, 46)),
        ),
    ),
}


@dataclass(frozen=True)
class Job:
    """One row with one seed: where it runs, and how it is trained and evaluated."""

    config: Config
    run: Path
    probe: dict[str, Any]


def paper(
    table: Literal["2", "3", "4", "objective", "resolution", "pitch"] = "2",
    subject: Literal["animal", "rat", "rat-field", "human-sim", "human"] = "rat",
    *,
    rows: list[str] | None = None,
    budget: int = 600,
    seeds: list[int] = [0, 1, 2],  # noqa: B006  (a list on the command line; never changed)
    jobs: int = 1,
    threads: int = 1,
    settings: dict[str, Any] | None = None,
    frames: int | None = None,
    test_frames: int | None = None,
    views: int | None = None,
    pixels: int | None = None,
    every: int | None = None,
    source: Path | None = None,
    out: Path = Path("runs/paper"),
    progress: bool = True,
) -> Path:
    """Train and evaluate the rows of one of the paper's tables on one subject, beside the paper's own numbers.

    Rows that were finished before are not trained again, and one that was interrupted goes on from its checkpoint.

    Args:
        table: The paper's table 2 (methods, on Human3.6M), 3 (methods, on Rat7M) or 4 (ablations), "objective": its
            terms left out one by one, "resolution": voxels and pixels, or "pitch": how fine the voxels are around
            the body, which the paper does not vary.
        subject: Whose videos: "animal" (capsules, simulated), "rat", "rat-field" or "human-sim" (dm_control's,
            rendered), or "human" (four real videos). The data are the same for all rows and seeds.
        rows: Names of the rows, as the table shows them; all when left out.
        budget: Training steps of every row.
        seeds: Seeds of the networks and of the order of the pairs; each row is trained once with each.
        jobs: Rows trained at the same time.
        threads: CPU threads of each; results depend on it in the last digits.
        settings: Settings for all rows, "section.name: value"; a row's own come last.
        frames: Training frames to simulate; like the next three, the subject's own number when left out. A regression
            on few frames fits them and not the animal: with many keypoints, give it minutes of video.
        test_frames: Test frames to simulate.
        views: Cameras to simulate.
        pixels: Height and width of the pictures to simulate; `data.height` and `data.width` are the networks'.
        every: Distance between the frames of the regression; the subject's own when left out.
        source: Files that the subject's videos come from, or that move it, as for `bkind3d demo`.
        out: Folder of the data, the runs and the tables.
        progress: Whether to show a progress bar.

    Returns:
        The table as Markdown; the CSV file beside it has a line for each row and seed.

    Raises:
        InputError: A setting that cannot be used, or data that cannot be made.
    """
    if min(budget, jobs, threads, 1 if every is None else every) < 1 or not seeds or len(set(seeds)) < len(seeds):
        raise InputError(
            "paper: budget, jobs, threads and every must be 1 or more, and seeds one or more different numbers"
        )
    chosen, about = TABLES[table], SUBJECTS[subject]
    if rows is not None:
        names = [row.name for row in chosen.rows]
        if not rows or not set(rows) <= set(names):
            raise InputError(f"rows: table {table} has the rows {', '.join(map(repr, names))}; got {rows}")
        chosen = replace(chosen, rows=tuple(row for row in chosen.rows if row.name in rows))
    folder = out / subject
    probe = about.probe if every is None else about.probe | {"every": every}
    film = Film(0, frames, test_frames, views, pixels, source)
    project = film_once(about, folder, film, progress)
    data = identity(project)

    def plan(row: Row, seed: int) -> Job:
        config = about.config(project, seed, budget)
        config.train.threads = threads
        config.train.save_every = config.train.sample_every = max(100, budget // 10)
        config.train.keep = 1
        for name, value in {**(settings or {}), **row.settings}.items():
            change(config, name, value)
        validate(config)
        return Job(config, folder / f"{config.method}-{key(config, data, probe)}-seed{seed}", probe)

    planned = {(row.name, seed): plan(row, seed) for row in chosen.rows for seed in seeds}
    finish(list(planned.values()), jobs, progress)
    results = [
        {"row": row.name, "seed": seed} | summary(planned[row.name, seed].run) for row in chosen.rows for seed in seeds
    ]
    special = (settings or {}) | {name: value for name, value in {"every": every, "rows": rows}.items() if value}
    stem = folder / f"table-{table}-{budget}-steps{f'-{short_hash(special)}' if special else ''}"
    write_csv(stem.with_suffix(".csv"), results)
    notes = [
        f"Videos: {', '.join(f'{name} {size}' for name, size in film.sizes().items()) or 'of the usual length'}.",
        f"Settings for all rows: {json.dumps(settings)}." if settings else "Settings: the subject's own.",
        "Are the keypoints parts of the body: distances to bones and joints in body sizes, shares of frames and joints "
        "(docs/evaluation.md).",
        "MPJPE after removing the mean shift, PMPJPE after rigid alignment, on frames that training never saw; a "
        f"linear regression ({', '.join(f'{name} {value}' for name, value in probe.items()) or 'without bias'}).",
    ]
    text = markdown(chosen, about.title, results, budget, notes, planned[chosen.rows[0].name, seeds[0]].run)
    write_text(stem.with_suffix(".md"), text)
    tqdm.write(text)
    return stem.with_suffix(".md")


def key(config: Config, data: str, probe: dict[str, Any]) -> str:
    """Hash of everything that decides a row's result."""
    settings = {name: value for name, value in to_dict(config).items() if name not in ("project", "cache")}
    return short_hash([settings, data, probe])


def short_hash(content: Any) -> str:
    """Twelve digits that stand for what JSON can hold."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=6).hexdigest()


def film_once(subject: Subject, folder: Path, film: Film, progress: bool) -> Path:
    """The project file of the subject's videos, which are made where there are none yet.

    Raises:
        InputError: The videos were made otherwise, or cannot be made.
    """
    note, project = folder / "film.json", folder / "data" / "project.yaml"
    wanted = {"source": None if film.source is None else str(film.source.resolve())} | film.sizes()
    if not project.is_file():
        subject.film(folder / "data", film, progress)
        write_json(note, wanted)
    made = json.loads(note.read_text()) if note.is_file() else {"source": None}
    if made != wanted:
        raise InputError(f"out: the videos in {folder / 'data'} were made with {made}; choose another --out")
    return project


def identity(project: Path) -> str:
    """Hash of a project file and of all files that it names."""
    content = load_project(project)
    digest = hashlib.blake2b(project.read_bytes(), digest_size=16)
    for path in content.files():
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def change(config: Config, name: str, value: Any) -> None:
    """Change one setting, "section.name" or a name at the top.

    Raises:
        InputError: There is no such setting.
    """
    *sections, last = name.split(".")
    target: Any = config
    for section in sections:
        target = getattr(target, section, None)
    if target is None or last not in getattr(target, "__dataclass_fields__", {}):
        raise InputError(f"settings: there is no setting {name!r}; `bkind3d train --help` lists them")
    before = getattr(target, last)
    if isinstance(before, tuple) and isinstance(value, list):
        value = tuple(value)
    kinds = {float: (float, int), str: (str, int, list)}.get(type(before), (type(before),))  # a gap is any of the last
    if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(before, bool)):
        raise InputError(f"settings: {name} is of the kind of {before!r}, got {value!r}")
    setattr(target, last, deepcopy(value))


def finish(jobs: Sequence[Job], workers: int, progress: bool) -> None:
    """Train and evaluate what is not finished, several at a time."""
    waiting = list({job.run: job for job in jobs if not (job.run / "evaluation.json").is_file()}.values())
    with tqdm(total=len(waiting), desc="rows", unit="run", disable=None if progress else True) as bar:
        # Each in a fresh process: threads, seeds and accelerate's state are those of a run of its own.
        for finished in call_each(_run_job_apart, waiting, workers, fresh=True):
            if not finished:
                raise KeyboardInterrupt
            bar.update()


def run_job(job: Job) -> bool:
    """Train one row, or go on with it, and evaluate it; returns False if Ctrl-C ended it earlier."""
    if checkpoints(job.run):
        finished = resume(job.run, progress=False)
    else:
        finished = train(job.config, job.run, force=job.run.exists(), progress=False)
    if finished:
        evaluate(job.run, progress=False, force=True, **job.probe)
    return finished


def _run_job_apart(job: Job, report: Callable[[Any], None]) -> bool:
    return run_job(job)


def summary(run: Path) -> dict[str, Any]:
    """What the tables say of a finished run; lengths in the project's units."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    health = json.loads((run / "health.jsonl").read_text().splitlines()[-1])
    with (run / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    trained, *others = evaluation["rows"]
    by_name = {row["name"]: row for row in others}
    parts = evaluation["parts"]
    edges = parts["edges"]
    return {
        "pmpjpe": trained["pmpjpe"],
        "mpjpe": trained["mpjpe"],
        "mpjpe_absolute": trained["mpjpe_absolute"],
        "untrained_mpjpe": by_name[UNTRAINED]["mpjpe"],
        "untrained_pmpjpe": by_name[UNTRAINED]["pmpjpe"],
        "mean_pose_mpjpe": by_name[MEAN_POSE]["mpjpe"],
        "mean_pose_pmpjpe": by_name[MEAN_POSE]["pmpjpe"],
        "units": evaluation["units"],
        **{name: parts["rows"][0][name] for name in PARTS},
        "neighbours": edges["agreement"][0]["share"] if edges else None,
        "neighbours_chance": edges["agreement"][0]["all_pairs"] if edges else None,
        "keypoints": open_run(run).model.keypoints,
        "dead": sum("dead" in flags for flags in health["flags"]),
        "active_edges": int(float(last["active_edges"])),
        "minutes": float(last["seconds"]) / 60,
        "run": run.name,
    }


def write_csv(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """One line for each row and seed, numbers as they were measured."""
    columns = list(results[0])
    write_text(path, csv_text([columns, *([result[column] for column in columns] for result in results)]))


def markdown(
    table: Table, subject: str, results: Sequence[dict[str, Any]], budget: int, notes: Sequence[str], run: Path
) -> str:
    """The table for reading: mean ± standard deviation over seeds, beside the paper's numbers."""
    seeds = len({result["seed"] for result in results})
    per, units = millimetres(results[0]["units"])
    theirs = {row["name"]: row for row in PAPER_ROWS if row["dataset"] == table.dataset}
    errors = [f"PMPJPE ({units})", f"MPJPE ({units})", "to mean pose", "untrained MPJPE"]
    head = ["", *errors, *PARTS.values(), "neighbours (chance)", "dead", "minutes"]
    if table.dataset:
        head += ["paper: PMPJPE (mm)", "paper: MPJPE (mm)"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in table.rows:
        mine = [result for result in results if result["row"] == row.name]
        cells = [
            row.name,
            spread([result["pmpjpe"] * per for result in mine]),
            spread([result["mpjpe"] * per for result in mine]),
            f"{mean(result['mpjpe'] / result['mean_pose_mpjpe'] for result in mine):.2f}",
            spread([result["untrained_mpjpe"] * per for result in mine]),
            *(f"{mean(result[name] for result in mine):.{3 if name in DISTANCES else 2}f}" for name in PARTS),
            neighbours(mine),
            f"{sum(result['dead'] for result in mine)} of {sum(result['keypoints'] for result in mine)}",
            f"{mean(result['minutes'] for result in mine):.1f}",
        ]
        if table.dataset:
            paper_row = theirs.get(row.paper)
            cells += [str(paper_row["pmpjpe"]), str(paper_row["mpjpe"])] if paper_row else ["", ""]
        lines.append(cells)
    first = results[0]
    lines.append(
        ["mean pose", f"{first['mean_pose_pmpjpe'] * per:.1f}", f"{first['mean_pose_mpjpe'] * per:.1f}", "1.00"]
        + [""] * (len(head) - 4)
    )
    environment = json.loads((run / "env.json").read_text())
    about = [
        f"# {table.title}",
        "",
        f"Here on {subject}: {budget} steps for every row, mean ± standard deviation over {seeds} seed(s), "
        f"{environment['device']} with {environment['cpu_threads']} thread(s) a row ({environment['machine']}, torch "
        f"{environment['versions']['torch']}, bkind3d {environment['versions']['bkind3d']}), "
        f"{datetime.now(UTC):%Y-%m-%d}.",
        *notes,
    ]
    if table.dataset:
        about.append(f"The paper's columns ({PAPER_SOURCE}) are {OTHER_DATA}.")
    return "\n".join([*about, "", *("| " + " | ".join(cells) + " |" for cells in lines), ""])


def neighbours(results: Sequence[dict[str, Any]]) -> str:
    """Share of the active edges that join neighbours, and of all pairs of keypoints: means over seeds with edges."""
    known = [result for result in results if result["neighbours"] is not None]
    if not known:
        return "–"
    share, chance = (mean(result[name] for result in known) for name in ("neighbours", "neighbours_chance"))
    return f"{share:.2f} ({chance:.2f})"


def millimetres(units: str) -> tuple[float, str]:
    """Factor and name of the unit that the tables are read in: millimetres for metres and centimetres."""
    return {"m": (1000.0, "mm"), "cm": (10.0, "mm")}.get(units, (1.0, units))


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation of the sample; the mean alone of one value."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
