"""BKinD-3D: self-supervised 3D keypoints and skeleton from calibrated multi-view video (Sun et al., CVPR 2023)."""
