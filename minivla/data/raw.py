"""From raw observations to a batch: the gate where wrong inputs are caught.

Raw is what `LeRobotDataset.__getitem__`, a data loader or an environment gives. Most failures of robot
policies pass this point in silence (a camera under another name, an image in 0…255, a state of another
robot), so `to_batch` refuses whatever it cannot tell for sure, naming what came, what was expected and how
to mend it.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivla.data.features import ACTION, FeatureType, MissingKey, PolicyFeature

# What LeRobot lets through a processor beside observations, action and padding flags
# (`lerobot/processor/converters.py`).
COMPANIONS = ("task", "index", "task_index", "episode_index", "timestamp", "next.reward", "next.done")
TOLERANCE = 1e-3  # how far beyond [0, 1] resampling may push a pixel


def to_batch(
    raw: Mapping[str, Any],
    input_features: Mapping[str, PolicyFeature],
    *,
    n_obs_steps: int | None = None,
    rename: Mapping[str, str] | None = None,
    optional: Collection[str] = (),
    resizes: bool = False,
) -> dict[str, Any]:
    """Check raw observations, and give them a batch axis, float32 and LeRobot's layout.

    raw: by key, arrays or tensors, batched or not. Images are uint8 (H, W, 3) or float (3, H, W) in [0, 1];
    states (S,).
    n_obs_steps: T, for policies that take a history (their data has a time axis after B); None for the
    others.
    rename: the preprocessor's rename map; keys keep their names here, and are checked against what they will
    become.
    optional: inputs that may be absent (the empty cameras of some policies).
    resizes: the policy brings images to its size itself, so that theirs does not matter here.

    Returns images (B, 3, H, W) float32 in [0, 1], states (B, S) float32, `task` as a list of B strings,
    `action`, `…_is_pad` and LeRobot's companions with a batch axis; other observations come along unchecked,
    all other keys are dropped, as in LeRobot. Raises KeyError for an absent input, ValueError for a wrong
    size, range, layout or unequal batch sizes, TypeError for a dtype that is no image or number.
    """
    rename = rename or {}
    features = {
        key: input_features[rename.get(key, key)] for key in raw if rename.get(key, key) in input_features
    }
    present = {rename.get(key, key) for key in raw}
    if missing := [key for key in input_features if key not in present and key not in optional]:
        raise MissingKey(_missing_message(raw, input_features, missing, rename))
    batch = {key: _convert(key, raw[key], feature) for key, feature in features.items()}
    for key, feature in () if resizes else features.items():
        _check_size(key, batch[key], feature)
    batched = _is_batched(raw, batch, features, n_obs_steps)
    for key in raw:
        if key not in batch and _goes_along(key):
            batch[key] = _as_tensor(raw[key])
    if not batched:
        batch = {key: _add_axis(value) for key, value in batch.items()}
    return _with_equal_sizes(batch)


def _goes_along(key: str) -> bool:
    return key.startswith(("observation.", ACTION)) or key.endswith("_is_pad") or key in COMPANIONS


def _as_tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "US":
        return value.tolist()
    if isinstance(value, np.ndarray | np.number | np.bool_):
        return torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value)
    return torch.tensor(value) if isinstance(value, bool | int | float) else value


def _add_axis(value: Any) -> Any:
    return value.unsqueeze(0) if isinstance(value, Tensor) else [value] if isinstance(value, str) else value


def _convert(key: str, value: Any, feature: PolicyFeature) -> Tensor:
    tensor = _as_tensor(value)
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"'{key}': got {type(value).__name__}; expected an array or tensor. Mend: torch.as_tensor(value)."
        )
    return (
        _image(key, tensor, feature) if feature.type == FeatureType.VISUAL else _vector(key, tensor, feature)
    )


def _vector(key: str, value: Tensor, feature: PolicyFeature) -> Tensor:
    size = len(feature.shape)
    if value.ndim < size or tuple(value.shape[value.ndim - size :]) != feature.shape:
        raise ValueError(
            f"'{key}': got shape {tuple(value.shape)}; expected {_axes(feature.shape)}, since the policy was "
            f"built for {feature.shape}. Give the same quantities in the same order, or build the policy "
            "from this dataset's features."
        )
    value = value.to(torch.float32)
    if not value.isfinite().all():
        where = sorted({int(index[-1]) for index in (~value.isfinite()).nonzero()})
        raise ValueError(
            f"'{key}': got NaN or inf at {where}; expected finite numbers. Look at the sensor or the dataset."
        )
    return value


def _image(key: str, value: Tensor, feature: PolicyFeature) -> Tensor:
    channels = feature.shape[0]
    if value.dtype != torch.uint8 and not value.is_floating_point():
        raise TypeError(_image_message(key, value, channels, "value.astype('uint8') if it holds 0…255"))
    if value.ndim < 3:
        raise ValueError(_image_message(key, value, channels, f"stack {channels} channels"))
    last, first = value.shape[-1] == channels, value.shape[-3] == channels
    if last and first:  # three rows of pixels or three channels? Only the expected size can tell.
        size = tuple(value.shape[-3:-1] if value.dtype == torch.uint8 else value.shape[-2:])
        last, first = (last, first) if size == feature.shape[1:] else (False, False)
    if value.dtype == torch.uint8:
        if not last:
            raise ValueError(
                _image_message(key, value, channels, "move the channels last, np.moveaxis(image, -3, -1)")
            )
        return value.movedim(-1, -3).to(torch.float32) / 255
    if not first:
        raise ValueError(
            _image_message(key, value, channels, "move the channels first, image.movedim(-1, -3)")
        )
    return _in_range(key, value, channels)


def _check_size(key: str, value: Tensor, feature: PolicyFeature) -> None:
    """Of an image, channels first. Networks run on other sizes, and see the world at another scale."""
    given, expected = tuple(value.shape[-2:]), feature.shape[-2:]
    if feature.type == FeatureType.VISUAL and given != expected:
        where = f", or build it so: Tabletop(size={expected[0]})" if expected[0] == expected[1] else ""
        raise ValueError(
            f"'{key}': got an image of {given[0]} x {given[1]} pixels (H x W); expected {expected[0]} x "
            f"{expected[1]}, which the policy was built for. Mend: resize it as the training data was{where}."
        )


def _in_range(key: str, value: Tensor, channels: int) -> Tensor:
    low, high = (float(bound) for bound in value.aminmax())
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return value.to(torch.float32)
    mend = "look for NaN, or for an image that is already normalised"
    if low >= -1.1 and high <= 255:
        mend = "image / 255" if low >= 0 else "(image + 1) / 2"
    raise ValueError(
        _image_message(key, value, channels, mend) + f" Its values run from {low:g} to {high:g}."
    )


def _image_message(key: str, value: Tensor, channels: int, mend: str) -> str:
    return (
        f"'{key}': got {str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}; expected "
        f"uint8 (H, W, {channels}), or float ({channels}, H, W) in [0, 1], with or without leading batch and "
        f"time axes. Mend: {mend}."
    )


def _axes(shape: tuple[int, ...]) -> str:
    inner = ", ".join(str(size) for size in shape)
    return f"{shape} or (B, {inner})"


def _is_batched(
    raw: Mapping[str, Any],
    batch: Mapping[str, Tensor],
    features: Mapping[str, PolicyFeature],
    steps: int | None,
) -> bool:
    """Whether the tensors have a batch axis, from the number of axes in front of each feature's own."""
    leading = {key: value.shape[: value.ndim - len(features[key].shape)] for key, value in batch.items()}
    counts = {len(axes) for axes in leading.values()}
    if len(counts) > 1 or max(counts, default=0) > (1 if steps is None else 2):
        shown = ", ".join(f"{key} {tuple(batch[key].shape)}" for key in batch)
        most = "a batch axis or none" if steps is None else f"batch and time (T = {steps}) axes, or fewer"
        raise ValueError(f"got {shown}; expected the same leading axes on all: {most}. Add or remove axes.")
    count = max(counts, default=_is_list(raw.get("task")))
    if steps is None or count != 1:
        _check_time(leading, steps, count == 2)
        return count > 0
    batched = _witness(raw, leading, steps)
    _check_time(leading, steps, not batched)
    return batched


