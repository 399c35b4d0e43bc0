"""Processors: the small steps between a dataset's batch and what a network sees, and back.

A pipeline is a list of steps, each a dataclass that takes a batch and returns a new one. Fresh policies get

    rename keys -> batch axis -> (text to tokens) -> device -> normalise      before the network
    unnormalise -> cpu                                                        after it

On disk a pipeline is LeRobot 0.6's (`lerobot/processor/pipeline.py`): a JSON list of registered step names
with their settings, and one safetensors file for each step that has tensors. `read_pipeline` and
`write_pipeline` speak it both ways. The steps themselves are in `steps.py`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from minivla.data.features import ACTION
from minivla.data.normalize import Stats, as_stats
from minivla.data.relative import link, source_of
from minivla.data.steps import STEPS, AddBatch, Batch, Device, Normalize, Rename, Step, Unnormalize
from minivla.files import atomic_write, read_json


@dataclass(repr=False)
class Pipeline:
    """A list of steps, called one after the other. Printing it shows what happens to a batch."""

    steps: list[Step]
    name: str = "policy_preprocessor"

    @overload
    def __call__(self, batch: Tensor) -> Tensor: ...
    @overload
    def __call__(self, batch: Mapping[str, Any]) -> Batch: ...
    def __call__(self, batch: Mapping[str, Any] | Tensor) -> Batch | Tensor:
        """Run the steps. A tensor alone is taken for an action, and comes back as one."""
        if isinstance(batch, Tensor):
            action: Tensor = self({ACTION: batch})[ACTION]
            return action
        out = dict(batch)
        for step in self.steps:
            out = step(out)
        return out

    @property
    def rename_map(self) -> dict[str, str]:
        """The map of the Rename step: the dict itself, so that updating it changes the pipeline."""
        return next((step.rename_map for step in self.steps if isinstance(step, Rename)), {})

    @property
    def stats(self) -> Stats:
        """The statistics of the first step that holds any; {} when none does."""
        return next((step.stats for step in self.steps if isinstance(step, Normalize) and step.stats), {})

    @property
    def relative_to(self) -> Tensor | None:
        """The state (B, S) that actions are relative to, None when they are not (`minivla.data.relative`)."""
        source = source_of(self.steps)
        return None if source is None else source.reference

    @relative_to.setter
    def relative_to(self, state: Tensor | None) -> None:
        if (source := source_of(self.steps)) is not None:
            source.reference = state

    def with_stats(
        self, stats: Mapping[str, Mapping[str, Any]], *, allow_constant: bool = False
    ) -> "Pipeline":
        """A copy that scales by other statistics, for another dataset. Errors as `check_statistics`."""
        steps = [
            replace(step, stats=as_stats(stats), allow_constant=allow_constant)
            if isinstance(step, Normalize)
            else step
            for step in self.steps
        ]
        return Pipeline(steps, self.name)

    def with_device(self, device: str | torch.device) -> "Pipeline":
        """A copy whose Device steps go to `device`."""
        steps = [
            replace(step, device=str(device)) if isinstance(step, Device) else step for step in self.steps
        ]
        return Pipeline(steps, self.name)

    def __repr__(self) -> str:
        lines = [f"{self.name}, {len(self.steps)} steps"]
        for number, step in enumerate(self.steps, start=1):
            first, *more = step.describe()
            lines += [f"  {number}  {type(step).__name__:<11}  {first}", *(f"{'':18}{line}" for line in more)]
        return "\n".join(lines)


def make_pipelines(
    config: Any,
    stats: Mapping[str, Mapping[str, Any]] | None,
    *,
    text: Iterable[Step] = (),
    allow_constant: bool = False,
) -> tuple[Pipeline, Pipeline]:
    """A fresh policy's preprocessor and postprocessor, in LeRobot's order (`lerobot/processor/factory.py`).

    config: has input_features, output_features, normalization_mapping, device; its `arrange_steps`, if it has
    one, puts further steps between these.
    stats: the dataset's, or None for a policy that will get them later.
    text: steps on the instruction, put after the batch axis.

    Errors as `check_statistics`.
    """
    features, outputs = {**config.input_features, **config.output_features}, dict(config.output_features)
    shared: dict[str, Any] = {
        "norm_map": config.normalization_mapping,
        "stats": as_stats(stats or {}),
        "allow_constant": allow_constant,
    }
    before = [Rename(), AddBatch(), *text, Device(config.device or "cpu"), Normalize(features, **shared)]
    after = [Unnormalize(outputs, **shared), Device("cpu")]
    if arrange := getattr(config, "arrange_steps", None):
        before, after = arrange(before, after)
    link(before, after)
    return Pipeline(before), Pipeline(after, "policy_postprocessor")


def write_pipeline(pipeline: Pipeline, folder: str | Path, filename: str | None = None) -> None:
    """Write a pipeline as LeRobot 0.6 does: a JSON file, and a safetensors file per step with tensors.

    Steps with files of their own, such as a tokenizer that was given as an object, write them too.
    """
    folder = Path(folder)
    prefix = re.sub(r"[^a-z0-9_]", "_", pipeline.name.lower())
    entries = []
    for index, step in enumerate(pipeline.steps):
        entry: dict[str, Any] = {"registry_name": step.registry_name, "config": step.to_json()}
        if state := step.state():
            entry["state_file"] = f"{prefix}_step_{index}_{step.registry_name}.safetensors"
            tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
            atomic_write(folder / entry["state_file"], save(tensors))
        step.write_files(folder)
        entries.append(entry)
    content = json.dumps({"name": pipeline.name, "steps": entries}, indent=2)
    atomic_write(folder / (filename or f"{prefix}.json"), content)


def read_pipeline(
    folder: str | Path,
    filename: str = "policy_preprocessor.json",
    *,
    device: str | torch.device | None = None,
    stats: Mapping[str, Mapping[str, Any]] | None = None,
    allow_constant: bool = False,
) -> Pipeline:
    """Read a pipeline from a folder in LeRobot 0.6's format.

    device: where its Device steps shall go instead (leave it out for a postprocessor, whose device is the
    CPU).
    stats: statistics instead of the folder's.
    allow_constant: let `stats` have constant dimensions.

    Raises FileNotFoundError for an absent file, ValueError for one that is damaged or has a step or setting
    unknown here, and the errors of `check_statistics`; constant dimensions in the folder's own only warn.
    """
    folder = Path(folder)
    content = read_json(folder / filename)
    if not isinstance(content.get("steps"), list):
        raise ValueError(
            f"{folder / filename} has {', '.join(content) or 'nothing'}; expected 'name' and a list 'steps'. "
            "It is no pipeline of LeRobot's: write it again, or take it out, so that minivla.load looks for "
            "statistics among the weights, as in older folders."
        )
    steps = [
        _read_step(folder, filename, number, entry, stats is None)
        for number, entry in enumerate(content["steps"])
    ]
    pipeline = Pipeline(steps, content.get("name", Path(filename).stem))
    if stats is not None:
        pipeline = pipeline.with_stats(stats, allow_constant=allow_constant)
    return pipeline if device is None else pipeline.with_device(device)


def _read_step(
    folder: Path,
    filename: str,
    number: int,
    entry: Any,
    own_stats: bool,
) -> Step:
    _check_entry(folder / filename, number, entry)
    name = entry.get("registry_name", entry.get("class"))
    if name not in STEPS:
        raise ValueError(
            f"step {number} of {folder / filename} is '{name}'; expected one of {', '.join(STEPS)}. If the "
            "policy needs it, write it as a Step and pass it to minivla.data.steps.register; if not, "
            "take it out of the file."
        )
    kind = STEPS[name]
    file = entry.get("state_file") if own_stats or not issubclass(kind, Normalize) else None
    state = _read_state(folder, filename, number, file) if file else {}
    try:
        step = kind.from_json(entry.get("config") or {}, state)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"step {number} ('{name}') of {folder / filename} has settings {entry.get('config')}; expected "
            f"those of {kind.__name__}({', '.join(f.name for f in fields(kind))}): {error}. Take the unknown "
            "one out, or mend the one of the wrong kind."
        ) from error
    step.find_files(folder)
    return step


def _check_entry(path: Path, number: int, entry: Any) -> None:
    kinds: dict[str, Any] = {"registry_name": str, "class": str, "config": dict, "state_file": str}
    if isinstance(entry, dict):
        wrong = [name for name, kind in kinds.items() if not isinstance(entry.get(name), kind | None)]
        if not wrong:
            return
    raise ValueError(
        f"step {number} of {path} reads {entry!r}; expected {{'registry_name': name, 'config': {{…}}}} and, "
        "for a step with tensors, 'state_file': name. Write the file again."
    )


def _read_state(folder: Path, filename: str, number: int, name: str) -> dict[str, Tensor]:
    path = folder / Path(name).name  # never outside the folder
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder / filename} says that step {number} keeps its tensors in {name}, which is not there; "
            f"expected it in {folder}. Copy or download the folder again, with all its .safetensors files."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); copy or download it again") from error
