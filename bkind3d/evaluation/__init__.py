"""What discovered keypoints are worth, measured on arrays."""
