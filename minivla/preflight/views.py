"""Is this picture the right way round, and from the right camera? Told by frames taken in a like state.

A frame is compared with the recorded frames whose states are nearest to its own: as it is, turned over in
several ways, and against the other cameras' frames. Objects lie elsewhere in every episode, so one frame
proves something only if it is (almost) among the recorded ones; several frames prove it together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

COLOURS = "with red and blue exchanged"  # as OpenCV reads them
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "upside down": lambda picture: picture.flip(-2),
    "mirrored": lambda picture: picture.flip(-1),
    "turned by 180 degrees": lambda picture: picture.flip(-2).flip(-1),
    "a quarter turned to the right": lambda picture: picture.rot90(1, (-2, -1)),
    "a quarter turned to the left": lambda picture: picture.rot90(-1, (-2, -1)),
    "with rows and columns exchanged": lambda picture: picture.transpose(-2, -1),
    COLOURS: lambda picture: picture.flip(-3),
    "with red and green exchanged": lambda picture: picture[..., [1, 0, 2], :, :],
    "with green and blue exchanged": lambda picture: picture[..., [0, 2, 1], :, :],
}

NEAREST = 8
SAME_FRAME = 15.0  # times nearer: the very frame. One clean frame in six thousand reached 8.
TOGETHER = 1.5  # times nearer on average, over several frames. Eight clean ones reached 1.25.
SEVERAL = 4
AGREE = 0.75  # of the frames must say the same


def distance(pictures: Tensor, reference: Tensor) -> Tensor:
    """Of each picture (B, 3, H, W) to the nearest of its references (B, K, 3, H, W): mean square, (B,)."""
    return (pictures[:, None] - reference).square().flatten(2).mean(2).amin(1)


def verdict(plain: Tensor, other: Tensor) -> bool | None:
    """Whether `other` explains the pictures and `plain` does not; both (B,) distances. None: cannot tell."""
    ratio = plain / other.clamp(min=1e-9)
    if bool((ratio > SAME_FRAME).float().mean() > 0.5):
        return True
    if bool((ratio < 1 / SAME_FRAME).float().mean() > 0.5):
        return False
    if len(ratio) < SEVERAL:
        return None
    together = float(plain.mean() / other.mean().clamp(min=1e-9))
    for guilty, much, share in ((True, together, ratio > 1), (False, 1 / max(together, 1e-9), ratio < 1)):
        if much > TOGETHER and float(share.float().mean()) >= AGREE:
            return guilty
    return None


def turned(pictures: Tensor, reference: Tensor) -> tuple[str | None, bool]:
    """How the pictures (B, 3, H, W) are turned against their references, and whether that could be told."""
    plain = distance(pictures, reference)
    others = {name: turn(pictures) for name, turn in TRANSFORMS.items()}
    found = {
        name: distance(other, reference) for name, other in others.items() if other.shape == pictures.shape
    }
    verdicts = {name: verdict(plain, other) for name, other in found.items()}
    guilty = [name for name, said in verdicts.items() if said]
    if guilty:
        return min(guilty, key=lambda name: float(found[name].mean())), True
    return None, all(said is not None for said in verdicts.values())


def nearest(
    states: Tensor, recorded: Tensor, count: int = NEAREST, *, without: Tensor | None = None
) -> Tensor:
    """For each state (B, S) the `count` recorded ones (N, S) most like it: positions (B, count).

    `without` (B, N) is True where a recorded one must not be taken.
    """
    scale = recorded.std(0).clamp(min=1e-6)
    gaps = torch.cdist(states / scale, recorded / scale)
    if without is not None:
        gaps = gaps.masked_fill(without, torch.inf)
    return gaps.topk(min(count, len(recorded)), largest=False).indices
