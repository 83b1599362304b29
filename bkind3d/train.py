"""The training loop (paper, Section 3.2.4)."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Sampler
from tqdm import tqdm

from bkind3d.checkpoints import (
    OBJECTIVE,
    WEIGHTS,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    pairs_per_step,
    remove_partial,
    save_checkpoint,
    save_networks,
)
from bkind3d.config import Config, TrainConfig, save_config, validate
from bkind3d.data import FrameCache, PairDataset, gap_in_frames
from bkind3d.errors import InputError, Terminated
from bkind3d.health import keypoint_health
from bkind3d.logs import append_health, append_metrics, cut_logs, write_environment, write_skeleton
from bkind3d.losses import Objective
from bkind3d.memory import estimate, gigabytes
from bkind3d.models.body import Body
from bkind3d.models.discovery import DiscoveryModel, Reconstruction
from bkind3d.models.methods import PENALTIES
from bkind3d.models.views import as_floats, foreground_only
from bkind3d.pictures import sample_sheet
from bkind3d.run import alone, build_model, create_run, let_go, open_inputs, open_run, refuse_existing
from bkind3d_kernels.geometry import VoxelGrid, project_points

HEALTH_FRAMES = 400
ENDING = (signal.SIGTERM, signal.SIGINT)  # the first counts where both came


class EpochSampler(Sampler[int]):
    """A new order of all pairs in each epoch, drawn from (seed, epoch) alone, so that a resumed run sees the same."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 32) + self.epoch)
        yield from torch.randperm(self.size, generator=generator).tolist()


