"""Diffusion Policy beside LeRobot's: a chunk at equal steps, a training step, the memory of one.

Two sizes: that of `lerobot/diffusion_pusht` (one 96 × 96 camera cropped to 84 × 84, 16 actions, a U-Net of
512, 1024 and 2048 channels), and one near the shipped checkpoint's (two 64 × 64 cameras, a U-Net of 64 and
128 channels; the ResNet stays, LeRobot has no smaller eye). Both sample in 10 steps.

What dominates: at the published size the U-Net's weights, a quarter of a billion, which each step reads once
for one short chunk; that is a matter of memory, not of arithmetic. Ours multiplies them as they lie, torch's
convolution lays them out anew at each call. At the small size the ResNet, which is the same on both sides.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from benchmarks import anatomy
from benchmarks.pairs import (
    Call,
    Size,
    chunk_race,
    make_batch,
    make_ours,
    make_pair,
    make_theirs,
    memory_race,
    observation,
    training_race,
)
from benchmarks.timing import Row

COMMON = {
    "horizon": 16,
    "n_action_steps": 8,
    "use_group_norm": True,
    "use_separate_rgb_encoder_per_camera": False,
    "num_inference_steps": 10,
}
SMALL_UNET = {"down_dims": (64, 128), "diffusion_step_embed_dim": 64}
SMALL = Size("small", 2, (3, 64, 64), 3, 3, COMMON | SMALL_UNET)
PUBLISHED = Size("published size", 1, (3, 96, 96), 2, 2, COMMON | {"crop_shape": (84, 84)})
SIZES = {size.name: size for size in (SMALL, PUBLISHED)}
SAMPLES = {"small": 8, "published size": 4}


def make(who: str, size: str) -> Any:
    """One of the two, ready to be trained."""
    return (make_ours if who == "ours" else make_theirs)("diffusion", SIZES[size])


def chunks(both: tuple[Any, Any]) -> dict[str, Call]:
    """What makes a chunk, ours and LeRobot's."""
    ours, theirs = both
    theirs.eval()
    seen = observation(make_batch(ours, 1))
    return {
        "minivla": lambda: ours.predict_action_chunk(seen),
        "LeRobot": lambda: theirs.predict_action_chunk(seen),
    }


@lru_cache(maxsize=1)
def pair(size: str, sampler: str = "DDIM") -> tuple[Any, Any]:
    """Both, on one set of tensors. The last one is kept: a published size takes half a minute to be made."""
    return make_pair("diffusion", SIZES[size], noise_scheduler_type=sampler)


def latency(size: str, sampler: str, rounds: int, warmup: int = 2) -> list[Row]:
    """One chunk, 10 steps."""
    calls = chunks(pair(size, sampler)).values()
    what = f"Diffusion Policy {size}, {sampler} in 10 steps"
    return chunk_race(what, *calls, rounds=rounds, warmup=warmup)


def training(size: str, rounds: int, **options: Any) -> list[Row]:
    """One optimiser step; `options` of `training_race`."""
    return training_race(f"Diffusion Policy {size}", pair(size), SAMPLES[size], rounds=rounds, **options)


def memory(size: str, rounds: int) -> Row:
    """The peak of a training step."""
    what = f"Diffusion Policy {size}"
    return memory_race(what, "benchmarks.diffusion", size, SAMPLES[size], rounds=rounds)


def where(size: str, rounds: int) -> str:
    """Where the time goes."""
    both = pair(size)
    ours = both[0]
    parts = {"image encoder": ours.rgb_encoder, "U-Net": ours.unet}
    title, batch = f"Diffusion Policy, {size}, DDIM in 10 steps", make_batch(ours, SAMPLES[size])
    return anatomy.describe(title, ours, parts, chunks(both), batch, rounds=rounds)


def rows() -> list[Row]:
    """All of Diffusion Policy's rows."""
    return [
        *latency("small", "DDPM", 20),
        *latency("small", "DDIM", 20),
        *training("small", 8),
        memory(PUBLISHED.name, 2),
        *latency(PUBLISHED.name, "DDIM", 4, warmup=1),
        *training(PUBLISHED.name, 4, warmup=1, counts=(None,)),
    ]


def notes() -> list[str]:
    """Where the time goes, at both sizes."""
    return [where(PUBLISHED.name, 2), where("small", 5)]
