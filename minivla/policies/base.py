"""What every policy shares: its config's file format, its processors, the action queue, saving.

The method names are LeRobot's (`policies/pretrained.py`), and a saved folder is LeRobot's: `config.json`,
`model.safetensors`, `policy_preprocessor.json`, `policy_postprocessor.json` and the processors' statistics.
"""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, get_args, get_type_hints

import torch
from torch import Tensor, nn

from minivla.data.features import (
    ACTION,
    OBS_ENV_STATE,
    OBS_STATE,
    FeatureType,
    MissingKey,
    NormalizationMode,
    PolicyFeature,
    features_from_json,
    features_to_json,
)
from minivla.data.processors import Pipeline, make_pipelines, write_pipeline
from minivla.data.raw import to_batch
from minivla.data.tensors import write_tensors
from minivla.files import atomic_folder

Batch = Mapping[str, Any]  # LeRobot's keys to tensors, and "task" to a list of sentences
AnyStats = Mapping[str, Mapping[str, Any]]  # feature to statistic to values
Draw = Tensor | None  # a random draw: given, so that a result can be repeated, or None to draw it here
Rng = torch.Generator | None

# LeRobot's own bookkeeping in config.json: nothing here changes what a policy computes.
BOOKKEEPING = {
    "type", "use_amp", "use_peft", "push_to_hub", "repo_id", "private", "tags", "license", "pretrained_path",
    "pretrained_revision", "optimizer_betas", "optimizer_eps",
}  # fmt: skip


@dataclass
class PolicyConfig:
    """The fields every policy's `config.json` has.

    input_features, output_features   what goes in and comes out, by batch key
    normalization_mapping             how each type of feature is normalised
    n_obs_steps T, device             observations the policy sees; where it runs (None: where it is put)
    """

    type: ClassVar[str] = ""
    MINIVLA_FIELDS: ClassVar[tuple[str, ...]] = ()

    n_obs_steps: int = 1
    input_features: dict[str, PolicyFeature] = field(default_factory=dict)
    output_features: dict[str, PolicyFeature] = field(default_factory=dict)
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=dict)
    device: str | None = None

    @property
    def image_features(self) -> dict[str, PolicyFeature]:
        """The cameras, by batch key, in the order in which the policy looks through them."""
        return {key: f for key, f in self.input_features.items() if f.type is FeatureType.VISUAL}

    @property
    def robot_state_feature(self) -> PolicyFeature | None:
        """`observation.state`, if the policy has one."""
        return self.input_features.get(OBS_STATE)

    @property
    def env_state_feature(self) -> PolicyFeature | None:
        """`observation.environment_state`, if the policy has one."""
        return self.input_features.get(OBS_ENV_STATE)

    @property
    def action_feature(self) -> PolicyFeature:
        """`action`. Raises ValueError when the config names none."""
        if ACTION not in self.output_features:
            raise ValueError(
                f"output_features has {sorted(self.output_features) or 'nothing'}, expected 'action'; "
                "use minivla.data.features_of(dataset) to fill input_features and output_features"
            )
        return self.output_features[ACTION]

    @property
    def observation_delta_indices(self) -> list[int] | None:
        """Which observations, relative to now, a training item holds (None: the current one, without a time
        axis).
        """
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        """Which actions, relative to now, a training item holds."""
        raise NotImplementedError

    def follow(self, steps: Iterable[Any], changed: Collection[str]) -> None:
        """Let stored steps do as this config says where `changed` fields were overridden; here: nothing."""

    def unusual(self) -> dict[str, Any]:
        """The minivla-only fields that are not at their defaults; with none, LeRobot reads the folder."""
        own = [f for f in fields(self) if f.name in self.MINIVLA_FIELDS]
        return {f.name: getattr(self, f.name) for f in own if getattr(self, f.name) != _default(f)}

    def to_json(self) -> dict[str, Any]:
        """The content of `config.json`. Minivla-only fields stand under the key "minivla", if any is set."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.MINIVLA_FIELDS}
        plain["input_features"] = features_to_json(self.input_features)
        plain["output_features"] = features_to_json(self.output_features)
        plain["normalization_mapping"] = {k: str(mode) for k, mode in self.normalization_mapping.items()}
        if (
            "pretrained_backbone_weights" in plain
        ):  # LeRobot would fetch them, although the folder holds them all
            plain["pretrained_backbone_weights"] = None
        extra = {"minivla": self.unusual()} if self.unusual() else {}
        return {"type": self.type, **plain, **extra}

    @classmethod
    def modernise(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A `config.json` of an older upstream in today's fields, and what became of those that are no more.

        Raises ValueError for a setting that today's code cannot follow.
        """
        return dict(content), []

    @classmethod
    def from_json(cls, content: Mapping[str, Any], **overrides: Any) -> Self:
        """A config out of `config.json`, some fields overridden.

        Raises ValueError naming every field this class does not know: a setting we would silently not follow.
        """
        own = {f.name for f in fields(cls)}
        given = {k: v for k, v in content.items() if k in own or k not in BOOKKEEPING | {"minivla"}}
        for name in ("minivla", "normalization_mapping", "input_features", "output_features"):
            if not isinstance(table := content.get(name) or {}, Mapping):
                raise ValueError(f"{name!r} holds {type(table).__name__}, expected a table {{name: value}}")
        given |= content.get("minivla") or {}
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in (given | overrides) if name not in known]:
            near = {name: difflib.get_close_matches(name, known, 1) for name in unknown}
            hints = ", ".join(
                f"{name!r}" + (f" (did you mean {n[0]!r}?)" if n else "") for name, n in near.items()
            )
            raise ValueError(f"{cls.__name__} has no field {hints}; its fields are {', '.join(known)}")
        if given.get("normalization_mapping"):
            modes = given["normalization_mapping"].items()
            given["normalization_mapping"] = {kind: _mode(kind, mode) for kind, mode in modes}
        for name in ("input_features", "output_features"):
            given[name] = features_from_json(given.get(name))
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        _expect_types(cls, given | overrides)
        return cls(**(given | overrides))