def _is_list(value: Any) -> int:
    return int(isinstance(value, list | tuple | np.ndarray))


def _witness(raw: Mapping[str, Any], leading: Mapping[str, tuple[int, ...]], steps: int) -> bool:
    """One axis, and the policy has a history: is the axis batch or time?"""
    if "task" in raw:
        return bool(_is_list(raw["task"]))
    if "timestamp" in raw or "index" in raw:
        return torch.as_tensor(raw["timestamp"] if "timestamp" in raw else raw["index"]).ndim > 0
    if steps == 1 or any(axes[0] != steps for axes in leading.values()):
        return True
    raise ValueError(
        f"got one leading axis of {steps}; expected to tell {steps} samples from {steps} steps of history, "
        "and nothing does. Add the batch axis yourself, value[None], or give `task`: a string for one "
        "sample, a list for a batch."
    )


def _check_time(leading: Mapping[str, tuple[int, ...]], steps: int | None, has_time: bool) -> None:
    for key, axes in leading.items():
        if has_time and axes[-1] != steps:
            raise ValueError(
                f"'{key}': got {axes[-1]} steps of history; expected {steps}, the policy's n_obs_steps. Set "
                "delta_timestamps with minivla.data.delta_timestamps(config, fps)."
            )


def _with_equal_sizes(batch: dict[str, Any]) -> dict[str, Any]:
    sizes = {key: len(value) for key, value in batch.items() if isinstance(value, Tensor) and value.ndim > 0}
    size = next(iter(sizes.values()), 1)
    if (task := batch.get("task")) is not None:
        _check_task(task)
        batch["task"] = [task] * size if isinstance(task, str) else list(task)
        sizes["task"] = len(batch["task"])
    if len(set(sizes.values())) > 1:
        raise ValueError(f"got batch sizes {sizes}; expected one and the same. Cut or repeat the odd ones.")
    return batch


