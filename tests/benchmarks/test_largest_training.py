"""The table of the largest volumes, on a model of memory of our own."""

import pytest

from benchmarks import largest_training


def test_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest_training, "foretold", lambda batch, stage, side: batch * side**3 * 100)
    assert largest_training.largest(1, "none", 100 * 64**3) == 64
    assert largest_training.largest(1, "none", 100 * 64**3 - 1) == 48
    assert largest_training.largest(2, "none", 100 * 64**3) == 48
    assert largest_training.largest(1, "none", 1.0) == 0


def test_the_settings_are_the_papers() -> None:
    config = largest_training.settings(4, "volume", 96)
    assert (config.model.encoder, config.data.height, config.loss.network) == ("resnet50", 256, "vgg19")
    assert (config.train.batch, config.train.checkpointing, config.model.voxels) == (4, "volume", 96)
