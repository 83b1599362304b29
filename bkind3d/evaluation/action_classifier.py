"""Can behaviour be told from keypoint tracks? A 1D convolutional network over time (paper, Section 4.2), on arrays.

A window of frames around each labelled frame is given its behaviour. Every kind of track (discovered keypoints, true
joints, an untrained network's keypoints) is prepared in the same way:

1. the centroid over keypoints and frames of the window is subtracted, so that the place is no cue;
2. lengths are divided by the RMS distance from it over the training windows: one number, without units;
3. the displacements from frame to frame, divided by their own RMS, are as many further channels: C = 6J;
4. in training each window is turned about the vertical by a random angle, so that the heading is no cue.

The network is three convolutions of width 5 over the window, the first two followed by max-pooling by 2, each with
batch normalisation and ReLU; the mean over what remains of the window, dropout and a linear layer give the behaviours.
AdamW on the cross-entropy, whose classes may be weighted by the inverse of their frequency, in a fixed number of
steps, so that large and small recordings take equally long. It runs on the CPU in float32 and gives the same numbers
for the same seeds and number of threads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bkind3d.errors import InputError
from bkind3d.evaluation.blocks import block_numbers
from bkind3d.tables import align, percent

MAJORITY = "majority"
MEASURES = ("top1", "topk", "balanced")
SETTINGS: dict[str, Any] = {
    "channels": 32,
    "width": 5,
    "dropout": 0.3,
    "batch": 64,
    "learning_rate": 3e-3,
    "weight_decay": 1e-2,
}
SHORTEST_WINDOW = 5  # frames: two poolings leave one
_SCALE_WINDOWS = 1024  # training windows that the two scales are measured on
_CHUNK = 512  # windows per forward pass


@dataclass(frozen=True)
class ActionOptions:
    """Options of the classifier; all are written into the result.

    Args:
        window: frames of a window, odd.
        top: k of the top-k accuracy.
        seeds: how many classifiers are trained for each kind of track, with seeds 0, 1, ...
        class_weights: "balanced" weighs each behaviour by the inverse of its number of training windows, "none" all
            windows alike.
        steps: training steps of a classifier.

    Raises:
        InputError: a value out of range.
    """

    window: int = 31
    top: int = 2
    seeds: int = 3
    class_weights: Literal["balanced", "none"] = "balanced"
    steps: int = 300

    def __post_init__(self) -> None:
        if self.window < SHORTEST_WINDOW or self.window % 2 == 0:
            raise InputError(f"window: expected an odd number of at least {SHORTEST_WINDOW} frames, got {self.window}")
        if self.top < 1:
            raise InputError(f"top: expected at least 1, got {self.top}")
        if self.seeds < 1:
            raise InputError(f"seeds: expected at least 1, got {self.seeds}")
        if self.steps < 1:
            raise InputError(f"steps: expected at least 1, got {self.steps}")
        if self.class_weights not in ("balanced", "none"):
            raise InputError(f'class_weights: expected "balanced" or "none", got {self.class_weights!r}')


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows that lie within their recording, around frames of known behaviour.

    Attributes:
        centre: (W,) middle frame, counted through all recordings one after another.
        time: (W,) the same on an axis where recordings lie a window apart: windows overlap where it differs by less
            than a window's length.
        recording: (W,) number of the recording.
        label: (W,) behaviour.
        unknown: number of frames left out because their behaviour is not known.
        cut: number left out because their window reaches over an end of their recording, or over a frame that it lacks.
    """

    centre: np.ndarray
    time: np.ndarray
    recording: np.ndarray
    label: np.ndarray
    unknown: int
    cut: int


@dataclass(frozen=True, eq=False)
class Fold:
    """Places in :class:`Windows` to train on and to test on."""

    train: np.ndarray
    test: np.ndarray


