"""Frames in: the project file, videos, the frame cache, and pairs of frames for training."""

from bkind3d.data.cache import build_cache
from bkind3d.data.cached import CachedRecording, FrameCache
from bkind3d.data.index import Index, load_index, save_index
from bkind3d.data.matching import RecordingInfo, probe_recording
from bkind3d.data.pairs import PairDataset, gap_in_frames, require_pairs
from bkind3d.data.project import Project, Recording, load_project, save_project
from bkind3d.data.truth import Truth, load_truth, save_truth
from bkind3d.data.video import VideoInfo, probe_video, read_frames
from bkind3d.data.volume import Volume, propose_volume, require_visible, visible_views

__all__ = [
    "CachedRecording",
    "FrameCache",
    "Index",
    "PairDataset",
    "Project",
    "Recording",
    "RecordingInfo",
    "Truth",
    "VideoInfo",
    "Volume",
    "build_cache",
    "gap_in_frames",
    "load_index",
    "load_project",
    "load_truth",
    "probe_recording",
    "probe_video",
    "propose_volume",
    "read_frames",
    "require_pairs",
    "require_visible",
    "save_index",
    "save_project",
    "save_truth",
    "visible_views",
]
