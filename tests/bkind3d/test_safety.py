"""What a kill or a full disk leaves of a run, at every write: it can be gone on with, finished work is kept."""

import contextlib
import errno
import functools
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import TINY as TINY_LINE
from command_line import refused
from tiny_model import TINY

import bkind3d.train as training
from bkind3d import files
from bkind3d.checkpoints import checkpoints
from bkind3d.cli import main
from bkind3d.config import Config, DataConfig, LossConfig, TrainConfig, load_config
from bkind3d.errors import InputError
from bkind3d.exports import FORMATS
from bkind3d.predict import predict
from bkind3d.run import CONTENT, EARLIER, LOCK, create_run, open_inputs, open_run
from bkind3d.train import resume, train


class KilledError(BaseException):
    """The process ends here."""


class Faults:
    """Counts what changes a folder, and at one of these things kills the process or has the system fail.

    Python tells of every file that it opens, moves or removes. Once it is killed, nothing changes the folder any more:
    what would tidy up does not run.
    """

    active: "Faults | None" = None
    hooked = False

    def __init__(self, folder: Path, stop: int | None = None, error: OSError | None = None) -> None:
        self.folder, self.stop, self.error = str(folder), stop, error
        self.seen: list[str] = []

    def look(self, event: str, path: object) -> None:
        if not isinstance(path, str | bytes | os.PathLike) or not os.fsdecode(path).startswith(self.folder):
            return
        if self.error is None and self.stop is not None and len(self.seen) > self.stop:
            raise KilledError
        self.seen.append(f"{event} {Path(os.fsdecode(path)).name}")
        if len(self.seen) - 1 == self.stop:
            raise self.error or KilledError

    @classmethod
    def hook(cls, event: str, arguments: tuple[object, ...]) -> None:
        if cls.active is None:
            return
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            cls.active.look("write", arguments[0])
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            cls.active.look(event, arguments[0])

    @contextlib.contextmanager
    def watch(self) -> Iterator["Faults"]:
        if not Faults.hooked:
            sys.addaudithook(Faults.hook)
            Faults.hooked = True
        Faults.active = self
        try:
            yield self
        finally:
            Faults.active = None


Make = Callable[..., Config]


