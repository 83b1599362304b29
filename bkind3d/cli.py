"""The `bkind3d` command: one verb for each step of the work."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from jsonargparse import ArgumentParser, Namespace

from bkind3d.calib import convert_calibration, show_calibration
from bkind3d.check import check_run
from bkind3d.config import Config, read_settings, validate
from bkind3d.data import load_project
from bkind3d.data.h36m import h36m_project
from bkind3d.data.rat7m import rat7m_project
from bkind3d.documents import read_yaml
from bkind3d.errors import InputError, Terminated, brief
from bkind3d.evaluation.actions import actions
from bkind3d.evaluation.evaluate import evaluate
from bkind3d.experiments.demo import demo
from bkind3d.experiments.paper import paper
from bkind3d.exports import FORMATS, export
from bkind3d.init import init_project
from bkind3d.predict import predict
from bkind3d.report import build_report
from bkind3d.report.film import film
from bkind3d.report.render import render
from bkind3d.run import open_inputs
from bkind3d.shards import share
from bkind3d.train import resume, train
from bkind3d_kernels import BackendUnavailable

FAILED = 1  # of a check that found something red
INTERRUPTED, TERMINATED = 130, 143  # 128 + the number of the signal


def run_check(config: Namespace) -> None:
    """Look at a project before training: files, frame counts, calibration, what the cameras see, memory."""
    report = check_run(load_project(config.file), settings_of(config), config.out)
    report.print()
    if config.out is not None:
        from bkind3d.report.check_page import write_check_page  # jinja2 is for pages alone

        print(f"page: {write_check_page(report, config.out)}")
    if report.fails:
        sys.exit(FAILED)


def settings_of(config: Namespace) -> Config:
    """The settings of a run among the arguments of a verb."""
    return Config(**{name: config[name] for name in Config.__dataclass_fields__})


def run_train(config: Namespace) -> None:
    """Train a run, or go on with one."""
    settings = settings_of(config)
    if config.steps is not None and not config.resume:
        raise InputError("--steps goes with --resume; a new run takes --train.steps")
    if config.resume and settings != Config():
        raise InputError("--resume goes on with the run's own settings; only --steps may be given")
    finished = (
        resume(config.out, steps=config.steps) if config.resume else train(settings, config.out, force=config.force)
    )
    if finished:
        say(f"done: {config.out}; next: bkind3d predict {config.out}")
    else:
        say(f"stopped and saved; go on with: bkind3d train --resume --out {config.out}")
        sys.exit(INTERRUPTED)


def say(message: str, file: TextIO | None = None) -> None:
    """Print what is the same in all processes of a training in the first one alone."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=file)


def run_import(config: Namespace) -> None:
    """Write the project of a data set."""
    path = READERS[config.dataset](**vars(config[config.dataset]))
    print(f"{path}; next: bkind3d check {path} --out {path.parent / 'check'}")


def run_cache(config: Namespace) -> None:
    """Build the frame cache of a training, or a share of it."""
    settings = settings_of(config)
    validate(settings)
    names = share(load_project(settings.project).names(), config.shard)
    if names:
        open_inputs(settings, recordings=names)
    print(f"{settings.cache_directory}: {', '.join(names) or 'nothing to build'}")


def run_predict(
    run: Path, recordings: list[str] | None = None, shard: str | None = None, batch: int = 16, force: bool = False
) -> None:
    """Write the 3D keypoints of recordings to RUN/poses/<recording>.nc; those that are done are kept.

    Args:
        run: Run folder.
        recordings: Names of recordings; all of the project when left out.
        shard: "i/n", counted from 1: every n-th of them from the i-th on, for processes side by side or a job array.
        batch: Moments per forward pass; lower it when memory is short.
        force: Do again what is done.
    """
    for path in predict(run, recordings=recordings, shard=shard, batch=batch, force=force):
        print(path)


def run_export(
    run: Path,
    to: str,
    recordings: list[str] | None = None,
    start: str | None = None,
    out: Path | None = None,
    force: bool = False,
) -> None:
    """Write the poses of a run in the files of another tool: RUN/exports/<to>/.

    Args:
        run: Run folder with poses.
        to: The tool.
        recordings: Names of recordings with poses; all of them when left out.
        start: When the recording began, with its time zone, such as 2026-03-01T14:30:00+01:00; NWB asks for it.
        out: Folder for the files; RUN/exports/<to> when left out.
        force: Replace files that exist.
    """
    for path in export(run, to, recordings=recordings, start=start, out=out, force=force):
        print(path)


def run_report(run: Path, force: bool = False) -> None:
    """Write RUN/report.html: one file with figures, clips and a 3D scene that opens offline.

    Args:
        run: Run folder.
        force: Replace an earlier report.
    """
    print(build_report(run, force=force))


