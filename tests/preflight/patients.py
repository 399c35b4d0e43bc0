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
from minivla.policies.diffusion import DiffusionConfig, DiffusionPolicy
from minivla.policies.vqbet import VQBeT, VQBeTConfig
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


DIFFUSION: dict[str, Any] = {
    "horizon": 8,
    "n_action_steps": 4,
    "compact_vision": True,
    "pretrained_backbone_weights": None,
    "spatial_softmax_num_keypoints": 4,
    "down_dims": (8, 16),
    "diffusion_step_embed_dim": 8,
    "transformer_width": 16,
    "transformer_heads": 2,
    "transformer_layers": 1,
    "transformer_dropout": 0.0,
    "noise_scheduler_type": "DDIM",
    "num_inference_steps": 4,
    "vocabulary": VOCABULARY,
}
VQBET: dict[str, Any] = {
    "n_obs_steps": 2,
    "action_chunk_size": 4,
    "crop_shape": None,
    "several_cameras": True,
    "compact_vision": True,
    "pretrained_backbone_weights": None,
    "spatial_softmax_num_keypoints": 4,
    "n_vqvae_training_steps": 50,
    "vqvae_n_embed": 5,
    "vqvae_embedding_dim": 8,
    "vqvae_enc_hidden_dim": 16,
    "gpt_block_size": 16,
    "gpt_input_dim": 16,
    "gpt_output_dim": 16,
    "gpt_n_layer": 1,
    "gpt_n_head": 2,
    "gpt_hidden_dim": 16,
    "dropout": 0.0,
    "vocabulary": VOCABULARY,
}


def small_diffusion(dataset, seed: int = 0, **settings: Any) -> DiffusionPolicy:
    """An untrained Diffusion Policy for a dataset of Tabletop's."""
    torch.manual_seed(seed)
    inputs, outputs = features_of(dataset)
    config = DiffusionConfig(input_features=inputs, output_features=outputs, **DIFFUSION | settings)
    return DiffusionPolicy(config, dataset.stats, allow_constant=True)


def small_vqbet(dataset, seed: int = 0, *, phase: int = 2, **settings: Any) -> VQBeT:
    """A VQ-BeT for a dataset of Tabletop's, in phase 1, or with the codes of a few steps in phase 2."""
    torch.manual_seed(seed)
    inputs, outputs = features_of(dataset)
    config = VQBeTConfig(input_features=inputs, output_features=outputs, **VQBET | settings)
    policy = VQBeT(config, dataset.stats, allow_constant=True)
    if phase == 2:
        for _ in range(3):
            chunks = torch.randn(40, config.action_chunk_size, *outputs["action"].shape)
            policy.vqvae.train().learn(chunks, 9)
        policy.vqvae.finish()
    return policy.eval()


def spoiled(patient: Patient) -> Patient:
    """A copy to spoil."""
    dataset = copy.copy(patient.dataset)
    dataset.columns = dict(dataset.columns)
    return replace(patient, policy=copy.deepcopy(patient.policy), raw=dict(patient.raw), dataset=dataset)


def bind(policy, name, method):
    """A method on a class of its own, so that a copy of the policy has it too."""
    policy.__class__ = type(f"Odd{type(policy).__name__}", (type(policy),), {name: method})
