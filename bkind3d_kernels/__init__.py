"""Fast torch operations for lifting many camera views into 3D keypoints."""