def run_render(
    run: Path,
    recording: str | None = None,
    overlay: bool = False,
    cameras: list[str] | None = None,
    speed: float | None = None,
    start: float = 0.0,
    seconds: float | None = None,
    fps: float | None = None,
    size: int | None = None,
    max_bytes: int | None = None,
    out: Path | None = None,
    force: bool = False,
) -> None:
    """Write RUN/render.gif, views beside the turning 3D skeleton, or with --overlay RUN/overlay.mp4, the videos.

    Args:
        run: Run folder.
        recording: Name of the recording; the first test recording when left out, else the first.
        overlay: The original videos at full resolution with keypoints and edges over them, as H.264.
        cameras: With --overlay: one camera fills the picture, several are a grid; all of them when left out.
        speed: With --overlay: 0.25 shows it four times slower than it was; 1 when left out.
        start: Seconds into the recording.
        seconds: Length; 4 when left out, with --overlay to the end of the recording.
        fps: Pictures per second; 15 when left out. With --overlay they are the recording's.
        size: Width in pixels; 832 when left out, with --overlay the videos' own.
        max_bytes: Largest file wanted, 1500000 when left out; fewer colours, then a smaller picture, until it fits.
        out: File ending in .gif, .png (animated PNG) or .mp4; with --overlay in .mp4.
        force: Replace an earlier file.
    """
    if overlay:
        _left_out("with --overlay", fps=fps, max_bytes=max_bytes)
        path = film(
            run, recording=recording, cameras=cameras, start=start, seconds=seconds,
            speed=1.0 if speed is None else speed, size=size, out=out, force=force,
        )  # fmt: skip
    else:
        _left_out("without --overlay", cameras=cameras, speed=speed)
        given = {"seconds": seconds, "fps": fps, "size": size, "max_bytes": max_bytes}
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        path = render(run, recording=recording, start=start, out=out, force=force, **chosen)
    print(f"{path}  ({path.stat().st_size / 1e6:.2f} MB)")


def _left_out(when: str, **options: object) -> None:
    """Refuse options that have no meaning."""
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name}: has no meaning {when}; leave it out")


VERBS: dict[str, tuple[Callable[..., object], str]] = {
    "demo": (demo, "the whole way on a simulated subject or a filmed man"),
    "init": (init_project, "a project file from a folder of videos and a calibration"),
    "predict": (run_predict, "3D keypoints of every frame"),
    "evaluate": (evaluate, "regress annotated joints from the keypoints"),
    "actions": (actions, "classify behaviour from the keypoints"),
    "report": (run_report, "one offline HTML page about a run"),
    "render": (run_render, "a moving picture of a run, or its videos with the keypoints over them"),
    "paper": (paper, "the paper's tables on a subject of one's own choice"),
}
CALIB: dict[str, Callable[..., None]] = {"convert": convert_calibration, "show": show_calibration}
READERS: dict[str, Callable[..., Path]] = {"h36m": h36m_project, "rat7m": rat7m_project}
# Switches, given by their name alone.
FLAGS = {
    "force": "replace what an earlier call wrote",
    "bias": "give the linear map a constant term (paper: none)",
    "scale": "allow scale in the aligned error (paper: none)",
    "per_joint": "print the error of each joint as well",
    "overlay": "the original videos at full resolution with keypoints and edges over them, as H.264",
    "resume": "go on with the run in --out, with the settings it has",
}


def add_flags(parser: ArgumentParser, names: Iterable[str]) -> None:
    """Add switches that take no value."""
    for name in names:
        parser.add_argument(f"--{name}", action="store_true", help=FLAGS[name])


def build_parser() -> ArgumentParser:
    """The parser of the whole command line."""
    parser = ArgumentParser(prog="bkind3d", description="3D keypoints from calibrated multi-view video.")
    verbs = parser.add_subcommands(required=True, dest="verb")
    for name, (function, summary) in VERBS.items():
        verbs.add_subcommand(name, parser_of(function), help=summary)
    verbs.add_subcommand("export", export_parser(), help="poses in the files of other tools")
    verbs.add_subcommand("check", check_parser(), help="look at a project before training")
    verbs.add_subcommand("train", train_parser(), help="train a run, or go on with one")
    verbs.add_subcommand("cache", cache_parser(), help="build the frame cache of a training, or a share of it")
    readers = ArgumentParser(description="Write a project file that names the files of a published data set.")
    verbs.add_subcommand("import", readers, help="a project from a published data set")
    add_readers(readers)
    calib = ArgumentParser(description="A calibration of any known format; see docs/calibrations.md.")
    verbs.add_subcommand("calib", calib, help="show a calibration of any known format, or convert it to Anipose TOML")
    tasks = calib.add_subcommands(required=True, dest="task")
    for name, function in CALIB.items():
        tasks.add_subcommand(name, parser_of(function), help=summary_of(function))
    return parser


