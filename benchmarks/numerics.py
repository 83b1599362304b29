"""Are the numbers right on this device?  python -m benchmarks.numerics --device cuda

Runs every backend that can run, in every dtype and with the options that matter, on small random scenes, and compares
the outputs and all gradients with the float64 reference on the CPU, on the same (rounded) inputs. One row each; the
error is the largest difference in units of the largest magnitude. float64 and float32 have fixed tolerances; bfloat16
and float16 may err at most twice as much as the reference does on the CPU in that dtype. Exit status 1 if a row fails.

On CUDA each scene has a process of its own, several at once (--jobs): most of the time goes into compilation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bkind3d_kernels import (
    VoxelGrid,
    explain,
    group_norm_act,
    linear_soft_argmax3d,
    rasterize_edges,
    soft_argmax3d,
    unproject,
)
from bkind3d_kernels.backends import BACKENDS, OPERATIONS

from . import parts
from .measure import largest_error
from .problems import FLOATING
from .unproject import ring

COLUMNS = ("device", "op", "options", "backend", "dtype", "quantity", "error", "tolerance", "status", "reason")
# Of values, and of gradients to geometry: those jump where a float32 coordinate falls on the other side of a pixel's
# border or another edge wins, for a few voxels or pixels of all that they add up.
TOLERANCES = {torch.float64: (1e-11, 1e-9), torch.float32: (5e-5, 1e-3)}
LEAST = 1e-3  # half precision: below this nothing is said
GEOMETRY = ("projections", "affine", "keypoints")
ROUNDED = ("unproject", "group_norm_act")  # their outputs, and so the gradients of these, have the measured dtype


@dataclass
class Scene:
    """An operation with its options, on inputs that all take gradients."""

    op: str
    options: str
    inputs: dict[str, Tensor]
    call: Callable[..., Any]  # (backend, **inputs) -> tensor, tuple or list
    low: tuple[str, ...]  # the inputs that take the measured dtype; the rest is geometry
    fixed: dict[str, Tensor] = field(default_factory=dict)  # inputs without gradients

    def leaves(self, dtype: torch.dtype, device: str, exact: bool = False) -> dict[str, Tensor]:
        """The inputs that take gradients. With ``exact`` in float64, the numbers as rounded to ``dtype``."""
        geometry = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = {}
        for name, value in self.inputs.items():
            value = value.to(dtype if name in self.low else geometry)
            inputs[name] = (value.double() if exact else value).to(device).requires_grad_()
        return inputs

    def function(self, backend: str, device: str) -> Callable[..., list[Tensor]]:
        """From inputs by name to the outputs that have gradients."""
        fixed = {name: value.to(device) for name, value in self.fixed.items()}

        def call(**inputs: Tensor) -> list[Tensor]:
            found = self.call(backend, **inputs, **fixed)
            return [o for o in (found if isinstance(found, (tuple, list)) else [found]) if o.is_floating_point()]

        return call

    def evaluate(self, backend: str, dtype: torch.dtype, device: str, exact: bool = False) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        geometry = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = self.leaves(dtype, device, exact)
        outputs = self.function(backend, device)(**inputs)
        generator = torch.Generator().manual_seed(2)
        cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
        if not exact:
            cotangents = [c.to(o) for c, o in zip(cotangents, outputs)]
        else:
            rounding = [dtype if self.op in ROUNDED else geometry] * len(outputs)
            cotangents = [c.to(d).double().to(o.device) for c, d, o in zip(cotangents, rounding, outputs)]
        gradients = torch.autograd.grad(outputs, list(inputs.values()), cotangents)
        values = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        return values | {f"gradient of {name}": g for name, g in zip(inputs, gradients)}


def scenes() -> Iterator[Scene]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Features as smooth as those of a network: derivatives along the map then jump little between pixels.
    coarse = normal(2 * 3, 5, 6, 7)
    features = F.interpolate(coarse, size=(24, 28), mode="bicubic", align_corners=True).view(2, 3, 5, 24, 28)
    features = features.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    cameras = ring(3, (24, 28)).expand(2, -1, -1, -1) * (1 + 0.01 * normal(2, 3, 1, 4))
    shape = (12, 11, 9)
    box = VoxelGrid.box(torch.zeros(3, dtype=torch.float64), (2.4, 2.2, 1.8), shape).affine
    mask = torch.tensor([[True, True, False], [True, True, True]])
    view_weights = 0.2 + torch.rand(2, 3, 5, generator=generator, dtype=torch.float64)
    for aggregation in ("softmax", "mean", "sum", "max", "weighted"):
        for unseen in ("zero", "exclude"):

            def lift(backend: str, aggregation: str = aggregation, unseen: str = unseen, **inputs: Tensor) -> Any:
                return unproject(
                    inputs["features"],
                    inputs["projections"],
                    VoxelGrid(inputs["affine"], shape),
                    aggregation=aggregation,
                    unseen=unseen,
                    view_mask=inputs["view_mask"],
                    view_weights=inputs.get("view_weights"),
                    return_counts=True,
                    backend=backend,
                )

            given = {"features": features, "projections": cameras, "affine": box}
            given |= {"view_weights": view_weights} if aggregation == "weighted" else {}
            low = ("features", "view_weights")
            yield Scene("unproject", f"{aggregation}, {unseen}", given, lift, low, {"view_mask": mask})

    logits = 3 * normal(2, 7, 12, 10, 9)
    volume = VoxelGrid.box(torch.tensor([0.3, -0.2, 0.5]).double(), (1.0, 0.8, 0.7), (12, 10, 9)).affine
    for temperature in (1.0, 0.25):

        def locate(backend: str, temperature: float = temperature, **inputs: Tensor) -> Any:
            grid, more = VoxelGrid(inputs["affine"], (12, 10, 9)), {"return_peak": True, "return_covariance": True}
            return soft_argmax3d(inputs["logits"], grid, temperature=temperature, backend=backend, **more)

        given = {"logits": logits, "affine": volume}
        yield Scene("soft_argmax3d", f"temperature {temperature}, peak, covariance", given, locate, ("logits",))

    lifted = normal(2, 21, 12, 10, 9).contiguous(memory_format=torch.channels_last_3d)
    weight, bias = normal(7, 21) / 2, normal(7)
    for layout, features in (("channels last", lifted), ("channels first", lifted.contiguous())):

        def regress(backend: str, **inputs: Tensor) -> Any:
            grid, more = VoxelGrid(inputs["affine"], (12, 10, 9)), {"return_peak": True, "return_covariance": True}
            offset = inputs["bias"].to(inputs["weight"].dtype)  # its gradient is zero
            return linear_soft_argmax3d(inputs["features"], inputs["weight"], offset, grid, backend=backend, **more)

        given = {"features": features, "weight": weight, "affine": volume}
        options = f"{layout}, peak, covariance"
        yield Scene("linear_soft_argmax3d", options, given, regress, ("features",), {"bias": bias})

    keypoints = 24 * torch.rand(3, 8, 2, generator=generator, dtype=torch.float64) - 4  # some outside of the first map
    weights = normal(3, 28) + 0.5  # some not drawn
    for sizes, sigmas in (([(16, 16)], [2.0]), ([(8, 10), (16, 20), (33, 31)], [1.8, 3.6, 2.3])):

        def draw(backend: str, sizes: Any = sizes, sigmas: Any = sigmas, **inputs: Tensor) -> Any:
            return rasterize_edges(inputs["keypoints"], inputs["weights"], sizes, sigmas, backend=backend)

        given = {"keypoints": keypoints, "weights": weights}
        options = "sizes " + " ".join(f"{h}x{w}" for h, w in sizes)
        yield Scene("rasterize_edges", options, given, draw, ("keypoints", "weights"))

    for size, groups in (((3, 20, 13, 9), 5), ((2, 24, 7, 8, 5), 8)):
        for more, activation in ((False, "relu"), (True, "relu"), (True, "none")):

            def normalise(backend: str, groups: int = groups, activation: str = activation, **inputs: Tensor) -> Any:
                more = {"residual": inputs.get("residual"), "activation": activation, "backend": backend}
                return group_norm_act(inputs["x"], groups, inputs["weight"], inputs["bias"], **more)

            given = {"x": normal(*size) + 0.5, "weight": 1 + 0.3 * normal(size[1]), "bias": 0.3 * normal(size[1])}
            given |= {"residual": normal(*size)} if more else {}
            options = f"{len(size) - 2}D, {activation}" + (", residual" if more else "")
            yield Scene("group_norm_act", options, given, normalise, ("x", "residual"))


def rows(
    device: str, chosen: list[Scene], dtypes: Sequence[torch.dtype], backends: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One row for each scene, dtype, backend that can run, and quantity."""
    for scene in chosen:
        for dtype in dtypes:
            if scene.op == "rasterize_edges" and dtype not in TOLERANCES:
                continue
            exact = scene.evaluate("reference", dtype, "cpu", exact=True)
            usual = scene.evaluate("reference", dtype, "cpu") if dtype not in TOLERANCES else {}
            for line in explain(scene.op, device=device, dtype=dtype):
                identity = {"device": device, "op": scene.op, "options": scene.options, "backend": line.backend}
                identity["dtype"] = str(dtype).removeprefix("torch.")
                if not line.available or line.backend not in backends:
                    continue
                try:
                    found = scene.evaluate(line.backend, dtype, device)
                except Exception as error:  # noqa: BLE001  a failure is a row, and the others go on
                    reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    yield identity | {"quantity": "all", "status": "failed", "reason": reason}
                    continue
                for quantity, value in found.items():
                    error = largest_error([value], [exact[quantity]])
                    if dtype in TOLERANCES:
                        tolerance = TOLERANCES[dtype][any(name in quantity for name in GEOMETRY)]
                    else:
                        tolerance = max(LEAST, 2 * largest_error([usual[quantity]], [exact[quantity]]))
                    yield identity | {
                        "quantity": quantity,
                        "error": f"{error:.2e}",
                        "tolerance": f"{tolerance:.1e}",
                        "status": "passed" if error <= tolerance else "failed",  # a NaN fails
                    }


