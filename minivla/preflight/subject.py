"""What is examined: policy, raw batch, dataset and environment, each read once, and nothing of it changed.

The raw batch is mended where a fault is plain (`mended`), so that the checks after it see a good batch and do
not report the same fault over and over; what was mended is kept as `faults`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from minivla import recorder
from minivla.data.features import ACTION, OBS_LANGUAGE, FeatureType, NormalizationMode, PolicyFeature
from minivla.data.raw import to_batch
from minivla.policies.base import Policy
from minivla.preflight import running
from minivla.preflight.alternatives import another_text, noise, other_texts
from minivla.preflight.names import match_inputs
from minivla.preflight.pictures import examine
from minivla.preflight.recordings import Recordings
from minivla.preflight.report import ERROR, Finding, NotRun
from minivla.preflight.scaling import Scaling, features_from, modes_from, rename_map_of, scaling_of
from minivla.preflight.vectors import examine_action, examine_task, examine_vector
from minivla.tracing import trace

FEW = 8  # samples that the probes look at
TAME = 6.0  # standard deviations
ACTION_WORDS = "action_tokenizer_processor"
OTHERS = 2  # observations that are put in place of each sample


class Refused(NotRun):
    """The batch, and no lacking input, keeps the checks from running: `finding` is what is wrong."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(f"the batch does not get to the policy ({finding.code}): {finding.what}")
        self.finding = finding


@dataclass(frozen=True)
class Baseline:
    """The batch's chunk (B, H, A), other prepared observations, and how much the chunks of all vary: over
    everything, and each dimension (A,). `reach`, how far the chunk goes with an observation that is all
    other, in this spread: little, where what varies is mostly drawn.
    """

    chunk: Tensor
    others: list[dict[str, Any]]
    spread: float
    spreads: Tensor
    reach: float


