"""Which of the batch's inputs is which of the policy's."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from minivla.data.features import ACTION, OBS_ENV_STATE, OBS_STATE, FeatureType, PolicyFeature
from minivla.data.raw import COMPANIONS
from minivla.preflight.report import ERROR, WARNING, Finding

EMPTY = ".empty_camera_"  # in the names of cameras that are always absent


def match_inputs(
    raw: Mapping[str, Any],
    inputs: Mapping[str, PolicyFeature],
    rename: Mapping[str, str],
    optional: Collection[str] = (),
) -> tuple[list[Finding], dict[str, str]]:
    """Find each of the policy's inputs in a raw batch, under its own name or the likest one.

    `optional`: inputs that may be absent, of which a warning is enough. Returns what is wrong, and {the
    policy's name: the batch's name} for those found.
    """
    places = {rename.get(key, key): key for key in raw if rename.get(key, key) in inputs}
    missing = [key for key in inputs if key not in places and EMPTY not in key]
    spare = [key for key in raw if key not in places.values() and not _is_bookkeeping(key)]
    guesses = _likest(missing, spare, raw, inputs)
    findings: list[Finding] = []
    cameras = [key for key in missing if inputs[key].type == FeatureType.VISUAL]
    table = _table(raw, inputs, places, spare, {k: guesses[k] for k in cameras if k in guesses})
    if named := [key for key in cameras if key in guesses]:
        what = (
            f"the policy looks for {', '.join(named)}; the batch has {', '.join(guesses[k] for k in named)}"
        )
        mend = "if these are the same cameras under other names, paste the rename below"
        findings.append(Finding("camera-names", ERROR, ", ".join(named), what, mend, table))
    absent = [key for key in cameras if key not in guesses]
    optional = optional if len(absent) < len(inputs_of(inputs)) else ()  # it needs one
    if needed := [key for key in absent if key not in optional]:
        what = f"the policy looks through {len(inputs_of(inputs))} cameras, and the batch lacks these"
        mend = "plug the camera in, or train a policy without it; a black picture in its place is no mend"
        findings.append(Finding("camera-absent", ERROR, ", ".join(needed), what, mend, table))
    if masked := [key for key in absent if key in optional]:
        what = "the batch lacks these cameras; the policy masks their tokens and goes on without them"
        mend = "nothing to do if it was trained without them, too; else plug the camera in, or rename one"
        findings.append(Finding("camera-absent", WARNING, ", ".join(masked), what, mend, table))
    for key in [key for key in missing if key not in cameras]:
        findings.append(_absent_vector(key, guesses.get(key)))
    extra = [key for key in spare if key not in guesses.values() and _is_picture(raw[key])]
    if extra:
        what = "the batch has cameras that the policy never looks at"
        mend = "nothing to do if that is meant; else rename one of them to a camera of the policy"
        findings.append(Finding("camera-extra", WARNING, ", ".join(extra), what, mend, table))
    return findings, places | guesses


def inputs_of(inputs: Mapping[str, PolicyFeature]) -> list[str]:
    """The cameras among the inputs."""
    return [key for key, feature in inputs.items() if feature.type == FeatureType.VISUAL]


def _absent_vector(key: str, guess: str | None) -> Finding:
    kind = {OBS_STATE: "state", OBS_ENV_STATE: "environment-state"}.get(key, "input")
    if guess is not None:
        what = f"the batch has no '{key}', but a '{guess}' of that size"
        return Finding(f"{kind}-name", ERROR, key, what, f"raw['{key}'] = raw.pop('{guess}')")
    return Finding(
        f"{kind}-absent", ERROR, key, "the batch has no such input", "give it with each observation"
    )


def _likest(
    missing: list[str], spare: list[str], raw: Mapping[str, Any], inputs: Mapping[str, PolicyFeature]
) -> dict[str, str]:
    """{missing input: spare key}: pairs of a fitting shape, the likest names first, each key used once."""
    pairs = [
        (difflib.SequenceMatcher(None, key, name).ratio(), -i, -j, key, name)
        for i, key in enumerate(missing)
        for j, name in enumerate(spare)
        if _could_be(raw[name], inputs[key])
    ]
    found: dict[str, str] = {}
    for *_, key, name in sorted(pairs, reverse=True):
        if key not in found and name not in found.values():
            found[key] = name
    return {key: found[key] for key in missing if key in found}


def _could_be(value: Any, feature: PolicyFeature) -> bool:
    if feature.type == FeatureType.VISUAL:
        return _is_picture(value)
    shape = tuple(getattr(value, "shape", ()))
    return not _is_picture(value) and shape[-1:] == feature.shape[-1:]


def _is_picture(value: Any) -> bool:
    shape = tuple(getattr(value, "shape", ()))
    return len(shape) >= 3 and min(shape[-2:]) > 0 and (shape[-1] in (1, 3, 4) or shape[-3] in (1, 3, 4))


def _is_bookkeeping(key: str) -> bool:
    known = (*COMPANIONS, "frame_index", "subtask", "subtask_index")
    return key in known or key.startswith((ACTION, "next.")) or key.endswith("_is_pad")


def _table(
    raw: Mapping[str, Any],
    inputs: Mapping[str, PolicyFeature],
    places: Mapping[str, str],
    spare: list[str],
    guesses: Mapping[str, str],
) -> str:
    """Two columns, and the rename to paste where there is one."""
    rows = [("policy wants", "batch has")]
    rows += [(key, places.get(key, "(missing)")) for key in inputs_of(inputs)]
    rows += [("", key) for key in spare if _is_picture(raw[key])]
    width = max(len(left) for left, _ in rows)
    lines = [f"{left:<{width}} | {right}" for left, right in rows]
    lines.insert(1, "-" * (width + 1) + "+" + "-" * (1 + max(len(right) for _, right in rows)))
    if guesses:
        names = {name: key for key, name in guesses.items()}
        lines += [f"rename = {names}", "raw = {rename.get(key, key): value for key, value in raw.items()}"]
    return "\n".join(lines)
