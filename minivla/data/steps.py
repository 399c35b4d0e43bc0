"""The steps that processors are made of: each takes a batch and returns a new one.

Each is a small dataclass with LeRobot 0.6's name and settings, and does what LeRobot's does to the bit.
Sources: `rename_processor.py`, `batch_processor.py`, `tokenizer_processor.py`, `device_processor.py`,
`normalize_processor.py` in `lerobot/processor`.
"""

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from minivla.data.features import (
    ACTION,
    OBS_ENV_STATE,
    OBS_IMAGE,
    OBS_IMAGES,
    OBS_LANGUAGE,
    OBS_STATE,
    FeatureType,
    MissingKey,
    NormalizationMode,
    PolicyFeature,
    features_from_json,
    features_to_json,
)
from minivla.data.normalize import (
    Stats,
    as_stats,
    check_statistics,
    constant_dimensions,
    describe_constant,
    normalize,
    unnormalize,
)

Batch = dict[str, Any]
STEPS: dict[str, type["Step"]] = {}
"""The steps that can be read from a folder, by LeRobot's registry name."""


def register(step: type["Step"]) -> type["Step"]:
    """Make a step readable from folders (a policy's own steps are registered in the policy's file)."""
    STEPS[step.registry_name] = step
    return step


@dataclass(repr=False)
class Step:
    """One step: called with a batch, it returns a new batch and leaves the old one as it was."""

    registry_name: ClassVar[str]

    def __call__(self, batch: Batch) -> Batch:
        """Apply the step."""
        raise NotImplementedError

    def describe(self) -> list[str]:
        """What the step does, for people: one line, or a line for each thing it touches."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The step's settings, as LeRobot writes them."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """The step's tensors, which get a safetensors file of their own when there are any."""
        return {}

    def write_files(self, folder: Path) -> None:
        """Write what is neither setting nor tensor (a tokenizer) into a checkpoint's folder."""

    def find_files(self, folder: Path) -> None:
        """Called when the step was read from `folder`: note where its files are, wherever that is by now."""

    @classmethod
    def from_json(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Self:
        """The reverse of `to_json` and `state`. TypeError for a setting the step does not have."""
        return cls(**config)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'; '.join(self.describe())})"


@register
@dataclass(repr=False)
class Rename(Step):
    """Give observations the policy's names: `rename_map` is {name in the data: name in the policy}."""

    registry_name: ClassVar[str] = "rename_observations_processor"
    rename_map: dict[str, str] = field(default_factory=dict)

    def __call__(self, batch: Batch) -> Batch:
        """Raises ValueError when two observations would end under one name, where LeRobot keeps the last."""
        names = {
            key: self.rename_map.get(key, key) if key.startswith("observation.") else key for key in batch
        }
        if len(set(names.values())) < len(names):
            twice = sorted(key for key, name in names.items() if list(names.values()).count(name) > 1)
            raise ValueError(
                f"renaming {self.rename_map} puts {', '.join(twice)} under one name; expected one each. Take "
                "one away."
            )
        return {names[key]: value for key, value in batch.items()}

    def describe(self) -> list[str]:
        """The renamed keys."""
        return [f"{old} -> {new}" for old, new in self.rename_map.items()] or ["keys stay as they are"]

    def to_json(self) -> dict[str, Any]:
        """LeRobot's settings."""
        return {"rename_map": self.rename_map}


@register
@dataclass(repr=False)
class AddBatch(Step):
    """Make a batch of one out of a single observation; what has a batch axis already stays.

    `minivla.data.to_batch` has done so, and more, before a policy's pipeline runs; the step is here because
    LeRobot's files have it, and so that a pipeline alone does what it does there. Actions are expected as
    (A,) or (B, …).
    """

    registry_name: ClassVar[str] = "to_batch_processor"

    def __call__(self, batch: Batch) -> Batch:
        """Add the axis where it is missing."""
        return {key: self._with_axis(key, value) for key, value in batch.items()}

    def _with_axis(self, key: str, value: Any) -> Any:
        if key == "task" and isinstance(value, str):
            return [value]
        bare = 3 if key == OBS_IMAGE or key.startswith(f"{OBS_IMAGES}.") else _BARE_AXES.get(key)
        return value.unsqueeze(0) if isinstance(value, Tensor) and value.ndim == bare else value

    def describe(self) -> list[str]:
        """One line."""
        return ["a single observation becomes a batch of one"]


