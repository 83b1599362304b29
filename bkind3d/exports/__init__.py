"""Poses in the files of other tools: one module for each tool, and their registry."""

from bkind3d.exports.formats import FORMATS, Export
from bkind3d.exports.run import export
from bkind3d.exports.track import Track, Views

__all__ = ["FORMATS", "Export", "Track", "Views", "export"]
