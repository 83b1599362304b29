"""Where does a training step take its time and memory?  python -m benchmarks.step --help

Each variant is a training run in a process of its own, with settings of its own and, where it names one, the package of
another checkout. The variants take their steps in turn, so that a machine that slows down slows all of them. A variant
is ``LABEL``, ``LABEL:SETTINGS`` or ``LABEL@CHECKOUT:SETTINGS``, SETTINGS as JSON:

    python -m benchmarks.step --project rig/project.yaml --out FILE.csv \\
        now 'before@../before' 'reference:{"model.backend": "reference"}'

A row says of a stage of the step: median seconds, and the bytes that autograd keeps for the backward pass, each
storage once, weights left out. The backward pass is one stage, and so is the optimiser's step. The row `step` is the
whole: seconds without the loading of pairs, all bytes kept, and the process's peak of resident memory (on a GPU, of
allocated memory).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    "variant",
    "stage",
    "seconds",
    "saved_bytes",
    "peak_bytes",
    "steps",
    "threads",
    "device",
    "commit",
    "settings",
)
# Stage, and what of the trainer it is; a method has some of them.
STAGES = {
    "look": "_seen",
    "encoder": "model.encoder.forward",
    "maps": "model.geometry.forward",
    "unproject": "model.unproject.forward",
    "volume network": "model.volume.forward",
    "fine network": "model.fine.forward",
    "lift": "model.lift",
    "draw": "model.draw",
    "decoder": "model.reconstruction.forward",
    "body": "model.body.forward",
    "target": "model.target",
    "loss": "objective.forward",
    "backward": "accelerator.backward",
    "clip": "accelerator.clip_grad_norm_",
    "optimiser": "optimizer.step",
}


class Stages:
    """Seconds and kept bytes of the stages of a trainer's step; a stage inside another is not counted in the outer."""

    def __init__(self, trainer: Any, synchronize: Callable[[], None]) -> None:
        self.synchronize = synchronize
        self.seconds: dict[str, float] = defaultdict(float)
        self.saved: dict[str, int] = defaultdict(int)
        self.open: list[str] = []
        self.started = 0.0
        weights = trainer.model.parameters()
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in weights}
        self.kept: set[int] = set()
        for stage, name in STAGES.items():
            self._wrap(trainer, name, stage)

    def _wrap(self, trainer: Any, name: str, stage: str) -> None:
        *path, last = name.split(".")
        owner = trainer
        for part in path:
            owner = getattr(owner, part, None)
        if owner is None or not hasattr(owner, last):
            return
        inner = getattr(owner, last)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.stage(stage):
                return inner(*arguments, **options)

        setattr(owner, last, timed)

    def _turn(self) -> None:
        """Give the time since the last turn to the innermost open stage."""
        self.synchronize()
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.started
        self.started = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Inside the block, time and kept bytes are this stage's."""
        self._turn()
        self.open.append(name)
        try:
            yield
        finally:
            self._turn()
            self.open.pop()

    def pack(self, tensor: Any) -> Any:
        """Count a tensor that autograd keeps."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.kept | self.weights:
            self.kept.add(storage.data_ptr())
            self.saved[self.open[-1]] += storage.nbytes()
        return tensor


def work(arguments: argparse.Namespace) -> None:
    """The process of one variant: takes a step for each line that it reads, and says how it went."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the package prints is not an answer
    import torch

    from bkind3d.experiments.paper import change
    from bkind3d.experiments.subjects import SUBJECTS
    from bkind3d.train import Trainer

    torch.set_num_threads(arguments.threads)
    config = SUBJECTS[arguments.subject].config(arguments.project, seed=0)
    for name, value in json.loads(arguments.settings).items():
        change(config, name, value)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), progress=False)
        cuda = trainer.accelerator.device.type == "cuda"
        trainer.wrapped.train()
        trainer.objective.train()
        batches = trainer._batches()
        stages: Stages | None = None
        for line in sys.stdin:
            batch = next(batches)
            if line.strip() == "step":
                started = time.perf_counter()
                trainer._train_step(*batch)
                torch.cuda.synchronize() if cuda else None
                answer: dict[str, Any] = {"seconds": time.perf_counter() - started}
                answer["peak"] = (
                    torch.cuda.max_memory_allocated()
                    if cuda
                    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                )
            else:
                stages = stages or Stages(trainer, torch.cuda.synchronize if cuda else lambda: None)
                stages.seconds.clear()
                stages.saved.clear()
                stages.kept.clear()
                hooks = torch.autograd.graph.saved_tensors_hooks(stages.pack, lambda tensor: tensor)
                with stages.stage("rest"), hooks:
                    trainer._train_step(*batch)
                answer = {"stages": stages.seconds, "saved": stages.saved}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


