"""`load` and `receipt`.

Parameters are built on the meta device, where they have a shape and no memory; then each tensor is read from
disk straight into the memory it stays in, and nothing is fetched that the folder overwrites. LeRobot's loader
(`policies/pretrained.py`) fills a model with random or ImageNet weights first, holds a second copy while it
overwrites them and, by default, lets missing and unexpected keys pass.
"""

from __future__ import annotations

import contextlib
import difflib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from minivla.checkpoints.account import CheckpointError, Receipt, account
from minivla.checkpoints.hub import download, download_headers, locate
from minivla.checkpoints.stored import StoredTensor, read_headers, read_tensor
from minivla.data.features import FeatureType, NormalizationMode, PolicyFeature
from minivla.data.normalize import constant_dimensions, describe_constant
from minivla.data.processors import Normalize, Pipeline, Step, make_pipelines, read_pipeline
from minivla.data.relative import link
from minivla.data.stats import LEGACY_KEY, legacy_stats
from minivla.files import read_json
from minivla.policies.base import Policy, PolicyConfig

POLICIES: dict[str, str] = {
    "act": "minivla.policies.act:ACT",
    "diffusion": "minivla.policies.diffusion:DiffusionPolicy",
    "vqbet": "minivla.policies.vqbet:VQBeT",
    "pi0": "minivla.policies.pi:PI0",
    "pi05": "minivla.policies.pi:PI05",
    "pi0_fast": "minivla.policies.pi0_fast:PI0Fast",
}
"""`type` in config.json → "module:Class"."""

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
# These make a constructor fetch weights, which the folder is about to replace.
FETCHING_FIELDS: dict[str, Any] = {"pretrained_backbone_weights": None}
PRECISIONS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # by their names in a config's `dtype`
TABLES = ("input_features", "output_features", "normalization_mapping")
# Saved processors were made from these, and would not follow if they alone were overridden.
PROCESSOR_FIELDS = (*TABLES, "use_relative_actions", "relative_exclude_joints", "action_feature_names")

StatsLike = Mapping[str, Mapping[str, Any]]
FROM_CHECKPOINT: Any = object()


def load(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    stats: StatsLike | None = FROM_CHECKPOINT,
    allow_constant: bool = False,
    **overrides: Any,
) -> Policy:
    """A policy with its weights and its processors, in evaluation mode.

    source: a shipped checkpoint's name (`list_checkpoints()`), a folder, or a hub repository, "owner/name".
    device: where to put it; None is the CPU, wherever the checkpoint was trained.
    dtype: of the floating-point weights; None is as stored, but float32 for float16, in which shipped
    checkpoints are kept to be small. Buffers that are computed, and in no checkpoint, keep theirs. Where a
    config says the precision itself (π0's `dtype`), weights get what it says, whatever they are stored in,
    as in LeRobot: "bfloat16" there means all but vision, norms and small projections, and so does
    torch.bfloat16 here.
    revision: on the hub, a branch, tag or commit. `policy.receipt.revision` is the commit that was loaded.
    stats: statistics in place of the checkpoint's, such as `dataset.stats`. A checkpoint that lacks them is
    refused, unless they are given here, or `stats=None` says that this is known: then `preprocess` and
    `postprocess` raise.
    allow_constant: let `stats` have dimensions that never vary. A checkpoint's own only warn, for the policy
    was trained with them.
    overrides: config fields, such as n_action_steps=8.

    Raises FileNotFoundError (no such checkpoint or file; hub out of reach), CheckpointError, with the receipt
    (keys or shapes that do not fit), ValueError (unknown type or field, damaged file, no statistics,
    processors that leave a feature unscaled), TypeError (`stats` or an override of the wrong kind).
    """
    place = _check_device(device)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; expected a floating-point type such as torch.bfloat16, or None")
    folder, commit = locate(source, revision, download)
    policy, notes = _build(folder, {**overrides, "device": str(place)}, dtype)
    stored = read_headers(folder)
    superseded = _superseding(folder, stats)
    policy.receipt = Receipt(account(policy, stored, superseded), str(source), commit, notes)
    _refuse_misfits(policy)
    _refuse_false_ties(policy.receipt, stored)
    if changed := [name for name in PROCESSOR_FIELDS if name in overrides]:
        _refuse_stale_processors(folder, changed, stats)
    policy.preprocessor, policy.postprocessor = _processors(
        folder, policy.config, stored, stats, fresh=bool(changed), allow_constant=allow_constant
    )
    if policy.preprocessor is not None:
        policy.config.follow(policy.preprocessor.steps, overrides)
    _fill(policy, stored, place, dtype)
    return policy.eval()