_BARE_AXES = {OBS_STATE: 1, OBS_ENV_STATE: 1, ACTION: 1, "index": 0, "task_index": 0}


@register
@dataclass(repr=False)
class Tokenize(Step):
    """Turn `task` into token ids (B, L) and their mask (B, L), True where a token is real.

    The tokenizer is loaded when the step is first called, so that a policy whose tokenizer is out of reach
    still loads. `tokenizer_name` is a hub repository, a folder, or "tokenizer", a folder in the checkpoint's
    own. Give an object as `tokenizer` to need no loading: it goes before the name, and is saved with the
    checkpoint. `ending` is a text that is encoded by itself and put behind the other tokens (minivla only).

    Warns, once, of a text that is longer than `max_length`: what is cut is never read.
    """

    registry_name: ClassVar[str] = "tokenizer_processor"
    FOLDER: ClassVar[str] = "tokenizer"
    tokenizer_name: str | None = None
    max_length: int = 512
    task_key: str = "task"
    padding_side: str = "right"
    padding: str = "max_length"
    truncation: bool = True
    ending: str = ""
    tokenizer: Any = None

    def __post_init__(self) -> None:
        self._loaded: Any = None  # what `tokenizer_name` named
        self._folder: Path | None = None  # the checkpoint's, when it holds the tokenizer
        self._warned = False

    def __call__(self, batch: Batch) -> Batch:
        """Raises KeyError without a task, FileNotFoundError when the tokenizer cannot be loaded."""
        if batch.get(self.task_key) is None:
            raise MissingKey(
                f"no '{self.task_key}' in the batch, which holds {', '.join(batch)}; expected an "
                f"instruction. Add raw['{self.task_key}'] = 'put the red block on the green square'."
            )
        device = next((value.device for value in batch.values() if isinstance(value, Tensor)), None)
        text = batch[self.task_key]
        texts = [text] if isinstance(text, str) else list(text)
        if self.tokenizer is None:
            self.tokenizer = self._loaded = load_tokenizer(self._place())
        ids, valid = self._encode_with_ending(texts) if self.ending else self._encode(texts)
        tokens = {
            f"{OBS_LANGUAGE}.tokens": ids.to(device),
            f"{OBS_LANGUAGE}.attention_mask": valid.to(device=device, dtype=torch.bool),
        }
        return {**batch, **tokens}

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        out = self.tokenizer(
            texts,
            max_length=self.max_length,
            truncation=self.truncation,
            padding=self.padding,
            padding_side=self.padding_side,
            return_tensors="pt",
        )
        ids, valid = out["input_ids"], out["attention_mask"]
        full = valid.bool().all(dim=1) & (ids.shape[1] == self.max_length)
        if self.truncation and not self._warned:
            for sample in full.nonzero().flatten().tolist():
                self._warn_of_cut(sample, self._ids(texts[sample]))
        return ids, valid

    def _encode_with_ending(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """As openpi's PaligemmaTokenizer: the ending comes last, and is cut first."""
        ending = self._ids(self.ending, add_special_tokens=False)
        rows = [self._ids(text) + ending for text in texts]
        for sample, row in enumerate(rows):
            self._warn_of_cut(sample, row)
        rows = [row[: self.max_length] if self.truncation else row for row in rows]
        size = self.max_length if self.padding == "max_length" else max(map(len, rows))
        ids = torch.full((len(rows), size), self.tokenizer.pad_token_id or 0)
        valid = torch.zeros(len(rows), size, dtype=torch.bool)
        for i, row in enumerate(rows):
            place = slice(size - len(row), size) if self.padding_side == "left" else slice(len(row))
            ids[i, place], valid[i, place] = torch.tensor(row), True
        return ids, valid

    def _ids(self, text: str, **options: Any) -> list[int]:
        """One text's tokens, however many."""
        whole = {"max_length": WHOLE, "truncation": False, "padding": False, "verbose": False}
        return [int(token) for token in self.tokenizer([text], **whole | options)["input_ids"][0]]

    def _warn_of_cut(self, sample: int, ids: list[int]) -> None:
        cut = ids[self.max_length :]
        if not cut or self._warned or not self.truncation:
            return
        self._warned = True
        spelled = f": {self.tokenizer.decode(cut)!r}" if hasattr(self.tokenizer, "decode") else ""
        warnings.warn(
            f"the text of sample {sample} has {len(ids)} tokens, {self.max_length} are read; the last "
            f"{len(cut)} are cut{spelled}. Shorten it, or raise tokenizer_max_length",
            stacklevel=4,
        )

    def describe(self) -> list[str]:
        """One line."""
        given = "the tokenizer given"
        name = given if self._given else self.tokenizer_name or given
        return [f"{self.task_key} to {self.max_length} tokens of {name}"]

    @property
    def _given(self) -> bool:
        """Is there a tokenizer that no name stands for?"""
        return self.tokenizer is not None and self.tokenizer is not self._loaded

    def _place(self) -> str | None:
        if self._folder is None or self.tokenizer_name != self.FOLDER:
            return self.tokenizer_name
        return str(kept_in(self._folder, self.FOLDER))

    def to_json(self) -> dict[str, Any]:
        """LeRobot's settings; a tokenizer given as an object gets the name of its folder."""
        left_out = ("tokenizer", "tokenizer_name", *(() if self.ending else ("ending",)))
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        name = self.tokenizer_name
        if self._given:
            name = self.FOLDER if hasattr(self.tokenizer, "save_pretrained") else None
        return settings | ({"tokenizer_name": name} if name else {})

    def write_files(self, folder: Path) -> None:
        """The tokenizer itself, in transformers' format, when it was given, or came from such a folder."""
        target = folder / self.FOLDER
        if self._given and not hasattr(self.tokenizer, "save_pretrained"):
            warnings.warn(
                f"{type(self.tokenizer).__name__} has no save_pretrained, so it is not saved with the "
                "policy; give it again after loading",
                stacklevel=2,
            )
        elif self._given:
            self.tokenizer.save_pretrained(target)
        elif self._folder is not None and self._folder.resolve() != folder.resolve():
            shutil.copytree(kept_in(self._folder, self.FOLDER), target, dirs_exist_ok=True)

    def find_files(self, folder: Path) -> None:
        """The name "tokenizer" means the folder inside the checkpoint's."""
        if self.tokenizer_name == self.FOLDER:
            self._folder = folder


def kept_in(checkpoint: Path, name: str) -> Path:
    """The folder in which a checkpoint keeps a tokenizer. FileNotFoundError when it is not there."""
    if not (checkpoint / name).is_dir():
        raise FileNotFoundError(
            f"there is no folder '{name}' in {checkpoint}, in which this checkpoint keeps its tokenizer: "
            "copy the checkpoint whole, or set `step.tokenizer` (of π0-FAST: call `policy.use_tokenizers`)"
        )
    return checkpoint / name


WHOLE = 1_000_000  # tokens; longer than any text


def load_tokenizer(name: str | None) -> Any:
    """A tokenizer of transformers', from a folder or the hub. FileNotFoundError when it is out of reach."""
    if name is None:
        raise FileNotFoundError(
            "no tokenizer and no tokenizer_name; expected one. Set `step.tokenizer` to a tokenizer."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the tokenizer '{name}' could not be loaded ({str(error).splitlines()[0]}); expected a folder "
            "or a hub repository within reach. If it is gated, accept its licence on its hub page and run "
            "`hf auth login`; without a network, download it once and set `step.tokenizer` (of π0-FAST: call "
            "`policy.use_tokenizers`) to the tokenizer loaded from there."
        ) from error


@register
@dataclass(repr=False)
class Device(Step):
    """Move every tensor to `device`, and floating-point ones to `float_dtype` when it is given.

    A tensor already on some GPU stays on that GPU when `device` is one (accelerate has placed it there).
    """

    registry_name: ClassVar[str] = "device_processor"
    device: str = "cpu"
    float_dtype: str | None = None

    def __post_init__(self) -> None:
        self.device = str(self.device)
        if self.float_dtype is not None and self.float_dtype not in _DTYPES:
            raise ValueError(
                f"float_dtype is {self.float_dtype!r}; expected null or one of {', '.join(_DTYPES)}"
            )

    def __call__(self, batch: Batch) -> Batch:
        """Raises ValueError when this machine lacks the device."""
        target = torch.device(self.device)
        if target.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"the pipeline sends tensors to '{self.device}', and this machine has no CUDA device; "
                "expected one that is here. Load with minivla.load(…, device='cpu')."
            )
        return {
            key: self._move(value, target) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

    def _move(self, value: Tensor, target: torch.device) -> Tensor:
        dtype = _DTYPES[self.float_dtype] if self.float_dtype and value.is_floating_point() else value.dtype
        if target.type == "mps" and dtype == torch.float64:
            dtype = torch.float32  # mps has no float64
        place = value.device if value.is_cuda and target.type == "cuda" else target
        return value.to(place, dtype, non_blocking=target.type == "cuda")

    def describe(self) -> list[str]:
        """One line."""
        return [f"tensors to {self.device}" + (f", floats as {self.float_dtype}" if self.float_dtype else "")]

    def to_json(self) -> dict[str, Any]:
        """LeRobot's settings: the kind of device, without its number."""
        return {"device": torch.device(self.device).type, "float_dtype": self.float_dtype}


_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "half": torch.float16,
    "float": torch.float32,
    "double": torch.float64,
}


