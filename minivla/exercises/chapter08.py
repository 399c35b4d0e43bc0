"""Self-checks of chapter 8, π0: openpi's marks as a mask, the pull of real-time chunking, a state that is
looked at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minivla.actions.flow import PI
from minivla.actions.realtime import RTCConfig, guide, prefix_weights
from minivla.data.features import FeatureType, PolicyFeature
from minivla.exercises.verdict import verdict
from minivla.policies.pi import PI0, PI0Config

HORIZON, STEPS = 5, 4


def check_from_marks(from_marks: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Check `from_marks(marks, valid)`: openpi's marks (L,) of 0 and 1, where 1 says that this token may not
    be seen by those before it, and which tokens are real, valid (L,) bool; to (L, L) bool, True where a row
    may look at a column's. What the rows of padding hold does not matter.
    """

    def complaint() -> str | None:
        for marks, hidden, why in (
            ([0, 0, 0, 1, 1, 0], [], "two patches and a word, then a state, then two actions: three blocks"),
            ([0, 0, 0, 1, 1, 0], [1], "nobody looks at padding"),
            ([0, 0, 0, 0], [], "without a mark all tokens are one block"),
            ([1, 1, 1, 1], [], "a mark at every token is a causal mask"),
            ([0, 1, 0, 0, 1, 0], [0, 4], "a mark opens a block, and counts even if its token is padding"),
        ):
            valid = torch.ones(len(marks), dtype=torch.bool)
            valid[hidden] = False
            given = torch.as_tensor(from_marks(torch.tensor(marks), valid))
            block = torch.tensor(marks).cumsum(0)
            wanted = (block <= block[:, None]) & valid
            if tuple(given.shape) != tuple(wanted.shape):
                return f"for {len(marks)} marks it returns shape {tuple(given.shape)}, expected (L, L)"
            wrong = (given.bool() != wanted) & valid[:, None]
            if wrong.any():
                row, column = (int(place[0]) for place in wrong.nonzero(as_tuple=True))
                told, said = "may" if wanted[row, column] else "may not", bool(given[row, column])
                return (
                    f"marks {marks}, padding at {hidden}: token {row} {told} look at token {column}, and "
                    f"yours says {said}; {why}"
                )
        return None

    verdict(complaint)


def check_guided(guided: Callable[[Tensor, Tensor, float, Tensor, Tensor], Tensor]) -> None:
    """Check `guided(velocity, x, time, previous, held)`: the velocity (B, H, A) at the point x (B, H, A) and
    `time` (1 is noise), bent towards the `previous` chunk (B, H, A) as far as it is held to, held (H,); the
    pull is 10 times the error at most.
    """

    def complaint() -> str | None:
        random = torch.Generator().manual_seed(0)
        velocity, x, previous = (torch.randn(2, HORIZON, 3, generator=random) for _ in range(3))
        held = prefix_weights(1, 4, HORIZON, "LINEAR")
        for time in (0.5, 0.2, 0.99, 1.0):
            given = guided(velocity, x, time, previous, held)
            if tuple(given.shape) != tuple(x.shape):
                return f"it returns shape {tuple(given.shape)}, expected that of x, {tuple(x.shape)}"
            field = guide(lambda point, now: velocity, previous, 1, RTCConfig(), PI, execution_horizon=4)
            wanted = field(x, torch.tensor([time]))
            if torch.allclose(given, wanted, rtol=1e-3, atol=1e-4):
                continue
            if not torch.allclose(given[:, -1], velocity[:, -1], atol=1e-4):
                return f"at time {time:g} it bends the last action, which is free: held is 0 there"
            if time == 1.0:
                return "at time 1, where the formula divides by zero, the pull is 10 times the error"
            if torch.allclose(given, 2 * velocity - wanted, rtol=1e-3, atol=1e-4):
                return "it pushes away: noise is at time 1 here, so the velocity points from action to noise"
            return (
                f"at time {time:g} the first action's velocity is {given[0, 0, 0]:.2f}, expected "
                f"{wanted[0, 0, 0]:.2f}: the foreseen chunk is x - time · velocity, the weight "
                "min(10, (time² + (1 - time)²) / (time (1 - time)))"
            )
        return None

    verdict(complaint)


def check_state_once(state_once: Callable[[PI0, dict[str, Tensor], Tensor], Tensor]) -> None:
    """Check `state_once(policy, batch, noise)`: the chunk (B, H, A) that `policy.predict_action_chunk(batch,
    noise=noise)` gives, for which the expert runs on the state once, and on the H actions alone in each step.
    """

    def complaint() -> str | None:
        policy, batch = _small()
        noise = torch.randn(2, HORIZON, policy.config.max_action_dim, generator=_dice(1))
        wanted = policy.predict_action_chunk(batch, noise=noise)
        counts: list[dict[str, int]] = []

        def count(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            tokens = given[0] if given else named["tokens"]
            counts.append({name: x.shape[1] for name, x in tokens.items()})

        watch = policy.paligemma.decoder.register_forward_pre_hook(count, with_kwargs=True)
        try:
            with torch.no_grad():
                given = state_once(policy, batch, noise)
        finally:
            watch.remove()
        if tuple(given.shape) != tuple(wanted.shape):
            return f"it returns shape {tuple(given.shape)}, expected {tuple(wanted.shape)}"
        if not torch.allclose(given, wanted, rtol=1e-3, atol=1e-4):
            off = float((given - wanted).abs().max())
            return (
                f"the chunk is another one, by up to {off:.2f}: is every position and mask row still right?"
            )
        ran = [run.get("suffix", 0) for run in counts]
        most = 1 + policy.config.num_inference_steps * HORIZON
        if sum(ran) > most:
            return f"right, but the expert ran on {sum(ran)} tokens, {ran}; expected {most}: the state once"
        return None

    verdict(complaint)


def _dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _small() -> tuple[PI0, dict[str, Any]]:
    """A π0 of random weights, and two samples for it, one with a shorter prompt."""
    camera, stream = "observation.images.table", {"layers": 2, "mlp": 32, "heads": 2, "head_dim": 8}
    config = PI0Config(
        input_features={
            camera: PolicyFeature(FeatureType.VISUAL, (3, 16, 16)),
            "observation.state": PolicyFeature(FeatureType.STATE, (3,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (3,))},
        chunk_size=HORIZON, n_action_steps=HORIZON, num_inference_steps=STEPS, max_state_dim=3,
        max_action_dim=3, image_resolution=(16, 16), compact_vision=True, vocab_size=20,
        vision_size={"width": 16, "image_size": 16},
        language_size=stream | {"width": 24}, expert_size=stream | {"width": 16},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = PI0(config).eval()
        for parameter in policy.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    real = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    return policy, {
        camera: torch.rand(2, 3, 16, 16, generator=_dice(2)),
        "observation.state": torch.randn(2, 3, generator=_dice(3)),
        "observation.language.tokens": torch.randint(20, (2, 6), generator=_dice(4)),
        "observation.language.attention_mask": real,
    }