def summary_of(function: Callable[..., object]) -> str:
    """The first line of what a function says of itself."""
    return (function.__doc__ or function.__name__).splitlines()[0]


def parser_of(function: Callable[..., object]) -> ArgumentParser:
    """The parser of a verb that one function does."""
    flags = [parameter for parameter in inspect.signature(function).parameters if parameter in FLAGS]
    verb = ArgumentParser(description=summary_of(function))
    verb.add_function_arguments(function, as_positional=True, skip={"progress", *flags})
    add_flags(verb, flags)
    return verb


def add_readers(parser: ArgumentParser) -> None:
    """Add a subcommand for each data set."""
    sets = parser.add_subcommands(required=True, dest="dataset")
    for name, function in READERS.items():
        summary = summary_of(function)
        reader = ArgumentParser(description=summary)
        reader.add_function_arguments(function, as_positional=True, skip={"out"})
        reader.add_argument("--out", type=Path, required=True, help="folder for the project, made when missing")
        sets.add_subcommand(name, reader, help=summary)


def export_parser() -> ArgumentParser:
    """The parser of `bkind3d export`: a run, and the tool by its name."""
    parser = ArgumentParser(description="Write the poses of a run in the files of another tool: RUN/exports/<to>/.")
    parser.add_function_arguments(run_export, as_positional=True, skip={"to", "force"})
    parser.add_argument("--to", required=True, choices=list(FORMATS), help="the tool; see docs/exports.md")
    add_flags(parser, ("force",))
    return parser


def check_parser() -> ArgumentParser:
    """The parser of `bkind3d check`: a project, and every setting of the run that it is to be for."""
    parser = ArgumentParser(description="Look at a project before training.")
    parser.add_argument("file", metavar="PROJECT", type=Path, help="project file (YAML); see docs/rig.md")
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below, as for train")
    parser.add_argument(
        "--out", type=Path | None, default=None, help="folder for a picture per camera with the volume drawn in"
    )
    parser.add_class_arguments(Config)
    return parser


def train_parser() -> ArgumentParser:
    """The parser of `bkind3d train`: every setting, from a YAML file, the command line, or both."""
    parser = ArgumentParser(description="Train a run, or go on with one.")
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    add_flags(parser, ("force", "resume"))
    parser.add_argument("--steps", type=int | None, default=None, help="with --resume: new number of steps")
    parser.add_class_arguments(Config)
    return parser


def cache_parser() -> ArgumentParser:
    """The parser of `bkind3d cache`: the settings of `bkind3d train`."""
    parser = ArgumentParser(description="Build the frame cache of a training, or a share of it.")
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    shard = "i/n, counted from 1: every n-th recording from the i-th on, for processes side by side or a job array"
    parser.add_argument("--shard", type=str | None, default=None, help=shard)
    parser.add_class_arguments(Config)
    return parser


def check_settings_files(arguments: Sequence[str]) -> None:
    """Read the files that `--config` names as `config.yaml` is read, before the parser does.

    Raises:
        InputError: One of them cannot be read, or a setting in it is unknown or of another type.
    """
    for argument, following in pairwise([*arguments, ""]):
        name, _, value = argument.partition("=")
        if name == "--config":
            path = Path(value or following)
            content = read_yaml(path)
            known = {key: content[key] for key in content if key in Config.__dataclass_fields__}
            try:
                read_settings(Config, known)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None


def refuse(message: str) -> NoReturn:
    """End with one line and exit code 2."""
    print(f"bkind3d: error: {' '.join(brief(message, 2000).split(chr(10)))}", file=sys.stderr)
    sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends with one line and exit code 2."""
    parser = build_parser()
    try:
        check_settings_files(sys.argv[1:] if arguments is None else arguments)
        namespace = parser.parse_args(arguments)
        verb = namespace.verb
        settings = parser.instantiate(namespace)[verb]
        if verb == "check":
            run_check(settings)
        elif verb == "train":
            run_train(settings)
        elif verb == "cache":
            run_cache(settings)
        elif verb == "import":
            run_import(settings)
        elif verb == "export":
            run_export(**vars(settings))
        elif verb == "calib":
            CALIB[settings.task](**vars(settings[settings.task]))
        else:
            VERBS[verb][0](**vars(settings))
    except (InputError, BackendUnavailable) as error:
        refuse(str(error))
    except torch.OutOfMemoryError:
        refuse("out of memory: lower --batch")
    except OSError as error:
        refuse(f"{error.filename or 'output'}: {error.strerror or error}")
    except Terminated as ending:
        say(f"bkind3d: {ending}", file=sys.stderr)
        sys.exit(TERMINATED)
    except KeyboardInterrupt:
        print("bkind3d: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
