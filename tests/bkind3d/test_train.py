"""Training: exact resumption, interruption, logs, and what it refuses."""

import csv
import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from bkind3d.checkpoints import LATER_BUFFERS, checkpoints
from bkind3d.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig, load_config, save_config
from bkind3d.data.window import look
from bkind3d.errors import InputError
from bkind3d.evaluation.evaluate import UNTRAINED, evaluate
from bkind3d.evaluation.parts import OUTLINE_POINTS, RANDOM_POINTS
from bkind3d.models.methods import PENALTIES, Method
from bkind3d.models.views import GREY
from bkind3d.poses import Poses
from bkind3d.predict import predict
from bkind3d.run import build_model, load_model
from bkind3d.train import EpochSampler, Trainer, build_optimizer, learning_rate_factor, resume, train

MakeConfig = Callable[..., Config]


@pytest.fixture
def config(rig: Path, tmp_path: Path) -> MakeConfig:
    """Settings small enough for tests, with the foreground and windows; keywords change those of training."""

    def make(*, foreground: bool = True, **changes: object) -> Config:
        return Config(
            project=rig,
            cache=rig.parent / "cache",
            method="volumetric",
            data=DataConfig(height=32, width=32, gap=4, foreground=foreground, window=24 if foreground else 0),
            model=ModelConfig(
                keypoints=4, encoder="small", pyramid_channels=8, channels=4, voxels=8, volume_channels=(4, 4, 8),
                volume_stem=3, volume_blocks=1, edge_strides=(8, 4), edge_sigmas=(1.0, 1.5), decoder_channels=(8, 8),
                turn_volume=True, silhouette_strides=(4, 2),
            ),
            loss=LossConfig(target_channels="grey", network="none", pixel_scales=2, regularise_after=1.0),
            train=TrainConfig(
                **{"steps": 7, "batch": 3, "log_every": 1, "sample_every": 4, "save_every": 3, "warmup": 2} | changes  # type: ignore[arg-type]
            ),
        )  # fmt: skip

    return make


class HostReads(TorchDispatchMode):
    """Lines of the packages at which the host reads a value: on a GPU it would wait there for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in ("_local_scalar_dense", "nonzero", "masked_select") or masks:
            frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            if "/bkind3d" in frames[-2].filename:  # the last one is this method
                self.lines.add(f"{Path(frames[-2].filename).name}: {frames[-2].line}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method", "cascade"),
    [("volumetric", 0.0), ("volumetric", 0.5), ("triangulation", 0.0), ("depth", 0.0), ("keypoint3d", 0.0)],
)
def test_the_host_reads_nothing_in_a_step(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method, cascade: float
) -> None:
    """On a GPU values are not checked, which this takes over; the optimiser, torch's, counts its steps on the host."""
    for module in ("geometry", "rasterize_edges"):
        monkeypatch.setattr(sys.modules[f"bkind3d_kernels.{module}"], "checks_values", lambda tensor: False)
    settings = config()
    settings.method, settings.model.cascade, settings.model.cascade_voxels = method, cascade, 6
    trainer = Trainer(settings, tmp_path / "run", progress=False)
    batches = trainer._batches()
    trainer._train_step(*next(batches))
    batch = next(batches)
    with HostReads() as reads:
        trainer._train_step(*batch)
        assert trainer._anywhere(None) is None
    assert reads.lines == set()
    with HostReads() as reads:
        trainer.model.skeleton.pairs[trainer.model.skeleton.active]
    assert len(reads.lines) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a device need one")