def receipt(source: str | Path, *, revision: str | None = None, **overrides: Any) -> Receipt:
    """What `load` would do with each key, told from `config.json` and the headers of the weights alone.

    No memory is taken for weights; of a hub repository only the headers are fetched; a folder's safetensors
    files need not hold more than their headers (`write_headers`). Whether the checkpoint fits is in `.ok`,
    never an error; other errors are as for `load`.
    """
    from_hub: dict[str, StoredTensor] = {}

    def fetch(repository: str, revision: str | None) -> tuple[Path, str]:
        folder, commit, tensors = download_headers(repository, revision)
        from_hub.update(tensors)
        return folder, commit

    folder, commit = locate(source, revision, fetch)
    stored = from_hub or read_headers(folder, whole=False)
    policy, notes = _build(folder, overrides)
    entries = account(policy, stored, _superseding(folder, FROM_CHECKPOINT))
    return Receipt(entries, str(source), commit, notes)


def _check_device(device: str | torch.device | None) -> torch.device:
    place = torch.device("cpu" if device is None else device)
    offered = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not offered.get(place.type, True):
        there = ", ".join(name for name, available in offered.items() if available)
        raise ValueError(
            f"no device '{place}' on this machine, which offers {there}; leave `device` out for the CPU"
        )
    return place


# --- config.json to a policy whose parameters have no memory yet -------------------------------------------


def _build(
    folder: Path, overrides: dict[str, Any], dtype: torch.dtype | None = None
) -> tuple[Policy, list[str]]:
    """The policy, and notes on settings of an older config.json."""
    path = folder / "config.json"
    content = read_json(path)
    policy_class = _policy_class(content, path)
    _check_overrides(policy_class.config_class, overrides)
    if content.get("use_peft"):
        raise ValueError(
            f"{path} has use_peft: the folder holds adapters, no whole policy; merge them in and save again"
        )
    own = {f.name for f in fields(policy_class.config_class)}
    if "dtype" in own and dtype in PRECISIONS:
        overrides = {**overrides, "dtype": PRECISIONS[dtype]}
    quiet = {name: value for name, value in FETCHING_FIELDS.items() if name in own}
    try:
        content, notes = policy_class.config_class.modernise(content)
        config = policy_class.config_class.from_json(content, **overrides, **quiet)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        error.add_note(
            f"while reading {path}" + (f", with {overrides} in place of its own" if overrides else "")
        )
        raise
    with _parameters_on_meta():
        return policy_class(config), notes


def _policy_class(content: dict[str, Any], path: Path) -> type[Policy]:
    name = content.get("type")
    if not isinstance(name, str) or name not in POLICIES:
        near = difflib.get_close_matches(str(name), POLICIES, n=1)
        hint = f", did you mean {near[0]!r}" if near else ""
        old = ". A folder from before LeRobot had types: convert it with a LeRobot of then" * (name is None)
        if name is None and {"action_dim", "action_horizon"} <= content.keys():
            old = '. This is openpi\'s: add "type": "pi0" or "pi05" to it, whichever it is'
        raise ValueError(f"{path} has type {name!r}{hint}; minivla knows {', '.join(sorted(POLICIES))}{old}")
    module, _, attribute = POLICIES[name].partition(":")
    found: type[Policy] = getattr(import_module(module), attribute)
    return found