def table(found: list[dict[str, Any]]) -> str:
    """Rows passed and the worst error for each operation, backend and dtype."""
    lines = [f"{'operation':<22}{'backend':<12}{'dtype':<10}{'passed':>9}  {'worst output':>13}{'worst gradient':>16}"]
    for key in dict.fromkeys((row["op"], row["backend"], row["dtype"]) for row in found):
        own = [row for row in found if (row["op"], row["backend"], row["dtype"]) == key]
        passed = sum(row["status"] == "passed" for row in own)
        worst = []
        for kind in ("output", "gradient"):
            errors = [float(row["error"]) for row in own if row["quantity"].startswith(kind)]
            worst.append(f"{max(errors):.1e}" if errors else "-")
        lines.append(f"{key[0]:<22}{key[1]:<12}{key[2]:<10}{passed:>4}/{len(own):<4}  {worst[0]:>13}{worst[1]:>16}")
    return "\n".join(lines)


def _parts(chosen: list[Scene], options: argparse.Namespace) -> list[parts.Part]:
    """A process for each scene."""
    common = ("--jobs", "1", "--device", options.device, "--backend", *options.backend, "--dtype", *options.dtype)
    anything = {"device": options.device, "backend": "any", "dtype": "any", "quantity": "all"}
    return [
        parts.Part((*common, "--scene", str(number)), anything | {"op": scene.op, "options": scene.options})
        for number, scene in enumerate(chosen)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run, write, print; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.numerics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="CSV file for the rows")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: all")
    names = [str(dtype).removeprefix("torch.") for dtype in FLOATING]
    parser.add_argument("--dtype", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--scene", type=int, help="one scene alone, by its position")
    parser.add_argument("--jobs", type=int, help="processes at once; default 1 on the CPU, on CUDA most cores")
    parser.add_argument("--seconds", type=float, default=120, help="limit for processes of their own; default 120")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no GPU here", file=sys.stderr)
        return 2
    chosen = list(scenes()) if options.scene is None else [list(scenes())[options.scene]]
    jobs = options.jobs or parts.default_jobs(options.device)
    source = rows(options.device, chosen, [getattr(torch, name) for name in options.dtype], options.backend)
    if jobs > 1:
        source = parts.rows(f"{__package__}.numerics", _parts(chosen, options), jobs, options.seconds)
    found = parts.collect(source, options.out, COLUMNS)
    for row in found:
        if row["status"] == "failed":
            print("failed:", *(f"{row[column]}" for column in COLUMNS if row.get(column) and column != "status"))
    print(table(found))
    for op in OPERATIONS:
        absent = [
            f"{line.backend} ({line.reason})" for line in explain(op, device=options.device) if not line.available
        ]
        if absent:
            print(f"{op}: not available on {options.device}: {'; '.join(absent)}")
    return 1 if any(row["status"] == "failed" for row in found) else 0


if __name__ == "__main__":
    parts.leave(main())
