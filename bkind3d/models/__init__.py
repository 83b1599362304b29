"""The networks: what all discovery methods share, a file for each of them, and their registry."""
