"""What discovered keypoints are worth: beside annotated joints, without labels, and for telling behaviour."""
