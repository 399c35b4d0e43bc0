"""A sampler against its loss: do both mean the same by time, by noise, and by what the network predicts?

The loss mixes a chunk x₀ and noise ε to x = a x₀ + b ε. Which a and b a time stands for is measured, by
giving the loss one batch, one noise and that time; nothing is taken from the policy's config. Then the
sampler's path is followed: from the noise, through times at which the loss has less and less of it, to the
chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minivla import recorder
from minivla.actions.diffusion import PREDICTIONS
from minivla.data.features import ACTION
from minivla.policies.base import Policy
from minivla.preflight.report import ERROR, Finding, NotRun
from minivla.preflight.subject import Subject
from minivla.tracing import trace

ALIKE = 0.99  # cosine between two actions that are to be one: rounding is above, another sign far below
LEAST_NOISE = 0.5  # of the variance of what the sampler begins with, as the loss has it


def exact(dtype: torch.dtype) -> float:
    """How far rounding may take two numbers apart that are to be one."""
    return 1e-3 if dtype == torch.float32 else 0.05


@dataclass(frozen=True)
class Lesson:
    """What the loss makes of one time: the mixture x = `signal` · action + `noise` · noise that the network
    is given, and the target it is to predict, (B, H, A) each; `rest`, the part of x that is no such mixture.
    """

    time: Tensor
    signal: float
    noise: float
    rest: float
    x: Tensor
    target: Tensor

    @property
    def share(self) -> float:
        """How much of x is noise, by variance."""
        return self.noise**2 / max(self.signal**2 + self.noise**2, 1e-12)


def time_convention(subject: Subject) -> Iterator[Finding]:
    """The sampler starts at the noise, walks by times and predictions as its loss means them, and ends at the
    chunk.

    Threads: openpi#825; open-pi-zero#27 (the sign of the Euler step) #35; lerobot PR#1605; GR00T#51.
    """
    if not isinstance(subject.policy, Policy):
        raise NotRun("one of minivla's policies: a sampler's path is recorded by minivla.trace")
    (call, chunk), flow = subject.path, subject.path[0].flow
    if flow is None:
        raise NotRun("a policy with flow time: this one integrates nothing")
    yield from _start(subject, call)
    if flow.quantity == "velocity":
        yield from _walk(flow)
    yield from _end(subject, flow, chunk)
    yield from _as_taught(subject, call, flow)


def _start(subject: Subject, call: recorder.Call) -> Iterator[Finding]:
    """The noise a policy is given is where the path starts."""
    drawn = drawn_noise(call)
    for noise in (drawn, -drawn):
        again = subject.sampled(noise=noise, steps=1)[0].flow
        if again is not None and not torch.equal(again.x[0], noise[..., : again.x.shape[-1]]):
            what = "the sampler's path does not start at the noise it is given"
            mend = "x at the noise end of time is the noise itself; look from which end the sampler starts"
            yield Finding("time-start", ERROR, "sampler", what, mend)
            return


def _walk(flow: recorder.Flow) -> Iterator[Finding]:
    """The path is the sum of its velocities, each times its step."""
    steps = flow.times.to(flow.v).diff().view(-1, *[1] * (flow.v.ndim - 1))
    if _cosine(flow.x[-1] - flow.x[0], (steps * flow.v).sum(0)) < 0.9:
        what = "the path does not follow its own velocity: the step's sign or size disagrees with the times"
        mend = "x += (next time - this time) * v, with both times as the loss has them"
        yield Finding("time-direction", ERROR, "sampler", what, mend)


def _end(subject: Subject, flow: recorder.Flow, chunk: Tensor) -> Iterator[Finding]:
    """The chunk is the path's end, from the current step on."""
    now = list(subject.config.action_delta_indices).index(0)  # some learn from past actions too
    end = flow.x[-1][:, now:][:, : chunk.shape[1], : chunk.shape[2]]
    if end.shape != chunk.shape or not torch.allclose(end, chunk, atol=1e-4):
        what = "the path's end is not the chunk the policy returns"
        yield Finding("time-end", ERROR, "sampler", what, "return x at the data end of time")


