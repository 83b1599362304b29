"""Frames in: the project file, videos, the frame cache, pairs of frames for training, and the simulated rig."""

from bkind3d.data.cache import CachedRecording, FrameCache, build_cache
from bkind3d.data.index import Index, load_index, save_index
from bkind3d.data.pairs import PairDataset, gap_in_frames, require_pairs
from bkind3d.data.project import Project, Recording, Truth, load_project, load_truth, save_project, save_truth
from bkind3d.data.video import RecordingInfo, VideoInfo, probe_recording, probe_video, read_frames
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
