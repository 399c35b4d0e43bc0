"""A dataset as the doctor needs it: columns, episodes and items, whoever made it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from minivla.data.features import ACTION, OBS_ENV_STATE, OBS_STATE
from minivla.data.normalize import Stats, as_stats
from minivla.data.windows import delta_timestamps, window_indices


class Recordings:
    """One face for `minivla.world.Demonstrations` and LeRobotDataset.

    Raises TypeError for anything else.
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "columns") and not hasattr(dataset, "hf_dataset"):
            raise TypeError(
                f"dataset is a {type(dataset).__name__}; expected minivla.world.demonstrations(...) or a "
                "LeRobotDataset. Leave it out, and the checks that need it are listed as not run."
            )
        self.dataset = dataset
        self.features: Mapping[str, Mapping[str, Any]] = dataset.features
        self._columns: dict[str, Tensor] = {}

    @cached_property
    def stats(self) -> Stats:
        """The dataset's statistics, float32."""
        own = self.dataset.stats if hasattr(self.dataset, "columns") else self.dataset.meta.stats
        return as_stats(own)

    def column(self, key: str) -> Tensor:
        """All frames of a column that is no picture, (N, …)."""
        if key not in self._columns:
            if hasattr(self.dataset, "columns"):
                values = self.dataset.columns[key]
            else:
                values = self.dataset.hf_dataset.with_format("numpy")[key][:]
            self._columns[key] = torch.as_tensor(np.stack(list(values)))
        return self._columns[key]

    def has(self, key: str) -> bool:
        """Whether there is such a column."""
        return key in self.features

    @cached_property
    def broken(self) -> dict[str, list[int]]:
        """{column: its frames with NaN or inf}, of actions and states."""
        found: dict[str, list[int]] = {}
        for key in (name for name in (ACTION, OBS_STATE, OBS_ENV_STATE) if self.has(name)):
            column = self.column(key).float()
            rows = (~column.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            found |= {key: rows} if rows else {}
        return found

    @cached_property
    def episodes(self) -> list[tuple[int, int]]:
        """Each episode's first frame and the one after its last, by position in this dataset."""
        numbers = self.column("episode_index").flatten()
        edges = (numbers[1:] != numbers[:-1]).nonzero().flatten() + 1
        bounds = [0, *edges.tolist(), len(numbers)]
        return list(itertools.pairwise(bounds))

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Every frame that has a successor in its episode, and that successor: two (M,) of positions."""
        rows = [torch.arange(start, stop - 1) for start, stop in self.episodes]
        now = torch.cat(rows)
        return now, now + 1

    def names(self, key: str, size: int) -> list[str]:
        """A name for each of `size` dimensions, their numbers where the dataset has none."""
        names = (self.features.get(key) or {}).get("names")
        if isinstance(names, Mapping):  # some datasets put them under one heading: {"motors": […]}
            names = next(iter(names.values()), None)
        fits = isinstance(names, list | tuple) and len(names) == size
        return [str(name) for name in names] if fits and names else [str(index) for index in range(size)]

    def spread_rows(self, count: int) -> list[int]:
        """`count` frames, evenly spread over the whole dataset, ends left out."""
        total = len(self.column("episode_index"))
        return [int(total * (i + 0.5) / count) for i in range(min(count, total))]

    def items(self, rows: Sequence[int], config: Any) -> dict[str, Any]:
        """The raw batch of some frames, with the chunk of actions a policy of this config learns from."""
        if hasattr(self.dataset, "columns"):
            windows = delta_timestamps(config, self.dataset.fps, self.dataset.columns)
            return dict(default_collate(self.dataset.windows(windows).__getitems__(list(rows))))
        batch = dict(default_collate([self.dataset[row] for row in rows]))
        return batch | self.chunks(rows, config)

    def chunks(self, rows: Sequence[int], config: Any) -> dict[str, Tensor]:
        """Recorded chunks (B, H, A) in robot units, and which of their actions are padding (B, H)."""
        bounds = torch.tensor(self.episodes)
        index = torch.as_tensor(rows)
        episode = torch.searchsorted(bounds[:, 1].contiguous(), index, right=True)
        frames, is_pad = window_indices(
            index, bounds[episode, 0], bounds[episode, 1], config.action_delta_indices
        )
        return {ACTION: self.column(ACTION)[frames].float(), "action_is_pad": is_pad}
