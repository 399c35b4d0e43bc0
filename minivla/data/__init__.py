"""The data path: what a dataset's item goes through on its way into a network, and an action on its way out.

features.py     what a policy sees and gives: keys, types, shapes
raw.py          the gate: raw observations checked and batched
normalize.py    the normalisation modes, and which statistics are refused
processors.py   the steps, pipelines of them, and LeRobot's files
stats.py        a dataset's statistics
windows.py      histories and chunks cut out of episodes
lerobot.py      LeRobotDataset, opened with the right windows
"""

from minivla.data.features import (
    ACTION,
    FeatureType,
    MissingKey,
    NormalizationMode,
    PolicyFeature,
    features_of,
)
from minivla.data.lerobot import open_dataset
from minivla.data.normalize import Stats
from minivla.data.processors import Pipeline, make_pipelines, read_pipeline, write_pipeline
from minivla.data.raw import to_batch
from minivla.data.stats import compute_stats, legacy_stats, with_imagenet_stats
from minivla.data.windows import delta_frames, delta_timestamps, window_indices

# `normalize` and `unnormalize` stay in their module, since a function would hide the module of the same name.
__all__ = [
    "ACTION",
    "FeatureType",
    "MissingKey",
    "NormalizationMode",
    "Pipeline",
    "PolicyFeature",
    "Stats",
    "compute_stats",
    "delta_frames",
    "delta_timestamps",
    "features_of",
    "legacy_stats",
    "make_pipelines",
    "open_dataset",
    "read_pipeline",
    "to_batch",
    "window_indices",
    "with_imagenet_stats",
    "write_pipeline",
]