class Variant:
    """A training run in a process of its own."""

    def __init__(self, text: str, arguments: argparse.Namespace) -> None:
        label, _, settings = text.partition(":")
        self.label, _, checkout = label.partition("@")
        self.settings = settings or "{}"
        json.loads(self.settings)
        self.checkout = Path(checkout).resolve() if checkout else ROOT
        if not (self.checkout / "bkind3d").is_dir():
            raise SystemExit(f"{text}: expected a checkout of this repository at {self.checkout}")
        git = ["git", "-C", str(self.checkout), "describe", "--always", "--dirty"]
        self.commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        command = [sys.executable, __file__, "--worker", "--project", str(arguments.project.resolve())]
        command += ["--subject", arguments.subject, "--threads", str(arguments.threads), "--settings", self.settings]
        environment = os.environ | {"PYTHONPATH": str(self.checkout), "OMP_NUM_THREADS": str(arguments.threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=self.checkout
        )
        self.steps: list[dict[str, Any]] = []
        self.stages: list[dict[str, Any]] = []

    def ask(self, what: str) -> dict[str, Any]:
        """One training step: "step" is timed as a whole, "stages" stage by stage."""
        self.send(what)
        return self.answer()

    def send(self, what: str) -> None:
        """Let the process begin."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What it says when it is done."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.label}: its process ended with status {self.process.wait()}")
        return json.loads(line)

    def rows(self, arguments: argparse.Namespace) -> list[dict[str, Any]]:
        """The table's rows of this variant."""
        common = {"variant": self.label, "steps": len(self.steps), "threads": arguments.threads}
        common |= {"commit": self.commit, "settings": self.settings, "device": arguments.device}
        names = list(dict.fromkeys(name for one in self.stages for name in one["stages"]))
        rows = []
        for name in names:
            seconds = statistics.median(one["stages"].get(name, 0.0) for one in self.stages)
            saved = self.stages[-1]["saved"].get(name, 0)
            rows.append(common | {"stage": name, "seconds": f"{seconds:.5f}", "saved_bytes": saved})
        seconds = statistics.median(one["seconds"] for one in self.steps)
        saved, peak = sum(self.stages[-1]["saved"].values()), max(one["peak"] for one in self.steps)
        whole = {"stage": "step", "seconds": f"{seconds:.5f}", "saved_bytes": saved, "peak_bytes": peak}
        return [*rows, common | whole]


def main() -> None:
    """Time, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=["now"], help="LABEL, LABEL:SETTINGS or LABEL@CHECKOUT:SETTINGS")
    parser.add_argument("--project", type=Path, required=True, help="project file")
    parser.add_argument("--subject", default="animal", help="whose settings, as for `bkind3d demo`")
    parser.add_argument("--steps", type=int, default=20, help="of each variant that are timed as a whole")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each process")
    parser.add_argument("--out", type=Path, help="CSV file; printed only when left out")
    parser.add_argument("--raw", type=Path, help="JSON file for the seconds of every step")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--settings", default="{}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    import torch

    from benchmarks.tables import write_csv  # here, since another checkout, whose steps a worker takes, may have none

    arguments.device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    variants = [Variant(text, arguments) for text in arguments.variants]
    for index in range(3 + arguments.steps):
        for variant in variants:
            answer = variant.ask("step")
            if index >= 3:  # the first steps allocate, and choose algorithms
                variant.steps.append(answer)
    for _ in range(max(3, arguments.steps // 2)):
        for variant in variants:
            variant.stages.append(variant.ask("stages"))
    rows = [row for variant in variants for row in variant.rows(arguments)]
    if arguments.out:
        write_csv(arguments.out, COLUMNS, rows)
    if arguments.raw:
        arguments.raw.write_text(json.dumps({variant.label: variant.steps for variant in variants}, indent=1))
    first = {row["stage"]: float(row["seconds"]) for row in rows if row["variant"] == variants[0].label}
    print(f"{'variant':>16} {'stage':>16} {'ms':>9} {'ratio':>7} {'kept MB':>9} {'peak MB':>9}")
    for row in rows:
        ratio = float(row["seconds"]) / first[row["stage"]] if first.get(row["stage"]) else float("nan")
        peak = f"{row['peak_bytes'] / 1e6:9.1f}" if "peak_bytes" in row else ""
        print(
            f"{row['variant']:>16} {row['stage']:>16} {1e3 * float(row['seconds']):9.2f} {ratio:7.2f} "
            f"{row['saved_bytes'] / 1e6:9.2f} {peak}"
        )


if __name__ == "__main__":
    main()
