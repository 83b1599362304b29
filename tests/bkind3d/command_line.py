"""The command line in tests: the smallest training, and the one line in which bad input ends."""

import pytest

from bkind3d.cli import main

TINY = [
    "--method=volumetric", "--data.height=32", "--data.width=32", "--data.gap=4", "--model.keypoints=4",
    "--model.encoder=small",
    "--model.pyramid_channels=8", "--model.channels=4", "--model.voxels=8", "--model.volume_channels=[4,4,8]",
    "--model.volume_stem=3", "--model.volume_blocks=1", "--model.edge_strides=[8,4]", "--model.edge_sigmas=[1,1.5]",
    "--model.decoder_channels=[8,8]", "--loss.network=none", "--loss.target_channels=grey", "--train.steps=2",
    "--train.batch=2",
]  # fmt: skip


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command line and return its one line of error."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("bkind3d: error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]
