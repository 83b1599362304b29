"""A training step by stage: what each stage keeps, whose time is whose, and two variants side by side."""

import csv
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import step
from bkind3d.sims.simulate import simulate_rig


class Model(torch.nn.Module):
    """An encoder inside `lift`, and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(3, 5, bias=False)

    def lift(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return self.encoder(x).exp()


def test_stages_share_time_and_bytes() -> None:
    model = Model()
    stages = step.Stages(SimpleNamespace(model=model), lambda: None)
    x = torch.randn(7, 3, requires_grad=True)
    with stages.stage("rest"), torch.autograd.graph.saved_tensors_hooks(stages.pack, lambda tensor: tensor):
        y = model.lift(x)
        y.square().sum().backward()
    assert stages.saved == {"encoder": 7 * 3 * 4, "lift": 7 * 5 * 4}  # x, not the weight; exp's output, once
    assert set(stages.seconds) == {"rest", "lift", "encoder"}
    assert stages.seconds["lift"] >= 0.02 > stages.seconds["encoder"]


def test_two_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    project = simulate_rig(
        tmp_path / "rig", views=4, frames=40, test_frames=4, image_size=(48, 48), workers=1, progress=False
    )
    small = {"data.height": 48, "data.width": 48, "data.window": 32, "data.gap": 4}
    variants = [f"first:{json.dumps(small)}", f"second@{step.ROOT}:{json.dumps(small | {'model.keypoints': 5})}"]
    files = "--out", str(tmp_path / "step.csv"), "--raw", str(tmp_path / "raw.json")
    arguments = [*variants, "--project", str(project), "--steps", "2", "--threads", "1", *files]
    monkeypatch.setattr(sys, "argv", ["step", *arguments])
    step.main()
    rows = list(csv.DictReader((tmp_path / "step.csv").open()))
    assert {row["variant"] for row in rows} == {"first", "second"}
    found = {row["stage"]: row for row in rows if row["variant"] == "second"}
    assert {"encoder", "maps", "lift", "draw", "decoder", "body", "backward", "optimiser", "step"} <= set(found)
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert int(found["encoder"]["saved_bytes"]) > 0
    assert int(found["step"]["peak_bytes"]) > 1e8
    assert len(json.loads((tmp_path / "raw.json").read_text())["first"]) == 2
    assert "second" in capsys.readouterr().out


def test_a_checkout_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected a checkout of this repository"):
        step.Variant(f"other@{tmp_path}", SimpleNamespace())
