"""Demonstrations of the experts, as a dataset in memory.

Disturbances teach recovery (Laskey et al. 2017, "DART: Noise Injection for Robust Imitation Learning"): now
and then a short burst of drift is added to the action that is *carried out*, while the action that is
*recorded* is the one the expert wanted.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from minivla.data.features import ACTION, OBS_IMAGES, OBS_STATE
from minivla.data.normalize import Stats
from minivla.data.stats import compute_stats
from minivla.data.windows import delta_frames, window_indices
from minivla.world import spec
from minivla.world.experts import expert
from minivla.world.tabletop import Tabletop

Frame = dict[str, Any]
COUNTERS = {"timestamp": "float32"} | dict.fromkeys(
    ("frame_index", "episode_index", "index", "task_index"), "int64"
)


class Demonstrations(Dataset[dict[str, Any]]):
    """Whole episodes, held as arrays; items are those of `LeRobotDataset.__getitem__`.

    columns: key -> array (frames, …), pictures as uint8 (frames, H, W, 3).
    lengths: frames in each episode.
    tasks: the instruction of each episode.
    features: columns as `meta/info.json` describes them.
    delta_timestamps: see `windows`.
    seeds: with which each episode's environment was reset, where its actions alone lead to success again.

    An item has a tensor for every column (pictures float32 (3, H, W) in [0, 1]), scalars `timestamp` in
    seconds, `frame_index` within the episode, `episode_index`, `index`, `task_index`, and the instruction
    under `task`.
    """

    def __init__(
        self,
        columns: Mapping[str, np.ndarray],
        lengths: Sequence[int],
        tasks: Sequence[str],
        features: Mapping[str, Mapping[str, Any]],
        *,
        fps: int = spec.FPS,
        delta_timestamps: Mapping[str, Sequence[float]] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.seeds = seeds
        self.features = {
            **features,
            **{k: {"dtype": d, "shape": (1,), "names": None} for k, d in COUNTERS.items()},
        }
        self.fps = fps
        self.tasks = list(dict.fromkeys(tasks))
        """The different instructions; `task_index` is a place in this list."""
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        """Where each episode starts, and where the last one ends: (episodes + 1,)."""
        self.columns = dict(columns) | self._counters(lengths, [self.tasks.index(task) for task in tasks])
        self._tensors = {key: torch.from_numpy(column) for key, column in self.columns.items()}
        self.deltas = self._deltas(delta_timestamps)

    def _counters(self, lengths: Sequence[int], task_indices: Sequence[int]) -> dict[str, np.ndarray]:
        episode = np.repeat(np.arange(len(lengths)), lengths)
        index = np.arange(len(episode))
        frame = index - self.starts[episode]
        values = (frame / self.fps, frame, episode, index, np.repeat(task_indices, lengths))
        return {k: v.astype(dtype) for (k, dtype), v in zip(COUNTERS.items(), values, strict=True)}

    def windows(self, delta_timestamps: Mapping[str, Sequence[float]] | None) -> "Demonstrations":
        """The same frames seen through windows: a shallow copy, no frame is duplicated.

        delta_timestamps: key -> seconds relative to the frame, multiples of 1/fps. The key's tensor gains a
        time axis in front, and `<key>_is_pad` says where it would have left the episode; its nearest frame
        stands there instead. Raises KeyError for a key there is none of, ValueError for a time between two
        frames.
        """
        other = copy.copy(self)
        other.deltas = self._deltas(delta_timestamps)
        return other

    def _deltas(self, delta_timestamps: Mapping[str, Sequence[float]] | None) -> dict[str, list[int]]:
        for key in delta_timestamps or {}:
            if key not in self.columns:
                raise KeyError(
                    f"delta_timestamps names '{key}', no column of this dataset. It has "
                    f"{', '.join(self.columns)}: rename the key, or take it out."
                )
        return delta_frames(delta_timestamps or {}, self.fps)

    def joined(self, other: "Demonstrations") -> "Demonstrations":
        """The episodes of both, this one's first, seen through this one's windows.

        `stats` are those of all, and there are no `seeds`. Raises ValueError where columns differ in name,
        shape or kind, or the fps.
        """
        if (self.features, self.fps) != (other.features, other.fps):
            raise ValueError(
                f"cannot join {self.fps} fps of {self.features} and {other.fps} fps of {other.features}; "
                "expected the same columns: make both with the same embodiment, size and cameras."
            )
        recorded = [key for key in self.columns if key not in COUNTERS]
        both = Demonstrations(
            {key: np.concatenate([self.columns[key], other.columns[key]]) for key in recorded},
            [stop - start for each in (self, other) for start, stop in each.episodes],
            [
                each.tasks[each.columns["task_index"][start]]
                for each in (self, other)
                for start, _ in each.episodes
            ],
            {key: self.features[key] for key in recorded},
            fps=self.fps,
        )
        both.deltas = self.deltas
        return both

    @property
    def num_frames(self) -> int:
        """How many frames there are."""
        return int(self.starts[-1])

    @property
    def num_episodes(self) -> int:
        """How many episodes there are."""
        return len(self.starts) - 1

    @property
    def episodes(self) -> list[tuple[int, int]]:
        """Each episode's first index and the one after its last."""
        return [
            (int(start), int(stop)) for start, stop in zip(self.starts[:-1], self.starts[1:], strict=True)
        ]

    @cached_property
    def stats(self) -> Stats:
        """The statistics that normalisation needs, by `minivla.data.compute_stats`."""
        # LeRobot sums timestamps up before it rounds them to float32.
        columns = self.columns | {"timestamp": self.columns["frame_index"] / self.fps}
        episodes = (
            {key: column[start:stop] for key, column in columns.items()} for start, stop in self.episodes
        )
        return compute_stats(episodes, self.features)

    def __len__(self) -> int:
        return self.num_frames

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The items at several indices, which costs less than one by one."""
        if absent := [int(i) for i in indices if not -len(self) <= i < len(self)]:
            raise IndexError(
                f"No frames {absent} among {len(self)}; expected {-len(self)} ≤ index < {len(self)}."
            )
        rows = torch.as_tensor([int(i) % len(self) for i in indices], dtype=torch.long)
        windows = {key: self._window(rows, deltas) for key, deltas in self.deltas.items()}
        batch: dict[str, Any] = {f"{key}_is_pad": is_pad for key, (_, is_pad) in windows.items()}
        batch |= {
            key: _to_float(c[windows[key][0] if key in windows else rows]) for key, c in self._tensors.items()
        }
        batch["task"] = [self.tasks[i] for i in self._tensors["task_index"][rows].tolist()]
        return [{key: column[i] for key, column in batch.items()} for i in range(len(rows))]

    def _window(self, rows: Tensor, deltas: list[int]) -> tuple[Tensor, Tensor]:
        """Frame numbers and padding, both (B, W), of windows around rows (B,)."""
        episode = self._tensors["episode_index"][rows]
        starts = torch.from_numpy(self.starts)
        return window_indices(rows, starts[episode], starts[episode + 1], deltas)


def _to_float(column: Tensor) -> Tensor:
    """Pictures uint8 (…, H, W, 3) become float32 (…, 3, H, W) in [0, 1]; anything else stays."""
    if column.dtype != torch.uint8:
        return column
    return (
        rearrange(column, "... height width channel -> ... channel height width")
        .contiguous()
        .float()
        .div_(255)
    )


def demonstrations(
    task: str | Sequence[str],
    episodes: int,
    seed: int,
    *,
    embodiment: str = "cartesian",
    size: int = 64,
    cameras: Sequence[str] = ("table", "wrist"),
    environment_state: bool = False,
    split: str = "train",
    noise: float = 0.15,
    delta_timestamps: Mapping[str, Sequence[float]] | None = None,
    progress: bool = False,
) -> Demonstrations:
    """Successful episodes of the expert, `episodes` of them; the same ones for the same seed.

    task: one task, or several, which take turns: episode i is of task i modulo their number.
    noise: the share of steps, in [0, 1), in which a disturbance moves the robot elsewhere than the recorded
    action says.
    delta_timestamps: as in `Demonstrations.windows`.
    progress: show a bar.

    The other arguments are Tabletop's.
    Raises ValueError for unknown names and numbers out of range, RuntimeError when the expert keeps failing.
    """
    if episodes < 1 or seed < 0 or not 0 <= noise < 1:
        raise ValueError(
            f"episodes={episodes}, seed={seed}, noise={noise}; expected ≥ 1, ≥ 0 and 0 ≤ noise < 1."
        )
    tasks = (task,) if isinstance(task, str) else tuple(task)
    if not tasks:
        raise ValueError("task is empty; expected one task, or several: task=('detour', 'pick_place').")
    settings = (embodiment, size, tuple(cameras), environment_state)
    envs = [Tabletop(each, *settings, split=split) for each in tasks]
    bar = tqdm(range(episodes), desc=f"{', '.join(tasks)} demonstrations", disable=not progress)
    kept = [_successful_episode(envs[i % len(envs)], np.random.default_rng([seed, i]), noise) for i in bar]
    dataset = collect(envs[0], [(frames, instruction) for frames, instruction, _ in kept], delta_timestamps)
    # A disturbed step carried out another action than the recorded one: such an episode does not repeat.
    dataset.seeds = None if noise else [seed for *_, seed in kept]
    return dataset


def collect(
    env: Tabletop,
    episodes: Sequence[tuple[Sequence[Frame], str]],
    delta_timestamps: Mapping[str, Sequence[float]] | None = None,
) -> Demonstrations:
    """A dataset of episodes, each given as frames of `env` and its instruction."""
    frames = [frame for episode, _ in episodes for frame in episode]
    return Demonstrations(
        {key: np.stack([frame[key] for frame in frames]) for key in frames[0]},
        [len(episode) for episode, _ in episodes],
        [instruction for _, instruction in episodes],
        columns_of(env),
        delta_timestamps=delta_timestamps,
    )


def columns_of(env: Tabletop) -> dict[str, dict[str, Any]]:
    """The columns an environment's frames have, as LeRobot's `meta/info.json` describes them."""
    names = {OBS_STATE: list(env.embodiment.state_names), ACTION: list(env.action_spec.names)}
    features: dict[str, dict[str, Any]] = {}
    for key, space in {**env.observation_space.spaces, ACTION: env.action_space}.items():
        if key.startswith(OBS_IMAGES):
            features[key] = {"dtype": "video", "shape": space.shape, "names": ["height", "width", "channels"]}
        else:
            features[key] = {"dtype": "float32", "shape": space.shape, "names": names.get(key)}
    return features


def _successful_episode(
    env: Tabletop, rng: np.random.Generator, noise: float
) -> tuple[list[Frame], str, int]:
    """Its frames, its instruction, and the seed its environment was reset with."""
    for _ in range(50):
        seed = int(rng.integers(2**31))
        frames = list(_episode(env, seed, rng, noise))
        if env.scene.stage == len(env.scene.parts):
            return frames, env.scene.instruction, seed
    raise RuntimeError(
        f"The expert failed 50 times running at {env.task} with noise={noise}: lower the noise."
    )


def _episode(env: Tabletop, seed: int, rng: np.random.Generator, noise: float) -> Iterator[Frame]:
    """The frames of one episode; the last is the one that its last action was decided on."""
    observation, _ = env.reset(seed=seed)
    yield from finished(env, observation, rng, noise)


def finished(
    env: Tabletop, observation: Mapping[str, np.ndarray], rng: np.random.Generator, noise: float
) -> Iterator[Frame]:
    """The frames with which the expert takes an episode to its end, from where it is; `observation` is the
    last one."""
    act, disturb, over = expert(env), Disturbance(env, rng, noise), False
    while not over:
        action = act()
        yield {**observation, ACTION: action}
        observation, _, terminated, truncated, _ = env.step(disturb(action))
        over = terminated or truncated


class Disturbance:
    """Bursts of drift, three to six steps long, that fill a `share` of all steps; a few of them also turn the
    grip round.

    In a burst every motion is off by the same random amount, up to four fifths of the largest step.
    """

    def __init__(self, env: Tabletop, rng: np.random.Generator, share: float) -> None:
        card = env.action_spec
        self.rng, self.share, self.grips = rng, share, list(card.gripper)
        self.strength = 0.8 * np.where(card.absolute, card.max_step, 1.0)
        self.strength[self.grips] = 0
        self.left = 0

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """The action, float32 (A,), that is carried out in place of `action`."""
        if self.left == 0 and self.rng.random() < self.share / (4.5 * (1 - self.share)):
            self.left = int(self.rng.integers(3, 7))
            self.drift = (self.rng.uniform(-1, 1, len(action)) * self.strength).astype(np.float32)
            self.turned = self.rng.random() < 0.15
        if self.left == 0:
            return action
        self.left -= 1
        disturbed = action + self.drift
        if self.turned:
            disturbed[self.grips] *= -1
        return disturbed
