"""What is tried out with the package: the demo, the tables of the paper, and the subjects of both."""
