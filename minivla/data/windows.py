"""Windows: the history and the chunk that belong to one frame of an episode.

A policy says which frames it wants relative to the current one (`observation_delta_indices` [-1, 0] is two
steps of history, `action_delta_indices` 0…H-1 a chunk of H actions); a dataset is asked in seconds. Where a
window reaches over the end of its episode, the last frame is repeated and marked as padding
(`action_is_pad`), so that the loss can leave it out:

    >>> indices, is_pad = window_indices(8, episode_start=0, episode_stop=10, deltas=[-1, 0, 1, 2])
    >>> indices.tolist(), is_pad.tolist()
    ([7, 8, 9, 9], [False, False, False, True])

The rule is LeRobot 0.6's (`lerobot/datasets/dataset_reader.py`, `factory.py`, `feature_utils.py`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minivla.data.features import ACTION


def delta_timestamps(config: Any, fps: float, keys: Iterable[str] | None = None) -> dict[str, list[float]]:
    """The windows a policy is trained on, in seconds, as `LeRobotDataset(delta_timestamps=…)` takes them.

    config: has input_features, output_features, observation_delta_indices, action_delta_indices (None: the
    current frame only, without a time axis).
    keys: the dataset's, where it has others than the policy.

    Empty when nothing is windowed.
    Raises ValueError unless fps is positive.
    """
    if not fps > 0:
        raise ValueError(
            f"fps is {fps}; expected the dataset's frames per second, above 0. Pass dataset.fps."
        )
    keys = [*config.input_features, *config.output_features] if keys is None else list(keys)
    deltas = {key: _deltas(config, key) for key in keys}
    return {key: [delta / fps for delta in wanted] for key, wanted in deltas.items() if wanted is not None}


def _deltas(config: Any, key: str) -> Sequence[int] | None:
    if key == ACTION:
        return config.action_delta_indices
    return config.observation_delta_indices if key.startswith("observation.") else None


def delta_frames(
    timestamps: Mapping[str, Sequence[float]], fps: float, tolerance: float = 1e-4
) -> dict[str, list[int]]:
    """The reverse of `delta_timestamps`: seconds to frames, for each key.

    Raises ValueError when a time is further than `tolerance` seconds from a frame.
    """
    for key, seconds in timestamps.items():
        off = [second for second in seconds if abs(second * fps - round(second * fps)) / fps > tolerance]
        if off:
            nearest = [round(second * fps) / fps for second in off]
            raise ValueError(
                f"delta_timestamps['{key}'] holds {off}, between two frames at {fps} fps; expected multiples "
                f"of 1/{fps} s. Take {nearest}, or minivla.data.delta_timestamps(config, fps)."
            )
    return {key: [round(second * fps) for second in seconds] for key, seconds in timestamps.items()}


def window_indices(
    index: int | Tensor, episode_start: int | Tensor, episode_stop: int | Tensor, deltas: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Which frames the window of frame `index` is made of, and which of them are padding.

    index, episode_start, episode_stop: integers, or tensors (…) of them; the episode is start ≤ i < stop.
    deltas: W frames relative to index. Returns (indices, is_pad), each (…, W). Raises ValueError for a frame
    outside its episode.
    """
    frame, start, stop = (torch.as_tensor(v).unsqueeze(-1) for v in (index, episode_start, episode_stop))
    if ((frame < start) | (frame >= stop)).any():
        raise ValueError(
            f"frame {index} is outside its episode, {episode_start} ≤ i < {episode_stop}; expected one "
            "inside. Give absolute indices, and the bounds of the episode that holds them."
        )
    wanted = frame + torch.as_tensor(deltas, dtype=torch.long)
    return wanted.clamp(start, stop - 1), (wanted < start) | (wanted >= stop)