def build_pairs(config: Config, cache: FrameCache, names: list[str]) -> ConcatDataset[tuple[Tensor, ...]]:
    """All training pairs: every distance, and both directions if so configured."""
    fps = cache.recordings[names[0]].fps
    directions = (False, True) if config.data.reverse else (False,)
    return ConcatDataset(
        PairDataset(
            cache,
            names,
            gap_in_frames(gap, fps),
            reverse=reverse,
            masks=config.data.foreground,
            window=config.data.window,
        )
        for gap in config.data.gaps
        for reverse in directions
    )


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from 1 to `final_lr` at the last step."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    progress = min(1.0, step / max(1, config.steps))
    return warm * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def build_optimizer(model: DiscoveryModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or SGD as published, with a learning rate of its own and no decay for the edges' weights and radii."""
    edges = [model.skeleton.parameter] + ([model.body.capsules.parameter] if model.body is not None else [])
    networks = [p for p in model.parameters() if all(p is not edge for edge in edges)]
    groups: list[dict[str, Any]] = [
        {"params": networks, "lr": config.lr, "base_lr": config.lr, "weight_decay": config.weight_decay},
        {"params": edges, "lr": config.edge_lr, "base_lr": config.edge_lr, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, momentum=0.9) if config.optimizer == "sgd" else torch.optim.AdamW(groups)


def require_precision(precision: str) -> None:
    """Refuse half precision on the CPU, where it is slower than fp32 anyway.

    In torch 2.13, bfloat16 gradients to the weights of 3D convolutions over 2 × 2 × 2 voxels, the bottom of the volume
    network, hold memory that was never written.

    Raises:
        InputError: There is no GPU.
    """
    if precision != "no" and not torch.cuda.is_available():
        raise InputError(f"train.precision: {precision} needs a GPU; use no")


def observed(found: Reconstruction) -> dict[str, Tensor]:
    """What keypoint health is measured on: positions (2N, J, 3), confidence (2N, J), and what the foreground says."""
    kept = {"positions": found.positions.flatten(0, 1), "confidence": found.confidence.flatten(0, 1)}
    if found.on_body is not None:
        kept |= {"on_body": found.on_body.share, "identity": found.on_body.identity[None]}
    return {name: value.detach() for name, value in kept.items()}


class Interrupt:
    """Which signal asks for an end: SIGINT (Ctrl-C), whose second press stops at once, or SIGTERM.

    A scheduler's SIGTERM may come more than once, from the launcher as well: a second one changes nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    @contextmanager
    def watch(self) -> Iterator[Interrupt]:
        """Listen inside the block, where a handler may be set (the main thread)."""
        try:
            before = {number: signal.signal(number, self) for number in ENDING}
        except ValueError:
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Trainer:
    """One run: builds everything from the settings, trains, logs and saves.

    Args:
        config: All settings.
        run: Run folder, already made.
        progress: Whether to show a progress bar.
        pairs: Pairs of a step in all processes together, which share them evenly; `train.batch` for each when left out.

    Raises:
        InputError: Settings or inputs that cannot be used, or processes that cannot share the pairs evenly.
    """

    def __init__(self, config: Config, run: Path, *, progress: bool = True, pairs: int | None = None) -> None:
        self.config, self.run, self.progress = config, run, progress
        require_precision(config.train.precision)
        torch.backends.cudnn.benchmark = True  # every step has the same sizes
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        self.accelerator = Accelerator(
            mixed_precision=config.train.precision,
            log_with="tensorboard" if importlib.util.find_spec("tensorboard") else None,
            project_dir=run,
            # The order of pairs comes from EpochSampler; accelerate must not draw one of its own.
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
        )
        processes = self.accelerator.num_processes
        if pairs is not None and pairs % processes:
            raise InputError(
                f"{run}: a step of this run has {pairs} pairs, which {processes} processes cannot share evenly; choose "
                f"a number of processes that divides {pairs}"
            )
        if pairs is not None:
            config.train.batch = pairs // processes
        self.pairs_per_step = config.train.batch * processes
        self.model = build_model(config)  # first, since its settings may be impossible, and the frames take minutes
        self.inputs = open_inputs(config, progress=progress and self.accelerator.is_main_process)
        names = self.inputs.project.names("train", "both")
        if not names:
            raise InputError(f"{config.project}: no recording with split train or both")
        self.pairs = build_pairs(config, self.inputs.cache, names)
        set_seed(config.train.seed)
        self.objective = Objective(config.loss, self.inputs.unit, self._mean)
        loader: DataLoader[tuple[Tensor, ...]] = DataLoader(
            self.pairs,
            batch_size=config.train.batch,
            sampler=EpochSampler(len(self.pairs), config.train.seed),
            num_workers=config.train.workers,
            drop_last=True,
            persistent_workers=config.train.workers > 0,
        )
        self.wrapped, self.optimizer, self.loader = self.accelerator.prepare(
            self.model, build_optimizer(self.model, config.train), loader
        )
        if len(self.loader) == 0:
            raise InputError(f"train.batch: {len(self.pairs)} pairs do not fill one batch of {self.pairs_per_step}")
        self.objective.to(self.accelerator.device)
        self.accelerator.register_save_state_pre_hook(self._save_weights)
        self.accelerator.register_load_state_pre_hook(self._load_weights)
        self.grid = self.inputs.grid.to(self.accelerator.device)
        self.losses: list[tuple[int, Tensor]] = []  # of the steps since the last row of metrics.csv
        self.recent: deque[dict[str, Tensor]] = deque(maxlen=max(1, HEALTH_FRAMES // (2 * config.train.batch)))
        self.step, self.saved = 0, -1
        self.seconds = 0.0

    def _mean(self, value: Tensor) -> Tensor:
        """Average over processes."""
        return self.accelerator.reduce(value, "mean") if self.accelerator.num_processes > 1 else value

    # -- the loop ------------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Train to the last step; returns False if Ctrl-C ended it earlier. Either way the state is saved.

        Raises:
            Terminated: SIGTERM ended it earlier, here or in another process; the state is saved.
        """
        steps = self.config.train.steps
        bar = tqdm(
            total=steps, initial=self.step, unit="step", desc="train",
            disable=None if self.progress and self.accelerator.is_main_process else True,
        )  # fmt: skip
        self.accelerator.init_trackers("tensorboard")
        self.wrapped.train()
        self.objective.train()
        with Interrupt().watch() as interrupt, bar:
            started, asked = time.perf_counter() - self.seconds, None
            for batch in self._batches():
                row = self._train_step(*batch)
                self.seconds = time.perf_counter() - started
                self._after_step(row, bar)
                asked = self._anywhere(interrupt.signal)
                if asked is not None or self.step >= steps:
                    break
        if self.saved != self.step:
            self._save()
        # Let go of everything that holds the process group, so that its threads end before the interpreter does.
        self.wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()
        if asked == signal.SIGTERM and self.step < steps:
            raise Terminated(f"terminated and saved; go on with: bkind3d train --resume --out {self.run}")
        return self.step >= steps

    def _anywhere(self, asked: int | None) -> int | None:
        """The signal that asks for an end in any process: all must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return asked
        flags = torch.tensor([float(asked == number) for number in ENDING], device=self.accelerator.device)
        shares = self._mean(flags).tolist()
        return next((number for number, share in zip(ENDING, shares, strict=True) if share > 0), None)

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Batches of pairs, their projections and masks from the current step on, epoch after epoch."""
        per_epoch = len(self.loader)
        while self.step < self.config.train.steps:
            epoch, skipped = divmod(self.step, per_epoch)
            self.loader.set_epoch(epoch)
            yield from self.accelerator.skip_first_batches(self.loader, skipped) if skipped else self.loader

    @property
    def epoch(self) -> float:
        """Epochs since the start, with fraction."""
        return self.step / len(self.loader)

    def _train_step(self, images: Tensor, projections: Tensor, *foreground: Tensor) -> dict[str, Tensor]:
        factor = learning_rate_factor(self.step, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        # From (seed, step) alone, like the order of pairs: a resumed run draws the same.
        generator = torch.Generator().manual_seed((self.config.train.seed << 32) + self.step)
        images, body = self._seen(images, *foreground)
        moments = 2 * self.pairs_per_step
        grid = self._own(self.model.training_grid(self.grid, self.inputs.project.up, moments, generator))
        with self.accelerator.autocast():
            found: Reconstruction = self.wrapped(images, projections, grid, body)
        target = self.model.target(images, self.config.loss)
        terms = self.objective(found, target, self.model.skeleton, self.epoch)
        self.optimizer.zero_grad()
        self.accelerator.backward(terms["loss"])
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.train.clip)
        self._keep_weights_finite(norm)
        self.optimizer.step()
        self.recent.append(observed(found))
        self.losses.append((self.step, terms["loss"].detach()))
        self.step += 1
        return {**{name: term.detach() for name, term in terms.items()}, "grad_norm": norm}

    def _keep_weights_finite(self, norm: Tensor) -> None:
        """Let a step whose gradient is not finite change nothing but by momentum, without asking the device."""
        finite = norm.isfinite()
        for parameter in self.wrapped.parameters():
            if parameter.grad is not None:
                parameter.grad = torch.where(finite, parameter.grad, 0.0)

    def _pairs_of(self, step: int) -> str:
        """Recordings and frames of the pairs that this process saw in a step, counted from 0."""
        epoch, place = divmod(step, len(self.loader))
        sampler = EpochSampler(len(self.pairs), self.config.train.seed)
        sampler.set_epoch(epoch)
        size = self.config.train.batch
        first = (place * self.accelerator.num_processes + self.accelerator.process_index) * size
        names = []
        for item in list(sampler)[first : first + size]:
            part = bisect_right(self.pairs.cumulative_sizes, item)
            pairs = self.pairs.datasets[part]
            assert isinstance(pairs, PairDataset)
            where, *rows = pairs.locate(item - (self.pairs.cumulative_sizes[part - 1] if part else 0))
            recording = pairs.recordings[where]
            names.append(f"{recording.name} {' and '.join(str(recording.clock[row]) for row in rows)}")
        return ", ".join(names)

    def _own(self, grid: VoxelGrid) -> VoxelGrid:
        """Of the grids of all moments of a step, frames t first, those of this process's pairs."""
        processes, place = self.accelerator.num_processes, self.accelerator.process_index
        if processes == 1 or len(grid.affine) == 1:
            return grid
        return VoxelGrid(grid.affine.unflatten(0, (2, processes, -1))[:, place].flatten(0, 1), grid.shape)

    def _seen(
        self, images: Tensor, masks: Tensor | None = None, distances: Tensor | None = None
    ) -> tuple[Tensor, Body | None]:
        """What the networks see, in [0, 1], and the foreground in it."""
        images = as_floats(images)
        if masks is None or distances is None:
            return images, None
        return foreground_only(images, as_floats(masks)), Body(distances, self.inputs.unit)

    def _after_step(self, row: dict[str, Tensor], bar: Any) -> None:
        every = self.config.train
        bar.update()
        last = self.step == every.steps
        if self.step % every.log_every == 0 or last:
            self._log(self._of_all_pairs(row), bar)
        if self.step % every.sample_every == 0 or last:
            self._sample(bar)
        if self.step % every.save_every == 0 or last:
            self._save()

    # -- what it writes ------------------------------------------------------------------------------------------------

    def _of_all_pairs(self, row: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms of a step, averaged over processes."""
        return dict(zip(row, self._mean(torch.stack([value.float() for value in row.values()])), strict=True))

    def _log(self, row: dict[str, Tensor], bar: Any) -> None:
        values = dict.fromkeys(PENALTIES, 0.0) | {name: float(value) for name, value in row.items()}
        self._look_at_losses(bar)
        active = int(self.model.skeleton.active.sum())
        bar.set_postfix(loss=f"{values['loss']:.4f}", edges=active)
        if not self.accelerator.is_main_process:
            return
        lr = self.optimizer.param_groups[0]["lr"]
        values |= {"step": self.step, "epoch": self.epoch, "active_edges": active, "lr": lr, "seconds": self.seconds}
        append_metrics(self.run, values)
        self.accelerator.log(values, step=self.step)

    def _look_at_losses(self, bar: Any) -> None:
        """Name the pairs of steps whose loss was not finite.

        Raises:
            InputError: That of every step since the last look.
        """
        steps = [step for step, _ in self.losses]
        finite = torch.stack([loss for _, loss in self.losses]).isfinite().tolist()
        self.losses.clear()
        bad = [step for step, good in zip(steps, finite, strict=True) if not good]
        for step in bad:
            bar.write(f"step {step + 1}: the loss is not finite, the weights stay; frames: {self._pairs_of(step)}")
        if len(bad) == len(steps):
            raise InputError(f"{self._diverged()}; frames of the last step: {self._pairs_of(bad[-1])}")

    @torch.no_grad()
    def _sample(self, bar: Any) -> None:
        """Write keypoint health, the skeleton and a picture of one pair (always the same one)."""
        if not self.accelerator.is_main_process:
            return
        seen = {name: torch.cat([step[name].cpu() for step in self.recent]).float().numpy() for name in self.recent[-1]}
        if "identity" in seen:  # one row a step
            seen["identity"] = seen["identity"].mean(0)
        volume, up = self.inputs.volume, self.inputs.project.up
        health = keypoint_health(
            seen.pop("positions"), seen.pop("confidence"), np.array(volume.center), np.array(volume.size), up, **seen
        )
        append_health(self.run, self.step, health)
        bar.write(f"step {self.step}: {health.summary()}")
        write_skeleton(self.run, self.model)

        self.wrapped.eval()
        images, projections, *foreground = (
            part[None].to(self.accelerator.device) for part in self.pairs[len(self.pairs) // 2]
        )
        scaled, _ = self._seen(images, *foreground)
        found = self.model(scaled, projections, self.grid)
        target = self.model.target(scaled, self.config.loss)
        first = projections[:, 0] if projections.ndim == 5 else projections  # of frame t
        pixels, _ = project_points(first, found.positions[:, 0, None])
        skeleton = self.model.skeleton
        sample_sheet(
            self.run / "samples" / f"step_{self.step:06d}.png",
            images[0, 0].permute(0, 2, 3, 1).cpu().numpy(),
            pixels[0].float().cpu().numpy(),
            skeleton.pairs[skeleton.active].cpu().numpy(),
            target[0].mean(1).cpu().numpy(),
            found.difference[0].float().mean(1).cpu().numpy(),
            names=list(self.inputs.project.cameras.names),
            confidence=found.confidence[0, 0].float().cpu().numpy(),
            title=f"step {self.step}",
        )
        self.wrapped.train()

    def _diverged(self) -> str:
        good = "the checkpoints before are good" if checkpoints(self.run) else "there is no checkpoint before"
        return (
            f"{self.run}: the loss or a weight is not finite at step {self.step}; lower train.lr or set "
            f"train.precision to no; {good}"
        )

    def _save_weights(self, models: list[torch.nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        """Save the bare networks: a run trained by several processes is read by one."""
        weights.clear()
        if self.accelerator.is_main_process:
            save_networks(self.model, self.objective, self.recent, Path(folder))

    def _load_weights(self, models: list[torch.nn.Module], folder: str) -> None:
        models.clear()
        load_weights(self.model, Path(folder) / WEIGHTS)
        self.objective.load_state_dict(load_file(Path(folder) / OBJECTIVE))

    def _save(self) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise InputError(self._diverged())
        keep = self.config.train.keep
        save_checkpoint(self.accelerator, self.run, self.step, self.seconds, keep, pairs=self.pairs_per_step)
        if self.accelerator.is_main_process:
            let_go(self.run)
            write_skeleton(self.run, self.model)
        self.saved = self.step

    def restore(self) -> None:
        """Go back to the newest checkpoint, and cut the logs to its step.

        Raises:
            InputError: No checkpoint, or a corrupt one.
        """
        step, folder = latest_checkpoint(self.run)
        self.step, self.seconds, observed = load_checkpoint(self.accelerator, folder)
        # What another number of processes observed is of batches of another size, and is left behind.
        self.recent.extend(row for row in observed if len(row["positions"]) == 2 * self.config.train.batch)
        self.saved = self.step
        if self.accelerator.is_main_process:
            remove_partial(self.run)
            let_go(self.run)
            cut_logs(self.run, step)
        self.accelerator.wait_for_everyone()


def train(config: Config, run: Path, *, force: bool = False, progress: bool = True) -> bool:
    """Train a new run.

    Args:
        config: All settings.
        run: Folder to make.
        force: Replace an earlier run in that folder.
        progress: Whether to show progress bars.

    Returns:
        True if the last step was reached, False if Ctrl-C ended it earlier; the state is saved either way.

    Raises:
        InputError: Settings, project, videos or folder that cannot be used, not enough memory, or another process of
            the training has ended.
        Terminated: SIGTERM ended it earlier; the state is saved.
    """
    validate(config)
    refuse_existing(run, force=force)
    config.project = config.project.resolve()
    config.cache = config.cache_directory.resolve()
    with _held(run):
        trainer = Trainer(config, run, progress=progress)
        if trainer.accelerator.is_main_process:
            create_run(run, config, force=force)
            environment = write_environment(run, config, trainer.accelerator.device)
            tqdm.write(f"encoder: {environment['encoder']}; perceptual network: {environment['perceptual_network']}")
        trainer.accelerator.wait_for_everyone()
        return _guarded(trainer)


def _held(run: Path) -> AbstractContextManager[None]:
    """The run folder for this training alone; its first process holds it."""
    return alone(run) if os.environ.get("RANK", "0") == "0" else nullcontext()


def resume(run: Path, *, steps: int | None = None, progress: bool = True) -> bool:
    """Go on with a run from its newest checkpoint, exactly as if it had never stopped.

    Another number of processes shares the same pairs of each step: `train.batch` changes with it.

    Args:
        run: Run folder.
        steps: New number of steps, to go on for longer; as configured when left out.
        progress: Whether to show progress bars.

    Returns:
        As `train`.

    Raises:
        InputError: No such run, no checkpoint, or a corrupt one; otherwise as `train`.
        Terminated: As `train`.
    """
    config = open_run(run)
    with _held(run):
        pairs = pairs_per_step(latest_checkpoint(run)[1])
        if steps is not None:
            config.train.steps = steps
        validate(config)
        trainer = Trainer(config, run, progress=progress, pairs=pairs)
        trainer.restore()
        if trainer.accelerator.is_main_process:
            save_config(config, run / "config.yaml")
        return _guarded(trainer)


def _guarded(trainer: Trainer) -> bool:
    try:
        return trainer.train()
    except torch.OutOfMemoryError as error:
        views = len(trainer.inputs.project.cameras.names)
        raise InputError(out_of_memory(trainer.config, views, trainer.grid.shape)) from error
    except RuntimeError as error:
        if trainer.accelerator.num_processes > 1 and is_about_another_process(error):
            raise InputError(
                f"{trainer.run}: another process of the training has ended, and this one with it; go on from the last "
                f"checkpoint with: bkind3d train --resume --out {trainer.run}"
            ) from error
        raise


def is_about_another_process(error: RuntimeError) -> bool:
    """Whether the processes of a training could not reach each other any more; gloo has no error of its own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def out_of_memory(config: Config, views: int, voxels: tuple[int, int, int]) -> str:
    """What a step would have taken, and the setting that lowers it most; arguments as `training_memory`."""
    found = estimate(config, views, voxels)
    needed = f"out of memory: a training step takes about {gigabytes(found.bytes)}"
    if not found.savings:
        return f"{needed}, and no one setting lowers that"
    best = found.savings[0]
    return f"{needed}; {best.change} lowers that most, to {gigabytes(best.bytes)}"
