"""The virtual rig: dm_control's rodent and humanoid, drawn by MuJoCo, with exact truth; needs the extra `sim`."""

from bkind3d.sims.virtual.rig import virtual_rig

__all__ = ["virtual_rig"]
