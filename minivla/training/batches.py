"""Which samples a training step sees, which random numbers it draws: functions of seed and step alone.

Samplers that walk through a shuffled list lose their place when a run is killed (accelerate's resume has to
skip batches one by one, and only within the epoch). Here nothing has a place to lose: the samples are one
endless stream, epoch after epoch, each a permutation made from (seed, epoch), and the batch of step k is a
slice of it. Random numbers (dropout, the VAE's noise, a dataset's augmentation) are reseeded at every step
from (seed, step, process).
"""

from __future__ import annotations

import contextlib
import random
import signal
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from minivla.data.features import ACTION
from minivla.data.windows import delta_timestamps

# Each use of random numbers has a stream of its own, so that none disturbs another.
ORDER, AUGMENTATION, STEP, EPISODES = 1, 2, 3, 4


def seed_all(*key: int) -> None:
    """Seed python's, numpy's and torch's global generators from a key of non-negative integers."""
    words = np.random.SeedSequence(key).generate_state(3, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    # Not torch.manual_seed, which without a GPU notes a stack trace for the day there is one: 0.8 ms a step.
    torch.default_generator.manual_seed(int(words[2]))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(int(words[2]))
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(int(words[2]))


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever the block draws or seeds, the caller's generators go on as if it had not run."""
    python, legacy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([ORDER, seed, epoch]).permutation(size)


class Batches(Dataset[dict[str, Any]]):
    """Batches by step: `batches[k]` is the raw batch of step k (counted from 0), whichever worker asks.

    Items (dicts, as `LeRobotDataset.__getitem__` gives) are stacked along a new first axis; `task` becomes
    a list of str.
    """

    def __init__(
        self, dataset: Any, batch_size: int, seed: int, *, process: int = 0, processes: int = 1
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self.batch_size, self.process, self.processes = batch_size, process, processes

    def indices(self, step: int) -> list[int]:
        """Which samples step k sees: every one once an epoch, shuffled anew each epoch.

        The processes' batches are consecutive pieces of the batch that one process sees at
        `batch_size * processes`.

        >>> Batches(range(9), 2, seed=0, process=1, processes=2).indices(0)
        [1, 4]
        >>> Batches(range(9), 4, seed=0).indices(0)[2:]
        [1, 4]
        """
        size = len(self.dataset)
        first = (step * self.processes + self.process) * self.batch_size
        places = range(first, first + self.batch_size)
        return [int(_permutation(size, self.seed, place // size)[place % size]) for place in places]

    def __getitem__(self, step: int) -> dict[str, Any]:
        seed_all(AUGMENTATION, self.seed, step, self.process)  # not left to the worker, which may be any
        several = getattr(self.dataset, "__getitems__", None)
        indices = self.indices(step)
        items = several(indices) if several else [self.dataset[index] for index in indices]
        return dict(default_collate(items))

    def loader(self, steps: range, *, num_workers: int = 0, pin_memory: bool = False) -> DataLoader[Any]:
        """The batches of `steps`, in order, prepared ahead by `num_workers` processes."""
        return DataLoader(
            self,
            batch_size=None,  # batches are made here, not by the loader
            sampler=steps,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),  # or the loader draws from the global one
        )


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal; the main one decides, and needs its workers until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def windowed(dataset: Any, config: Any) -> Any:
    """The dataset with the policy's windows, if it can make them (minivla.world's can) and has none yet.

    A policy whose config has `drop_n_last_frames` gets no windows that begin there (`without_last`). Raises
    ValueError when the dataset is empty.
    """
    if len(dataset) == 0:
        raise ValueError("the dataset is empty (0 frames); record or select at least one episode")
    if hasattr(dataset, "windows") and not getattr(dataset, "deltas", None):
        dataset = dataset.windows(delta_timestamps(config, dataset.fps))
    return without_last(dataset, getattr(config, "drop_n_last_frames", 0))


def without_last(dataset: Any, count: int) -> Any:
    """The dataset without the last `count` frames of each episode, whose windows are mostly padding.

    As LeRobot's EpisodeAwareSampler (`datasets/sampler.py`). Warns, and keeps all, when the dataset is
    neither minivla.world's nor a LeRobotDataset, and so does not tell its episodes. Raises ValueError when
    nothing is left.
    """
    if not count:
        return dataset
    if hasattr(dataset, "hf_dataset"):
        episode = np.asarray(dataset.hf_dataset.with_format("numpy")["episode_index"][:])
    elif hasattr(dataset, "columns"):
        episode = dataset.columns["episode_index"]
    else:
        warnings.warn(
            f"a {type(dataset).__name__} does not tell where episodes end: drop_n_last_frames = {count} is "
            "not followed; leave these frames out of it, and set drop_n_last_frames=0",
            stacklevel=3,
        )
        return dataset
    kept = np.flatnonzero(episode[:-count] == episode[count:])
    if not len(kept):
        raise ValueError(
            f"no episode has more than drop_n_last_frames = {count} frames; record longer ones, or lower it"
        )
    return Subset(dataset, kept.tolist())


def check_batch(batch: Mapping[str, Any], config: Any) -> None:
    """Refuse, before the first step, a preprocessed batch that this policy cannot learn from.

    Raises KeyError when the action or an input is absent, ValueError when the actions (B, H, A) have
    another size than the policy predicts.
    """
    wanted = [*config.input_features, ACTION]
    if missing := [key for key in wanted if key not in batch]:
        raise KeyError(
            f"the policy needs {', '.join(missing)}; the dataset's batch has {', '.join(batch)}. "
            "Rename the dataset's columns, or build the policy from this dataset's features "
            "(minivla.data.features_of(dataset))"
        )
    window = config.action_delta_indices
    expected = (() if window is None else (len(window),)) + tuple(config.output_features[ACTION].shape)
    given = tuple(batch[ACTION].shape[1:])
    if given != expected:
        raise ValueError(
            f"the dataset's actions have shape {given} a sample, the policy's {expected}, (horizon, size); "
            "give the dataset the policy's windows, delta_timestamps="
            "minivla.data.windows.delta_timestamps(policy.config, fps), or build the policy for these actions"
        )


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`; everything else as it was."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
