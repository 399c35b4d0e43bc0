"""Checks that run the policy, on a twin of it: what its chunk depends on, and its queue."""

from __future__ import annotations

import math
from collections.abc import Iterator

from minivla.data.features import ACTION, FeatureType
from minivla.preflight import running
from minivla.preflight.report import ERROR, WARNING, Finding, NotRun
from minivla.preflight.subject import Baseline, Subject

NOTHING = 1e-6  # of the chunk's spread: rounding
LITTLE = 1e-3
KINDS = {"image": "images", "state": "state", "text": "instruction"}


def weights_finite(subject: Subject) -> Iterator[Finding]:
    """No parameter or buffer holds NaN or inf."""
    if names := subject.broken_weights:
        what = f"{len(names)} of the policy's tensors hold NaN or inf"
        mend = "take an earlier checkpoint; look at the learning rate, the loss scale and the data"
        where = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        yield Finding("weights-not-finite", ERROR, where, what, mend)


def actions_vary(subject: Subject) -> Iterator[Finding]:
    """The chunk is made of numbers, and each dimension of it says different things at different times."""
    chunk = running.chunk(subject.patient, subject.batch)
    if not chunk.isfinite().all():
        what = f"{1 - float(chunk.isfinite().float().mean()):.0%} of the predicted actions are NaN or inf"
        mend = "record a trace (minivla.trace) and look for the first tensor that is not finite"
        yield Finding("chunk-not-finite", ERROR, "policy", what, mend)
        return
    baseline, scaling = subject.baseline, subject.scaling
    if baseline.spread < NOTHING:
        return  # `depends on images` says so
    still = (baseline.spreads < LITTLE * baseline.spread).nonzero().flatten().tolist()
    fixed = scaling.constant(ACTION) if scaling is not None and scaling.usable(ACTION) else []
    for index in (index for index in still if index not in fixed):
        what = "the policy says the same at every step, whatever is observed; other dimensions vary"
        mend = "look at this row of the action head: never loaded, zeroed, or masked out of the loss"
        yield Finding("action-constant", ERROR, subject.dimension(ACTION, index), what, mend)


def sensitivity(kind: str, subject: Subject) -> Iterator[Finding]:
    """The chunk changes when the images, the state or the instruction are those of another moment.

    Threads: lerobot#515 #951 #1239 #1270 #2213 #2761; act#6; physical-ai-studio#998; GR00T#82 #130.
    """
    keys = _keys_of(kind, subject)
    if not keys:
        raise NotRun(f"a policy that reads {'an instruction' if kind == 'text' else KINDS[kind]}")
    if not math.isfinite(subject.baseline.spread):
        raise NotRun("chunks that are finite")
    if subject.baseline.spread < NOTHING:
        if kind == "image" or not _keys_of("image", subject):
            what = "the same action at every step, whatever is observed"
            mend = "look for a head that was never loaded or trained, or a normalisation that flattens it"
            yield Finding("constant-chunk", ERROR, "policy", what, mend)
        return
    reached = _change(subject, keys)
    subject.measurements[f"chunk's change with other {KINDS[kind]}"] = reached
    yield from _judged(kind, KINDS[kind], reached, subject.baseline)
    if kind == "image" and len(keys) > 1 and reached >= NOTHING:
        for key in keys:
            alone = _change(subject, [key])
            subject.measurements[f"  {key.rsplit('.', 1)[-1]} alone"] = alone
            yield from _judged(kind, key, alone, subject.baseline)


def _judged(kind: str, where: str, reached: float, base: Baseline) -> Iterator[Finding]:
    code, plural = f"ignores-{'instruction' if kind == 'text' else kind}", kind == "image"
    if reached < NOTHING:
        what = f"the chunk is the same with other {where}"
        mend = "do these tokens reach the action head (minivla.trace)? Are they masked, or weights zero?"
        yield Finding(code, ERROR, where, what, mend)
    elif reached < LITTLE * min(1.0, base.reach):
        verb = "barely moves" if plural else "hardly changes"
        what = f"the chunk {verb} with other {where}: by {reached:.1g} of its spread"
        mend = (
            "a sign of causal confusion or of collapsed features; vary this input more in the training data"
        )
        yield Finding(code, WARNING, where, what, mend)


def _keys_of(kind: str, subject: Subject) -> list[str]:
    if kind == "text":
        return ["task"] if subject.reads_text else []
    types = (FeatureType.VISUAL,) if kind == "image" else (FeatureType.STATE, FeatureType.ENV)
    return [key for key, feature in subject.inputs.items() if feature.type in types]


def _change(subject: Subject, keys: list[str]) -> float:
    """Root mean square of the chunk's change when `keys` come from another observation, in its spread; the
    second observation is asked where the first changes next to nothing.
    """
    reached, base = 0.0, subject.baseline
    for number in range(len(base.others)):
        change = running.chunk(subject.patient, subject.mixed(keys, number)) - base.chunk
        if not change.isfinite().all():
            raise NotRun("chunks that are finite")
        reached = max(reached, float(change.square().mean().sqrt()) / base.spread)
        if reached >= LITTLE:
            break
    return reached


def queue_reset(subject: Subject) -> Iterator[Finding]:
    """After `reset` the next action follows from what is observed then, and from nothing before.

    Threads: lerobot PR#343 #1116 #2277; SpatialVLA#52; strands#731; data4robotics#8.
    """
    old, new = (running.moment(b, subject.config) for b in (subject.batch, subject.baseline.others[0]))
    used, fresh = subject.twin(), subject.patient
    for policy in (used, fresh):
        policy.reset()
    first = running.action(used, old)
    used.reset()
    after, wanted = running.action(used, new), running.action(fresh, new)
    if subject.config.observation_delta_indices is None:  # a history would need more than one observation
        wanted = running.chunk(subject.patient, new)[:, 0].to(after)
    scale = float((wanted - first).abs().max())
    if scale < NOTHING:
        raise NotRun("a chunk that depends on the observation")
    if float((after - wanted).abs().max()) > 1e-3 * scale:
        what = "after reset() the first action still is that of the episode before"
        mend = "clear every queue, ensemble and history in reset(); call it whenever an episode starts"
        yield Finding("queue-not-reset", ERROR, "reset()", what, mend)