@pytest.fixture
def config(rig: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Settings of the smallest run; what takes most of its time and touches no file but a picture is left out."""
    opened = functools.cache(lambda project: open_inputs(make(), progress=False))
    monkeypatch.setattr(training, "open_inputs", lambda config, progress: opened(config.project))
    monkeypatch.setattr(training, "sample_sheet", lambda path, *arguments, **named: path.touch())
    monkeypatch.setattr(training.Accelerator, "free_memory", lambda self: None)
    monkeypatch.setattr(files, "_is_running", lambda process: False)  # those that were killed here

    def make(steps: int = 2, **changes: int) -> Config:
        return Config(
            project=rig,
            cache=rig.parent / "cache",
            method="volumetric",
            data=DataConfig(height=32, width=32, gap=4, foreground=False),
            model=TINY,
            loss=LossConfig(target_channels="grey", network="none"),
            train=TrainConfig(steps=steps, batch=2, log_every=1, sample_every=100, save_every=1, warmup=1, **changes),
        )

    return make


def go(settings: Config, run: Path, *, force: bool = False) -> None:
    train(settings, run, force=force, progress=False)


def steps_of(run: Path) -> list[int]:
    return [step for step, _ in checkpoints(run)]


def moments(settings: Make, run: Path, *, force: bool) -> list[int]:
    """One moment for each different thing that a training does to its folder."""
    with Faults(run).watch() as faults:
        go(settings(), run, force=force)
    names = [re.sub(r"\d+(\.[0-9a-f]{8})?", "#", name) for name in faults.seen]
    return [names.index(name) for name in dict.fromkeys(names)]


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def leftovers(run: Path) -> list[str]:
    known = {*CONTENT, "notes.txt", LOCK}  # the lock of a process that is dead is none
    found = [entry.name for entry in run.iterdir() if entry.name not in known]
    return found + [entry.name for entry in (run / "checkpoints").iterdir() if "partial" in entry.name]


def test_a_new_run_that_is_killed_anywhere_can_be_gone_on_with(config: Make, tmp_path: Path) -> None:
    for moment in moments(config, tmp_path / "whole", force=False):
        run = tmp_path / str(moment)
        with Faults(run, moment).watch() as faults, pytest.raises(KilledError):
            go(config(), run)
        where = faults.seen[-1]
        if steps_of(run):
            assert "go on with --resume" in message_of(lambda run=run: go(config(), run))
            resume(run, progress=False)
            assert steps_of(run) == [1, 2], where
        elif (run / "config.yaml").exists():
            assert "start it again with" in message_of(lambda run=run: resume(run, progress=False)), where
            assert "start it again with --force" in message_of(lambda run=run: go(config(), run)), where
            create_run(run, config(), force=True)
        else:
            assert "not a run folder" in message_of(lambda run=run: resume(run, progress=False)), where
            create_run(run, config(), force=False)
        assert not leftovers(run), where


def test_an_earlier_run_is_kept_until_the_new_one_has_a_checkpoint(config: Make, tmp_path: Path) -> None:
    old = tmp_path / "old"
    go(config(1, seed=7), old)
    (old / "notes.txt").write_text("what I saw")
    weights = (checkpoints(old)[0][1] / "model.safetensors").read_bytes()
    shutil.copytree(old, tmp_path / "whole")
    for moment in moments(config, tmp_path / "whole", force=True):
        run = Path(shutil.copytree(old, tmp_path / str(moment)))
        with Faults(run, moment).watch() as faults, pytest.raises(KilledError):
            go(config(), run, force=True)
        where = faults.seen[-1]
        assert (run / "notes.txt").exists()
        kept = [path for path in run.rglob("model.safetensors") if path.read_bytes() == weights]
        if (run / "config.yaml").exists() and load_config(run / "config.yaml").train.seed == 0:  # the new run
            assert steps_of(run) or kept, where
            if not steps_of(run):
                assert "start it again with" in message_of(lambda run=run: resume(run, progress=False)), where
        else:  # the old one, in whatever state
            assert kept, where
            assert open_run(run).train.seed == 7, where
            assert steps_of(run) == [1], where
            assert not [*(run / EARLIER).glob("*")], where
        with_checkpoint = bool(steps_of(run))
        create_run(run, config(), force=True)
        assert leftovers(run) == [EARLIER], where
        assert (weights in [path.read_bytes() for path in run.rglob("model.safetensors")]) or with_checkpoint, where


def test_a_full_disk_at_any_write_loses_nothing(config: Make, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for moment in moments(config, tmp_path / "whole", force=False)[::4]:
        run = tmp_path / str(moment)
        with Faults(run, moment, full).watch() as faults, contextlib.suppress(InputError, OSError):
            go(config(), run)
        before = steps_of(run)
        if before:
            resume(run, progress=False)
        else:
            go(config(1), run, force=(run / "config.yaml").exists())
        assert steps_of(run)[-1:] >= before[-1:], faults.seen[-1]
        assert not leftovers(run), faults.seen[-1]


def test_a_full_disk_while_predicting_is_one_line(config: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(config(1), run)
    with Faults(run).watch() as faults:
        predict(run, recordings=["test"], progress=False)
    for moment in range(len(faults.seen)):
        shutil.rmtree(run / "poses")
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with Faults(run, moment, full).watch():
            assert "No space left on device" in message_of(lambda: predict(run, recordings=["test"], progress=False))
        assert not (run / "poses").exists() or not list((run / "poses").iterdir())
        predict(run, recordings=["test"], progress=False)


VERBS = {
    "check": "check {project} --out {new}/check",
    "init": "init {folder} --out {new}/project.yaml --units m",
    "cache": "cache --project {project} --cache {new}/cache",
    "calib": "calib convert {folder}/calibration.toml {new}/rig.toml",
    "predict": "predict {run} --force",
    "evaluate": "evaluate {run} --force",
    "report": "report {run}",
    "render": "render {run}",
    "overlay": "render {run} --overlay",
} | {
    to: f"export {{run}} --to {to}" + (" --recordings [test] --start 2026-03-01T14:30:00Z" if to == "nwb" else "")
    for to in FORMATS
}


@pytest.fixture(scope="module")
def finished(rig: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a training of one step, with poses and an evaluation."""
    run = tmp_path_factory.mktemp("finished") / "run"
    main(["train", "--project", str(rig), "--cache", str(run.parent / "cache"), "--out", str(run), *TINY_LINE])
    main(["predict", str(run)])
    main(["evaluate", str(run)])
    return run


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system lets no file grow beyond that: every library's writes fail, in Python or not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    """What is in its files, but for the cache's lock and its notes of what it has seen."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if path.name not in (".lock", ".ledger")}


@pytest.mark.parametrize("verb", VERBS)
def test_a_write_that_fails_is_one_line_in_every_verb(
    verb: str, own_rig: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, new = tmp_path / "run", tmp_path / "new"
    shutil.copytree(finished, run)
    new.mkdir()
    before = contents(tmp_path)
    line = VERBS[verb].format(project=own_rig, folder=own_rig.parent, run=run, new=new)
    arguments = [*line.split(), *(TINY_LINE if verb == "cache" else [])]
    with files_of_at_most(200):
        error = refused(arguments, capsys)
    assert str(tmp_path) in error, error
    assert re.search("File too large|disk is full", error), error
    assert contents(tmp_path) == before


def test_one_process_trains_a_run(config: Make, tmp_path: Path) -> None:
    """A second one is told who has it; a lock whose process was killed is none."""
    run = tmp_path / "run"
    go(config(1), run)
    program = (
        f"import fcntl, os, time; lock = open({str(run / LOCK)!r}, 'w'); fcntl.flock(lock, fcntl.LOCK_EX); "
        "print(f'process {os.getpid()} on a host', file=lock, flush=True); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for use in (lambda: resume(run, steps=2, progress=False), lambda: go(config(1), run, force=True)):
            assert f"another process trains this run (process {holder.pid} on a host)" in message_of(use)
        holder.kill()
        holder.wait()
    assert (run / LOCK).exists()
    resume(run, steps=2, progress=False)
    assert not (run / LOCK).exists()
    assert steps_of(run) == [1, 2]