def _mode(kind: str, mode: str) -> NormalizationMode:
    if mode not in list(NormalizationMode):
        raise ValueError(
            f"normalization_mapping[{kind!r}] is {mode!r}, expected one of {', '.join(NormalizationMode)}"
        )
    return NormalizationMode(mode)


def _expect_types(cls: type[PolicyConfig], given: Mapping[str, Any]) -> None:
    """Raises ValueError for a number, text or flag of the wrong kind; an int will do for a float."""
    simple = (int, float, str, bool, NoneType)
    for name, hint in get_type_hints(cls).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if name not in given or not all(kind in simple for kind in kinds):
            continue
        fits = isinstance(given[name], kinds) or (float in kinds and isinstance(given[name], int))
        if not fits:
            wanted = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"{name} is {given[name]!r}, expected {wanted}")


def _default(f: Field[Any]) -> Any:
    return (
        f.default
        if f.default is not MISSING
        else f.default_factory()
        if callable(f.default_factory)
        else None
    )


class Policy(nn.Module):
    """A robot policy: observations in, a chunk of actions out.

    `config` says everything about its shape; `stats` are the dataset's statistics, from which the processors
    are made (None: the policy computes on normalised batches, but `preprocess` and `postprocess` refuse). A
    dimension that never varies in them is refused by name, unless `allow_constant`.

    A subclass sets `name` and `config_class`, and what its checkpoints are like, by upstream's names:
    CHECKPOINT_NAMES  (regex, replacement) pairs that turn our parameter names into upstream's
    IGNORED_KEYS      {regex: reason} for keys that are left out on purpose
    STAND_INS         {name: other}: where a file lacks the first, it stored the two as one, under the other
    `canonical_names` knows other names that files were published with, `extra_tensors` what upstream needs
    to find in a file and nobody uses.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[PolicyConfig]]
    CHECKPOINT_NAMES: ClassVar[tuple[tuple[str, str], ...]] = ()
    IGNORED_KEYS: ClassVar[dict[str, str]] = {}
    STAND_INS: ClassVar[dict[str, str]] = {}
    resizes_images: ClassVar[bool] = False  # does it bring images of any size to its own?

    def __init__(
        self, config: PolicyConfig, stats: AnyStats | None = None, *, allow_constant: bool = False
    ) -> None:
        super().__init__()
        self.config: Any = config
        self.receipt: Any = None
        self.preprocessor: Pipeline | None = None
        self.postprocessor: Pipeline | None = None
        if stats is not None:
            self.preprocessor, self.postprocessor = make_pipelines(
                config, stats, allow_constant=allow_constant
            )
        self.reset()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @classmethod
    def upstream_name(cls, name: str) -> str:
        """The checkpoint's name of one of our parameters or buffers."""
        for pattern, replacement in cls.CHECKPOINT_NAMES:
            name = re.sub(pattern, replacement, name)
        return name

    @classmethod
    def canonical_names(cls, keys: Iterable[str]) -> dict[str, str]:
        """Stored key → upstream's name today, for all keys of a checkpoint: families whose files were
        published under several names say here what is what. Two keys may not end under one name.
        """
        return {key: key for key in keys}

    def extra_tensors(self) -> dict[str, Tensor]:
        """What `save` writes beside our own tensors, by upstream's names: upstream refuses a folder without.

        Nothing is copied: a tensor of ours may stand under a second name, zeros may be one, expanded.
        """
        return {}

    @property
    def inert(self) -> dict[str, str]:
        """Our tensors that are loaded, and trained by upstream, but cannot change the output; each with the
        reason.
        """
        return {}

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        """Inputs that an observation may lack."""
        return ()

    @property
    def resting(self) -> dict[str, str]:
        """Our modules and tensors, by name, that training leaves as they are for now, each with the reason:
        a phase that is over or still to come, a part that is not to be trained. Freezing them is not needed.
        """
        return {}

    def preprocess(self, raw: Mapping[str, Any], *, history: bool = True) -> dict[str, Any]:
        """Raw observations, batched or not, to the normalised batch the network sees, on the policy's device.

        `history` False says that these are of one moment, as an environment gives them, which is unclear
        where B is n_obs_steps. Raises ValueError or KeyError naming what does not fit
        (`minivla.data.raw.to_batch`).
        """
        pipeline = self._required(self.preprocessor, "preprocess")
        windowed = history and self.config.observation_delta_indices is not None
        steps = self.config.n_obs_steps if windowed else None
        checked = to_batch(
            raw, self.config.input_features, n_obs_steps=steps, rename=pipeline.rename_map,
            optional=self.optional_inputs, resizes=self.resizes_images,
        )  # fmt: skip
        batch = pipeline(checked)
        return {key: self._placed(value) for key, value in batch.items()}

    def _placed(self, value: Any) -> Any:
        """On the policy's device, and floating-point numbers in the type of its parameters."""
        if not isinstance(value, Tensor):
            return value
        dtype = next(self.parameters()).dtype if value.is_floating_point() else value.dtype
        return value.to(self.device, dtype, non_blocking=True)

    def postprocess(self, action: Tensor) -> Tensor:
        """Normalised actions (..., A) to robot units, on the CPU."""
        return self._required(self.postprocessor, "postprocess")({ACTION: action})[ACTION].cpu()

    def _required(self, pipeline: Pipeline | None, verb: str) -> Pipeline:
        if pipeline is None:
            raise ValueError(
                f"this {self.name} policy has no statistics, so it cannot {verb}; build it with "
                f"{type(self).__name__}(config, stats=dataset.stats) or load it with "
                "minivla.load(folder, stats=...)"
            )
        return pipeline

    def forward(
        self, batch: Batch, *, noise: Draw = None, time: Draw = None, generator: Rng = None
    ) -> tuple[Tensor, dict[str, float]]:
        """The training loss of a normalised batch, and its parts by LeRobot's names.

        A policy with a sampler tells a trace what the loss gives its network, "noisy", wants of it, "target",
        and, there as in the sampler, gets, "denoised", (B, H, A) each: `minivla.doctor` compares them.
        """
        raise NotImplementedError

    def predict_action_chunk(
        self, batch: Batch, *, noise: Draw = None, steps: int | None = None, generator: Rng = None
    ) -> Tensor:
        """The chunk of normalised actions (B, H, A) that follows from this batch alone."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget the episode, actions and observations: call it whenever the environment is reset."""
        self._queue: deque[Tensor] = deque()
        self._seen: deque[dict[str, Tensor]] = deque(maxlen=self.config.n_obs_steps)
        self._relative_to: Tensor | None = None  # the state that the queue's actions are relative to

    @torch.no_grad()
    def select_action(self, batch: Batch) -> Tensor:
        """One step of control: the next normalised action (B, A). A new chunk is predicted when the queue is
        empty.

        `batch` is this moment's observation, (B, …); policies that see several keep the others themselves.
        Where actions are relative to the state, `postprocess` then adds the one their chunk began with.
        Raises ValueError when the batch size changes in the middle of an episode, or for a time axis.
        """
        self.eval()
        self._remember(batch)
        if not self._queue:
            chunk = self.predict_action_chunk(self._with_history(batch))
            self._queue.extend(chunk[:, : self.config.n_action_steps].unbind(dim=1))
            self._relative_to = self.preprocessor.relative_to if self.preprocessor else None
        expect_batch_size(batch, len(self._queue[0]))
        if self.preprocessor and self._relative_to is not None:
            self.preprocessor.relative_to = self._relative_to
        return self._queue.popleft()

    def _remember(self, batch: Batch) -> None:
        """Keep this observation beside the last; an episode's first one stands for all before it."""
        if self.config.observation_delta_indices is None:
            return
        if self._seen:
            expect_batch_size(batch, len(next(iter(self._seen[0].values()))))
        now = {key: batch[key] for key in self.config.input_features}
        for key, feature in self.config.input_features.items():
            if now[key].ndim != len(feature.shape) + 1:
                raise ValueError(
                    f"'{key}' has shape {tuple(now[key].shape)}, expected (B, *{feature.shape}): "
                    "select_action takes one moment's observation, predict_action_chunk a history (B, T, …)"
                )
        self._seen.extend([now] * (1 if self._seen else self.config.n_obs_steps))

    def _with_history(self, batch: Batch) -> Batch:
        """The batch with the observations kept so far, (B, T, …), for policies that see several."""
        keys = self._seen[0] if self._seen else ()
        return {**batch, **{key: torch.stack([past[key] for past in self._seen], dim=1) for key in keys}}

    def expect_history(self, batch: Batch) -> None:
        """Raises ValueError unless every input holds n_obs_steps observations, (B, T, …)."""
        steps = self.config.n_obs_steps
        for key, feature in self.config.input_features.items():
            if batch[key].ndim != len(feature.shape) + 2 or batch[key].shape[1] != steps:
                raise ValueError(
                    f"'{key}' has shape {tuple(batch[key].shape)}, expected (B, {steps}, *{feature.shape}), "
                    f"a history of n_obs_steps = {steps}. select_action keeps one itself; a dataset gives it "
                    "with minivla.data.delta_timestamps(config, fps)"
                )

    def act(self, raw: Mapping[str, Any]) -> Tensor:
        """One step of control for people: raw observation in, actions (B, A) in robot units out."""
        return self.postprocess(self.select_action(self.preprocess(raw, history=False)))

    @property
    def schedule_start(self) -> int:
        """With which training step the learning rate's schedule begins; before, the rate is constant."""
        return 0

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """AdamW's parameter groups, as upstream trains them."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        return [group(trainable, self.config.optimizer_lr, self.config.optimizer_weight_decay)]

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write LeRobot's format into `folder`, whole or not at all; floating-point weights are cast to
        `dtype`, if given.

        Warns when the config uses minivla-only fields: LeRobot refuses such a folder.
        """
        if unusual := self.config.unusual():
            warnings.warn(
                f"{folder} uses fields only minivla knows ({', '.join(unusual)}): LeRobot will refuse it",
                stacklevel=2,
            )
        state = self.state_dict(keep_vars=True)
        first = {id(tensor): name for name, tensor in reversed(state.items())}  # tied tensors are stored once
        tensors = {self.upstream_name(name): state[name] for name in first.values()} | self.extra_tensors()
        with atomic_folder(folder) as staging:
            (staging / "config.json").write_text(json.dumps(self.config.to_json(), indent=2) + "\n")
            write_tensors(staging / "model.safetensors", tensors, dtype=dtype)
            for pipeline, name in (
                (self.preprocessor, "preprocessor"),
                (self.postprocessor, "postprocessor"),
            ):
                if pipeline is not None:
                    write_pipeline(pipeline, staging, f"policy_{name}.json")
        return Path(folder)


def group(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> dict[str, Any]:
    """One parameter group for AdamW."""
    return {"params": list(parameters), "lr": lr, "weight_decay": weight_decay}


def expect_batch_size(batch: Batch, size: int) -> None:
    """Raises ValueError unless the batch has as many samples as the episode in progress."""
    given = next((len(v) for v in batch.values() if isinstance(v, Tensor)), size)
    if given != size:
        raise ValueError(
            f"the batch holds {given} samples, the episode in progress has {size}; "
            "call policy.reset() when a new episode starts"
        )


def instructions(batch: Batch) -> Any:
    """The batch's B sentences. Raises KeyError when it has no "task", for a policy that reads one."""
    if "task" not in batch:
        raise MissingKey(
            "this policy reads an instruction and the batch has no 'task'; add task=[sentence, …], one for "
            "each sample (an environment gives it as info['task'])"
        )
    return batch["task"]
