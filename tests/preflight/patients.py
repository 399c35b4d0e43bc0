"""Patients for the doctor: a clean one, and the faults that can be given to it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import default_collate

from minivla.data.features import features_of
from minivla.data.windows import delta_timestamps
from minivla.policies.act import ACT, ACTConfig
from minivla.preflight import doctor
from minivla.world import VOCABULARY
from tests.policies.small import TINY

TABLE, WRIST = "observation.images.table", "observation.images.wrist"
STATE = "observation.state"


@dataclass
class Patient:
    policy: Any
    raw: dict[str, Any]
    dataset: Any
    env: Any

    def report(self, given: str):
        """The doctor's, with dataset ("d") and environment ("e") or without."""
        return doctor(
            self.policy,
            self.raw,
            dataset=self.dataset if "d" in given else None,
            env=self.env if "e" in given else None,
        )


def patient_of(policy, dataset, env, rows=(3, 40, 61, 85)) -> Patient:
    """Some frames of the dataset, with chunks, as a data loader gives them."""
    windows = dataset.windows(delta_timestamps(policy.config, dataset.fps))
    return Patient(policy, default_collate([windows[row] for row in rows]), dataset, env)


def small_act(dataset, seed: int = 0, **settings: Any) -> ACT:
    """An untrained ACT for a dataset of Tabletop's."""
    torch.manual_seed(seed)
    inputs, outputs = features_of(dataset)
    options = TINY | {"chunk_size": 8, "vocabulary": VOCABULARY}
    config = ACTConfig(input_features=inputs, output_features=outputs, **options | settings)
    return ACT(config, dataset.stats, allow_constant=True)


def spoiled(patient: Patient) -> Patient:
    """A copy to spoil."""
    dataset = copy.copy(patient.dataset)
    dataset.columns = dict(dataset.columns)
    return replace(patient, policy=copy.deepcopy(patient.policy), raw=dict(patient.raw), dataset=dataset)


def bind(policy, name, method):
    """A method on a class of its own, so that a copy of the policy has it too."""
    policy.__class__ = type(f"Odd{type(policy).__name__}", (type(policy),), {name: method})