def find_windows(behaviour: Sequence[np.ndarray], frames: Sequence[np.ndarray], window: int, every: int = 1) -> Windows:
    """The windows of recordings.

    Args:
        behaviour: for each recording (T,), the behaviour of each used frame, -1 where it is not known.
        frames: for each recording (T,), the increasing numbers of these frames.
        window: used frames of a window, odd.
        every: distance of neighbouring frames; a window has no two of another distance.

    Raises:
        InputError: no window lies in any recording.
    """
    radius, start, unknown, cut = window // 2, 0, 0, 0
    rows = []
    for place, (labels, numbers) in enumerate(zip(behaviour, frames, strict=True)):
        whole = np.zeros(len(labels), dtype=bool)
        if len(labels) >= window:
            whole[radius : len(labels) - radius] = numbers[window - 1 :] - numbers[: 1 - window] == (window - 1) * every
        known = labels >= 0
        kept = np.flatnonzero(whole & known)
        rows.append(np.stack([start + kept, start + kept + place * window, np.full(len(kept), place), labels[kept]]))
        unknown, cut, start = unknown + int((~known).sum()), cut + int((known & ~whole).sum()), start + len(labels)
    centre, time, recording, label = np.concatenate(rows, axis=1).astype(np.int64)
    if len(centre) == 0:
        raise InputError(f"window: no recording holds {window} frames around one of known behaviour; shorten it")
    return Windows(centre, time, recording, label, unknown, cut)


def split_fold(windows: Windows, test: Sequence[int]) -> list[Fold]:
    """One fold: the windows of the recordings numbered in ``test`` against all others."""
    tested = np.isin(windows.recording, test)
    return [Fold(np.flatnonzero(~tested), np.flatnonzero(tested))]


def blocked_folds(windows: Windows, blocks: int, window: int) -> list[Fold]:
    """A fold for each block of consecutive windows; no training window shares a frame with a test window.

    Raises:
        InputError: as :func:`bkind3d.evaluation.blocks.block_numbers`.
    """
    block = block_numbers(len(windows.time), blocks)
    folds = []
    for held_out in range(blocks):
        test = np.flatnonzero(block == held_out)
        first, last = windows.time[test[0]], windows.time[test[-1]]
        apart = (windows.time <= first - window) | (windows.time >= last + window)
        folds.append(Fold(np.flatnonzero(apart), test))
    return folds


def check_folds(windows: Windows, folds: Sequence[Fold], behaviours: Sequence[str], options: ActionOptions) -> None:
    """Refuse what no classifier can be trained on.

    Raises:
        InputError: fewer than two behaviours in the windows, fewer in all than ``top``, or a fold without training or
            test windows.
    """
    if len(np.unique(windows.label)) < 2:
        raise InputError("behaviours: at least two must occur in the windows")
    if options.top > len(behaviours):
        raise InputError(f"top: expected at most the number of behaviours ({len(behaviours)}), got {options.top}")
    if any(len(fold.train) == 0 or len(fold.test) == 0 for fold in folds):
        raise InputError("windows: a fold has none to train or none to test on; use fewer blocks or a shorter window")