def _as_taught(subject: Subject, call: recorder.Call, flow: recorder.Flow) -> Iterator[Finding]:
    """Times and predictions mean to the sampler what they mean to the loss. One finding at most, since others
    would follow from it.
    """
    noise, predicted = draw(call), call.hidden.get("denoised", flow.v[-1])
    asked = (flow.times[i] for i in (0, (len(flow.v) - 1) // 2, -2))
    first, middle, last = (lesson(subject, time, noise) for time in asked)
    action = subject.training_batch[ACTION]
    if max(first.rest, last.rest) > exact(flow.x.dtype):
        what = "what the loss gives the network is no mixture of the actions and the noise it was given"
        yield Finding("loss-noise", ERROR, "loss", what, "use the noise that is given, and mix it only once")
    elif first.share < LEAST_NOISE:
        what = f"the sampler starts from noise, at a time at which the loss has {first.share:.0%} of it"
        mend = "let both have noise at the same end of time; take enough steps to begin where noise is most"
        yield Finding("time-start", ERROR, "sampler and loss", what, mend)
    elif len(flow.v) > 1 and last.share >= first.share:
        what = "the sampler walks towards times at which the loss has more noise, not less"
        yield Finding("time-direction", ERROR, "sampler and loss", what, "turn the sampler's times round")
    elif _cosine(_meant(flow, middle, middle.x, middle.target), action) < ALIKE:
        what = f"what the loss teaches, taken for the {flow.quantity} as the sampler does, misses the action"
        mend = "compare the loss's target with what the sampler makes of a prediction; look at its sign"
        yield Finding("time-direction", ERROR, "sampler and loss", what, mend)
    elif not _arrives(flow, last, predicted):
        what = "the path's end is not the action that the last prediction means"
        mend = "compare the sampler's step with x = a · action + b · noise, with a and b as the loss has them"
        yield Finding("time-end", ERROR, "sampler and loss", what, mend)


def drawn_noise(call: recorder.Call) -> Tensor:
    """What a sampler starts from, as wide as the network sees it: wider than the path where actions are
    padded (π0).
    """
    assert call.flow is not None
    return call.hidden.get("noise", call.flow.x[0])


def draw(call: recorder.Call) -> Tensor:
    """Noise for the loss, such as the sampler starts from: standard normal, always the same."""
    like = drawn_noise(call)
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(like)


def lesson(subject: Subject, time: Tensor, noise: Tensor) -> Lesson:
    """What the loss makes of a time. NotRun for a policy that does not tell."""
    policy, batch = subject.patient.eval(), subject.training_batch
    with trace(policy) as recorded, torch.no_grad():
        policy(batch, noise=noise, time=time.expand(len(noise)).to(noise.device))
    if not {"noisy", "target"} <= set(recorded.hidden):
        raise NotRun('a loss that tells what it teaches: recorder.keep("noisy", x), keep("target", target)')
    action = batch[ACTION]
    x, target, noise = (
        part[..., : action.shape[-1]] for part in (recorded.hidden["noisy"], recorded.hidden["target"], noise)
    )
    mixed, *parts = (part.flatten().double().cpu() for part in (x, action, noise))
    scales = torch.linalg.lstsq(torch.stack(parts, dim=-1), mixed[:, None]).solution[:, 0]
    rest = (mixed - torch.stack(parts, dim=-1) @ scales).norm() / mixed.norm()
    return Lesson(time, float(scales[0]), float(scales[1]), float(rest), x, target)


def _meant(flow: recorder.Flow, taught: Lesson, x: Tensor, predicted: Tensor) -> Tensor:
    """The action that a prediction at x means to the sampler, at the lesson's time."""
    if flow.quantity == "velocity":
        return x + (flow.times[-1] - taught.time).to(x) * predicted
    means = {
        "epsilon": (x - taught.noise * predicted) / taught.signal,
        "sample": predicted,
        "v_prediction": taught.signal * x - taught.noise * predicted,
    }
    return {PREDICTIONS[name]: action for name, action in means.items()}[flow.quantity]


def _arrives(flow: recorder.Flow, last: Lesson, predicted: Tensor) -> bool:
    """Whether the path ends at the action that its last prediction means, which may have been clipped."""
    meant, end = _meant(flow, last, flow.x[-2], predicted), flow.x[-1]
    bound = float(end.abs().max())
    return bool(torch.allclose(meant.clamp(-bound, bound), end, atol=exact(end.dtype) * max(bound, 1.0)))


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one.flatten().float(), other.flatten().float(), dim=0))
