"""Patients for the doctor: a clean one, and the faults that can be given to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from minivla.actions.regression import masked_l1
from minivla.data.features import FeatureType, NormalizationMode, features_of
from minivla.data.windows import delta_timestamps
from minivla.policies.act import ACT, ACTConfig
from minivla.preflight import doctor
from minivla.world import VOCABULARY

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
    options = {
        "chunk_size": 8,
        "n_action_steps": 4,
        "dim_model": 16,
        "n_heads": 2,
        "dim_feedforward": 24,
        "n_encoder_layers": 1,
        "n_vae_encoder_layers": 1,
        "latent_dim": 4,
        "dropout": 0.0,
        "pretrained_backbone_weights": None,
        "compact_vision": True,
        "vocabulary": VOCABULARY,
    }
    config = ACTConfig(input_features=inputs, output_features=outputs, **options | settings)
    return ACT(config, dataset.stats, allow_constant=True)


def spoiled(patient: Patient) -> Patient:
    """A copy to spoil."""
    dataset = copy.copy(patient.dataset)
    dataset.columns = dict(dataset.columns)
    return replace(patient, policy=copy.deepcopy(patient.policy), raw=dict(patient.raw), dataset=dataset)


@dataclass(frozen=True)
class Fault:
    """code: what the doctor must say. given: "d" dataset, "e" environment. so: errors that follow from it."""

    name: str
    code: str
    make: Callable[[Patient], None]
    given: str = ""
    so: tuple[str, ...] = field(default=())


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
    everything = list(policy.parameters())
    bind(policy, "optimizer_groups", lambda self: [{"params": list(self.parameters())}])
    assert everything


def bind(policy, name, method):
    """A method on a class of its own, so that a copy of the policy has it too."""
    policy.__class__ = type(f"Odd{type(policy).__name__}", (type(policy),), {name: method})


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


def wrong_seeds(patient):
    patient.dataset.seeds = [100 + i for i in range(patient.dataset.num_episodes)]


def wrong_env(text):
    def make(patient):
        patient.env = text

    return make


FAULTS = [
    Fault("no statistics at all", "statistics-absent", no_statistics),
    Fault("statistics of the state missing", "statistics-absent", drop_stats),
    Fault("mean is infinite", "statistics-not-finite", set_stats(STATE, "mean", lambda m: m * float("inf"))),
    Fault("a dimension hardly moves", "statistics-near-constant", near_constant, "", ("trainable-stuck",)),
    Fault("a dimension never moves", "statistics-constant", constant, "", ("trainable-stuck",)),
    Fault("statistics of another kind", "statistics-kind", quantiles),
    Fault("normalisation skipped", "statistics-mode", identity),
    Fault("nothing scales the state", "statistics-identity", identity_far),
    Fault(
        "statistics of another dataset",
        "statistics-other-dataset",
        set_stats(STATE, "mean", lambda m: m + 2),
        "d",
        ("replay-error", "action-sign"),
    ),
    Fault("state in degrees", "statistics-scale", raw(STATE, lambda x: x * 57.3)),
    Fault(
        "postprocessor of another dataset",
        "processors-disagree",
        set_stats("action", "std", lambda s: s * 2, "postprocessor"),
    ),
    Fault(
        "cameras under other names",
        "camera-names",
        rename({TABLE: "observation.images.tabletop", WRIST: "observation.images.hand"}),
    ),
    Fault("a camera is absent", "camera-absent", drop(WRIST)),
    Fault("a camera too many", "camera-extra", extra_camera),
    Fault("cameras exchanged, dataset given", "camera-order", rename({TABLE: WRIST, WRIST: TABLE}), "d"),
    Fault("cameras exchanged, batch only", "camera-order", rename({TABLE: WRIST, WRIST: TABLE})),
    Fault("pictures in 0…255", "image-range", raw(TABLE, lambda x: x * 255)),
    Fault("pictures in [-1, 1]", "image-range", raw(TABLE, lambda x: x * 2 - 1)),
    Fault("pictures already normalised", "image-range", normalised),
    Fault("float pictures, channels last", "image-layout", raw(TABLE, lambda x: x.movedim(1, -1))),
    Fault("uint8 pictures, channels first", "image-layout", raw(TABLE, lambda x: (x * 255).round().byte())),
    Fault("whole numbers 0 and 1", "image-range", raw(TABLE, lambda x: (x.movedim(1, -1) > 0.5).byte())),
    Fault("pictures of another size", "image-size", raw(TABLE, lambda x: x[..., ::2, ::2])),
    Fault("padded with -1", "image-pad-value", raw(TABLE, padded(-1.0))),
    Fault(
        "padded, then rescaled to -3",
        "image-pad-value",
        raw(TABLE, padded(-3.0, lambda x: 2 * x - 1)),
        "",
        ("image-range",),
    ),
    Fault("upside down", "image-flipped", raw(TABLE, lambda x: x.flip(-2)), "d"),
    Fault("mirrored", "image-flipped", raw(WRIST, lambda x: x.flip(-1)), "d"),
    Fault("red and blue exchanged", "image-colours", raw(TABLE, lambda x: x.flip(1)), "d"),
    Fault("black pictures", "image-blank", raw(TABLE, torch.zeros_like)),
    Fault(
        "NaN pixels",
        "image-not-finite",
        raw(TABLE, lambda x: x.index_fill(-1, torch.tensor([5]), float("nan"))),
    ),
    Fault("a state too short", "state-size", raw(STATE, lambda x: x[:, :2])),
    Fault("a state padded to 32", "state-size", raw(STATE, lambda x: torch.nn.functional.pad(x, (0, 29)))),
    Fault(
        "a dimension of the state filled with zeros",
        "state-padding",
        raw(STATE, lambda x: x.index_fill(-1, torch.tensor([2]), 0.0)),
    ),
    Fault(
        "NaN in the state",
        "state-not-finite",
        raw(STATE, lambda x: x.index_fill(-1, torch.tensor([1]), float("nan"))),
    ),
    Fault("state under another name", "state-name", rename({STATE: "observation.joints"})),
    Fault("no instruction", "instruction-absent", drop("task")),
    Fault("padding flags under another name", "padding-flags", rename({"action_is_pad": "actions_id_pad"})),
    Fault(
        "a chunk of another length",
        "action-horizon",
        lambda p: (raw("action", lambda x: x[:, :7])(p), raw("action_is_pad", lambda x: x[:, :7])(p)),
    ),
    Fault("padding leaks into the loss", "padding-leaks", leaky, "", ("trainable-stuck",)),
    Fault("blind", "ignores-image", silenced("encoder_img_feat_input_proj"), "", ("trainable-stuck",)),
    Fault("numb", "ignores-state", silenced("encoder_robot_state_input_proj")),
    Fault("deaf", "ignores-instruction", silenced("instruction.neighbours"), "", ("trainable-stuck",)),
    Fault("a constant chunk", "constant-chunk", silenced("action_head"), "", ("trainable-stuck",)),
    Fault("frozen, but train() thaws", "frozen-moves", thawing),
    Fault("not in the optimiser", "trainable-stuck", forgotten),
    Fault("a loss of NaN", "loss-not-finite", nan_loss, "", ("padding-leaks",)),
    Fault("reset clears nothing", "queue-not-reset", no_reset),
    Fault("a probe breaks", "check-failed", breaking),
    Fault(
        "an environment of another size",
        "environment-mismatch",
        wrong_env("tabletop:pick_place?size=96"),
        "e",
    ),
    Fault(
        "an environment of another body",
        "action-size",
        wrong_env("tabletop:pick_place?embodiment=bimanual"),
        "e",
        ("environment-mismatch",),
    ),
    Fault("recorded beyond the bounds", "action-out-of-range", column(lambda a, s: a * 1.5), "de"),
    Fault("places where changes are wanted", "action-absolute", column(places), "de", ("replay-error",)),
    Fault("an axis reversed", "action-sign", column(lambda a, s: a * [1, -1, 1]), "de"),
    Fault("axes exchanged", "action-frame", column(lambda a, s: a[:, [1, 0, 2]]), "de", ("replay-error",)),
    Fault(
        "table widths, not shares",
        "action-units",
        column(lambda a, s: a * [0.04, 0.04, 1]),
        "de",
        ("replay-error", "statistics-other-dataset"),
    ),
    Fault("gripper reversed", "gripper-sign", column(lambda a, s: a * [1, 1, -1]), "de"),
    Fault("recorded from another start", "replay-fails-in-env", wrong_seeds, "de"),
]
