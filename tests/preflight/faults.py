"""How each fault is given to a patient; fault_table.py says what the doctor must call it."""

from __future__ import annotations

import copy

import gymnasium
import numpy as np
import torch

from minivla.actions.regression import masked_l1
from minivla.data.features import FeatureType, NormalizationMode
from minivla.world import Tabletop
from tests.preflight.patients import STATE, TABLE, WRIST, bind


def scaler(policy, side="preprocessor"):
    return next(step for step in getattr(policy, side).steps if hasattr(step, "norm_map"))


def set_stats(key: str, name: str, change, *sides: str):
    def make(patient):
        for side in sides or ("preprocessor", "postprocessor"):
            step = scaler(patient.policy, side)
            if key in step.stats:
                step.stats[key] = dict(step.stats[key], **{name: change(step.stats[key][name].clone())})

    return make


def no_statistics(patient):
    patient.policy.preprocessor = patient.policy.postprocessor = None


def drop_stats(patient):
    scaler(patient.policy).stats.pop(STATE)


def near_constant(patient):
    set_stats(STATE, "std", lambda std: std.index_fill(0, torch.tensor([1]), 1e-6))(patient)


def constant(patient):
    for name, value in (("std", 0.0), ("min", 0.5), ("max", 0.5)):
        set_stats(STATE, name, lambda v, value=value: v.index_fill(0, torch.tensor([1]), value))(patient)


def quantiles(patient):
    patient.policy.config.normalization_mapping["STATE"] = NormalizationMode.QUANTILES
    step = scaler(patient.policy)
    step.norm_map[FeatureType.STATE] = NormalizationMode.QUANTILES
    step.stats[STATE] = {name: step.stats[STATE][name] for name in ("mean", "std")}


def identity(patient):
    scaler(patient.policy).norm_map[FeatureType.STATE] = NormalizationMode.IDENTITY


def identity_far(patient):
    identity(patient)
    patient.policy.config.normalization_mapping["STATE"] = NormalizationMode.IDENTITY
    raw(STATE, lambda x: x * 57.3)(patient)


def raw(key: str, change):
    def make(patient):
        patient.raw[key] = change(patient.raw[key].clone())

    return make


def rename(names: dict[str, str]):
    def make(patient):
        patient.raw = {names.get(key, key): value for key, value in patient.raw.items()}

    return make


def drop(key: str):
    return lambda patient: patient.raw.pop(key) is None


def extra_camera(patient):
    patient.raw["observation.images.side"] = patient.raw[TABLE]


def column(change):
    """change(action (N, A), state (N, S)) -> action, as if it had been recorded so."""

    def make(patient):
        patient.dataset.__dict__.pop("stats", None)
        columns = patient.dataset.columns
        action = change(columns["action"].copy(), columns[STATE]).astype(np.float32)
        patient.dataset.columns["action"] = action
        patient.dataset._tensors = {**patient.dataset._tensors, "action": torch.from_numpy(action)}

    return make


def places(action, state):
    action[:, :2] = np.concatenate([state[1:, :2], state[-1:, :2]])
    return action


def padded(low: float, scale=lambda x: x):
    def change(x):
        x = scale(x)
        x[..., :8, :] = x[..., -8:, :] = low
        return x

    return change


def normalised(patient):
    table = scaler(patient.policy).stats[TABLE]
    patient.raw[TABLE] = (patient.raw[TABLE] - table["mean"]) / table["std"]


def leaky(patient):
    policy = patient.policy

    def forward(batch, *, noise=None, time=None, generator=None):
        latent = policy.prior_mean(batch)
        everything = torch.zeros_like(batch["action_is_pad"])
        loss = masked_l1(policy.decode(batch, latent), batch["action"], everything)
        return loss, {"l1_loss": loss.item()}

    policy.forward = forward


def silenced(module: str):
    """The weights are zero, the bias stays: whatever comes in, the same comes out."""

    def make(patient):
        with torch.no_grad():
            patient.policy.get_submodule(module).weight.zero_()

    return make


class Thawing(torch.nn.Linear):
    """Frozen, until somebody calls train()."""

    def train(self, mode=True):
        self.requires_grad_(True)
        return super().train(mode)


def thawing(patient):
    policy = patient.policy
    policy.action_head.__class__ = Thawing
    policy.action_head.requires_grad_(False)
    bind(policy, "optimizer_groups", lambda self: [{"params": list(self.parameters())}])


def forgotten(patient):
    def groups(self):
        return [{"params": [p for name, p in self.named_parameters() if "encoder_robot" not in name]}]

    bind(patient.policy, "optimizer_groups", groups)


def no_reset(patient):
    bind(patient.policy, "reset", lambda self: None)


def breaking(patient):
    def predict(self, batch, **options):
        raise ZeroDivisionError("a probe that breaks")

    bind(patient.policy, "predict_action_chunk", predict)


def nan_loss(patient):
    bind(
        patient.policy,
        "forward",
        lambda self, batch, **_: (sum(p.sum() for p in self.parameters()).log() * float("nan"), {}),
    )


def with_step(change):
    """A preprocessor whose last step is `change(batch) -> batch`."""

    def make(patient):
        patient.policy = copy.copy(patient.policy)
        bind(
            patient.policy,
            "preprocess",
            lambda self, raw: change(type(self).__mro__[1].preprocess(self, raw)),
        )

    return make


def refusing(batch):
    raise LookupError("a step that raises")


def making_nan(batch):
    return {**batch, STATE: batch[STATE] * float("nan")}


def weights(name: str, value: float):
    def make(patient):
        with torch.no_grad():
            patient.policy.get_parameter(name)[0] = value

    return make


def dead_gripper(patient):
    with torch.no_grad():
        patient.policy.action_head.weight[2].zero_()


def exchanged(patient):
    policy = patient.policy
    policy.preprocessor, policy.postprocessor = policy.postprocessor, policy.preprocessor


def nan_in_dataset(patient):
    def spoil(action, state):
        action[5, 1] = np.nan
        return action

    column(spoil)(patient)


class Reversed(gymnasium.ActionWrapper):
    def action(self, action):
        return action * np.array([-1, 1, 1], np.float32)


class Exchanged(gymnasium.ActionWrapper):
    def action(self, action):
        return action[[1, 0, 2]]


class Weak(gymnasium.ActionWrapper):
    def action(self, action):
        return action * np.array([0.1, 1, 1], np.float32)


class Speechless(gymnasium.Wrapper):
    def reset(self, **options):
        observation, info = self.env.reset(**options)
        info.pop("task")
        return observation, info

    def step(self, action):
        *rest, info = self.env.step(action)
        info.pop("task", None)
        return *rest, info


class OneEyed(gymnasium.ObservationWrapper):
    def observation(self, observation):
        return {**observation, WRIST: observation[TABLE]}


class Dark(gymnasium.ObservationWrapper):
    def observation(self, observation):
        return {**observation, TABLE: observation[TABLE] // 5}


def wrapped(wrapper):
    def make(patient):
        patient.env = lambda: wrapper(Tabletop("pick_place", size=patient.raw[TABLE].shape[-1]))

    return make


def flags(change):
    def make(patient):
        patient.raw["action_is_pad"] = change(patient.raw["action_is_pad"])

    return make


def doubled(patient):
    patient.raw[WRIST] = patient.raw[TABLE]


NEGATIVE = set_stats(STATE, "std", lambda std: -std)


def wrong_seeds(patient):
    patient.dataset.seeds = [100 + i for i in range(patient.dataset.num_episodes)]


def wrong_env(text):
    def make(patient):
        patient.env = text

    return make
