"""State, environment state, actions and instruction of a raw batch: what is wrong, and the mended ones."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivla.data.features import ACTION, FeatureType, PolicyFeature
from minivla.nn.instruction import split_words
from minivla.preflight.pictures import Look
from minivla.preflight.report import ERROR, WARNING, Finding
from minivla.preflight.scaling import Scaling

KINDS = {FeatureType.STATE: "state", FeatureType.ENV: "environment-state", FeatureType.ACTION: "action"}
FAR = 3.0  # a zero this many standard deviations from the mean is no measurement


def examine_vector(key: str, value: Any, feature: PolicyFeature, scaling: Scaling | None) -> Look:
    """Look at a state (..., S) or a chunk (..., A): numbers, size, values."""
    look, kind = Look(key), KINDS.get(feature.type, "input")
    tensor = torch.as_tensor(value) if isinstance(value, np.ndarray | list | tuple) else value
    if not isinstance(tensor, Tensor) or tensor.ndim == 0:
        look.note(f"{kind}-size", f"got {value!r:.60}; expected {feature.shape}", "give an array or tensor")
        return look
    sized = _sized(look, kind, tensor.detach().cpu().float(), feature.shape[-1])
    if sized is None:
        return look
    if not sized.isfinite().all():
        where = sorted({int(index[-1]) for index in (~sized.isfinite()).nonzero()})
        what = f"NaN or inf at {_dimensions(where)}"
        look.note(f"{kind}-not-finite", what, "look at the sensor, or at that column of the dataset")
        sized = torch.where(sized.isfinite(), sized, _centre(scaling, key, sized.shape[-1]))
    look.value = sized
    return look


def _sized(look: Look, kind: str, value: Tensor, wanted: int) -> Tensor | None:
    given = value.shape[-1]
    if given == wanted:
        return value
    what = f"got {given} numbers; the policy was built for {wanted}"
    if given > wanted and bool((value[..., wanted:] == 0).all()):
        what += f", and those from {wanted} on are zero: it was padded"
        look.note(f"{kind}-size", what, f"take the padding off: value[..., :{wanted}]")
        return value[..., :wanted]
    look.note(f"{kind}-size", what, "give the same quantities in the same order as the training data")
    return None


def _centre(scaling: Scaling | None, key: str, size: int) -> Tensor:
    pair = scaling.pair(key) if scaling is not None else None
    centre = scaling.apply(key, torch.zeros(size), inverse=True) if scaling is not None and pair else None
    return torch.zeros(size) if centre is None else centre.nan_to_num()


def examine_action(
    mended: dict[str, Any], outputs: dict[str, PolicyFeature], config: Any, scaling: Scaling | None
) -> list[Finding]:
    """Look at the batch's actions, if it has any; those that cannot be used are taken out of `mended`."""
    value = mended.pop(ACTION, None)
    if value is None:
        return []
    look = examine_vector(ACTION, value, outputs[ACTION], scaling)
    findings, horizon = look.findings, len(config.action_delta_indices)
    if look.value is None or look.value.ndim < 2:
        return findings
    steps = look.value.shape[-2]
    padded = mended.get("action_is_pad")
    is_chunk = padded is not None or look.value.ndim == 3
    if is_chunk and steps != horizon:
        what = f"a chunk of {steps} actions; the policy predicts {horizon}"
        mend = "take minivla.data.delta_timestamps(policy.config, fps) for the dataset's windows"
        return [*findings, Finding("action-horizon", ERROR, ACTION, what, mend)]
    if is_chunk and padded is None:
        return [*findings, _no_flags(mended)]
    if is_chunk:
        mended[ACTION] = look.value
        findings = findings + _wrong_flags(mended["action_is_pad"], list(config.action_delta_indices))
    return findings


def _wrong_flags(flags: Any, deltas: list[int]) -> list[Finding]:
    """The action of the present moment is never padding, nor is one before the last that is none."""
    pad = torch.as_tensor(flags).bool().reshape(-1, len(deltas))[:, deltas.index(0) if 0 in deltas else 0 :]
    wrong = pad[:, 0] | (pad[:, :-1] & ~pad[:, 1:]).any(1)
    if not wrong.any():
        return []
    what = f"in {int(wrong.sum())} of {len(wrong)} samples real actions are marked as padding"
    what += ": the flags are inverted" if bool((pad[:, :1] & ~pad[:, -1:]).any()) else ""
    mend = "True means padding, and only actions after the episode's end are"
    return [Finding("padding-flags", ERROR, "action_is_pad", what, mend)]


def _no_flags(mended: dict[str, Any]) -> Finding:
    near = difflib.get_close_matches("action_is_pad", [key for key in mended if "pad" in key], 1, 0.3)
    what = "a chunk of actions, and nothing says which of them are padding" + (
        f"; there is a '{near[0]}'" if near else ""
    )
    mend = (
        f"batch['action_is_pad'] = batch.pop('{near[0]}')"
        if near
        else ("give the dataset delta_timestamps for 'action': it then adds 'action_is_pad'")
    )
    return Finding("padding-flags", ERROR, "action_is_pad", what, mend)


def examine_task(mended: dict[str, Any], vocabulary: Collection[str]) -> list[Finding]:
    """Look at the instruction of a policy that reads one, of these words or of any if there are none; what is
    no instruction is taken out.
    """
    task = mended.get("task")
    texts = [task] if isinstance(task, str) else list(task) if isinstance(task, list | tuple) else None
    if texts is None or not all(isinstance(text, str) for text in texts):
        what = "the policy follows an instruction and the batch has none" + (
            "" if task is None else f", but {task!r:.40}"
        )
        return [_replaced(mended, "instruction-absent", what)]
    if any(not text.strip() for text in texts):
        return [_replaced(mended, "instruction-absent", "an instruction is empty")]
    known = set(vocabulary)
    strange = sorted({word for text in texts for word in split_words(text) if known and word not in known})
    if not strange:
        return []
    what = f"words the policy never saw in training: {', '.join(strange[:8])}"
    mend = "say it in the words of policy.config.vocabulary; unknown words all read alike"
    return [Finding("instruction-words", WARNING, "task", what, mend)]


def _replaced(mended: dict[str, Any], code: str, what: str) -> Finding:
    mended.pop("task", None)
    return Finding(
        code, ERROR, "task", what, "add task=[sentence, …]; an environment gives it in info['task']"
    )


def _dimensions(indices: list[int]) -> str:
    return ("dimension " if len(indices) == 1 else "dimensions ") + ", ".join(map(str, indices))