def _check_task(task: Any) -> None:
    fits = isinstance(task, list | tuple) and all(isinstance(text, str) for text in task)
    if not fits and not isinstance(task, str):
        raise TypeError(
            f"'task': got {task!r}; expected an instruction, or a list of one for each sample. Numbers are "
            "task_index: look the text up in the dataset's tasks."
        )


def _missing_message(
    raw: Mapping[str, Any], wanted: Mapping[str, PolicyFeature], missing: list[str], rename: Mapping[str, str]
) -> str:
    spare = [key for key in raw if rename.get(key, key) not in wanted and not _is_bookkeeping(key)]
    pairs = _suggest({key: raw[key] for key in spare}, wanted, missing)
    rows = [("policy wants", "batch has")]
    rows += [(key, "(missing)" if key in missing else key) for key in wanted] + [("", key) for key in spare]
    width = max(len(left) for left, _ in rows) + 2
    table = "\n".join(f"  {left:<{width}}{right}" for left, right in rows)
    mend = "Give the missing input with each observation."
    if pairs:
        names = {old: new for new, old in pairs.items()}
        mend = (
            "If these are the same under another name, paste:\n"
            f"  rename = {names}\n  raw = {{rename.get(key, key): value for key, value in raw.items()}}"
        )
    return f"the batch lacks {', '.join(missing)}\n{table}\n{mend}"


def _is_bookkeeping(key: str) -> bool:
    """No observation under another name, whatever its shape."""
    known = (*COMPANIONS, "frame_index", "subtask", "subtask_index")
    return key in known or key.startswith((ACTION, "next.")) or key.endswith("_is_pad")


def _suggest(
    spare: dict[str, Any], wanted: Mapping[str, PolicyFeature], missing: list[str]
) -> dict[str, str]:
    """{missing key: the key in `spare` that could be meant}, the likest name of a fitting shape."""
    found: dict[str, str] = {}
    for key in missing:
        fits = [name for name, value in spare.items() if _could_be(getattr(value, "shape", ()), wanted[key])]
        if fits:
            found[key] = max(fits, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio())
            del spare[found[key]]
    return found


def _could_be(shape: tuple[int, ...], feature: PolicyFeature) -> bool:
    if feature.type == FeatureType.VISUAL:
        return len(shape) >= 3 and feature.shape[0] in (shape[-1], shape[-3])
    return len(shape) in (1, 2, 3) and tuple(shape[-len(feature.shape) :]) == feature.shape