@dataclass(frozen=True)
class Subject:
    """Everything the checks look at.

    policy         ours or LeRobot's; checks work on a `twin`
    raw            the batch as it was given
    dataset        the dataset, or None
    env            a gymnasium environment, or None
    preprocessor, postprocessor   the policy's pipelines, or None
    measurements, notes   {name: value} and sentences for the report, which the checks fill
    exchanged      whether the processors were given the other way about; here they are put right
    """

    policy: Any
    raw: Mapping[str, Any]
    dataset: Recordings | None = None
    env: Any = None
    preprocessor: Any = None
    postprocessor: Any = None
    measurements: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    exchanged: bool = False

    @cached_property
    def recordings(self) -> Recordings | None:
        """The dataset to compare with: none where it holds NaN, which `dataset finite` reports."""
        return None if self.dataset is None or self.dataset.broken else self.dataset

    @property
    def config(self) -> Any:
        """The policy's."""
        return self.policy.config

    @cached_property
    def inputs(self) -> dict[str, PolicyFeature]:
        """What the policy takes in, by batch key, without inputs that may be absent and are."""
        places, features = self._matched[1], features_from(self.config.input_features)
        return {k: f for k, f in features.items() if k in places or k not in self.optional}

    @property
    def optional(self) -> tuple[str, ...]:
        """Inputs that an observation may lack; LeRobot's policies on a PaliGemma, too, mask cameras."""
        if isinstance(self.policy, Policy):
            return self.policy.optional_inputs
        features = features_from(self.config.input_features)
        masks = hasattr(self.config, "empty_cameras")
        return tuple(k for k, f in features.items() if masks and f.type == FeatureType.VISUAL)

    @property
    def resizes(self) -> bool:
        """Does the policy bring pictures of any size to its own?"""
        return getattr(self.policy, "resizes_images", hasattr(self.config, "image_resolution"))

    @cached_property
    def outputs(self) -> dict[str, PolicyFeature]:
        """What it gives out."""
        return features_from(self.config.output_features)

    @property
    def has_processors(self) -> bool:
        """Whether statistics can be looked for: our policies carry theirs, LeRobot's are given beside."""
        return isinstance(self.policy, Policy) or self.preprocessor is not None

    @property
    def cameras(self) -> list[str]:
        """The policy's cameras, in its order."""
        return [key for key, feature in self.inputs.items() if feature.type == FeatureType.VISUAL]

    @cached_property
    def modes(self) -> dict[str, NormalizationMode]:
        """How the config wants each feature normalised."""
        features = {**self.inputs, **self.outputs}
        return modes_from(features, self.config.normalization_mapping)

    @cached_property
    def scaling(self) -> Scaling | None:
        """How the preprocessor normalises."""
        return scaling_of(self.preprocessor)

    @cached_property
    def back(self) -> Scaling | None:
        """How the postprocessor gets back to robot units."""
        return scaling_of(self.postprocessor)

    @property
    def reads_text(self) -> bool:
        """Whether the policy follows an instruction."""
        tokens = any(hasattr(step, "tokenizer_name") for step in getattr(self.preprocessor, "steps", ()))
        named = any(key.startswith(OBS_LANGUAGE) for key in self.inputs)
        return bool(getattr(self.config, "vocabulary", ())) or tokens or named

    def names(self, key: str) -> list[str]:
        """A name for each dimension of a vector, from the dataset or the environment, else its number."""
        size = {**self.inputs, **self.outputs}[key].shape[-1]
        if self.recordings is not None:
            return self.recordings.names(key, size)
        spec = getattr(getattr(self.env, "unwrapped", None), "action_spec", None)
        if key == ACTION and spec is not None and len(spec.names) == size:
            return list(spec.names)
        return [str(index) for index in range(size)]

    def dimension(self, key: str, index: int) -> str:
        """One dimension for people: "action[2] (grip)"; a picture's are its channels."""
        names = self.names(key) if key not in self.cameras else ["red", "green", "blue"]
        name = names[index] if index < len(names) else str(index)
        return f"{key}[{index}]" + ("" if name == str(index) else f" ({name})")

    @cached_property
    def _matched(self) -> tuple[list[Finding], dict[str, str]]:
        """What is wrong with the names, and {the policy's name: the batch's}."""
        features = features_from(self.config.input_features)
        return match_inputs(self.raw, features, rename_map_of(self.preprocessor), self.optional)

    @cached_property
    def _examined(self) -> tuple[dict[str, Any], list[Finding]]:
        """The mended raw batch, and the faults that were mended on the way."""
        rename = rename_map_of(self.preprocessor)
        faults, places = list(self._matched[0]), self._matched[1]
        mended = {key: value for key, value in self.raw.items() if rename.get(key, key) not in self.inputs}
        for key, place in places.items():
            feature, name = self.inputs[key], place if rename.get(place, place) == key else key
            look = examine if feature.type == FeatureType.VISUAL else examine_vector
            seen = look(key, self.raw[place], feature, self.scaling)
            faults += [f for f in seen.findings if f.code != "image-size" or not self.resizes]
            mended.pop(place, None)
            mended[name] = seen.value
        faults += examine_action(mended, self.outputs, self.config, self.scaling)
        if self.reads_text:
            faults += examine_task(mended, getattr(self.config, "vocabulary", ()))
        return mended, faults

    @property
    def faults(self) -> list[Finding]:
        """What was found while reading the raw batch."""
        return self._examined[1]

    def mended(self, key: str) -> Tensor | None:
        """A raw input by the policy's name for it, whole and in robot units; pictures (..., 3, H, W)."""
        table, rename = self._examined[0], rename_map_of(self.preprocessor)
        return next((value for name, value in table.items() if rename.get(name, name) == key), None)

    def named(self, key: str) -> str:
        """The policy's name for a key of the batch."""
        return rename_map_of(self.preprocessor).get(key, key)

    def few(self, raw: Mapping[str, Any], limit: int = FEW) -> dict[str, Any]:
        """A raw batch checked and batched, the first samples of it. Raises as `minivla.data.to_batch`."""
        history = None if self.config.observation_delta_indices is None else self.config.n_obs_steps
        rename = rename_map_of(self.preprocessor)
        batch = to_batch(raw, self.inputs, n_obs_steps=history, rename=rename)
        few = {key: value if _is_scalar(value) else value[:limit] for key, value in batch.items()}
        if self.reads_text and "task" not in few:  # `examine_task` has said so
            few["task"] = [another_text(self.config, "", 0)] * _size(few)
        return few

    @cached_property
    def observation(self) -> dict[str, Any]:
        """The mended batch's first samples, batched, in robot units. NotRun when it cannot be had."""
        absent = [key for key in self.inputs if self.mended(key) is None]
        if absent:
            raise NotRun(f"the batch has no usable {', '.join(absent)}")
        try:
            return self.few(self._examined[0])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise Refused(_refusal("the batch could not be read", error)) from error

    @cached_property
    def batch(self) -> dict[str, Any]:
        """The same, as the network sees it. NotRun when the statistics or steps do not allow it."""
        return self.prepare(self.observation)

    def prepare(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Observations (from `few`) to the normalised batch, on the policy's device."""
        if self.preprocessor is None:
            raise NotRun("the policy's preprocessor")
        try:
            own = isinstance(self.policy, Policy) and self.preprocessor is self.policy.preprocessor
            batch = self.policy.preprocess(observation) if own else self.preprocessor(dict(observation))
        except Exception as error:  # anybody's steps may be in there
            raise Refused(_refusal("the preprocessor refuses the batch", error)) from error
        placed = {key: self._placed(value) for key, value in batch.items()}
        broken = [key for key in self.inputs if not _finite(placed.get(key))]
        if broken:
            what = f"the preprocessor makes NaN or inf of {', '.join(broken)}, or leaves it out"
            mend = "run its steps one by one on this batch (policy.preprocessor.steps) to see which does"
            raise Refused(Finding("preprocessing-not-finite", ERROR, "preprocessor", what, mend))
        return placed

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        example = next(self.policy.parameters())
        return value.to(example.device, example.dtype if value.is_floating_point() else value.dtype)

    @property
    def samples(self) -> tuple[int, int]:
        """How many samples the probes look at, and how many the batch has. NotRun where it cannot be read."""
        size = _size(self.observation)
        whole = self.mended(next(iter(self.inputs)))
        given = len(whole) if whole is not None and size == FEW else size
        return size, given

    @cached_property
    def training_batch(self) -> dict[str, Any]:
        """The normalised batch with a chunk of actions, of which the last third is marked as padding.

        The actions are the batch's, or, where it has none, random: what is probed with them holds for any.
        Vectors far out of scale are cut off: they would saturate units, and hide gradients that are there.
        """
        size, horizon = (
            len(next(self.batch[key] for key in self.inputs)),
            len(self.config.action_delta_indices),
        )
        shape = (size, horizon, *self.outputs[ACTION].shape)
        action = self.batch.get(ACTION)
        if action is None or tuple(action.shape) != shape or not _finite(action):
            action = self._placed(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        is_pad = torch.arange(horizon, device=action.device) >= max(1, horizon - max(1, horizon // 3))
        tame = {key: self.batch[key].clamp(-TAME, TAME) for key in self.inputs if key not in self.cameras}
        chunk = {ACTION: action, "action_is_pad": is_pad.expand(size, horizon).clone()}
        return self._in_words({**self.batch, **tame, **chunk})

    def _in_words(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A training batch, with its actions as tokens for a policy that reads those (π0-FAST)."""
        steps = getattr(self.preprocessor, "steps", ())
        writes = (step for step in steps if getattr(type(step), "registry_name", "") == ACTION_WORDS)
        return next((step(batch) for step in writes), batch)

    def mixed(self, keys: Sequence[str], number: int) -> dict[str, Any]:
        """The normalised batch with `keys` from another observation. Where there is a prompt it is written
        anew: a state may stand in it beside the instruction.
        """
        others, named = self.others[number], {self.named(key): key for key in self.observation}
        if not any(key.startswith(OBS_LANGUAGE) for key in self.batch):
            other = self.baseline.others[number]
            return {**self.batch, **{key: other[key] for key in keys if key in other}}
        places = [named.get(key, key) for key in keys]
        return {
            **self.batch,
            **self.prepare({**self.observation, **{k: others[k] for k in places if k in others}}),
        }

    @cached_property
    def broken_weights(self) -> list[str]:
        """The names of parameters and buffers that hold NaN or inf."""
        held = itertools.chain(self.policy.named_parameters(), self.policy.named_buffers())
        return [name for name, tensor in held if not _finite(tensor)]

    def twin(self, *, weights: bool = False) -> Any:
        """A copy of the policy to work on. The weights' memory is shared unless `weights`; buffers, modes,
        queues and whatever else it keeps are the twin's own.
        """
        if self.broken_weights:
            raise NotRun("finite weights")
        # Parameters of its own on the same memory, so that flags and gradients stay apart.
        shared = {} if weights else {id(p): _view(p) for p in self.policy.parameters()}
        unchanged = (
            getattr(self.policy, name, None) for name in ("preprocessor", "postprocessor", "receipt")
        )
        return copy.deepcopy(self.policy, {**shared, **{id(part): part for part in unchanged}})

    @cached_property
    def patient(self) -> Any:
        """The twin that predicts chunks; no check does more to it."""
        return self.twin()

    def sampled(self, **options: Any) -> tuple[recorder.Call, Tensor]:
        """What is recorded while a chunk is predicted for the batch, and the chunk; `options` are those of
        `predict_action_chunk`.
        """
        torch.manual_seed(running.SEED)
        policy = self.patient.eval()
        with trace(policy) as recorded, torch.no_grad():
            chunk = policy.predict_action_chunk(running.observed(self.batch), **options)
        return recorded.calls[-1], chunk

    @cached_property
    def path(self) -> tuple[recorder.Call, Tensor]:
        """The same, with the policy's own options."""
        return self.sampled()

    @cached_property
    def baseline(self) -> Baseline:
        """What the probes compare with."""
        plain = running.chunk(self.patient, self.batch)
        others = [{**self.batch, **self.prepare(other)} for other in self.others]
        chunks = [plain, *(running.chunk(self.patient, other) for other in others)]
        every = torch.cat(chunks)
        spread = running.spread(every)
        farthest = max(float((other - plain).square().mean().sqrt()) for other in chunks[1:])
        return Baseline(plain, others, spread, every.flatten(0, 1).std(0), farthest / max(spread, 1e-12))

    @cached_property
    def others(self) -> list[dict[str, Any]]:
        """More observations, batched, in robot units, of the batch's size: what the policy could have
        seen instead. From the dataset, else noise.
        """
        size = _size(self.observation)
        own = self.observation.get("task") or [""] * size
        if self.recordings is not None:
            rows = self.recordings.spread_rows(OTHERS * size)
            rows = list(itertools.islice(itertools.cycle(rows), OTHERS * size))
            others = [self.recorded(rows[i::OTHERS][::-1]) for i in range(OTHERS)]
        else:
            names = {self.named(name): name for name in self.observation}
            held = {key: self.observation[names[key]] for key in self.inputs if key in names}
            features = {key: self.inputs[key] for key in held}
            drawn = [noise(held, features, self.scaling, seed) for seed in range(OTHERS)]
            others = [{names[key]: value for key, value in each.items()} for each in drawn]
        return [
            {**other, "task": other_texts(own, other.get("task") or own, self.config, seed)}
            for seed, other in enumerate(others)
        ]

    def recorded(self, rows: Sequence[int], limit: int = FEW) -> dict[str, Any]:
        """Some frames of the dataset, batched, in robot units. NotRun without one, or where it does not have
        what the policy wants.
        """
        if self.recordings is None:
            raise NotRun("dataset")
        raw, rename = self.recordings.items(rows, self.config), rename_map_of(self.preprocessor)
        renamed = {place: key for key, place in self._matched[1].items() if rename.get(place, place) != key}
        keys = {*self.inputs, ACTION, "action_is_pad", "task"}
        raw = {renamed.get(key, key): value for key, value in raw.items()}
        try:
            return self.few({key: value for key, value in raw.items() if rename.get(key, key) in keys}, limit)
        except (KeyError, ValueError, TypeError) as error:
            raise NotRun(f"a dataset with the policy's inputs ({_first_line(error)})") from error


def _refusal(what: str, error: Exception) -> Finding:
    mend = "give every input the same batch size, and the axes the policy's config asks for"
    text = f"{what}: {type(error).__name__}: {_first_line(error)[:300]}"
    return Finding("preprocessing-fails", ERROR, "preprocessor", text, mend)


def _view(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


def _size(batch: Mapping[str, Any]) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, list) and getattr(value, "ndim", 0) == 0


def _finite(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(value.isfinite().all())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
