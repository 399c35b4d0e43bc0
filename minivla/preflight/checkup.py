"""`minivla.doctor`: every check, one after the other, none of which can stop the others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from minivla.policies.base import Policy
from minivla.preflight import (
    cameras,
    control,
    learning,
    motion,
    observations,
    probes,
    sampler,
    scales,
    statistics,
)
from minivla.preflight.recordings import Recordings
from minivla.preflight.report import ERROR, Finding, NotRun, Report, sorted_findings
from minivla.preflight.scaling import are_exchanged
from minivla.preflight.subject import Subject
from minivla.tracing import bare
from minivla.training.batches import preserved_rng
from minivla.training.evaluation import environments

Check = Callable[[Subject], Iterable[Finding]]

CHECKS: dict[str, Check] = {
    "weights finite": probes.weights_finite,
    "dataset finite": statistics.dataset_finite,
    "processors in order": statistics.processors_in_order,
    "statistics present": statistics.statistics_present,
    "statistics finite": statistics.statistics_sound,
    "statistics vary": statistics.statistics_vary,
    "statistics of this dataset": statistics.statistics_of_dataset,
    "scale of the batch": scales.scale_of_batch,
    "zero padding": scales.padded_with_zeros,
    "processors agree": statistics.processors_agree,
    "inputs": observations.inputs,
    "preparation": observations.preparation,
    "cameras differ": cameras.distinct,
    "camera order": cameras.camera_order,
    "picture orientation": cameras.orientation,
    "as recorded": observations.as_recorded,
    "environment's observations": observations.environment,
    "padding leaves the loss alone": learning.padding_mask,
    "actions vary": probes.actions_vary,
    "depends on images": partial(probes.sensitivity, "image"),
    "depends on state": partial(probes.sensitivity, "state"),
    "depends on instruction": partial(probes.sensitivity, "text"),
    "frozen and trainable": learning.frozen_and_trainable,
    "time convention": sampler.time_convention,
    "queue reset": probes.queue_reset,
    "action range": control.action_range,
    "environment's motion": motion.environment_motion,
    "action frame": control.action_frame,
    "gripper sign": control.gripper_sign,
    "open-loop replay": control.open_loop_replay,
    "replay in the environment": control.environment_replay,
}
"""Every check by name, in the order of the report."""


def doctor(
    policy: Any,
    batch: Mapping[str, Any],
    *,
    dataset: Any = None,
    env: Any = None,
    preprocessor: Any = None,
    postprocessor: Any = None,
) -> Report:
    """Look for what fails silently before a robot does: a preflight report.

    policy          one of minivla's, or LeRobot's; compiled or wrapped for distributed training, too
    batch           raw, as `dataset[i]`, a data loader or an environment gives it, batched or not
    dataset         `minivla.world.demonstrations(…)` or a LeRobotDataset the policy was trained on
    env             a gymnasium environment or a string, as `minivla.evaluate` takes; one without a `spec`
                    cannot be copied and is itself reset and stepped
    preprocessor, postprocessor   LeRobot's pipelines, for its policies; ours carry their own

    The policy is not changed: not its parameters, modes or queue, nor anybody's random generators. Checks
    that lack their input are listed as not run; a check that breaks down is a finding, "check-failed".
    Raises TypeError for a policy that is none, a batch that is no dict, a dataset of unknown kind; ValueError
    for an environment that cannot be made.
    """
    policy = bare(policy)
    _expect(policy, batch)
    own = policy if isinstance(policy, Policy) else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(torch.inference_mode(False))
        made = stack.enter_context(environments(env, 1))[0] if env is not None else None
        before = preprocessor if preprocessor is not None or own is None else own.preprocessor
        after = postprocessor if postprocessor is not None or own is None else own.postprocessor
        recordings = None if dataset is None else Recordings(dataset)
        exchanged = are_exchanged(before, after)
        pipelines = (after, before) if exchanged else (before, after)
        subject = Subject(policy, dict(batch), recordings, made, *pipelines, exchanged=exchanged)
        return examine(subject, CHECKS)


def examine(subject: Subject, checks: Mapping[str, Check]) -> Report:
    """Run the checks; see `doctor`."""
    findings: list[Finding] = []
    passed: list[str] = []
    not_run: dict[str, str] = {}
    for name, check in checks.items():
        found, lacking = _run(name, check, subject)
        findings += found
        if lacking is not None:
            not_run[name] = lacking
        elif not found:
            passed.append(name)
    title = f"minivla.doctor on {type(subject.policy).__name__}"
    unique = sorted_findings(dict.fromkeys(findings))
    told = (subject.measurements, title, _evidence(subject), tuple(subject.notes))
    return Report(unique, tuple(passed), not_run, *told)


def _evidence(subject: Subject) -> str:
    """What the checks had to go by: how many samples, frames and episodes, and whether an environment."""
    parts = []
    with contextlib.suppress(NotRun):
        size, given = subject.samples
        parts.append(f"{size} of {given} samples" if size < given else f"{size} sample{'s' * (size > 1)}")
    if (recordings := subject.recordings) is not None:
        frames = len(recordings.column("episode_index"))
        parts.append(f"a dataset of {frames} frames in {len(recordings.episodes)} episodes")
    if subject.env is not None:
        parts.append("an environment")
    return ", ".join(parts) or "nothing but the policy"


def _run(name: str, check: Check, subject: Subject) -> tuple[list[Finding], str | None]:
    """What a check found, up to a breakdown if there was one, and what it lacked if it could not go on."""
    found: list[Finding] = []
    try:
        for finding in check(subject):
            found.append(finding)
    except NotRun as reason:
        return found, str(reason)
    except Exception as error:  # whatever it is, it is reported, and the others go on
        found.append(_broke_down(name, error))
    return found, None


def _broke_down(name: str, error: Exception) -> Finding:
    text = " ".join(str(error).split()) or "no message"
    what = f"the check broke down with {type(error).__name__}: {text[:300]}"
    mend = "if the other findings do not explain it, report it with this text"
    return Finding("check-failed", ERROR, name, what, mend)


def _expect(policy: Any, batch: Any) -> None:
    config = getattr(policy, "config", None)
    if not isinstance(policy, torch.nn.Module) or not hasattr(config, "input_features"):
        raise TypeError(
            f"policy is a {type(policy).__name__}; expected a minivla policy or one of LeRobot's. "
            "Load one: minivla.load('act-tabletop')."
        )
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch is a {type(batch).__name__}; expected a dict of raw observations. Give dataset[0], or "
            "what an environment observes."
        )
