"""Checkpoints of a run: ``checkpoints/step_<step>/`` holds all that a resumed run needs.

``model.safetensors`` are the networks, ``objective.safetensors`` the scales of the losses, ``recent.safetensors`` what
the next keypoint health is measured on, and ``trainer.json`` where the run was; optimiser and random numbers are saved
as accelerate does, and read as tensors and numbers alone: nothing in a checkpoint is run.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bkind3d.documents import read_json
from bkind3d.errors import InputError, brief, first_line
from bkind3d.files import flush_folder, write_json
from bkind3d.models.discovery import DiscoveryModel

WEIGHTS = "model.safetensors"
OBJECTIVE = "objective.safetensors"
RECENT = "recent.safetensors"
STATE = "trainer.json"
CHECKPOINT = re.compile(r"step_(\d+)")
LATER_BUFFERS = ("skeleton.observed", "skeleton.tree")  # of a run that knows the foreground; zeros in any other


def checkpoints(path: Path) -> list[tuple[int, Path]]:
    """All finished checkpoints of a run as (step, folder), oldest first."""
    found = []
    for folder in (path / "checkpoints").glob("step_*"):
        match = CHECKPOINT.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((int(match[1]), folder))
    return sorted(found)


def remove_partial(path: Path) -> None:
    """Remove checkpoints that a kill has left half written."""
    for folder in (path / "checkpoints").glob("step_*.partial"):
        shutil.rmtree(folder)


def latest_checkpoint(path: Path) -> tuple[int, Path]:
    """Step and folder of the newest checkpoint.

    Raises:
        InputError: The run has none.
    """
    found = checkpoints(path)
    if not found:
        raise InputError(
            f"{path / 'checkpoints'}: no checkpoint yet; if nothing trains this run, start it again with "
            f"`bkind3d train --force --out {path}`"
        )
    return found[-1]


def save_checkpoint(accelerator: Accelerator, run: Path, step: int, seconds: float, keep: int, *, pairs: int) -> None:
    """Save everything that a resumed run needs; a reader never sees half a checkpoint. Every process calls it.

    Args:
        accelerator: Knows what else is to be saved; its hook saves the networks by :func:`save_networks`.
        run: Run folder.
        step: Training step.
        seconds: That the training has taken.
        keep: Number of newest checkpoints kept.
        pairs: Pairs of a step in all processes together.

    Raises:
        InputError: It cannot be written.
    """
    final = run / "checkpoints" / f"step_{step:06d}"
    partial = final.with_suffix(".partial")
    try:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(partial / STATE, {"step": step, "seconds": seconds, "pairs": pairs})
            flush_folder(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for _, folder in checkpoints(run)[:-keep]:
                shutil.rmtree(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of them
        shutil.rmtree(partial, ignore_errors=True)
        kept = "earlier checkpoints are kept" if checkpoints(run) else "there is none before it"
        raise InputError(f"{final}: not written ({first_line(error)}); {kept}") from error
    accelerator.wait_for_everyone()


def save_networks(
    model: DiscoveryModel, objective: nn.Module, recent: Sequence[dict[str, Tensor]], folder: Path
) -> None:
    """Save the bare networks, the scales of the objective, and what was observed in the most recent steps."""
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    save_file(objective.state_dict(), folder / OBJECTIVE)
    save_file({name: torch.stack([step[name] for step in recent]) for name in recent[-1]}, folder / RECENT)


def load_checkpoint(accelerator: Accelerator, folder: Path) -> tuple[int, float, Iterable[dict[str, Tensor]]]:
    """Load what :func:`save_checkpoint` saved; returns the step, the seconds, and what was observed before it.

    Raises:
        InputError: The checkpoint cannot be used.
    """
    try:
        if accelerator.is_main_process:
            _without_code(folder)
        accelerator.wait_for_everyone()
        accelerator.load_state(str(folder))
        state = _state(folder)
        recent = load_file(folder / RECENT)
        count = len(recent["positions"])
        observed = [{name: rows[step] for name, rows in recent.items()} for step in range(count)]
        return state["step"], float(state["seconds"]), observed
    except InputError:
        raise
    except Exception as error:  # accelerate, torch and safetensors have many words for a file that is broken
        raise InputError(corrupt(folder, error)) from error


def _without_code(folder: Path) -> None:
    """Replace the objective's file of an earlier version, of which accelerate would run what is in it, by tensors."""
    earlier = folder / "custom_checkpoint_0.pkl"
    if earlier.exists():
        save_file(torch.load(earlier, weights_only=True), folder / OBJECTIVE)
        earlier.unlink()


def pairs_per_step(folder: Path) -> int | None:
    """Pairs of a step in all processes together, None in a checkpoint of an earlier version, which does not say.

    Raises:
        InputError: The checkpoint cannot be read.
    """
    try:
        return _state(folder).get("pairs")
    except InputError as error:
        raise InputError(corrupt(folder, error)) from error


def _state(folder: Path) -> dict[str, Any]:
    """Where the run was: `step`, `seconds`, and `pairs`, which earlier versions do not say."""
    state = read_json(folder / STATE)
    numbers = [state.get("step"), state.get("seconds"), state.get("pairs", 1)]
    if not all(isinstance(value, int | float) and 0 <= value < 1 << 53 for value in numbers):
        raise InputError(f"{STATE} does not say where the run was")
    if not all(isinstance(value, int) for value in (state["step"], state.get("pairs", 1))) or state.get("pairs") == 0:
        raise InputError(f"{STATE} does not say where the run was")
    return state


def load_weights(model: DiscoveryModel, file: Path) -> None:
    """Load a checkpoint's networks, also one of an earlier version, from before the foreground was known.

    Raises:
        InputError: The file cannot be read, or holds another network.
    """
    own = model.state_dict()
    try:
        model.load_state_dict({name: torch.zeros_like(own[name]) for name in LATER_BUFFERS} | load_file(file))
    except Exception as error:  # as above
        raise InputError(corrupt(file, error)) from error


def corrupt(path: Path, error: Exception) -> str:
    """One line for a checkpoint that cannot be used."""
    folder = path if path.is_dir() else path.parent
    return (
        f"{path}: corrupt or foreign checkpoint ({brief(first_line(error))}); remove {folder} to use the one before it"
    )
