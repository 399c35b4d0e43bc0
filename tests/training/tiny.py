"""A policy, a dataset and an environment small enough that training them takes milliseconds.

Run as a script (`python tests/training/tiny.py train '{"output": …}'`) it is the process that the tests kill.
"""

import json
import multiprocessing
import os
import random
import sys
import time
from dataclasses import dataclass, field
from typing import ClassVar

import gymnasium
import numpy as np
import torch
from torch import nn

from minivla.data.features import FeatureType, NormalizationMode, PolicyFeature
from minivla.policies.base import Policy, PolicyConfig, group

STATE, HORIZON, ACTION = 3, 4, 2
STATS = {
    key: {"mean": torch.zeros(size), "std": torch.ones(size)}
    for key, size in (("observation.state", STATE), ("action", ACTION))
}


@dataclass
class TinyConfig(PolicyConfig):
    type: ClassVar[str] = "tiny"

    chunk_size: int = HORIZON
    n_action_steps: int = 2
    noise: float = 0.1
    dropout: float = 0.1
    width: int = 16
    optimizer_lr: float = 1e-2
    optimizer_weight_decay: float = 1e-4
    normalization_mapping: dict = field(
        default_factory=lambda: {"STATE": NormalizationMode.MEAN_STD, "ACTION": NormalizationMode.MEAN_STD}
    )

    @property
    def action_delta_indices(self):
        return list(range(self.chunk_size))


class Tiny(Policy):
    """Two linear layers; in training it draws noise and drops activations, so that random numbers matter."""

    name = "tiny"
    config_class = TinyConfig

    def __init__(self, config, stats=None):
        super().__init__(config, stats)
        size = config.input_features["observation.state"].shape[0]
        self.action_size = config.output_features["action"].shape[0]
        self.encoder = nn.Linear(size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, config.chunk_size * self.action_size)

    def forward(self, batch, *, noise=None, time=None, generator=None):
        state = batch["observation.state"]
        if self.training and self.config.noise:
            state = state + self.config.noise * torch.randn_like(state)
        error = (self.predict_action_chunk({"observation.state": state}) - batch["action"]).abs()
        loss = (error * ~batch["action_is_pad"][..., None]).mean()
        return loss, {"l1_loss": loss.item()}

    def predict_action_chunk(self, batch, *, noise=None, steps=None, generator=None):
        hidden = self.dropout(torch.tanh(self.encoder(batch["observation.state"])))
        return self.head(hidden).unflatten(-1, (self.config.chunk_size, self.action_size))

    def optimizer_groups(self):
        lr, decay = self.config.optimizer_lr, self.config.optimizer_weight_decay
        return [group(self.head.parameters(), lr, decay), group(self.encoder.parameters(), lr / 10, decay)]


def tiny(seed=0, **fields):
    torch.manual_seed(seed)
    config = TinyConfig(
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (STATE,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
        **fields,
    )
    return Tiny(config, STATS)


class TinyData(torch.utils.data.Dataset):
    """States, and chunks that follow from them; `augment` adds noise from all three generators."""

    def __init__(self, size=37, augment=False, pause=0.0):
        generator = torch.Generator().manual_seed(5)
        self.state = torch.randn(size, STATE, generator=generator)
        self.action = (self.state @ torch.randn(STATE, HORIZON * ACTION, generator=generator)).tanh()
        self.augment, self.pause = augment, pause

    def __len__(self):
        return len(self.state)

    def __getitem__(self, index):
        if self.pause:
            time.sleep(self.pause)
        extra = random.random() + np.random.random() + torch.rand(()) if self.augment else 0.0
        return {
            "observation.state": self.state[index] + extra,
            "action": self.action[index].reshape(HORIZON, ACTION),
            "action_is_pad": torch.arange(HORIZON) >= HORIZON - index % 2,
            "index": torch.tensor(index),
            "task": f"task {index}",
        }


class TinyEnv(gymnasium.Env):
    """The state counts steps; even seeds succeed at the first one; episodes last seed % 5 + 1 steps."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space = gymnasium.spaces.Dict(
        {"observation.state": gymnasium.spaces.Box(-100, 100, (STATE,))}
    )
    action_space = gymnasium.spaces.Box(-0.5, 0.5, (ACTION,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.actions = []

    def reset(self, *, seed=None, options=None):
        self.started, self.elapsed = seed, 0
        return self._observe(), {"task": f"seed {seed}", "is_success": False}

    def step(self, action):
        self.actions.append(action)
        self.elapsed += 1
        success = self.started % 2 == 0 and self.elapsed == 1  # and false again afterwards
        ended = self.elapsed > self.started % 5
        return self._observe(), 0.0, ended, False, {"task": "", "is_success": success}

    def _observe(self):
        return {"observation.state": np.full(STATE, self.elapsed, np.float32)}

    def render(self):
        return np.full((21, 31, 3), 20 * self.elapsed, np.uint8)


if "tests/Tiny-v0" not in gymnasium.registry:
    gymnasium.register("tests/Tiny-v0", entry_point=TinyEnv)


def script(options):
    """Train as the tests do."""
    torch.set_num_threads(1)
    from minivla.training import train

    fields, data = options.pop("fields", {}), options.pop("data", {})
    train(tiny(**fields), TinyData(**data), progress=False, **options)


def child(options, environment):
    """The same in a process of its own, leading a group with its workers, as at a terminal."""
    os.setsid()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)
    script(options)


if __name__ == "__main__":
    script(json.loads(sys.argv[1]))
