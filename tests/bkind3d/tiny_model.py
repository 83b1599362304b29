"""The settings of the smallest model, volumetric, of four keypoints."""

from bkind3d.config import ModelConfig

TINY = ModelConfig(
    keypoints=4,
    encoder="small",
    pyramid_channels=8,
    channels=4,
    map_stride=4,
    voxels=8,
    volume_channels=(4, 4, 8),
    volume_stem=3,
    volume_blocks=1,
    edge_strides=(8, 4),
    edge_sigmas=(1.0, 1.5),
    decoder_channels=(8, 8),
)