@register
@dataclass(repr=False)
class Normalize(Step):
    """Bring each feature to its scale: `norm_map` gives a mode per feature type, `stats` the numbers per key.

    Every feature whose mode is not IDENTITY must have statistics, checked here (`check_statistics` says what
    is refused; `allow_constant` lets constant dimensions pass). There is no identity fallback: with no
    statistics at all (None, or a folder written without any) the step can be built, so that a policy can be
    trained from it later, but not called. `normalize_observation_keys`, when given, are the only
    observations touched.
    """

    registry_name: ClassVar[str] = "normalizer_processor"
    inverse: ClassVar[bool] = False
    features: dict[str, PolicyFeature]
    norm_map: dict[FeatureType, NormalizationMode]
    stats: Stats | None = None
    eps: float = 1e-8
    normalize_observation_keys: set[str] | None = None
    allow_constant: bool = False

    def __post_init__(self) -> None:
        self.features = dict(self.features)
        self.norm_map = {FeatureType(kind): NormalizationMode(mode) for kind, mode in self.norm_map.items()}
        self.stats = as_stats(self.stats or {})
        self._placed: dict[tuple[str, torch.device], dict[str, Tensor]] = {}
        for key, feature in self.features.items() if self.stats else ():
            _flat_to_channels(self.stats.get(key, {}), feature)
            check_statistics(self.stats, key, feature, self.mode(key), allow_constant=self.allow_constant)

    def mode(self, key: str) -> NormalizationMode:
        """The mode of one feature; IDENTITY for those that stay as they are."""
        feature = self.features[key]
        # LeRobot treats the one action named "action", and no other.
        if feature.type == FeatureType.ACTION and key != ACTION:
            return NormalizationMode.IDENTITY
        chosen = self.normalize_observation_keys
        if chosen is not None and key not in chosen and feature.type != FeatureType.ACTION:
            return NormalizationMode.IDENTITY
        return self.norm_map.get(feature.type, NormalizationMode.IDENTITY)

    def __call__(self, batch: Batch) -> Batch:
        """Raises KeyError without statistics, ValueError for a value whose size is not the feature's."""
        apply = unnormalize if self.inverse else normalize
        out = dict(batch)
        for key, feature in self.features.items():
            mode = self.mode(key)
            if mode == NormalizationMode.IDENTITY or batch.get(key) is None:
                continue
            _check_size(key, batch[key], feature)
            out[key] = apply(batch[key], mode, self._stats_for(key, batch[key].device), self.eps)
        return out

    def _stats_for(self, key: str, device: torch.device) -> dict[str, Tensor]:
        if not self.stats:
            raise MissingKey(
                f"'{key}' is to be scaled by {self.mode(key)}, and this pipeline has no statistics; expected "
                "those of the data the policy was trained on. Give them: "
                "pipeline.with_stats(dataset.stats), or minivla.load(…, stats=dataset.stats)."
            )
        if (key, device) not in self._placed:
            self._placed[key, device] = {name: value.to(device) for name, value in self.stats[key].items()}
        return self._placed[key, device]

    def describe(self) -> list[str]:
        """A line for each feature: its mode, and the formula."""
        width = max((len(key) for key in self.features), default=0)
        absent = "" if self.stats else "  NO STATISTICS"
        return [
            f"{key:<{width}}  {_formula(self.mode(key), self.inverse)}"
            + (absent if self.mode(key) != NormalizationMode.IDENTITY else "")
            for key in self.features
        ] or ["nothing to scale"]

    def to_json(self) -> dict[str, Any]:
        """LeRobot's settings."""
        settings = {
            "eps": self.eps,
            "features": features_to_json(self.features),
            "norm_map": {kind.value: mode.value for kind, mode in self.norm_map.items()},
        }
        chosen = self.normalize_observation_keys
        return settings if chosen is None else settings | {"normalize_observation_keys": sorted(chosen)}

    def state(self) -> dict[str, Tensor]:
        """Every statistic, those the modes do not need included, as `<key>.<name>`."""
        stats = self.stats or {}
        return {f"{key}.{name}": value for key, table in stats.items() for name, value in table.items()}

    @classmethod
    def from_json(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Self:
        """From a folder. Constant dimensions only warn: the policy was trained with LeRobot's numbers."""
        stats: Stats = {}
        for flat, value in state.items():
            key, _, name = flat.rpartition(".")
            stats.setdefault(key, {})[name] = value
        chosen = config.get("normalize_observation_keys")
        settings = dict(config) | {"features": features_from_json(config.get("features"))}
        settings |= {"normalize_observation_keys": None if chosen is None else set(chosen)}
        step = cls(stats=stats, allow_constant=True, **settings)
        step._warn_constant()
        return step

    def _warn_constant(self) -> None:
        for key, feature in self.features.items() if self.stats and not self.inverse else ():
            if constant := constant_dimensions((self.stats or {}).get(key, {}), self.mode(key)):
                warnings.warn(describe_constant(key, constant, feature, self.mode(key)), stacklevel=3)


@register
@dataclass(repr=False)
class Unnormalize(Normalize):
    """The way back, from the network's scale to robot units; fields as in `Normalize`."""

    registry_name: ClassVar[str] = "unnormalizer_processor"
    inverse: ClassVar[bool] = True


def _flat_to_channels(table: dict[str, Tensor], feature: PolicyFeature) -> None:
    """Image statistics given as (3,) become (3, 1, 1), in place."""
    if feature.type == FeatureType.VISUAL:
        table.update({name: value.reshape(-1, 1, 1) for name, value in table.items() if value.ndim == 1})


def _check_size(key: str, value: Tensor, feature: PolicyFeature) -> None:
    size, axis = (feature.shape[0], -3) if feature.type == FeatureType.VISUAL else (feature.shape[-1], -1)
    if value.ndim < -axis or value.shape[axis] != size:
        raise ValueError(
            f"'{key}': got shape {tuple(value.shape)}; expected {size} along axis {axis}, as in the policy's "
            f"feature {feature.shape}. Give what the policy was built for, or build it from this dataset's "
            "features."
        )


def _formula(mode: NormalizationMode, inverse: bool) -> str:
    low_high = {"MIN_MAX": "min..max", "QUANTILES": "q01..q99", "QUANTILE10": "q10..q90"}
    if mode == NormalizationMode.IDENTITY:
        return f"{mode:<10}  as it is"
    if mode == NormalizationMode.MEAN_STD:
        return f"{mode:<10}  {'x * std + mean' if inverse else '(x - mean) / std'}"
    ends = low_high[mode]
    return f"{mode:<10}  {f'-1..1 to {ends}' if inverse else f'{ends} to -1..1'}"
