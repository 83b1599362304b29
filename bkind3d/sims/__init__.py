"""Rigs that are made up: simulated, virtual, and recordings in the layout of a published data set."""