def compare_actions(
    tracks: Mapping[str, np.ndarray],
    windows: Windows,
    folds: Sequence[Fold],
    behaviours: Sequence[str],
    options: ActionOptions,
    *,
    up: Sequence[float] = (0.0, 0.0, 1.0),
) -> dict[str, Any]:
    """Train and test the classifier on each kind of track; the majority's row is added.

    Args:
        tracks: name -> positions (F, J, 3) of all frames of all recordings, one after another; J may differ.
        windows: see :func:`find_windows`.
        folds: each is trained and tested on its own; scores are taken over the test windows of all folds together.
        behaviours: their names.
        options: see :class:`ActionOptions`.
        up: the vertical.

    Returns:
        ``options``, ``behaviours``, ``windows`` (number of test windows of each behaviour, and of frames left out) and
        ``rows``: shares ``top1``, ``topk``, ``balanced`` (mean recall) and ``recall`` of each behaviour (None where it
        is not tested), means over the seeds, and their standard deviation ``sd`` where there are several.

    Raises:
        InputError: as :func:`check_folds`, or tracks that do not fit.
    """
    check_folds(windows, folds, behaviours, options)
    labels, count = windows.label, len(behaviours)
    tested = np.concatenate([fold.test for fold in folds])
    rows = []
    for name, positions in tracks.items():
        track = _checked_track(name, positions, int(windows.centre.max()))
        scores = [
            np.concatenate([_fold_scores(track, windows, fold, count, options, up, seed) for fold in folds])
            for seed in range(options.seeds)
        ]
        rows.append({"name": name} | _summary([action_scores(one, labels[tested], options.top) for one in scores]))
    frequency = [np.tile(np.bincount(labels[fold.train], minlength=count), (len(fold.test), 1)) for fold in folds]
    majority = action_scores(np.concatenate(frequency).astype(float), labels[tested], options.top)
    rows.append({"name": MAJORITY} | _summary([majority]))
    return {
        "options": vars(options) | SETTINGS,
        "behaviours": list(behaviours),
        "windows": {
            "tested": np.bincount(labels[tested], minlength=count).tolist(),
            "unknown": windows.unknown,
            "cut": windows.cut,
        },
        "rows": rows,
    }


def action_scores(scores: np.ndarray, labels: np.ndarray, top: int) -> dict[str, Any]:
    """Accuracy of class scores (W, C) against labels (W,).

    Returns:
        ``top1``; ``topk``, share of windows whose behaviour is among the ``top`` best; ``balanced``, mean over the
        behaviours that occur of ``recall`` (C,), None where one does not.
    """
    ranked = np.argsort(-scores, axis=1, kind="stable")
    hit = ranked[:, 0] == labels
    recall = [float(hit[labels == c].mean()) if (labels == c).any() else None for c in range(scores.shape[1])]
    return {
        "top1": float(hit.mean()),
        "topk": float((ranked[:, :top] == labels[:, None]).any(axis=1).mean()),
        "balanced": float(np.mean([value for value in recall if value is not None])),
        "recall": recall,
    }


def format_actions(document: Mapping[str, Any]) -> str:
    """Rows of :func:`compare_actions` as text for the terminal."""
    head = ["", "top-1", f"top-{document['options']['top']}", "balanced", *document["behaviours"]]
    body = [
        [row["name"], *(spread_percent(row, name) for name in MEASURES), *map(percent, row["recall"])]
        for row in document["rows"]
    ]
    return "\n".join(align(head, body))


def spread_percent(row: Mapping[str, Any], measure: str) -> str:
    """A share in percent, with its standard deviation over the seeds where there is one."""
    return percent(row[measure]) + (f" ± {100 * row['sd'][measure]:.1f}" if "sd" in row else "")