def _check_overrides(config_class: type[PolicyConfig], overrides: Mapping[str, Any]) -> None:
    known = [f.name for f in fields(config_class)]
    for name, value in overrides.items():
        if name in TABLES:
            _check_table(name, value)
        if name in FETCHING_FIELDS:
            raise ValueError(
                f"'{name}' cannot be overridden: all weights come from the checkpoint; leave it out"
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean '{near[0]}'" if near else ""
            raise ValueError(
                f"{config_class.__name__} has no field '{name}'{hint}; it has {', '.join(known)}"
            )


def _check_table(name: str, value: Any) -> None:
    entries = list(value.values()) if isinstance(value, Mapping) else [None]
    if name == "normalization_mapping":
        fits = all(entry in list(NormalizationMode) for entry in entries)
        example = "{'ACTION': minivla.data.NormalizationMode.MEAN_STD, …}"
    else:
        fits = all(isinstance(entry, PolicyFeature) for entry in entries)
        example = "{'observation.state': minivla.data.PolicyFeature('STATE', (14,)), …}"
    if not fits:
        raise TypeError(f"{name} is {value!r}; expected a dict such as {example}")


class _NoFilling(TorchFunctionMode):
    """Initialisation passes over tensors without memory: to fill them, torch would load its compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        draws = func.__name__ in ("normal_", "uniform_") or getattr(func, "__module__", "") == "torch.nn.init"
        if draws and isinstance(target, Tensor) and target.is_meta:
            return target
        return func(*args, **kwargs)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters registered meanwhile, by this thread, have no memory. Buffers, computed and small, do.

    A parameter that is on the meta device already is kept as it is, so that tied parameters stay tied. The
    random state is what it was before.
    """
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # torch annotates the hook as returning nothing, and registers what it returns
    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        with torch.random.fork_rng(devices=[]), _NoFilling():
            yield
    finally:
        hook.remove()


# --- tensors -----------------------------------------------------------------------------------------------


def _refuse_misfits(policy: Policy) -> None:
    found: Receipt = policy.receipt
    if not found.ok:
        raise CheckpointError(
            f"these weights do not fit the {type(policy).__name__} that config.json describes; nothing was "
            f"loaded.\n{found}\n"
            "Compare config.json and overrides with the policy that was saved, or save it again.",
            found,
        )


def _refuse_false_ties(found: Receipt, stored: Mapping[str, StoredTensor]) -> None:
    """Where both names of one tensor are stored they must agree, else one would be lost in silence."""
    for entry in found.tied:
        first = entry.reason.rpartition(" ")[-1]
        if entry.key in stored and not torch.equal(
            read_tensor(stored[entry.key]), read_tensor(stored[first])
        ):
            raise CheckpointError(
                f"'{entry.key}' and '{first}' are one tensor in this policy, and differ in "
                f"{stored[first].file.parent}; save it again from a model that ties them",
                found,
            )


def _fill(
    policy: Policy, stored: Mapping[str, StoredTensor], place: torch.device, dtype: torch.dtype | None
) -> None:
    """Read each tensor into place, one after the other; all names of a tied one get the same."""
    state = policy.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for ours, tensor in state.items():
        names.setdefault(id(tensor), []).append(ours)
    own_precision = hasattr(policy.config, "dtype")
    for entry in (*policy.receipt.matched, *(entry for entry in policy.receipt.tied if entry.source)):
        found, old = stored[entry.source or entry.key], state[entry.ours]
        kind = (
            old.dtype if own_precision and dtype in (None, *PRECISIONS) else _final_dtype(found, old, dtype)
        )
        value = read_tensor(found, dtype=kind).to(place)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        for name in names[id(old)]:
            owner, _, leaf = name.rpartition(".")
            setattr(policy.get_submodule(owner), leaf, value)
    policy.to(place)  # what is left are the buffers that no checkpoint holds


def _final_dtype(found: StoredTensor, old: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if not old.is_floating_point():
        return old.dtype
    return dtype or (torch.float32 if found.dtype == torch.float16 else found.dtype)


# --- processors --------------------------------------------------------------------------------------------


def _refuse_stale_processors(folder: Path, changed: list[str], stats: StatsLike | None) -> None:
    if stats in (None, FROM_CHECKPOINT) and (folder / PREPROCESSOR).is_file():
        raise ValueError(
            f"{', '.join(changed)} cannot be overridden alone: {folder / PREPROCESSOR} would still follow "
            "the old. Give stats=dataset.stats as well, and new processors are made"
        )


def _processors(
    folder: Path,
    config: PolicyConfig,
    stored: Mapping[str, StoredTensor],
    stats: StatsLike | None,
    *,
    fresh: bool,
    allow_constant: bool,
) -> tuple[Pipeline, Pipeline] | tuple[None, None]:
    """The folder's pipelines (unless `fresh`), else new ones from `stats` or an older model's buffers.

    A folder whose pipelines pass a feature by that its config normalises counts as one without.
    """
    given = None if stats is FROM_CHECKPOINT else stats
    buffers = {key: read_tensor(found) for key, found in stored.items() if LEGACY_KEY.match(key)}
    stored_ones = None if fresh else _read_pipelines(folder, config, given, allow_constant)
    passed_by = _passed_by(config, *stored_ones) if stored_ones else []
    if passed_by and stats is FROM_CHECKPOINT:
        raise ValueError(_not_scaled(folder, config, passed_by))
    if stored_ones and not passed_by:
        before, after = stored_ones
    elif given is not None:
        before, after = make_pipelines(config, given, allow_constant=allow_constant)
    elif stats is None and (passed_by or not buffers):
        return None, None
    else:
        before, after = _legacy_pipelines(folder, config, buffers)
    link(before.steps, after.steps)
    bare = [pipeline.name for pipeline in (before, after) if _lacks_statistics(pipeline)]
    if bare and stats is not None:
        raise ValueError(_no_statistics(folder, f"{' and '.join(bare)} came without any"))
    return before, after


def _read_pipelines(
    folder: Path, config: PolicyConfig, given: StatsLike | None, allow_constant: bool
) -> tuple[Pipeline, Pipeline] | None:
    if not any((folder / name).is_file() for name in (PREPROCESSOR, POSTPROCESSOR)):
        return None
    return (
        read_pipeline(folder, PREPROCESSOR, device=config.device, stats=given, allow_constant=allow_constant),
        read_pipeline(folder, POSTPROCESSOR, stats=given, allow_constant=allow_constant),
    )


def _superseding(folder: Path, stats: StatsLike | None) -> str:
    """What is used in place of statistics among the weights; "" when it is they."""
    if (folder / PREPROCESSOR).is_file():
        return PREPROCESSOR
    return "" if stats is FROM_CHECKPOINT or stats is None else "the statistics given"


def _passed_by(config: PolicyConfig, before: Pipeline, after: Pipeline) -> list[tuple[str, str]]:
    """(feature, file) where the config says to normalise and no step of the file does."""
    sides = ((config.input_features, before, PREPROCESSOR), (config.output_features, after, POSTPROCESSOR))
    return [
        (key, file)
        for features, pipeline, file in sides
        for key, feature in features.items()
        if _mode(config, key, feature) != NormalizationMode.IDENTITY
        and not any(_covers(step, key, file == POSTPROCESSOR) for step in pipeline.steps)
    ]


def _mode(config: PolicyConfig, key: str, feature: PolicyFeature) -> NormalizationMode:
    """As a step made from the config would have it, its exception for further actions included."""
    modes = {FeatureType(kind): mode for kind, mode in config.normalization_mapping.items()}
    return Normalize({key: feature}, modes).mode(key)


def _covers(step: Step, key: str, inverse: bool) -> bool:
    if not isinstance(step, Normalize) or step.inverse != inverse or key not in step.features:
        return False
    # A list of the observations to touch, when the file has one, was written on purpose.
    listed = step.normalize_observation_keys is not None and not inverse
    return listed or step.mode(key) != NormalizationMode.IDENTITY


def _not_scaled(folder: Path, config: PolicyConfig, passed_by: list[tuple[str, str]]) -> str:
    features = {**config.input_features, **config.output_features}
    rows = [
        f"  '{key}' ({_mode(config, key, features[key])}): no step of {folder / file}"
        for key, file in passed_by
    ]
    return (
        "config.json says to scale these features, and nothing does:\n" + "\n".join(rows) + "\nUnscaled, a "
        "policy would run, and fail. Give the statistics of its training data, "
        "minivla.load(…, stats=dataset.stats), and new processors are made; or say that you know, "
        "minivla.load(…, stats=None): then preprocess and postprocess raise. If a feature is to stay as it "
        "is, set 'IDENTITY' for its type in normalization_mapping of config.json"
    )


def _legacy_pipelines(
    folder: Path, config: PolicyConfig, buffers: Mapping[str, Tensor]
) -> tuple[Pipeline, Pipeline]:
    stats = legacy_stats(buffers, {**config.input_features, **config.output_features})
    try:
        # constant dimensions were there when the policy was trained, so its numbers hold for them
        before, after = make_pipelines(config, stats, allow_constant=True)
    except KeyError as error:
        raise ValueError(_no_statistics(folder, str(error))) from error
    for step in before.steps:
        if isinstance(step, Normalize):
            _warn_constant(step)
    return before, after


def _warn_constant(step: Normalize) -> None:
    for key, feature in step.features.items():
        table = (step.stats or {}).get(key)
        if table and (constant := constant_dimensions(table, step.mode(key))):
            warnings.warn(describe_constant(key, constant, feature, step.mode(key)), stacklevel=5)


def _lacks_statistics(pipeline: Pipeline) -> bool:
    bare = [step for step in pipeline.steps if isinstance(step, Normalize) and not step.stats]
    return any(step.mode(key) != NormalizationMode.IDENTITY for step in bare for key in step.features)


def _no_statistics(folder: Path, found: str) -> str:
    return (
        f"{folder} lacks statistics to normalise with ({found}). Without them a policy would run, and fail. "
        "Give those of its training data, minivla.load(…, stats=dataset.stats), or say that you know, "
        "minivla.load(…, stats=None): then preprocess and postprocess raise"
    )
