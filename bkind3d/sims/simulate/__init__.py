"""The simulated rig: a capsule animal filmed by calibrated cameras, with exact truth."""

from bkind3d.sims.simulate.rig import simulate_rig

__all__ = ["simulate_rig"]