def _summary(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and sample standard deviations where there are several."""
    mean: dict[str, Any] = {name: float(np.mean([one[name] for one in seeds])) for name in MEASURES}
    recalls = zip(*(one["recall"] for one in seeds), strict=True)
    mean["recall"] = [None if values[0] is None else float(np.mean(values)) for values in recalls]
    if len(seeds) > 1:
        mean["sd"] = {name: float(np.std([one[name] for one in seeds], ddof=1)) for name in MEASURES}
    return mean


def _checked_track(name: str, positions: np.ndarray, last: int) -> Tensor:
    """(F, J, 3) float32."""
    if positions.ndim != 3 or positions.shape[2] != 3 or 0 in positions.shape or len(positions) <= last:
        raise InputError(f"tracks of {name}: expected (F, J, 3) with F above {last}, got {positions.shape}")
    if not np.isfinite(positions).all():
        raise InputError(f"tracks of {name}: some positions are not finite")
    return torch.from_numpy(np.ascontiguousarray(positions, dtype=np.float32))


# --- windows into channels ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scales:
    """What lengths and displacements are divided by, in the tracks' unit."""

    length: float
    displacement: float


def _centred(track: Tensor, centre: Tensor, radius: int) -> Tensor:
    """Windows (B, T, J, 3) of a track (F, J, 3), their centroid removed."""
    windows = track[centre[:, None] + torch.arange(-radius, radius + 1)]
    return windows - windows.mean(dim=(1, 2), keepdim=True)


def _scales(track: Tensor, centre: Tensor, radius: int) -> _Scales:
    chosen = torch.linspace(0, len(centre) - 1, min(len(centre), _SCALE_WINDOWS)).long()
    windows = _centred(track, centre[chosen], radius)
    length, displacement = (x.square().sum(-1).mean().sqrt().item() for x in (windows, windows.diff(dim=1)))
    return _Scales(length or 1.0, displacement or 1.0)


def _channels(windows: Tensor, scales: _Scales) -> Tensor:
    """Centred windows (B, T, J, 3) -> (B, 6J, T): positions, and displacements from the frame before."""
    steps = nn.functional.pad(windows.diff(dim=1), (0, 0, 0, 0, 1, 0))
    return torch.cat([windows / scales.length, steps / scales.displacement], dim=2).flatten(2).transpose(1, 2)


def _random_turns(count: int, up: Sequence[float]) -> Tensor:
    """Rotations (B, 3, 3) about the vertical by random angles (Rodrigues' formula)."""
    x, y, z = (np.asarray(up, dtype=np.float64) / np.linalg.norm(up)).tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = 2 * torch.pi * torch.rand(count, 1, 1)
    return torch.eye(3) + angle.sin() * cross + (1 - angle.cos()) * (cross @ cross)


# --- the network --------------------------------------------------------------------------------------------------


def _network(inputs: int, behaviours: int) -> nn.Sequential:
    """(B, inputs, T) -> (B, behaviours)."""
    channels, width = SETTINGS["channels"], SETTINGS["width"]

    def layer(before: int, *after: nn.Module) -> list[nn.Module]:
        convolution = nn.Conv1d(before, channels, width, padding=width // 2, bias=False)
        return [convolution, nn.BatchNorm1d(channels), nn.ReLU(), *after]

    return nn.Sequential(
        *layer(inputs, nn.MaxPool1d(2)),
        *layer(channels, nn.MaxPool1d(2)),
        *layer(channels, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Dropout(SETTINGS["dropout"])),
        nn.Linear(channels, behaviours),
    )


def _fold_scores(
    track: Tensor, windows: Windows, fold: Fold, behaviours: int, options: ActionOptions, up: Sequence[float], seed: int
) -> np.ndarray:
    """Train on a fold's training windows and score its test windows: (W, C)."""
    radius = options.window // 2
    train, test = (torch.from_numpy(windows.centre[chosen]) for chosen in (fold.train, fold.test))
    labels = torch.from_numpy(windows.label[fold.train])
    scales = _scales(track, train, radius)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(6 * track.shape[1], behaviours)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=SETTINGS["learning_rate"], weight_decay=SETTINGS["weight_decay"], fused=True
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
        weight = _class_weights(labels, behaviours) if options.class_weights == "balanced" else None
        for _ in range(options.steps):
            chosen = torch.randint(len(train), (SETTINGS["batch"],))
            turns = _random_turns(len(chosen), up)
            turned = torch.einsum("bij,btkj->btki", turns, _centred(track, train[chosen], radius))
            loss = nn.functional.cross_entropy(network(_channels(turned, scales)), labels[chosen], weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        chunks = [network(_channels(_centred(track, chunk, radius), scales)) for chunk in test.split(_CHUNK)]
    return torch.cat(chunks).numpy()


def _class_weights(labels: Tensor, behaviours: int) -> Tensor:
    """(C,) inverse of each behaviour's share, 0 where it does not occur."""
    frequency = torch.bincount(labels, minlength=behaviours)
    return torch.where(frequency > 0, len(labels) / ((frequency > 0).sum() * frequency.clamp_min(1)), 0.0)