@pytest.mark.parametrize("method", ["volumetric", "triangulation", "depth", "keypoint3d"])
def test_a_step_never_waits_for_the_device(config: MakeConfig, tmp_path: Path, method: Method) -> None:
    settings = config()
    settings.method = method
    trainer = Trainer(settings, tmp_path / "run", progress=False)
    batches = trainer._batches()
    trainer._train_step(*next(batches))
    batch = next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._train_step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def states(run: Path) -> dict[str, torch.Tensor]:
    """Everything that the newest checkpoint holds, by name."""
    folder = checkpoints(run)[-1][1]
    flat: dict[str, torch.Tensor] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            flat[prefix] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}", item)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                walk(f"{prefix}.{index}", item)
        elif isinstance(value, int | float):
            flat[prefix] = torch.tensor(value)

    model, _ = load_model(run, load_config(run / "config.yaml"))
    walk("model", model.state_dict())
    walk("objective", load_file(folder / "objective.safetensors"))
    walk("optimizer.bin", torch.load(folder / "optimizer.bin", weights_only=True))
    return flat


def rows(run: Path) -> list[dict[str, str]]:
    """metrics.csv without its clock."""
    with (run / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def test_resumed_run_equals_an_unbroken_one_bit_for_bit(config: MakeConfig, tmp_path: Path) -> None:
    """Stopped inside the second epoch and again later; with regularisers, averages, tree and curriculum in it."""
    assert train(config(), tmp_path / "whole", progress=False)
    broken = tmp_path / "broken"

    settings = config()
    settings.train.steps = 7
    interrupted = Trainer(settings, broken, progress=False)
    (broken / "checkpoints").mkdir(parents=True)
    (broken / "samples").mkdir()
    save_config(settings, broken / "config.yaml")
    after_step = interrupted._after_step

    def press(*arguments: object) -> None:
        after_step(*arguments)  # type: ignore[arg-type]
        if interrupted.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    interrupted._after_step = press  # type: ignore[method-assign]
    assert interrupted.train() is False
    assert [step for step, _ in checkpoints(broken)] == [3, 5]
    torch.manual_seed(12345)  # whatever happened in between
    assert resume(broken, progress=False) is True

    expected, got = states(tmp_path / "whole"), states(broken)
    assert expected.keys() == got.keys()
    assert len(expected) > 100
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    assert rows(tmp_path / "whole") == rows(broken)
    assert (tmp_path / "whole" / "health.jsonl").read_text() == (broken / "health.jsonl").read_text()

    assert int(got["model.skeleton.tree"].sum()) == 3  # of four keypoints
    last = rows(broken)[-1]
    assert last["active_edges"] == "3"
    for name in ("containment", "silhouette", "identity", "rigidity"):
        assert float(last[name]) > 0, name
    health = json.loads((broken / "health.jsonl").read_text().splitlines()[-1])
    assert len(health["on_body"]) == len(health["identity"]) == 4


def test_resume_after_a_crash_rewrites_the_log(config: MakeConfig, tmp_path: Path) -> None:
    """A run that died after its last checkpoint has rows that belong to no saved state."""
    run = tmp_path / "run"
    train(config(), run, progress=False)
    expected = rows(run)
    shutil.rmtree(checkpoints(run)[-1][1])
    assert [step for step, _ in checkpoints(run)] == [3, 6]
    resume(run, progress=False)
    assert rows(run) == expected
    assert [json.loads(line)["step"] for line in (run / "health.jsonl").read_text().splitlines()] == [4, 7]


def test_resume_drops_half_a_line(config: MakeConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(steps=4), run, progress=False)
    expected = rows(run)
    for name, half in (("metrics.csv", "5,0.3"), ("health.jsonl", '{"step": 5, "fra')):
        with (run / name).open("a") as file:
            file.write(half)
    assert resume(run, steps=5, progress=False)
    assert rows(run)[:4] == expected
    assert len(rows(run)) == 5


def test_bf16_step(config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does in bfloat16, on volumes that this CPU can take in it."""
    monkeypatch.setattr("bkind3d.train.require_precision", lambda precision: None)
    run = tmp_path / "run"
    AcceleratorState._reset_state(True)  # accelerate keeps one precision for a whole process
    assert train(config(steps=2, precision="bf16"), run, progress=False)
    AcceleratorState._reset_state(True)
    assert all(np.isfinite(float(row["loss"])) for row in rows(run))


def test_a_step_that_is_not_finite_is_named_and_leaves_no_trace(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 4's pictures are no numbers: its pairs are named, and everything that is learned stays finite."""
    seen = Trainer._seen

    def broken(trainer: Trainer, images: torch.Tensor, *rest: torch.Tensor) -> Any:
        images, body = seen(trainer, images, *rest)
        return (images * torch.nan if trainer.step == 3 else images), body

    monkeypatch.setattr(Trainer, "_seen", broken)
    run = tmp_path / "run"
    assert train(config(steps=6, log_every=2, sample_every=5, batch=2), run)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert re.fullmatch(r"step 4: the loss is not finite, the weights stay; frames: (train \d+ and \d+(, )?){2}", line)
    assert [row["step"] for row in rows(run)] == ["2", "4", "6"]
    assert all(value.isfinite().all() for value in states(run).values() if value.is_floating_point())


def test_frames_that_are_named_are_those_that_were_seen(config: MakeConfig, tmp_path: Path) -> None:
    trainer = Trainer(config(foreground=False), tmp_path / "run", progress=False)
    first, _ = next(trainer._batches())
    named = re.findall(r"train (\d+) and (\d+)", trainer._pairs_of(0))
    frames = trainer.inputs.cache.recordings["train"].frames
    for images, rows_of_pair in zip(first, named, strict=True):
        for image, row in zip(images, rows_of_pair, strict=True):
            assert np.array_equal(image.permute(0, 2, 3, 1).numpy(), frames[int(row)])


def test_nothing_but_steps_that_are_not_finite_is_an_error(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_seen", lambda trainer, images, *rest: (images * torch.nan, None))
    with pytest.raises(InputError, match=r"not finite at step 1; .*frames of the last step: train \d+ and \d+"):
        train(config(foreground=False), tmp_path / "run", progress=False)


def test_impossible_settings_are_told_before_a_frame_is_read(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before an earlier run is replaced."""
    run = tmp_path / "run"
    train(config(steps=1), run, progress=False)
    kept = sorted(run.rglob("*"))
    monkeypatch.setattr("bkind3d.train.open_inputs", lambda *arguments, **options: pytest.fail("frames are read"))
    for section, changes, message in (
        ("model", {"edge_strides": (16, 4)}, r"model\.edge_strides: expected some of"),
        ("model", {"map_stride": 3}, r"model\.map_stride: this encoder has strides"),
        ("loss", {"ssim_window": 49}, r"loss\.ssim_window: expected odd, 3 to 47: .*, got 49"),
        ("loss", {"pixel_scales": 6}, r"loss\.pixel_scales: expected 0 to 5, .*, got 6"),
    ):
        settings = config()
        for name, value in changes.items():
            setattr(getattr(settings, section), name, value)
        with pytest.raises(InputError, match=message):
            train(settings, run, force=True, progress=False)
    assert sorted(run.rglob("*")) == kept


class Hostile:
    """A pickle of it makes a file when it is read by one who runs what pickles say."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("maker", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_nothing_in_a_run_folder_is_run(
    config: MakeConfig, tmp_path: Path, maker: Callable[[object, Path], object]
) -> None:
    train(config(steps=2, save_every=2), tmp_path / "good", progress=False)
    files = [path.relative_to(tmp_path / "good") for path in (tmp_path / "good").rglob("*") if path.is_file()]
    (folder,) = (path for _, path in checkpoints(tmp_path / "good"))
    files.append((folder / "custom_checkpoint_0.pkl").relative_to(tmp_path / "good"))  # of an earlier version
    mark = tmp_path / "mark"
    refused = 0
    for file in files:
        if "samples" in file.parts or "tensorboard" in file.parts:
            continue
        run = tmp_path / "run"
        shutil.copytree(tmp_path / "good", run)
        maker({"planted": Hostile(mark)}, run / file)
        try:
            resume(run, steps=3, progress=False)
        except InputError:
            refused += 1
        assert not mark.exists(), file
        shutil.rmtree(run)
    assert refused >= 6
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists()


def test_the_checkpoint_of_an_earlier_version_goes_on(config: MakeConfig, tmp_path: Path) -> None:
    train(config(steps=2), tmp_path / "run", progress=False)
    shutil.copytree(tmp_path / "run", tmp_path / "earlier")
    ((_, folder),) = checkpoints(tmp_path / "earlier")
    objective = folder / "objective.safetensors"
    torch.save(load_file(objective), folder / "custom_checkpoint_0.pkl")
    objective.unlink()
    for run in ("run", "earlier"):
        assert resume(tmp_path / run, steps=4, progress=False)
    assert rows(tmp_path / "run") == rows(tmp_path / "earlier")


def test_resume_for_longer(config: MakeConfig, tmp_path: Path) -> None:
    train(config(steps=2), tmp_path / "run", progress=False)
    assert resume(tmp_path / "run", steps=4, progress=False)
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2", "3", "4"]
    assert load_config(tmp_path / "run" / "config.yaml").train.steps == 4


@pytest.mark.parametrize("foreground", [False, True])
def test_run_folder(config: MakeConfig, tmp_path: Path, foreground: bool) -> None:
    run, settings = tmp_path / "run", config(steps=4, keep=1, foreground=foreground)
    train(settings, run, progress=False)
    assert [step for step, _ in checkpoints(run)] == [4]
    assert (run / "samples" / "step_000004.png").is_file()
    assert load_config(run / "config.yaml") == settings
    environment = json.loads((run / "env.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["backends"]["unproject"]
    assert environment["cudnn_benchmark"] is True
    skeleton = json.loads((run / "skeleton.json").read_text())
    assert skeleton["keypoints"] == ["kp00", "kp01", "kp02", "kp03"]
    assert len(skeleton["all_weights"]) == 6
    strong = [row for row in skeleton["all_weights"] if row[2] > skeleton["threshold"]]
    tree = load_model(run, settings)[0].skeleton.tree.tolist()
    bones = [row for row, kept in zip(skeleton["all_weights"], tree, strict=True) if kept]
    assert len(bones) == (3 if foreground else 0)
    assert skeleton["edges"] == (bones if foreground else strong)
    assert not list(run.rglob("*.part*"))


def test_loss_falls(config: MakeConfig, tmp_path: Path) -> None:
    train(config(steps=40, sample_every=1000, save_every=1000), tmp_path / "run", progress=False)
    loss = np.array([float(row["reconstruction"]) for row in rows(tmp_path / "run")])
    assert loss[-10:].mean() < 0.8 * loss[:3].mean()


def test_predict_and_evaluate(config: MakeConfig, tmp_path: Path, rig: Path) -> None:
    run = tmp_path / "run"
    train(config(steps=2), run, progress=False)
    paths = predict(run, progress=False)
    assert [path.name for path in paths] == ["train.nc", "test.nc"]
    poses = Poses.load(paths[1])
    truth = np.load(rig.parent / "test" / "truth.npz")["points3d"]
    assert poses.positions.shape == (len(truth), 4, 3)
    assert poses.units == "m"
    assert (np.abs(poses.positions - [0, 0, 0.3]) <= np.array([0.6, 0.6, 0.3]) + 1e-5).all()
    result = evaluate(run, every=2, progress=False)
    assert [row["name"] for row in result["rows"]] == ["BKinD-3D", UNTRAINED, "mean pose"]
    assert json.loads((run / "evaluation.json").read_text()) == result
    assert result["skeleton"]["frames"] == 4  # every second of the test recording
    assert result["skeleton"]["pairs"] == 6
    assert len(result["skeleton"]["lengths"]) == len(json.loads((run / "skeleton.json").read_text())["edges"])
    assert result["skeleton"]["agreement"][1]["all_pairs"] is not None
    parts = {row["name"]: row for row in result["parts"]["rows"]}
    assert list(parts) == ["BKinD-3D", UNTRAINED, RANDOM_POINTS, OUTLINE_POINTS]
    assert result["parts"]["frames"] == 4
    assert (len(result["parts"]["mirror"]), result["parts"]["units"]) == (6, "m")
    assert 0.2 < result["parts"]["size"] < 0.7  # m, of an animal half a metre long
    assert parts[RANDOM_POINTS]["nearest_bone"] < 1e-9 < parts["BKinD-3D"]["nearest_bone"]
    with pytest.raises(InputError, match="--force"):
        evaluate(run, progress=False)
    with pytest.raises(InputError, match='"nowhere" is not in'):
        predict(run, recordings=["nowhere"], progress=False)


def test_prediction_goes_on(config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(config(steps=1), run, progress=False)
    first, second = predict(run, progress=False)
    poses = Poses.load(first)
    assert (poses.step, poses.cameras) == (1, ["cam0", "cam1", "cam2", "cam3"])
    assert poses.on_body is not None
    assert 0 <= poses.on_body.min() <= poses.on_body.max() <= 1
    second.unlink()
    before = first.stat().st_mtime_ns
    capsys.readouterr()
    assert predict(run) == [first, second]
    assert first.stat().st_mtime_ns == before
    assert "test (1 of 1): 8 frames, " in capsys.readouterr().err
    predict(run, recordings=["train"], force=True, progress=False)
    assert first.stat().st_mtime_ns > before
    dataclasses.replace(poses, step=7).save(first)
    with pytest.raises(InputError, match=r"train\.nc: exists and is of training step 7, the newest are of step 1"):
        predict(run, progress=False)
    dataclasses.replace(poses, step=None).save(first)
    with pytest.raises(InputError, match=r"does not say of which networks it is, .* give --force"):
        predict(run, progress=False)


def test_evaluation_without_edges(config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(steps=1, foreground=False)
    settings.model.edge_threshold = 1e6
    train(settings, tmp_path / "run", progress=False)
    result = evaluate(tmp_path / "run")
    assert (result["skeleton"]["edges"], result["skeleton"]["lengths"]) == (0, [])
    assert "skeleton: no edges" in capsys.readouterr().out


def test_prediction_does_not_depend_on_the_batch(config: MakeConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(steps=1), run, progress=False)
    whole = Poses.load(predict(run, recordings=["test"], progress=False)[0])
    single = Poses.load(predict(run, recordings=["test"], batch=1, force=True, progress=False)[0])
    np.testing.assert_allclose(single.positions, whole.positions, atol=1e-5)


def test_untrained_network_is_the_one_that_training_starts_from(config: MakeConfig, tmp_path: Path) -> None:
    settings = config(steps=0)
    trainer = Trainer(settings, tmp_path, progress=False)
    for name, value in build_model(settings).state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_no_label_is_read_in_training(config: MakeConfig, tmp_path: Path, rig: Path) -> None:
    """The project trains the same with the truth files gone from it."""
    content = yaml.safe_load(rig.read_text())
    for recording in content["recordings"]:
        del recording["truth"]
    blind = rig.with_name("blind.yaml")
    blind.write_text(yaml.safe_dump(content))
    settings = config(steps=3)
    train(settings, tmp_path / "seeing", progress=False)
    settings.project = blind
    train(settings, tmp_path / "blind", progress=False)
    expected, got = states(tmp_path / "seeing"), states(tmp_path / "blind")
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate(tmp_path / "blind", progress=False)


def test_checkpoints_from_before_the_foreground_go_on(config: MakeConfig, tmp_path: Path) -> None:
    """They lack the buffers of the tree, which such a run leaves at zero; nothing else may be missing."""
    run = tmp_path / "run"
    train(config(steps=2, save_every=1, foreground=False), run, progress=False)
    expected, last = states(run), checkpoints(run)[-1][1]
    shutil.rmtree(last)
    file = checkpoints(run)[-1][1] / "model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if name not in LATER_BUFFERS}, file)
    assert resume(run, progress=False)
    got = states(run)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    file = last / "model.safetensors"
    save_file({name: value for name, value in weights.items() if name != "skeleton.known"}, file)
    with pytest.raises(InputError, match="corrupt or foreign checkpoint"):
        load_model(run, load_config(run / "config.yaml"))


def test_the_objective_of_the_paper(config: MakeConfig, tmp_path: Path) -> None:
    """Without the foreground, the loss is reconstruction, length and separation."""
    settings = config(steps=2, batch=16, foreground=False)  # the second step is the second epoch
    settings.model.turn_volume = False
    settings.loss.length, settings.loss.separation = 0.7, 0.3
    train(settings, tmp_path / "run", progress=False)
    first, second = ({name: float(value) for name, value in row.items()} for row in rows(tmp_path / "run"))
    assert first["loss"] == first["reconstruction"]
    expected = second["reconstruction"] + 0.7 * second["length"] + 0.3 * second["separation"]
    assert second["length"] > 0
    assert second["loss"] == pytest.approx(expected, rel=1e-4)
    assert all(row[name] == 0 for row in (first, second) for name in PENALTIES)


def test_networks_see_the_body_alone(config: MakeConfig, tmp_path: Path) -> None:
    """In training, in the sample pictures and in prediction; of a recording for tests alone too."""
    trainer = Trainer(config(), tmp_path, progress=False)
    entry = trainer.inputs.cache.recordings["test"]
    frames, masks, expected = look(entry, np.array([2, 5]), 24)
    images, projections = trainer.inputs.pictures(entry, np.array([2, 5]))
    assert torch.equal(projections, expected)
    body = torch.from_numpy(masks)[:, :, None].expand_as(images)
    assert 0.005 < float((body == 255).float().mean()) < 0.5
    assert (images[body == 0] == GREY).all()
    assert torch.equal(images[body == 255], torch.from_numpy(frames).permute(0, 1, 4, 2, 3)[body == 255] / 255)
    pair, projections, shares, distances = (part[None] for part in trainer.pairs[0])
    assert (pair.shape[-2:], projections.shape[:3]) == ((24, 24), (1, 2, pair.shape[2]))
    seen, found = trainer._seen(pair, shares, distances)
    assert (seen[(shares == 0)[:, :, :, None].expand_as(seen)] == GREY).all()
    assert found is not None
    assert ((found.distances == 0) == (shares > 127)).all()


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_existing_run_is_kept_without_force(config: MakeConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(steps=1), run, progress=False)
    before = (run / "metrics.csv").read_bytes()
    with pytest.raises(InputError, match="--force"):
        train(config(steps=2), run, progress=False)
    broken = config(steps=2)
    broken.project = tmp_path / "nowhere.yaml"
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        train(broken, run, force=True, progress=False)
    assert (run / "metrics.csv").read_bytes() == before
    train(config(steps=2), run, force=True, progress=False)
    assert len(rows(run)) == 2


def test_foreign_folder_is_never_replaced(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "config.yaml").write_text("settings of one's own")
    with pytest.raises(InputError, match="not a run folder"):
        train(config(), tmp_path, force=True, progress=False)
    assert (tmp_path / "thesis.tex").exists()


def test_force_leaves_foreign_files_in_a_run(config: MakeConfig, tmp_path: Path) -> None:
    train(config(steps=1), tmp_path / "run", progress=False)
    (tmp_path / "run" / "notes.txt").write_text("what I saw")
    train(config(steps=1), tmp_path / "run", force=True, progress=False)
    assert (tmp_path / "run" / "notes.txt").exists()


@pytest.mark.parametrize("damage", ["truncate", "garbage", "foreign"])
def test_corrupt_checkpoint(config: MakeConfig, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    train(config(steps=3), run, progress=False)
    file = checkpoints(run)[-1][1] / "model.safetensors"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "garbage":
        file.write_bytes(b"garbage")
    else:
        settings = load_config(run / "config.yaml")
        settings.model.keypoints = 5
        save_config(settings, run / "config.yaml")
    for use in (lambda: predict(run, progress=False), lambda: resume(run, steps=9, progress=False)):
        with pytest.raises(InputError, match=r"model\.safetensors: corrupt or foreign checkpoint") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_corrupt_optimizer_state(config: MakeConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(steps=3), run, progress=False)
    (checkpoints(run)[-1][1] / "optimizer.bin").write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"step_000003: corrupt or foreign checkpoint"):
        resume(run, steps=9, progress=False)
    assert load_config(run / "config.yaml").train.steps == 3


def test_run_without_checkpoint(config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        resume(tmp_path / "absent")
    save_config(config(), tmp_path / "config.yaml")
    with pytest.raises(InputError, match="no checkpoint"):
        resume(tmp_path)


def test_unwritable_output(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        train(config(), tmp_path / "file" / "run", progress=False)


def test_full_disk_while_saving_keeps_earlier_checkpoints(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(config(steps=3), run, progress=False)

    # Python, safetensors and torch each say it in their own way.
    for error in (OSError(28, "No space left on device"), SafetensorError("No space left"), RuntimeError("No space")):

        def full(self: object, folder: str, error: Exception = error) -> None:
            Path(folder).mkdir()
            raise error

        monkeypatch.setattr("accelerate.Accelerator.save_state", full)
        with pytest.raises(InputError, match="No space"):
            resume(run, steps=5, progress=False)
        assert [step for step, _ in checkpoints(run)] == [3]
        assert not list(run.rglob("*.part*"))


@pytest.mark.parametrize("gap", [0, "0 s", -3, 1000, "soon"])
def test_impossible_gap(config: MakeConfig, tmp_path: Path, gap: str | int) -> None:
    settings = config()
    settings.data.gap = gap
    with pytest.raises(InputError, match="gap"):
        train(settings, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_batch_larger_than_the_data(config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.batch"):
        train(config(batch=1000), tmp_path / "run", progress=False)


def test_diverging_run_stops_with_a_hint(config: MakeConfig, tmp_path: Path) -> None:
    settings = config(steps=30)
    settings.train.lr, settings.train.clip, settings.train.optimizer = 1e30, 1e30, "sgd"
    with pytest.raises(InputError, match=r"train\.lr"):
        train(settings, tmp_path / "run", progress=False)


# -- pieces ------------------------------------------------------------------------------------------------------------


def test_sampler_covers_every_pair_in_an_order_of_its_epoch() -> None:
    sampler = EpochSampler(50, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_learning_rate() -> None:
    config = TrainConfig(steps=100, warmup=10, final_lr=0.1)
    assert learning_rate_factor(0, config) == pytest.approx(0.1, rel=0.01)
    assert learning_rate_factor(9, config) == pytest.approx(1.0, rel=0.03)
    assert learning_rate_factor(100, config) == pytest.approx(0.1)


def test_every_parameter_has_its_group(config: MakeConfig) -> None:
    for foreground in (True, False):
        settings = config(foreground=foreground)
        model = build_model(settings)
        radii = [model.body.capsules.parameter] if model.body is not None else []
        assert len(radii) == foreground
        for name in ("adamw", "sgd"):
            settings.train.optimizer = name
            networks, edges = build_optimizer(model, settings.train).param_groups
            assert len(networks["params"]) + len(edges["params"]) == len(list(model.parameters()))
            assert edges["params"] == [model.skeleton.parameter, *radii]
            assert (edges["lr"], edges["weight_decay"]) == (settings.train.edge_lr, 0.0)


def test_config_round_trip_and_unknown_keys(config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(config(), path)
    assert load_config(path) == config()
    content = yaml.safe_load(path.read_text())
    content["model"]["voxles"] = 3
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match="voxles"):
        load_config(path)


def test_settings_from_before_the_foreground_have_none(config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(config(), path)
    assert load_config(path).data.foreground
    content = yaml.safe_load(path.read_text())
    del content["data"]["foreground"], content["data"]["window"], content["data"]["box"]
    for name in ("containment", "silhouette", "identity", "rigidity"):
        del content["loss"][name]
    path.write_text(yaml.safe_dump(content))
    expected = config(foreground=False)
    expected.data.box = 0.0
    assert load_config(path) == expected
